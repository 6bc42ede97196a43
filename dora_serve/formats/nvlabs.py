"""NVlabs/DoRA, the code of the paper (commonsense_reasoning/peft/src/peft/tuners/dora.py at 7e2f10a; formats.md 2).

`W' = m / ||W + s B A|| * (W + s B A)` over output rows, s = lora_alpha / r, m as `weight_m_wdecomp.weight` (out, 1).
A module of Wdecompose_target_modules has its magnitude alone: `W' = m / ||W|| * W`.

The LLaVA fork of that code (visual_instruction_tuning) saves the magnitudes into non_lora_trainables.bin, because of a
misspelt filter: that file is read where it lies beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights, Replacement
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import Roles, group, not_understood, of_each, pair
from dora_serve.formats.files import (
    CONFIG_NAME,
    Weights,
    find_weights,
    no_weights,
    open_weights,
    peek_config,
    read_config,
    require_finite,
    tensor_names,
)
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft_config import matches
from dora_serve.formats.values import boolean, names, number, rank_of, require_known

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LLAVA_REST = "non_lora_trainables.bin"
_ROLES: Roles = (
    ("lora_A", re.compile(r"^(.+)\.lora_A(?:\.[^.]+)?\.weight$")),
    ("lora_B", re.compile(r"^(.+)\.lora_B(?:\.[^.]+)?\.weight$")),
    ("magnitude", re.compile(r"^(.+)\.weight_m_wdecomp(?:\.[^.]+)?\.weight$")),
)
_TARGETS = ("target_modules", "Wdecompose_target_modules", "wdecompose_target_modules")
_KNOWN = frozenset(
    """
    auto_mapping base_model_name_or_path bias dora_simple enable_lora fan_in_fan_out inference_mode lora_alpha
    lora_dropout merge_weights modules_to_save peft_type r revision target_modules task_type
    Wdecompose_target_modules wdecompose_target_modules
    """.split()
)


def sniff(path: Path) -> bool:
    """Whether the configuration says DORA, or the names are NVlabs'."""
    kind = peek_config(path).get("peft_type")
    if kind is not None:
        return kind == "DORA"
    return any(".weight_m_wdecomp" in name for name in tensor_names(find_weights(path, *WEIGHTS)))


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read an adapter folder. Raises AdapterError, with every problem of the tensors at once."""
    config = read_config(path)
    require_known(path, config, _KNOWN, options)
    rank, alpha = rank_of(config, "r", 8), number(config, "lora_alpha")
    saved, bias = names(config, "modules_to_save"), str(config.get("bias") or "none")
    if config.get("enable_lora") not in (None, [], False):
        raise AdapterError(
            f"{CONFIG_NAME} says enable_lora = {config['enable_lora']!r}: parts of one fused layer, for which the "
            "published code has no DoRA.",
            remedy="Train the layers as they are, or report the format.",
        )
    file = find_weights(path, *WEIGHTS)
    if file is None:
        raise no_weights(path, WEIGHTS)
    weights = _with_llava_rest(open_weights(file, options.allow_pickle), path, options)
    require_finite(weights)
    parts = group(weights.tensors, _ROLES, _module, keeps_rest=True)
    modules = tuple(of_each(file, parts, lambda module, found: _of_module(module, found, file, rank, alpha / rank)))
    files = [path / CONFIG_NAME, file]
    if (path / LLAVA_REST).is_file():
        files.append(path / LLAVA_REST)
    return Adapter(
        path=path,
        format="nvlabs",
        modules=modules,
        replacements=_replacements(parts.rest, saved, bias, whole=(path / LLAVA_REST).is_file()),
        base=str(config["base_model_name_or_path"]) if config.get("base_model_name_or_path") else None,
        task_type=str(config["task_type"]) if config.get("task_type") else None,
        files=tuple(files),
        config=config,
        notes=tuple(_notes(parts.modules, config)),
    )


def _with_llava_rest(weights: Weights, path: Path, options: ReadOptions) -> Weights:
    """The weights, with the magnitudes that the LLaVA fork puts elsewhere."""
    rest = path / LLAVA_REST
    if not rest.is_file():
        return weights
    more = open_weights(rest, options.allow_pickle)
    both = sorted(weights.tensors.keys() & more.tensors.keys())
    if both:
        raise AdapterError(
            f"{weights.file.name} and {LLAVA_REST} both hold {', '.join(both[:4])}.",
            remedy="They are of two trainings: take both from one output folder.",
        )
    return Weights(weights.file, {**weights.tensors, **more.tensors})


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _of_module(module: str, found: Mapping[str, LazyTensor], file: Path, rank: int, scaling: float) -> LoraWeights:
    magnitude = found.get("magnitude")
    if magnitude is None:
        raise ValueError(
            f"{module}: weight_m_wdecomp is missing; bias = lora_only saves none, and the LLaVA fork puts them "
            f"into {LLAVA_REST}, wanted beside {file.name}"
        )
    out = prod(magnitude.shape)
    if magnitude.shape not in ((out,), (out, 1)) or not out:
        raise ValueError(f"{module}: weight_m_wdecomp {list(magnitude.shape)}, wanted [out, 1]")
    flat = magnitude.map((out,), torch.flatten)
    if len(found) == 1:
        none = torch.zeros(0, 0, dtype=magnitude.dtype)
        empty = LazyTensor((out, 0), none.dtype, lambda: none.new_zeros(out, 0))
        return LoraWeights(module, "linear", LazyTensor.of(none), empty, scaling, flat)
    if len(found) < 3:
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted lora_A, lora_B and the magnitude")
    both = pair(module, found["lora_A"], found["lora_B"], ("lora_A", "lora_B"), rank)
    if both.lora_B.shape[0] != out:
        raise ValueError(f"{module}: {out} magnitudes for lora_B {list(found['lora_B'].shape)}")
    return LoraWeights(module, both.kind, both.lora_A, both.lora_B, scaling, flat)


def _notes(modules: Collection[str], config: Mapping[str, object]) -> Iterator[str]:
    if boolean(config, "dora_simple"):
        yield "dora_simple changes the gradient alone."
    unnamed = [module for module in modules if not _is_named(module, config)]
    if unnamed:
        yield (
            f"{len(unnamed)} modules have weights here that target_modules and Wdecompose_target_modules in "
            f"{CONFIG_NAME} do not name ({', '.join(unnamed[:3])}{', ...' if len(unnamed) > 3 else ''}): they are "
            "merged, and NVlabs' code would leave them out."
        )


def _is_named(module: str, config: Mapping[str, object]) -> bool:
    """Whether the code would adapt a module of this name (tuners/dora.py, DoraModel._find_and_replace)."""
    lists = [config.get(key) for key in _TARGETS]
    if not any(lists):
        return True
    return any(
        matches(wanted, module) if isinstance(wanted, str) else any(module.endswith(name) for name in wanted)
        for wanted in lists
        if isinstance(wanted, str) or (isinstance(wanted, list) and all(isinstance(name, str) for name in wanted))
    )


def _replacements(
    rest: Mapping[str, LazyTensor], saved: tuple[str, ...], bias: str, *, whole: bool
) -> tuple[Replacement, ...]:
    """Whole tensors: saved modules, biases, and what LLaVA trains besides (its projector)."""
    found, unknown = [], {}
    for key, tensor in rest.items():
        name = _module(key)
        if name.endswith(".bias") and bias in ("all", "lora_only"):
            found.append(Replacement(name, tensor, "bias"))
        elif whole or any(f".{part}." in f".{name}." for part in saved):
            found.append(Replacement(name.replace(".modules_to_save.", "."), tensor, "modules_to_save"))
        else:
            unknown[key] = tensor
    if unknown:
        raise not_understood(unknown)
    return tuple(found)
