"""What a graph with adapter slots says about them, in its own metadata: enough to fill them without reading the graph.

    module.lora_A        (in, rank), or (slots, in, rank) in a graph for mixed batches
    module.lora_B        (rank, out), the scaling folded in;   (slots, rank, out)
    module.norm_scale    (out,), ones for plain LoRA;          (slots, out)
    base_sha256.<hex>    empty: its name alone keeps an adapter of another base from being fed, in every language

All are inputs with default values under which the graph is the base, or without (`SlotTable.required`) for runtimes
that cannot feed an input that has one, such as onnxruntime-node. For an embedding `in` is the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

METADATA_KEY = "dora_serve.slots"
ADAPTER_IDS = "adapter_ids"
_VERSION = 1
_GUARD = "base_sha256."


@dataclass(frozen=True)
class Slot:
    """Where an adapter can act: `y = norm_scale * (x W) + (x lora_A) lora_B`, plus the bias where there is one."""

    module: str
    kind: Literal["linear", "embedding"]
    in_features: int
    out_features: int

    @property
    def lora_A(self) -> str:
        return f"{self.module}.lora_A"

    @property
    def lora_B(self) -> str:
        return f"{self.module}.lora_B"

    @property
    def norm_scale(self) -> str:
        return f"{self.module}.norm_scale"


@dataclass(frozen=True)
class SlotTable:
    """All slots of a graph, by module.

    dtype: of the tensors, as numpy calls it. mixed: whether they carry a slot dimension and rows choose by
    `adapter_ids`. rank: of every slot where it is fixed, None where each adapter brings its own. fingerprint: of the
    graph's weights. required: whether the tensors have no default values, so
    that every run is given all of them. without: layers that an adapter could change and that have no slot.
    """

    slots: Mapping[str, Slot]
    fingerprint: str
    dtype: str = "float32"
    mixed: bool = False
    rank: int | None = None
    required: bool = False
    without: tuple[str, ...] = ()

    @property
    def guard(self) -> str:
        """The input that every adapter of this base carries and no other base has."""
        return f"{_GUARD}{self.fingerprint[:16]}"

    def to_json(self) -> str:
        return json.dumps(
            {
                "version": _VERSION,
                "mixed": self.mixed,
                "rank": self.rank,
                "required": self.required,
                "dtype": self.dtype,
                "base_sha256": self.fingerprint,
                "slots": {
                    slot.module: [slot.kind, slot.in_features, slot.out_features] for slot in self.slots.values()
                },
                "without": list(self.without),
            }
        )

    @staticmethod
    def from_json(text: str) -> SlotTable:
        """Raises ValueError for what no version of this project wrote."""
        try:
            table = json.loads(text)
            if table["version"] != _VERSION:
                raise ValueError(f"its slots are of version {table['version']}, and this program knows {_VERSION}")
            return SlotTable(
                slots={module: Slot(module, *facts) for module, facts in table["slots"].items()},
                fingerprint=str(table["base_sha256"]),
                dtype=str(table["dtype"]),
                mixed=bool(table["mixed"]),
                rank=table["rank"],
                required=bool(table["required"]),
                without=tuple(table["without"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its slots are described in a way that is not understood ({error})") from error


def guard_of(parameters: Mapping[str, object]) -> str | None:
    """The base that an adapter's tensors were made for, as `SlotTable.guard` calls it."""
    return next((name for name in parameters if name.startswith(_GUARD)), None)
