"""Decoding steps that are recorded once and replayed: on a GPU a step is one launch then, in place of a thousand.

A recording holds kernels and addresses, and Python is not looked at again. So all that changes between two steps lies
in tensors that stay where they are: the cache, the tokens, the places that they go to, and each row's own factors. Rows
and places are rounded up to powers of two, so that few recordings serve all steps. A shape is recorded when it comes
for the second time, and the recording's answer compared with the one that the model itself has just given.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dora_serve.engine.adapted_linear import Batch, Layers, Packed
from dora_serve.engine.cache import STEP, RowCache
from dora_serve.engine.factors import Factors, PreparedAdapter

_log = logging.getLogger(__name__)

_MOST, _MOST_BATCHES = 32, 4
"""Recordings of one cache, each of which keeps the memory of a step's intermediate results; and the batches that they
belong to, of adapters on other layers or of larger ranks, each as large as an adapter for every row."""


_RECORDING = threading.Lock()
"""CUDA allows one recording at a time in a process, and two engines may run in it."""


class Recorder(Protocol):
    """Runs a step, and returns what runs its kernels again: on the same tensors, with the same tensor for an answer."""

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]: ...


def cuda_recorder(device: torch.device) -> Recorder:
    """Recordings as CUDA graphs, which share one pool of memory: only one of them runs at a time."""
    pool: Any = None
    beside: Any = None

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        nonlocal pool, beside
        with _RECORDING, torch.cuda.device(device):
            pool, beside = pool or torch.cuda.graph_pool_handle(), beside or torch.cuda.Stream()
            before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            beside.wait_stream(before)
            try:
                # A stream of this device, and left for sure: torch.cuda.graph has one for all devices, and stays in it
                # where a recording breaks off.
                with torch.cuda.stream(beside):
                    step()  # outside of the graph first: libraries choose their kernels and make their workspaces
                    # Other threads load adapters meanwhile, which allocates memory.
                    with torch.cuda.graph(graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
                        answer = step()
            finally:
                before.wait_stream(beside)

        def replay() -> Tensor:
            graph.replay()
            return answer

        return replay

    return record


class FixedCache(RowCache):
    """A cache for recorded steps. rows: a power of two."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__(rows)
        with torch.inference_mode():  # as they are written to, whatever mode the caller is in then
            self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
            self._all_places = torch.zeros(rows, dtype=torch.long, device=device)
            self._all_rows = torch.arange(rows, device=device)

    def fix(self, tokens: Tensor) -> None:
        """Make the step that was begun one of as many rows and places as a recorded one has.

        tokens (count, 1). A row that is added writes to its first place, where nothing is yet.
        """
        count = len(tokens)
        rows = power_of_two(count)
        self.tokens[:count] = tokens
        self._all_places[:count] = self.places
        self._all_places[count:] = 0
        self.places, self.step_rows = self._all_places[:rows], self._all_rows[:rows]
        self.seen = STEP * power_of_two(self.seen // STEP)


def power_of_two(least: int) -> int:
    """The smallest that is not less."""
    return 1 << (least - 1).bit_length()


_LayerKind = tuple[str, bool, bool]
"""Its name, and whether it has a norm scale and a bias."""


@dataclass(frozen=True)
class _Kind:
    """Of a batch, what its tensors are allocated by. rank: of all its factors."""

    rank: int
    layers: tuple[_LayerKind, ...]


class FixedBatch:
    """Each row's own factors, on the layers that any of them has, in tensors that stay where they are."""

    def __init__(self, rows: int, kind: _Kind, like: Mapping[str, Factors]) -> None:
        self._held: list[Callable[[], PreparedAdapter | None]] = [_no_adapter] * rows
        self._packed: dict[str, Packed] = {}
        for name, has_scale, has_bias in kind.layers:
            lora_a, lora_b = like[name].lora_A, like[name].lora_B
            depth, width = lora_a.shape[1], lora_b.shape[1]
            self._packed[name] = Packed(
                lora_A=lora_a.new_zeros((rows, kind.rank, depth)),
                lora_B=lora_b.new_zeros((rows, kind.rank, width)),
                chosen=None,
                norm_scale=lora_b.new_ones((rows, 1, width)) if has_scale else None,
                bias=lora_b.new_zeros((rows, 1, width)) if has_bias else None,
            )

    def put(self, rows: Sequence[PreparedAdapter | None]) -> None:
        """The first rows have these adapters. What a row has already is left alone."""
        for row, adapter in enumerate(rows):
            held = self._held[row]
            if held is _no_adapter if adapter is None else held() is adapter:
                continue
            self._held[row] = _half_written  # should Ctrl-C come now
            for name, packed in self._packed.items():
                _put_row(packed, row, None if adapter is None else adapter.modules.get(name))
            self._held[row] = _no_adapter if adapter is None else weakref.ref(adapter)

    def first(self, rows: int) -> Layers | None:
        """Those of the first rows, None where there is nothing to add."""
        return _FirstRows(self._packed, rows) if self._packed else None


@dataclass(frozen=True)
class _FirstRows:
    packed: Mapping[str, Packed]
    rows: int

    def of(self, layer: str, *, embeds: bool = False) -> Packed | None:
        found = self.packed.get(layer)
        if found is None:
            return None
        scale, bias = found.norm_scale, found.bias
        return Packed(
            lora_A=found.lora_A[: self.rows],
            lora_B=found.lora_B[: self.rows],
            chosen=None,
            norm_scale=None if scale is None else scale[: self.rows],
            bias=None if bias is None else bias[: self.rows],
        )


def _no_adapter() -> None:
    """What a row holds that is the base's."""


def _half_written() -> None:
    """What a row holds that is neither an adapter nor the base."""


def _put_row(packed: Packed, row: int, factors: Factors | None) -> None:
    rank = 0 if factors is None else len(factors.lora_A)
    if factors is not None:
        packed.lora_A[row, :rank], packed.lora_B[row, :rank] = factors.lora_A, factors.lora_B
    packed.lora_A[row, rank:], packed.lora_B[row, rank:] = 0, 0
    if packed.norm_scale is not None:
        scale = None if factors is None else factors.norm_scale
        packed.norm_scale[row, 0] = 1 if scale is None else scale
    if packed.bias is not None:
        bias = None if factors is None else factors.bias
        packed.bias[row, 0] = 0 if bias is None else bias


_Shape = tuple[_Kind, int, int]
"""And how many rows and places."""


@dataclass
class _Known:
    """Of one cache. moves: how often its memory had moved when these were made. Used last is last."""

    moves: int
    batches: OrderedDict[_Kind, FixedBatch] = field(default_factory=OrderedDict)
    seen: set[_Shape] = field(default_factory=set)
    replays: OrderedDict[_Shape, Callable[[], Tensor]] = field(default_factory=OrderedDict)

    def trim(self) -> None:
        while len(self.batches) > _MOST_BATCHES:
            self.batches.popitem(last=False)
        for shape in [shape for shape in self.replays if shape[0] not in self.batches]:
            del self.replays[shape]
        while len(self.replays) > _MOST:
            self.replays.popitem(last=False)


class StepGraphs:
    """run: the model's logits (rows, vocabulary) of the step that a cache has begun, for a batch and tokens (rows, 1).
    embeddings: the layers that look their input up; adapters on these are not recorded. close_enough: how far logits
    may be from each other by rounding alone, over their spread.

    why_not: what keeps steps from being recorded, None while nothing does. replayed: how many steps were. Not safe to
    use from several threads.
    """

    def __init__(
        self,
        record: Recorder,
        run: Callable[[Layers | None, Tensor, FixedCache], Tensor],
        *,
        embeddings: Collection[str],
        close_enough: float,
    ) -> None:
        self._record, self._run = record, run
        self._embeddings, self._close_enough = frozenset(embeddings), close_enough
        self._known: weakref.WeakKeyDictionary[FixedCache, _Known] = weakref.WeakKeyDictionary()
        self._kinds: weakref.WeakKeyDictionary[Batch, _Kind | None] = weakref.WeakKeyDictionary()
        self.why_not: str | None = None
        self.replayed = 0

    @torch.inference_mode()
    def forward(self, batch: Batch, tokens: Tensor, cache: FixedCache, plain: Callable[[], Tensor]) -> Tensor:
        """The logits (count, vocabulary) of a step. plain: the model's own answer."""
        if self.why_not is not None:
            return plain()
        rows = batch.rows
        if batch not in self._kinds:  # it is the same object until the rows change
            found = _kind_of(rows)
            self._kinds[batch] = None if any(name in self._embeddings for name, *_ in found.layers) else found
        kind = self._kinds[batch]
        if kind is None:
            return plain()
        known = self._known.get(cache)
        if known is None or known.moves != cache.moves:
            self._known[cache] = known = _Known(cache.moves)
        shape = (kind, power_of_two(len(rows)), STEP * power_of_two(cache.seen // STEP))
        replay = known.replays.get(shape)
        if replay is not None:
            known.replays.move_to_end(shape)
            known.batches.move_to_end(kind)
            known.batches[kind].put(rows)
            cache.fix(tokens)
            self.replayed += 1
            return replay()[: len(rows)].clone()
        answer = plain()
        if shape in known.seen:
            self.why_not = self._take(known, shape, rows, tokens, cache, answer)
            if self.why_not is not None:
                _log.warning("Decoding goes on without recorded steps: %s.", self.why_not)
                self._known.clear()
                cache.begin_step(len(rows), tokens.device)  # what was recorded may have left other keys and values
                answer = plain()
        elif known.moves == cache.moves:
            known.seen.add(shape)
        return answer

    def _take(
        self,
        known: _Known,
        shape: _Shape,
        rows: Sequence[PreparedAdapter | None],
        tokens: Tensor,
        cache: FixedCache,
        answer: Tensor,
    ) -> str | None:
        """Record a step that was just done, which does the same once more, and compare. What is wrong, None if all is
        well."""
        kind, count, _ = shape
        try:
            batch = known.batches.get(kind) or _new_batch(cache.rows, kind, rows)
            batch.put(rows)
            cache.fix(tokens)
            replay = self._record(lambda: self._run(batch.first(count), cache.tokens[:count], cache))
            distance = _distance(replay()[: len(rows)], answer)
        except Exception as error:  # whatever a model does that cannot be recorded
            return f"a step cannot be recorded: {type(error).__name__}: {error}"
        if not distance <= self._close_enough:
            return f"a recorded step gives other logits than the model, by {distance:.2g} of their spread"
        if cache.moves == known.moves:  # else it has more places now: it is recorded the next time
            known.batches[kind], known.replays[shape] = batch, replay
            known.batches.move_to_end(kind)
            known.trim()
        return None


def _kind_of(rows: Sequence[PreparedAdapter | None]) -> _Kind:
    layers: dict[str, tuple[bool, bool]] = {}
    rank = _LEAST_RANK
    for adapter in {adapter for adapter in rows if adapter is not None}:
        for name, one in adapter.modules.items():
            scale, bias = layers.get(name, (False, False))
            layers[name] = (scale or one.norm_scale is not None, bias or one.bias is not None)
            rank = max(rank, len(one.lora_A))
    return _Kind(power_of_two(rank), tuple((name, *has) for name, has in sorted(layers.items())))


_LEAST_RANK = 16


def _new_batch(count: int, kind: _Kind, rows: Sequence[PreparedAdapter | None]) -> FixedBatch:
    given = {name: one for adapter in rows if adapter is not None for name, one in adapter.modules.items()}
    return FixedBatch(count, kind, given)


def _distance(one: Tensor, other: Tensor) -> float:
    """The root mean square of the difference over the spread of `other`; 0 where both are nowhere finite alike."""
    finite = torch.isfinite(other)
    if not torch.equal(finite, torch.isfinite(one)):
        return math.inf
    one, other = one[finite].double(), other[finite].double()
    if not other.numel():
        return 0.0
    spread = float((other - other.mean()).square().mean().sqrt())
    return float((one - other).square().mean().sqrt()) / spread if spread else float(not torch.equal(one, other))
