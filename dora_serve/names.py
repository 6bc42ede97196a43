"""From the name of a parameter in the running model to the tensors that hold it on disk.

An adapter carries run-time names; a checkpoint may have others: without the `model.` or `transformer.` in front
(gpt2, bert), with the language model one level elsewhere (llava), with one tensor an expert (mixtral). Names are
never matched by likeness: a rule gives exactly one tensor or none, and shapes are checked by the caller.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.runtime_names import Origin, RuntimeNames, runtime_names

# Run-time name (transformers 5) to checkpoint name, tried in order; facts of transformers/conversion_mapping.py.
_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^model\.language_model\.(?!lm_head)(.*)$"), r"language_model.model.\1"),
    (re.compile(r"^model\.language_model\.(.*)$"), r"model.\1"),
    (re.compile(r"^language_model\.model\.(.*)$"), r"model.language_model.\1"),
    (re.compile(r"^(.*)\.mlp\.(experts|gate)\.(.*)$"), r"\1.block_sparse_moe.\2.\3"),
)

# What versions of transformers put around the parts of a model that sees, in front of names and inside them.
_WRAPPERS = re.compile(r"^((language_)?model\.)+|(?<=vision_tower\.)vision_model\.")

# Per-expert names of (gate, up, down) under `experts.<e>.`, as checkpoints of the two styles store them.
_EXPERT_LEAVES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Place:
    """A stored tensor and the part of the run-time parameter that it holds, in units of the parameter's dim 0.

    start: where in the parameter the tensor's rows begin. tensor_start, tensor_parts: of which of how many equal
    parts of the tensor they are, where one tensor holds several parameters.
    """

    tensor: str
    start: int = 0
    tensor_part: int = 0
    tensor_parts: int = 1


@dataclass(frozen=True)
class ParameterNames:
    """The names of one checkpoint. `ask` gives what transformers knows; it is called only where the rules fail.

    architecture: the class that was trained, where it is not the one that the base's config.json names.
    """

    base: ShardedCheckpoint
    ask: Callable[[], RuntimeNames | None]
    architecture: str | None = None

    @staticmethod
    def of(base: ShardedCheckpoint, architecture: str | None = None) -> ParameterNames:
        return ParameterNames(base, lambda: runtime_names(base.folder, architecture), architecture)

    def find(self, parameter: str) -> tuple[Place, ...]:
        """Where a parameter lies, empty where it does not."""
        name = self._rename(parameter)
        if name is not None:
            return (Place(name),)
        origin = self._origin(parameter)
        if origin is None or not origin.groups:
            return ()
        if origin.operation in ("rename", "chunk") and len(origin.groups) == 1 and len(origin.groups[0]) == 1:
            return (Place(origin.groups[0][0], 0, origin.part, origin.parts),)
        if origin.operation == "concat" and all(len(group) == 1 for group in origin.groups):
            places, start = [], 0
            for (name,) in origin.groups:
                places.append(Place(name, start))
                start += self.base.tensors[name].shape[0]
            return tuple(places)
        return ()

    def experts(self, module: str, parameter: str) -> tuple[tuple[str, ...], ...]:
        """Stored per-expert tensors of a fused parameter: one tuple an expert, to be concatenated along dim 0."""
        for leaves in _EXPERT_LEAVES.get(parameter, ()):
            found: list[tuple[str, ...]] = []
            while True:
                names = [self._rename(f"{module}.{len(found)}.{leaf}.weight") for leaf in leaves]
                if None in names:
                    break
                found.append(tuple(name for name in names if name is not None))
            if found:
                return tuple(found)
        origin = self._origin(f"{module}.{parameter}")
        if origin is not None and origin.operation == "experts" and origin.groups:
            return tuple(zip(*origin.groups, strict=True))
        return ()

    def stored(self, parameter: str) -> str | None:
        """The tensor that is this parameter and nothing else, as far as that is known without asking transformers."""
        name = self._rename(parameter)
        if name is None and "known" in self.__dict__:
            places = self.find(parameter)
            name = places[0].tensor if len(places) == 1 and places[0].tensor_parts == 1 else None
        return name

    def nearest(self, parameter: str) -> tuple[str, ...]:
        """The stored names most like this one, for a message."""
        leaf = parameter.split(".")[-2:]
        same_leaf = [name for name in self.base.tensors if name.split(".")[-2:] == leaf]
        pool = same_leaf or list(self.base.tensors)
        return tuple(difflib.get_close_matches(parameter, pool[:5000], n=3, cutoff=0.3))

    def _rename(self, parameter: str) -> str | None:
        """The one stored tensor of this name, through the rules that need no knowledge of the model's class."""
        if parameter in self.base.tensors:
            return parameter
        for pattern, replacement in _RENAMES:
            renamed = pattern.sub(replacement, parameter)
            if renamed != parameter and renamed in self.base.tensors:
                return renamed
        ending = self._by_suffix.get(parameter, ())
        if len(ending) == 1 and not ending[0].startswith("."):
            return ending[0]
        shorter = parameter
        while "." in shorter:
            shorter = shorter.partition(".")[2]
            if "." not in shorter:
                break
            if shorter in self.base.tensors:
                return shorter
        unwrapped = self._by_unwrapped.get(_unwrap(parameter), ())
        return unwrapped[0] if len(unwrapped) == 1 else find_flat(parameter, self._by_flat_name)

    def _origin(self, parameter: str) -> Origin | None:
        """Where transformers finds it, None where that is nowhere in this base (it was asked of the folder, and a base
        with other layers than its folder's has other names)."""
        origin = self.known.origins.get(parameter) if self.known else None
        if origin is None or any(name not in self.base.tensors for group in origin.groups for name in group):
            return None
        return origin

    @cached_property
    def known(self) -> RuntimeNames | None:
        """What transformers knows of this model; None where it does not know it, or is not installed."""
        return self.ask() if self.base.config.get("architectures") or self.base.config.get("model_type") else None

    @cached_property
    def _by_flat_name(self) -> Mapping[str, str | None]:
        return flat_names(self.base.tensors)

    @cached_property
    def _by_suffix(self) -> Mapping[str, tuple[str, ...]]:
        index: dict[str, list[str]] = defaultdict(list)
        for name in self.base.tensors:
            rest = name
            while "." in rest:
                rest = rest.partition(".")[2]
                index[rest].append(name)
        return {suffix: tuple(names) for suffix, names in index.items()}

    @cached_property
    def _by_unwrapped(self) -> Mapping[str, tuple[str, ...]]:
        index: dict[str, list[str]] = defaultdict(list)
        for name in self.base.tensors:
            index[_unwrap(name)].append(name)
        return {unwrapped: tuple(names) for unwrapped, names in index.items()}


def flat_names(names: Iterable[str]) -> dict[str, str | None]:
    """From names with underscores for all dots but the last (`a_0_b.weight`) to the names; None where two share one."""
    flat: dict[str, str | None] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        key = f"{path.replace('.', '_')}.{leaf}"
        flat[key] = None if key in flat else name
    return flat


def find_flat(name: str, flat: Mapping[str, str | None]) -> str | None:
    """What a name means whose path has underscores for dots, as kohya's have, with or without what stands before it."""
    path, _, leaf = name.rpartition(".")
    component, _, path = path.rpartition(".")
    while "_" in path and "." not in component:
        if (found := flat.get(f"{path}.{leaf}")) is not None:
            return found
        path = path.partition("_")[2]
    return None


def _unwrap(name: str) -> str:
    """The name without wrappers: equal for one parameter in transformers before 4.52, before 5, and since."""
    while True:
        shorter = _WRAPPERS.sub("", name)
        if shorter == name:
            return name
        name = shorter
