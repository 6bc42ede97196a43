"""What a user says about the slots of an exported base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Which = Literal["layers", "all", "adapter"]


@dataclass(frozen=True)
class SlotOptions:
    """which: layers that get a slot. "layers" is every linear layer of the model's blocks, and whatever the adapter at
    hand changes besides; "all" also embeddings and heads; "adapter" only what the adapter at hand changes.
    mixed: for batches whose rows choose an adapter each. rank: fixed for all slots, None leaves it to each adapter.
    required: inputs without default values, for runtimes that cannot feed one that has them (onnxruntime-node).
    """

    which: Which = "layers"
    mixed: bool = False
    rank: int | None = None
    required: bool = False
