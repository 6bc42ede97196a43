"""The `norm_scale = m / ||W + s B A||` of an adapter's modules for the layers of this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dora_serve.errors import AdapterError, Problem
from dora_serve.ops import factored_row_norms, norm_scale, squared_row_norms
from dora_serve.vllm_plugin import layers
from dora_serve.vllm_plugin.layers import Module, Part
from dora_serve.vllm_plugin.placing import Trained, placed, refused


@dataclass
class LayerNorms:
    """A layer of this process with what is known of its norms.

    norm_scale (width,): of the rows that are known, else 1. parts: the others, and squares their `||W + s B A||^2`,
    of this process's columns alone where the layer is `summed` over the tensor-parallel group.
    """

    name: str
    norm_scale: Tensor
    parts: list[Part] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    summed: bool = False


@torch.no_grad()
def local_norms(manager: Any, lora: Any, trained: Trained, squares: dict[str, Tensor]) -> list[LayerNorms]:
    """What this process can tell by itself.

    manager: vLLM's LoRAModelManager. lora: the LoRAModel, before vLLM packs it. squares: `||w_i||^2` of the layers,
    filled when first needed.

    Raises PlanError with what the layers cannot take, UnmergeableError for weights that cannot be told.
    """
    return [_norms(manager, name, layer, found, squares) for name, layer, found in placed(manager, lora, trained)]


def sum_over_group(found: Sequence[LayerNorms], error: Exception | None) -> None:
    """Add up the squares of layers that are split by columns, over the tensor-parallel group; nothing where that is one
    process. Collective: every process comes here for every adapter, one that has failed as well, with its `error`.

    Raises `error`, and AdapterError where another process has one.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    shared = [squared for layer in found if layer.summed for squared in layer.squares]
    if group.world_size > 1:
        size = sum(squared.numel() for squared in shared)
        # The largest of each, and so the least of the size as well.
        said = torch.tensor([int(error is not None), size, -size])
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
        failed, largest, least = said.tolist()
        if error is None and (failed or largest != -least):
            raise AdapterError(
                "dora-serve: another process of this server could not load the adapter, or read another one.",
                remedy="Give a path that holds the same files on every machine of the server; its log has the reason.",
            )
    if error is not None:
        raise error
    if group.world_size > 1 and shared:
        total = torch.cat(shared)
        torch.distributed.all_reduce(total, group=group.cpu_group)
        for squared, summed in zip(shared, total.split([one.numel() for one in shared]), strict=True):
            squared.copy_(summed)


def finished(found: Sequence[LayerNorms]) -> dict[str, Tensor]:
    """By vLLM's name of a layer: norm_scale (width,) in float32. Raises PlanError for a row that is zero."""
    zero = []
    for layer in found:
        for part, squared in zip(layer.parts, layer.squares, strict=True):
            scale = norm_scale(part.magnitude.double(), squared.sqrt())
            if not torch.isfinite(scale).all():
                zero.append(
                    Problem(layer.name, "a row of W + s B A that is zero, which no magnitude can scale", "none")
                )
            layer.norm_scale[part.start : part.start + scale.shape[0]] = scale
    if zero:
        raise refused("DoRA", zero)
    return {layer.name: layer.norm_scale for layer in found}


def _norms(manager: Any, name: str, layer: Any, modules: list[Module | None], squares: dict[str, Tensor]) -> LayerNorms:
    width = layers.width_of(layer)
    if layers.is_linear(layer):
        return _linear(name, layer, modules, width, squares)
    (module,) = modules
    assert module is not None
    found = LayerNorms(name, torch.ones(width))
    if module.norm_scale is not None:
        found.norm_scale = module.norm_scale.float()
        return found
    whole = Part(0, module.lora_A, module.lora_B, module.scaling, module.magnitude, None)
    found.parts.append(whole)
    if layers.is_embedding(layer):
        # An output of an embedding is a column of its table, of which this process holds some rows.
        found.summed = layer.base_layer.tp_size > 1
        shard = layer.base_layer.shard_indices
        first, last = shard.org_vocab_start_index, shard.org_vocab_end_index
        table = layer.base_layer.weight.detach()[: last - first].T
        found.squares.append(_squares(name, table, whole.lora_B, module.lora_A[:, first:last], module.scaling, squares))
        return found
    head, weight = layers.head_weight(manager, name)
    found.summed = head.tp_size > 1
    first, last = head.shard_indices.org_vocab_start_index, head.shard_indices.org_vocab_end_index
    squared = torch.zeros(width, dtype=torch.float64)
    squared[first:last] = _squares(
        name, weight[: last - first], module.lora_B[first:last], module.lora_A, module.scaling, squares
    )
    found.squares.append(squared)
    return found


def _linear(name: str, layer: Any, modules: list[Module | None], width: int, squares: dict[str, Tensor]) -> LayerNorms:
    found = LayerNorms(name, torch.ones(width), summed=layers.is_row_parallel(layer) and layer.tp_size > 1)
    try:
        parts = layers.parts_of(layer, modules)
    except (IndexError, RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(one.lora_B.shape)) for one in modules if one is not None)
        problem = Problem(name, f"lora_B {shapes}", f"one that fits {width} outputs", str(error))
        raise refused("DoRA", [problem]) from error
    weight: Tensor | None = None
    for part in parts:
        stop = part.start + part.lora_B.shape[0]
        if part.norm_scale is not None:
            found.norm_scale[part.start : stop] = part.norm_scale
            continue
        if weight is None:
            weight = layers.dense_weight(layer, width)
        found.parts.append(part)
        key = f"{name}[{part.start}:{stop}]"
        found.squares.append(_squares(key, weight[part.start : stop], part.lora_B, part.lora_A, part.scaling, squares))
    return found


def _squares(
    key: str, weight: Tensor, lora_b: Tensor, lora_a: Tensor, scaling: float, known: dict[str, Tensor]
) -> Tensor:
    """`||W + s B A||^2` of each row over the columns that are here: (out,) in float64, on the host."""
    if key not in known:
        known[key] = squared_row_norms(weight)
    norms = factored_row_norms(
        [lambda: weight],
        known[key].unsqueeze(0),
        lora_a.to(weight.device).unsqueeze(0),
        lora_b.to(weight.device).unsqueeze(0),
        torch.tensor([scaling], dtype=torch.float64, device=weight.device),
        torch.float32,
    )
    return norms[0].square().cpu()
