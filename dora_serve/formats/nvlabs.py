"""NVlabs/DoRA, the code of the paper (commonsense_reasoning/peft/src/peft/tuners/dora.py at 7e2f10a; formats.md 2).

`W' = m / ||W + s B A|| * (W + s B A)` over output rows, s = lora_alpha / r, m as `weight_m_wdecomp.weight` (out, 1).
A module of Wdecompose_target_modules has its magnitude alone: `W' = m / ||W|| * W`.

The LLaVA fork of that code (visual_instruction_tuning) saves the magnitudes into non_lora_trainables.bin, because of a
misspelt filter: that file is read where it lies beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights, Replacement
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import Parts, Roles, group, misfit, not_understood, pair
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
from dora_serve.formats.values import boolean, names, number, rank_of, require_known

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LLAVA_REST = "non_lora_trainables.bin"
_ROLES: Roles = (
    ("lora_A", re.compile(r"^(.+)\.lora_A(?:\.[^.]+)?\.weight$")),
    ("lora_B", re.compile(r"^(.+)\.lora_B(?:\.[^.]+)?\.weight$")),
    ("magnitude", re.compile(r"^(.+)\.weight_m_wdecomp(?:\.[^.]+)?\.weight$")),
)
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
    parts = group(weights.tensors, _ROLES, _module)
    modules = _modules(file, parts, rank, alpha / rank)
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
        notes=("dora_simple changes the gradient alone.",) if boolean(config, "dora_simple") else (),
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


def _modules(file: Path, parts: Parts, rank: int, scaling: float) -> tuple[LoraWeights, ...]:
    problems, modules = [], []
    for module, found in parts.modules.items():
        magnitude = found.get("magnitude")
        if magnitude is None:
            problems.append(
                f"{module}: weight_m_wdecomp is missing; bias = lora_only saves none, and the LLaVA fork puts them "
                f"into {LLAVA_REST}, wanted beside {file.name}"
            )
            continue
        out = prod(magnitude.shape)
        if magnitude.shape not in ((out,), (out, 1)) or not out:
            problems.append(f"{module}: weight_m_wdecomp {list(magnitude.shape)}, wanted [out, 1]")
            continue
        flat = magnitude.map((out,), torch.flatten)
        if len(found) == 1:
            none = torch.zeros(0, 0, dtype=magnitude.dtype)
            empty = LazyTensor((out, 0), none.dtype, lambda out=out, none=none: none.new_zeros(out, 0))  # type: ignore[misc]
            modules.append(LoraWeights(module, "linear", LazyTensor.of(none), empty, scaling, flat))
            continue
        if len(found) < 3:
            problems.append(f"{module}: has {', '.join(sorted(found))}, wanted lora_A, lora_B and the magnitude")
            continue
        try:
            both = pair(module, found["lora_A"], found["lora_B"], ("lora_A", "lora_B"), rank)
        except ValueError as error:
            problems.append(str(error))
            continue
        if both.lora_B.shape[0] != out:
            problems.append(f"{module}: {out} magnitudes for lora_B {list(found['lora_B'].shape)}")
            continue
        modules.append(LoraWeights(module, both.kind, both.lora_A, both.lora_B, scaling, flat))
    if problems:
        raise misfit(file, problems)
    return tuple(modules)


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
