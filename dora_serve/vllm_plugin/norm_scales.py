"""The `norm_scale = m / ||W + s B A||` of an adapter's modules for the layers of this process.

Everything that can be wrong with the adapter is found here, before vLLM takes it into its registry, and so before an
adapter of the same name is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dora_serve.errors import AdapterError, PlanError, Problem
from dora_serve.ops import factored_row_norms, norm_scale, squared_row_norms
from dora_serve.vllm_plugin import layers
from dora_serve.vllm_plugin.layers import Module, Part

_MERGE_IT = "merge it with `dora-export merge` and serve the result"


@dataclass(frozen=True)
class Trained:
    """The DoRA side of an adapter as it was read. magnitudes: by vLLM's name of the module; names: the adapter's own
    name of each; precomputed: norm scales by the adapter's name, empty where it brings none that hold for this base."""

    magnitudes: Mapping[str, Tensor]
    names: Mapping[str, str]
    precomputed: Mapping[str, Tensor] = field(default_factory=dict)


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
    placed = _placed(manager, lora, trained)
    return [_norms(manager, name, layer, modules, squares) for name, layer, modules in placed]


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
        raise _refused(zero)
    return {layer.name: layer.norm_scale for layer in found}


def _refused(problems: list[Problem]) -> PlanError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return PlanError(
        f"This DoRA cannot be served here: {count}.",
        problems,
        remedy="Serve it on the base that it was trained on, or merge it (`dora-export merge`) and serve the result.",
    )


def _placed(manager: Any, lora: Any, trained: Trained) -> list[tuple[str, Any, list[Module | None]]]:
    """The layers of this process that the adapter changes, with the modules that are packed into each."""
    problems: list[Problem] = []
    taken: set[str] = set()
    placed: list[tuple[str, Any, list[Module | None]]] = []
    for name, layer in manager.modules.items():
        packed = manager.packed_modules.get(name, [name])
        weights = [manager._get_lora_layer_weights(lora, one) for one in packed]
        if not any(weights):
            weights = [manager._get_lora_layer_weights(lora, name)]
        modules = [_module(one, trained, manager.lora_config.max_lora_rank, problems) for one in weights]
        if any(modules):
            taken |= {module.name for module in modules if module is not None}
            problem = _unservable(manager, name, layer)
            if problem is not None:
                problems.append(problem)
            placed.append((name, layer, modules))
    elsewhere = _prefixes_on_other_stages(manager.model)
    for name in trained.magnitudes.keys() - taken:
        if not name.startswith(elsewhere):
            problems.append(Problem(trained.names[name], "a magnitude", "a layer that vLLM can adapt", _MERGE_IT))
    if problems:
        raise _refused(sorted(set(problems), key=str))
    return placed


def _prefixes_on_other_stages(model: Any) -> tuple[str, ...]:
    """Where the model has a placeholder, with pipeline parallelism: another process has the layers there."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer))


def _module(weights: Any, trained: Trained, max_rank: int, problems: list[Problem]) -> Module | None:
    if weights is None:
        return None
    magnitude = trained.magnitudes.get(weights.module_name)
    name = trained.names.get(weights.module_name, weights.module_name)
    if magnitude is None:
        problems.append(Problem(name, "no magnitude", "one, as use_dora promises", "the file is incomplete"))
        return None
    if not (isinstance(weights.lora_a, Tensor) and isinstance(weights.lora_b, Tensor)):
        problems.append(Problem(name, "a magnitude without lora_A and lora_B", "all three", "the file is incomplete"))
        return None
    out, rank = weights.lora_b.shape
    if weights.lora_a.shape[0] != rank or rank > max_rank:
        got = f"lora_A {tuple(weights.lora_a.shape)} and lora_B {tuple(weights.lora_b.shape)}"
        problems.append(Problem(name, got, f"one rank in both, of at most {max_rank}"))
        return None
    if magnitude.numel() != out:
        problems.append(Problem(name, f"a magnitude of {magnitude.numel()} values", f"{out}, the rows of lora_B"))
        return None
    scale = trained.precomputed.get(name)
    if scale is not None and scale.numel() != out:
        problems.append(Problem(name, f"a norm_scale of {scale.numel()} values", f"{out}, the rows of lora_B"))
        return None
    return Module(
        weights.module_name, weights.lora_a, weights.lora_b, float(weights.scaling), magnitude.flatten(), scale
    )


def _unservable(manager: Any, name: str, layer: Any) -> Problem | None:
    if layers.is_linear(layer) or layers.is_embedding(layer):
        return None
    if layers.is_head(layer):
        head, _ = layers.head_weight(manager, name)
        if getattr(head, "bias", None) is None:
            return None
        return Problem(name, "DoRA on a head with a bias", "one without", _MERGE_IT)
    return Problem(name, f"DoRA on a {type(layer).__name__}", "a linear, embedding or head layer", _MERGE_IT)


def _norms(manager: Any, name: str, layer: Any, modules: list[Module | None], squares: dict[str, Tensor]) -> LayerNorms:
    width = layers.width_of(layer)
    if layers.is_linear(layer):
        return _linear(name, layer, modules, width, squares)
    (module,) = modules
    assert module is not None
    if module.lora_B.shape[0] != width:
        raise _refused([Problem(name, f"lora_B of {module.lora_B.shape[0]} rows", f"{width}")])
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
        raise _refused([Problem(name, f"lora_B {shapes}", f"one that fits {width} outputs", str(error))]) from error
    weight: Tensor | None = None
    for part in parts:
        stop = part.start + part.lora_B.shape[0]
        problem = _shape_problem(name, layer, part, stop, width)
        if problem is not None:
            raise _refused([problem])
        if part.norm_scale is not None:
            found.norm_scale[part.start : stop] = part.norm_scale
            continue
        if weight is None:
            weight = layers.dense_weight(layer, width)
        found.parts.append(part)
        key = f"{name}[{part.start}:{stop}]"
        found.squares.append(_squares(key, weight[part.start : stop], part.lora_B, part.lora_A, part.scaling, squares))
    return found


def _shape_problem(name: str, layer: Any, part: Part, stop: int, width: int) -> Problem | None:
    got = f"lora_A {tuple(part.lora_A.shape)} and lora_B {tuple(part.lora_B.shape)}"
    wanted = f"{layer.input_size} inputs and {width} outputs in all"
    if part.lora_A.shape[1] != layer.input_size or stop > width:
        return Problem(name, got, wanted, "this is a base of another size")
    return None


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
