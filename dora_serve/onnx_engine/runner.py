"""What the engine asks of whatever runs a graph: ONNX Runtime itself, or ONNX Runtime GenAI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from dora_serve.onnx_engine.adapters import AdapterFile
from dora_serve.onnx_engine.slots import SlotTable


class Runner(Protocol):
    """An open graph. table: of its adapter slots, None without. vocabulary: the width of its logits. context: how many
    tokens a text can have, None where the graph does not say. provider: what runs it. mixed: whether one run serves
    several adapters. closeness: see `dora_serve.engine.generation.Decoder`.

    Adapters are named by what `put` gave for them, the base by None. Calls from several threads take turns.
    """

    table: SlotTable | None
    vocabulary: int
    context: int | None
    provider: str
    mixed: bool
    closeness: float

    def put(self, file: AdapterFile) -> Any:
        """Make an adapter ready for runs."""
        ...

    def take_out(self, adapter: Any) -> None:
        """Forget an adapter that no run uses any more."""
        ...

    def new_cache(self, rows: int) -> Any:
        """A `dora_serve.engine.generation.Cache` for `forward`."""
        ...

    def forward(self, adapters: Sequence[Any], tokens: Tensor, cache: Any) -> Tensor:
        """Logits (rows, vocabulary) of the last of tokens (rows, tokens). Raises EngineError where it does not run."""
        ...

    def logits_alone(self, adapter: Any, tokens: Sequence[int]) -> Tensor:
        """The logits (vocabulary,) after a text, in float32, from a run that has nothing else in it."""
        ...
