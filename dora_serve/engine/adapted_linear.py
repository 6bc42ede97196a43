"""A layer of the base that adds each row's own adapter: `norm_scale * (W x + s B (A x)) + bias`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dora_serve.engine.base_layers import keep_unpacked, lookup, without_bias
from dora_serve.engine.factors import Factors, PreparedAdapter
from dora_serve.errors import EngineError
from dora_serve.ops import adapted_linear


@dataclass(frozen=True)
class Packed:
    """The factors of a batch on one layer, as `ops.adapted_linear` takes them; None where one would say nothing.

    lora_A (R, in), lora_B (R, out), chosen (rows, 1, R): those of all its adapters, one below the other. Or each row's
    own, lora_A (rows, r, in), lora_B (rows, r, out). norm_scale and bias (rows, 1, out).
    """

    lora_A: Tensor
    lora_B: Tensor
    chosen: Tensor | None
    norm_scale: Tensor | None
    bias: Tensor | None


_ROUND_RANK = 16


class Layers(Protocol):
    """The factors of a batch, by layer."""

    def of(self, layer: str, *, embeds: bool = False) -> Packed | None:
        """None where no row has an adapter on the layer. embeds: whether that looks its input up."""
        ...


class Batch:
    """Which adapter each row of a forward has. Factors are packed layer by layer, once, when a forward first asks.

    Made anew when the rows change, which is when requests start and end, not at every token. slots: (rows,) the place
    of each row's adapter in `adapters`, -1 for the base.
    """

    def __init__(self, rows: tuple[PreparedAdapter | None, ...], *, by_row: bool = False) -> None:
        self.rows, self._by_row = rows, by_row
        self.adapters = tuple(dict.fromkeys(adapter for adapter in rows if adapter is not None))
        places = {adapter: place for place, adapter in enumerate(self.adapters)}
        self.slots = torch.tensor([-1 if adapter is None else places[adapter] for adapter in rows])
        self._packed: dict[str, Packed | None] = {}

    def of(self, layer: str, *, embeds: bool = False) -> Packed | None:
        """As Layers has it."""
        if layer not in self._packed:
            self._packed[layer] = self._pack(layer, embeds)
        return self._packed[layer]

    def _pack(self, layer: str, embeds: bool) -> Packed | None:
        factors = [adapter.modules.get(layer) for adapter in self.adapters]
        present = [(place, one) for place, one in enumerate(factors) if one is not None]
        if not present:
            return None
        first = present[0][1]
        slots = self.slots.to(first.lora_A.device)
        ranks = [len(one.lora_A) for _, one in present]
        shared: dict[str, Any] = {
            "norm_scale": _by_row(factors, slots, first, "norm_scale", 1.0),
            "bias": _by_row(factors, slots, first, "bias", 0.0),
        }
        # All ranks for all rows cost about twice as much a number as each row's own, but are fewer numbers to read.
        mixed = 2 * sum(ranks) > len(self.rows) * max(ranks) and len(present) > 1
        if (mixed or self._by_row) and not embeds:
            own = [None if slot < 0 else factors[slot] for slot in self.slots.tolist()]
            # Zeros up to a round rank: kernels that sum in steps then take the same ones whatever the other ranks are.
            rank = -(-max(ranks) // _ROUND_RANK) * _ROUND_RANK if self._by_row else max(ranks)
            return Packed(_stacked(own, "lora_A", rank), _stacked(own, "lora_B", rank), None, **shared)
        owners = torch.tensor([place for place, one in present for _ in one.lora_A], device=slots.device)
        alike = len(present) == 1 and bool((slots == present[0][0]).all())
        return Packed(
            lora_A=first.lora_A if len(present) == 1 else torch.cat([one.lora_A for _, one in present]),
            lora_B=first.lora_B if len(present) == 1 else torch.cat([one.lora_B for _, one in present]),
            chosen=None if alike else (owners == slots[:, None])[:, None],
            **shared,
        )


def _stacked(own: Sequence[Factors | None], field: str, rank: int) -> Tensor:
    """(rows, rank, width): each row's own factor, with zeros below it where its rank is smaller or it has none."""
    given = [None if one is None else getattr(one, field) for one in own]
    like = next(tensor for tensor in given if tensor is not None)
    stack: Tensor = like.new_zeros((len(given), rank, like.shape[1]))
    for row, tensor in enumerate(given):
        if tensor is not None:
            stack[row, : len(tensor)] = tensor
    return stack


def _by_row(factors: list[Factors | None], slots: Tensor, like: Factors, field: str, neutral: float) -> Tensor | None:
    """(rows, 1, out): the vector of each row's adapter, `neutral` for rows without; None where no adapter has one."""
    vectors = [getattr(one, field, None) for one in factors]
    if all(vector is None for vector in vectors):
        return None
    plain = like.lora_B.new_full((like.lora_B.shape[1],), neutral)
    table = torch.stack([plain if vector is None else vector for vector in vectors] + [plain])
    return table[slots][:, None]


@dataclass
class BatchOfNow:
    """What the layers of one model look at while a forward runs. batch: None when only the base is wanted; shape:
    (rows, tokens) of the forward.
    """

    batch: Layers | None = None
    shape: tuple[int, int] = (0, 0)


class AdaptedLinear(nn.Module):
    """A Linear, Conv1D, Embedding or bitsandbytes layer in the place of the base's own, which it holds as `base`.

    Without an adapter on it in the batch of now it is that layer, bit for bit. Its input has the batch's rows first,
    or all their tokens one after the other, as routers of experts are given them.
    """

    def __init__(self, base: nn.Module, name: str, now: BatchOfNow) -> None:
        super().__init__()
        keep_unpacked(base)
        self.base = base
        # A module's own attributes are found faster than its submodules, and this is asked a thousand times a second.
        self._layer, self._bias = (base,), (getattr(base, "bias", None),)
        self._name, self._now, self._embeds = name, now, isinstance(base, nn.Embedding)
        self._without_bias = without_bias(base)

    @property
    def weight(self) -> Any:
        """The base layer's own, for code that looks at a layer's weight: its dtype, its device, a tie."""
        return self._layer[0].weight

    @property
    def bias(self) -> Any:
        return self._bias[0]

    def forward(self, x: Tensor) -> Tensor:
        now = self._now
        packed = None if now.batch is None else now.batch.of(self._name, embeds=self._embeds)
        if packed is None:
            return self._layer[0](x)  # type: ignore[no-any-return]
        leading = x.shape if self._embeds else x.shape[:-1]
        rows, tokens = now.shape
        if len(leading) == 2 and leading[0] == rows:  # a head may be given the last tokens alone
            return self._adapted(x, packed)
        if leading == (rows * tokens,):
            return self._adapted(x.view(rows, tokens, *x.shape[1:]), packed).flatten(0, 1)
        if len(leading) == 3 and leading[:2] == (rows, 1):  # MiniCPM3's latents, of all that is in the cache
            return self._adapted(x[:, 0], packed)[:, None]
        raise EngineError(
            f"The layer {self._name} is given {list(leading)} tokens, and the batch has {list(now.shape)}: which row "
            "each of them belongs to cannot be told.",
            remedy="Merge the adapter with dora-export and serve the result.",
        )

    def _adapted(self, x: Tensor, packed: Packed) -> Tensor:
        plain = self._without_bias(x)
        lora_a: Tensor | None = packed.lora_A
        bias = self._bias[0]
        if packed.bias is not None:  # peft has lora_bias on LoRA alone, so it needs no norm_scale
            bias = packed.bias if bias is None else packed.bias + bias
        if self._embeds:
            # An embedding looks its A up; the rest is the same, with A x already known.
            x, lora_a = lookup(self._layer[0], packed.lora_A.T)(x), None
        return adapted_linear(
            plain, x, lora_a, packed.lora_B, chosen=packed.chosen, norm_scale=packed.norm_scale, bias=bias
        )


def put_layers(model: nn.Module, layers: Mapping[str, nn.Module], now: BatchOfNow) -> None:
    """Put an AdaptedLinear into the place of each of the model's layers, by name."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, AdaptedLinear(layer, name, now))
