"""What DoRA asks of vLLM's adapted layers: which rows and columns of a module this process holds, and its weights.

vLLM packs modules (q, k and v are one layer) and splits layers over processes: by rows of the weight (column-parallel),
by columns (row-parallel), or not at all. A `Part` is the share of one module of an adapter in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_serve.errors import UnmergeableError


@dataclass(frozen=True)
class Module:
    """A module of an adapter, whole. lora_A (r, in), lora_B (out, r) without the scaling, magnitude (out,);
    norm_scale (out,) where the adapter brings it."""

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor
    norm_scale: Tensor | None


@dataclass(frozen=True)
class Part:
    """Rows [start, start + out) of a layer, and the columns of this process. lora_A (r, in), lora_B (out, r), magnitude
    (out,) and norm_scale (out,) are cut to them."""

    start: int
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor
    norm_scale: Tensor | None


def is_linear(layer: Any) -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return isinstance(layer, BaseLinearLayerWithLoRA)


def is_embedding(layer: Any) -> bool:
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

    return isinstance(layer, VocabParallelEmbeddingWithLoRA)


def is_head(layer: Any) -> bool:
    """Whether it is what vLLM puts an adapter on lm_head into: the logits' processor."""
    from vllm.lora.layers import LogitsProcessorWithLoRA

    return isinstance(layer, LogitsProcessorWithLoRA)


def read_by_attention(model: Any) -> list[Any]:
    """The layers whose weights attention takes itself, past what is wrapped around them: kv_b_proj where it is MLA."""
    from vllm.model_executor.layers.attention import MLAAttention

    found = [one.kv_b_proj for one in model.modules() if isinstance(one, MLAAttention)]
    return [getattr(one, "base_layer", one) for one in found]


def is_row_parallel(layer: Any) -> bool:
    from vllm.lora.layers import RowParallelLinearWithLoRA

    return isinstance(layer, RowParallelLinearWithLoRA)


def slots_of(layer: Any) -> int:
    stacked = layer.lora_a_stacked
    return int((stacked[0] if isinstance(stacked, tuple) else stacked).shape[0])


def width_of(layer: Any) -> int:
    """How many outputs the layer has in this process."""
    if is_row_parallel(layer):
        return int(layer.output_size)
    if isinstance(layer.lora_b_stacked, tuple):
        return sum(int(stacked.shape[2]) for stacked in layer.lora_b_stacked)
    return int(layer.lora_b_stacked.shape[2])


def sizes_of(layer: Any) -> tuple[int, list[int]]:
    """How many inputs a layer has, and how many outputs each of its slices, in all processes together."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    base = layer.base_layer
    if is_embedding(layer):
        return int(base.org_vocab_size), [int(base.embedding_dim)]
    if is_head(layer):
        return int(layer.hidden_size), [width_of(layer)]
    sizes = [int(size) for size in getattr(base, "output_sizes", [base.output_size])]
    if isinstance(base, QKVParallelLinear):
        # Its output_sizes count a kv head again for every process that has a copy of it.
        heads, kv_heads = base.total_num_heads, base.total_num_kv_heads
        sizes = [heads * base.head_size, kv_heads * base.head_size, kv_heads * base.v_head_size]
    return int(base.input_size), sizes if len(sizes) == layer.n_slices else [sum(sizes)]


def added_bias(layer: Any) -> Tensor | None:
    """The bias that vLLM adds before the layer's output can be scaled."""
    if not is_linear(layer):
        return None
    base = layer.base_layer
    if base.skip_bias_add or (is_row_parallel(layer) and layer.tp_rank > 0):
        return None
    return base.bias  # type: ignore[no-any-return]


def parts_of(layer: Any, modules: Sequence[Module | None]) -> list[Part]:
    """The share of each module in a linear layer, cut by the layer's own rules, which are those of its lora_B.

    modules: those that vLLM packs into the layer, in its order, None for one that the adapter leaves alone.
    """
    if is_row_parallel(layer):
        (module,) = modules
        assert module is not None
        columns = layer.slice_lora_a(module.lora_A) if layer.tp_size > 1 else module.lora_A
        return [Part(0, columns, module.lora_B, module.scaling, module.magnitude, module.norm_scale)]
    slices = _slices(layer, modules)
    rows = _local_rows(layer, [None if one is None else one[1] for one in slices])
    parts, start = [], 0
    for one, local, stacked in zip(slices, rows, layer.lora_b_stacked, strict=True):
        if one is not None and local is not None:
            module, _ = one
            cut = local.flatten()
            scale = None if module.norm_scale is None else module.norm_scale[cut]
            parts.append(Part(start, module.lora_A, module.lora_B[cut], module.scaling, module.magnitude[cut], scale))
        start += int(stacked.shape[2])
    return parts


def _slices(layer: Any, modules: Sequence[Module | None]) -> list[tuple[Module, Tensor] | None]:
    """For each slice of the layer: the module it belongs to, and the numbers (n, 1) of its rows there."""
    numbered = [None if one is None else (one, torch.arange(one.lora_B.shape[0]).unsqueeze(1)) for one in modules]
    if len(modules) == layer.n_slices:
        return numbered
    if len(modules) == 1:
        # One trained matrix over a layer of several slices.
        assert numbered[0] is not None
        module, numbers = numbered[0]
        return [(module, rows) for rows in numbers.split(list(layer.base_layer.output_sizes))]
    # vLLM deals lora_A and lora_B out over the slices: here modules stand for the one, and numbers for the other.
    owners = [None if one is None else one[0] for one in numbered]
    dealt, rows_of = layer.expand_packed_lora(owners, [None if one is None else one[1] for one in numbered])
    return [None if one is None else (one, rows) for one, rows in zip(dealt, rows_of, strict=True)]


def _local_rows(layer: Any, rows: list[Tensor | None]) -> Sequence[Tensor | None]:
    if layer.tp_size == 1 or not hasattr(layer, "slice_lora_b"):
        return rows
    if layer.n_slices == 1:
        assert rows[0] is not None
        return [layer.slice_lora_b(rows[0])]
    return layer.slice_lora_b(rows)  # type: ignore[no-any-return]


def dense_weight(layer: Any, width: int) -> Tensor:
    """The weight (out, in) that a linear layer serves in this process: as it is stored, or else as the layer's answers
    to unit vectors, which are its columns, put together on the host."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    base, method = layer.base_layer, layer.base_layer.quant_method
    weight = getattr(base, "weight", None)
    if (
        isinstance(method, UnquantizedLinearMethod)
        and weight is not None
        and tuple(weight.shape)
        == (
            width,
            layer.input_size,
        )
    ):
        return weight.detach()  # type: ignore[no-any-return]
    if getattr(base, "input_scale", None) is not None:
        raise UnmergeableError(
            f"The layer {base.prefix} rounds its inputs to a fixed scale, and its weights cannot be told from outside.",
            remedy="Give an adapter with its norm scales: `dora-export convert ADAPTER --to vllm --base BASE -o OUT`.",
            layer=base.prefix,
        )
    answers = torch.empty(layer.input_size, width, dtype=layer.lora_config.lora_dtype)
    for start, units in _unit_vectors(layer.input_size, layer.lora_config.lora_dtype, layer.device):
        answers[start : start + units.shape[0]] = method.apply(base, units, None)
    return answers.T


_UNITS_AT_ONCE = 1024


def _unit_vectors(size: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, size, _UNITS_AT_ONCE):
        count = min(_UNITS_AT_ONCE, size - start)
        units = torch.zeros(count, size, dtype=dtype, device=device)
        units[:, start:].fill_diagonal_(1)
        yield start, units


def head_weight(manager: Any, name: str) -> tuple[Any, Tensor]:
    """The lm_head below a logits' processor, and its weight (vocabulary of this process, hidden)."""
    module = manager.model.get_submodule(name)
    head = getattr(module, "base_layer", module)
    return head, head.weight.detach()
