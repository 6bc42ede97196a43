"""Keys and values of a batch whose rows begin and end at different times, as a cache of transformers.

Every row begins at place 0 and has a length of its own, so what a row reads never depends on the rows beside it. The
memory is reserved in steps of STEP places; a forward sees as many of these as the longest row needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

STEP = 64
"""Attention over another number of places sums in another order, unless both are multiples of this."""


class RowCache:
    """A key-value cache with `rows` rows. A forward either fills one row from its beginning, or adds one token to each
    of the first `count` rows.
    """

    def __init__(self, rows: int) -> None:
        from transformers.cache_utils import Cache, CacheLayerMixin

        CacheLayerMixin.register(_Layer)
        self.rows = rows
        self.lengths = [0] * rows
        self._filling: int | None = 0
        self._count = 0
        self.seen = 0
        """How many places a step sees: the longest row with its new token, rounded up to a multiple of STEP."""
        self.places = self.step_rows = torch.empty(0, dtype=torch.long)
        """(count,): where the new tokens of a step go, which is also their position; and the rows that they go to."""
        self.moves = 0
        """How often more memory was reserved, elsewhere."""
        # By a weak reference: a circle would keep all this memory until Python looks for circles.
        self.layers = Cache(layer_class_to_replicate=partial(_Layer, weakref.proxy(self)))  # type: ignore[arg-type]

    def begin_fill(self, row: int, most: int = 0) -> None:
        """The next forward has one row, which becomes row `row`; how long it will be does not matter here."""
        self._filling, self.lengths[row] = row, 0

    def begin_step(self, count: int, device: torch.device) -> None:
        """The next forward adds a token to each of the first `count` rows."""
        self._filling, self._count = None, count
        self.places = torch.tensor(self.lengths[:count], device=device)
        self.step_rows = torch.arange(count, device=device)
        self.seen = -(-(max(self.lengths[:count], default=0) + 1) // STEP) * STEP

    def end(self, tokens: int) -> None:
        """The forward is done, and gave each of its rows so many tokens."""
        if self._filling is not None:
            self.lengths[self._filling] = tokens
        else:
            for row in range(self._count):
                self.lengths[row] += tokens

    def move(self, source: int, target: int) -> None:
        """Put row `source` into the place of row `target`."""
        length = self.lengths[source]
        layers: Any = self.layers.layers
        with torch.inference_mode():
            for layer in layers:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]
        self.lengths[target] = length

    def clear(self, row: int) -> None:
        """Forget a row that may not be finite: a place that is masked counts 0 times what it holds."""
        layers: Any = self.layers.layers
        with torch.inference_mode():
            for layer in layers:
                if layer.keys is not None and layer.values is not None:
                    layer.keys[row], layer.values[row] = 0, 0

    def padding_mask(self, device: torch.device) -> Tensor:
        """(count, seen): 1 where a row of a step has a token, the new one included."""
        return (torch.arange(self.seen, device=device) <= self.places[:, None]).long()

    @property
    def filling(self) -> int | None:
        return self._filling


class _Layer:
    """One layer's keys and values (rows, heads, places, dim), with what transformers asks of a cache layer."""

    is_compileable = False
    is_croppable = False
    is_sliding = False  # a window, where the model has one, is in the mask

    def __init__(self, owner: RowCache) -> None:
        self._owner = owner
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        owner = self._owner
        if owner.filling is not None:
            length = key_states.shape[2]
            keys, values = self._reserve(key_states, value_states, length)
            keys[owner.filling, :, :length] = key_states[0]
            values[owner.filling, :, :length] = value_states[0]
            return key_states, value_states
        count, seen = key_states.shape[0], owner.seen
        keys, values = self._reserve(key_states, value_states, seen)
        keys[owner.step_rows, :, owner.places] = key_states[:, :, 0]
        values[owner.step_rows, :, owner.places] = value_states[:, :, 0]
        return keys[:count, :, :seen], values[:count, :, :seen]

    def _reserve(self, key_states: Tensor, value_states: Tensor, places: int) -> tuple[Tensor, Tensor]:
        keys = _reserved(self.keys, self._owner.rows, key_states, places)
        values = _reserved(self.values, self._owner.rows, value_states, places)
        self._owner.moves += keys is not self.keys
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self._owner.filling is not None else self._owner.seen - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self._owner.filling is not None else self._owner.seen), 0

    def get_max_length(self) -> int:
        return -1


def _reserved(have: Tensor | None, rows: int, like: Tensor, places: int) -> Tensor:
    """`have` with room for so many places: zeros, since a masked place must not hold a NaN."""
    if have is not None and have.shape[2] >= places:
        return have
    wanted = max(places, 2 * have.shape[2] if have is not None else 0)
    grown = like.new_zeros((rows, like.shape[1], -(-wanted // STEP) * STEP, like.shape[3]))
    if have is not None:
        grown[:, :, : have.shape[2]] = have
    return grown


def step_mask(
    cache: RowCache, config: Any, device: torch.device, dtype: torch.dtype, *, whole: bool = False
) -> Tensor | dict[str, Tensor]:
    """What a step gives the model as attention_mask: (count, seen), or where the model has a sliding window, whose
    place in a row transformers would take from the longest row, the masks of its layer types as generate makes them.

    whole: always the masks as attention takes them, (count, 1, 1, seen), at which transformers does not look.
    """
    padding = cache.padding_mask(device)
    windows = sliding_window(config)
    if not whole and (windows is None or windows.size >= cache.seen):
        return padding
    full = padding.bool()
    shaped = {"full_attention": full[:, None, None]}
    if windows is not None:
        recent = torch.arange(cache.seen, device=device) > cache.places[:, None] - windows.size
        shaped["sliding_attention"] = (full & recent)[:, None, None]
    if getattr(config, "_attn_implementation", None) == "eager":
        lowest = torch.finfo(dtype).min
        shaped = {kind: torch.where(mask, 0.0, lowest).to(dtype) for kind, mask in shaped.items()}
    if windows is None:
        return shaped["full_attention"]
    if windows.layer_types is None:
        return shaped["sliding_attention"]
    return {kind: shaped[kind] for kind in windows.layer_types}


@dataclass(frozen=True)
class Window:
    """size: how many places a token sees, itself included. layer_types: all that the model has; None for one of all."""

    size: int
    layer_types: Sequence[str] | None


def sliding_window(config: Any) -> Window | None:
    """The window of a text model's configuration, where any of its layers has one."""
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(size, int) or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return Window(size, None if kinds is None else sorted(set(kinds)))
