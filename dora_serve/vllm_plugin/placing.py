"""Where an adapter's modules belong in this process, and everything that keeps them from being served there.

It is found before vLLM takes the adapter into its registry, and so before one of the same name is replaced. vLLM itself
copies what is too small into a corner of a slot, and stops in the middle of filling one for what is too large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dora_serve.errors import PlanError, Problem
from dora_serve.vllm_plugin import layers
from dora_serve.vllm_plugin.layers import Module

_MERGE_IT = "merge it with `dora-export merge` and serve the result"
_INCOMPLETE = "the file is incomplete"
_NO_FACTORS = "a magnitude, and neither lora_A nor lora_B"


@dataclass(frozen=True)
class Trained:
    """The DoRA side of an adapter as it was read. magnitudes: by vLLM's name of the module; names: the adapter's own
    name of each; precomputed: norm scales by the adapter's name, empty where it brings none that hold for this base."""

    magnitudes: Mapping[str, Tensor]
    names: Mapping[str, str]
    precomputed: Mapping[str, Tensor] = field(default_factory=dict)


def placed(manager: Any, lora: Any, trained: Trained) -> list[tuple[str, Any, list[Module | None]]]:
    """The layers of this process that a DoRA changes, by name, with the modules that are packed into each.

    manager: vLLM's LoRAModelManager. lora: the LoRAModel, before vLLM packs it.

    Raises PlanError with all that the layers cannot take.
    """
    problems: list[Problem] = []
    placed_names: set[str] = set()
    found: list[tuple[str, Any, list[Module | None]]] = []
    folded = layers.read_by_attention(manager.model)
    for name, layer, weights in _layers(manager, lora):
        modules = [_module(one, trained, manager.lora_config.max_lora_rank, problems) for one in weights]
        placed_names |= {one.module_name for one in weights if one is not None}
        if any(modules):
            shapes = [_shape(one) for one in modules]
            problem = _unservable(manager, name, layer, folded) or _misfit(name, layer, shapes)
            if problem is not None:
                problems.append(problem)
            found.append((name, layer, modules))
    elsewhere = _on_other_stages(manager.model)
    for name in trained.magnitudes.keys() - placed_names:
        if name not in lora.loras:
            problems.append(Problem(trained.names[name], _NO_FACTORS, "lora_A and lora_B", _INCOMPLETE))
        elif not f"{name}.".startswith(elsewhere):
            left_out = manager.lora_config.target_modules is not None and not manager._match_target_modules(name)
            wanted = "one of --lora-target-modules" if left_out else "a layer that vLLM can adapt"
            problems.append(Problem(trained.names[name], "a magnitude", wanted, _MERGE_IT))
    if problems:
        raise refused("DoRA", sorted(set(problems), key=str))
    return found


def require_fit(manager: Any, lora: Any) -> None:
    """Raises PlanError where the linear layers of this process cannot take a plain LoRA as it is."""
    problems: list[Problem] = []
    for name, layer, weights in _layers(manager, lora):
        if not layers.is_linear(layer):
            continue
        wrong = [_factors_problem(one.module_name, one, manager.lora_config.max_lora_rank) for one in weights if one]
        if not any(wrong):
            shapes = [None if one is None else (one.lora_a.shape[1], one.lora_b.shape[0]) for one in weights]
            wrong = [_misfit(name, layer, shapes)]
        problems += [one for one in wrong if one is not None]
    if problems:
        raise refused("LoRA", problems)


def refused(kind: str, problems: list[Problem]) -> PlanError:
    """The error that an adapter with these problems is answered with."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return PlanError(
        f"This {kind} cannot be served here: {count}.",
        problems,
        remedy="Serve it on the base that it was trained on, or merge it (`dora-export merge`) and serve the result.",
    )


def _layers(manager: Any, lora: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """The layers that the adapter has weights for, with those of each module that is packed into it."""
    for name, layer in manager.modules.items():
        packed = manager.packed_modules.get(name, [name])
        weights = [manager._get_lora_layer_weights(lora, one) for one in packed]
        if not any(weights):
            weights = [manager._get_lora_layer_weights(lora, name)]
        if any(weights):
            yield name, layer, weights


def _on_other_stages(model: Any) -> tuple[str, ...]:
    """Where the model has a placeholder, with pipeline parallelism: another process has that layer, or those below."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer))


def _module(weights: Any, trained: Trained, max_rank: int, problems: list[Problem]) -> Module | None:
    if weights is None:
        return None
    magnitude = trained.magnitudes.get(weights.module_name)
    name = trained.names.get(weights.module_name, weights.module_name)
    scale = trained.precomputed.get(name)
    problem = _factors_problem(name, weights, max_rank)
    if problem is None:
        out = weights.lora_b.shape[0]
        if magnitude is None:
            problem = Problem(name, "no magnitude", "one, as use_dora promises", _INCOMPLETE)
        elif magnitude.numel() != out:
            problem = Problem(name, f"a magnitude of {magnitude.numel()} values", f"{out}, the rows of lora_B")
        elif not torch.isfinite(magnitude).all():
            problem = Problem(name, "a magnitude that is not finite", "numbers", "its training went astray")
        elif scale is not None and scale.numel() != out:
            problem = Problem(name, f"a norm_scale of {scale.numel()} values", f"{out}, the rows of lora_B")
        else:
            scaling = float(weights.scaling)
            return Module(weights.module_name, weights.lora_a, weights.lora_b, scaling, magnitude.flatten(), scale)
    problems.append(problem)
    return None


def _factors_problem(name: str, weights: Any, max_rank: int) -> Problem | None:
    """What is wrong with lora_A and lora_B by themselves."""
    lora_a, lora_b = weights.lora_a, weights.lora_b
    missing = [which for which, one in (("lora_A", lora_a), ("lora_B", lora_b)) if not isinstance(one, Tensor)]
    if missing:
        return Problem(name, f"no {' and no '.join(missing)}", "lora_A and lora_B", _INCOMPLETE)
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1] or lora_a.shape[0] > max_rank:
        got = f"lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)}"
        return Problem(name, got, f"matrices of one rank, of at most {max_rank}")
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        hint = f"in {str(lora_a.dtype).removeprefix('torch.')}, which the server computes adapters in"
        return Problem(name, "values that are not finite", "numbers", hint)
    return None


def _shape(module: Module | None) -> tuple[int, int] | None:
    return None if module is None else (module.lora_A.shape[1], module.lora_B.shape[0])


def _misfit(name: str, layer: Any, shapes: Sequence[tuple[int, int] | None]) -> Problem | None:
    """Where the inputs or outputs (in, out) of the modules in a layer are not its own, over all processes together."""
    inputs, outputs = layers.sizes_of(layer)
    if len(shapes) == 1:
        outputs = [sum(outputs)]
    dealt = len(shapes) != len(outputs)  # vLLM deals them out over the slices, and refuses what does not add up
    for shape, size in zip(shapes, outputs, strict=False):
        if shape is not None and (shape[0] != inputs or (shape[1] != size and not dealt)):
            got = f"a module of {shape[0]} inputs and {shape[1]} outputs"
            return Problem(name, got, f"{inputs} and {size}", "this is a base of another size")
    return None


def _unservable(manager: Any, name: str, layer: Any, read_by_attention: Sequence[Any]) -> Problem | None:
    if layers.is_linear(layer):
        if not any(one is layer.base_layer for one in read_by_attention):
            return None
        return Problem(name, "DoRA on what vLLM's MLA folds into its attention", "other layers", _MERGE_IT)
    if layers.is_embedding(layer):
        return None
    if layers.is_head(layer):
        head, _ = layers.head_weight(manager, name)
        if getattr(head, "bias", None) is None:
            return None
        return Problem(name, "DoRA on a head with a bias", "one without", _MERGE_IT)
    return Problem(name, f"DoRA on a {type(layer).__name__}", "a linear, embedding or head layer", _MERGE_IT)
