"""From the module names that an adapter carries to those of a running model.

They are found as they stand, as the only ending, without the base model's prefix, or as transformers renames and fuses
them when it loads a checkpoint (transformers/conversion_mapping.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dora_serve.names import find_flat, flat_names


@dataclass(frozen=True)
class FusedPart:
    """Which part of a fused parameter a former module is: expert `expert`, the `part`-th of `parts` along dim 1."""

    owner: str
    leaf: str
    expert: int
    part: int
    parts: int

    def part_of(self, parameter: Tensor | None) -> Tensor:
        assert parameter is not None
        return parameter[self.expert].chunk(self.parts, dim=0)[self.part]


class ModuleNames:
    """From the adapter's names to the model's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._flat: dict[str, str | None] | None = None
        self._mapping: tuple[list[Any], list[Any]] | None = None
        self._state: dict[str, Tensor] = {}

    def find(self, name: str) -> str | None:
        """The run-time name of a module, or None."""
        name = name.replace(".base_layer", "")
        if name in self.modules:
            return name
        endings = [candidate for candidate in self.modules if candidate.endswith(f".{name}")]
        if len(endings) == 1:
            return endings[0]
        prefix = getattr(self.model, "base_model_prefix", "")
        if prefix and name.startswith(f"{prefix}.") and name.removeprefix(f"{prefix}.") in self.modules:
            return name.removeprefix(f"{prefix}.")
        renamed, pattern = self._rename(f"{name}.weight")
        module = renamed.rpartition(".")[0]
        if pattern is None and module in self.modules:
            return module
        if self._flat is None:
            self._flat = flat_names(f"{module}.weight" for module in self.modules)
        flat = find_flat(f"{name}.weight", self._flat)
        return flat.removesuffix(".weight") if flat else None

    def fused(self, name: str) -> FusedPart | None:
        """Where transformers puts the weight of a module that it fuses with its siblings; None where it does not."""
        renamed, pattern = self._rename(f"{name}.weight")
        owner, _, leaf = renamed.rpartition(".")
        converter = next((one for one in self._conversions()[1] if pattern in one.source_patterns), None)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if converter is None or expert is None or owner not in self.modules:
            return None
        if getattr(self.modules[owner], leaf, None) is None:
            return None
        operations = [(type(one).__name__, getattr(one, "dim", None)) for one in converter.operations]
        if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            return None
        sources = list(converter.source_patterns)
        return FusedPart(owner, leaf, int(expert[1]), sources.index(pattern), len(sources))

    def nearest(self, name: str) -> list[str]:
        import difflib

        leaf = name.rpartition(".")[2]
        same = [candidate for candidate in self.modules if candidate.rpartition(".")[2] == leaf]
        return difflib.get_close_matches(name, same or list(self.modules)[:5000], n=3, cutoff=0.3)

    def _rename(self, parameter: str) -> tuple[str, str | None]:
        """transformers' own renaming of a stored name, and the pattern of the fusion it takes part in, if any."""
        renamings, converters = self._conversions()
        if not renamings and not converters:
            return parameter, None
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self.model, "base_model_prefix", "")
        renamed, pattern = rename_source_key(parameter, renamings, converters, prefix, self._state)
        return str(renamed), pattern

    def _conversions(self) -> tuple[list[Any], list[Any]]:
        if self._mapping is None:
            self._mapping, self._state = ([], []), self.model.state_dict()
            if hasattr(self.model, "config") and hasattr(self.model, "base_model_prefix"):
                from transformers.conversion_mapping import get_model_conversion_mapping
                from transformers.core_model_loading import WeightConverter

                model: Any = self.model
                for transform in get_model_conversion_mapping(model) or []:
                    self._mapping[isinstance(transform, WeightConverter)].append(transform)
        return self._mapping


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a Linear whose weight is (in, out), told without importing it."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
