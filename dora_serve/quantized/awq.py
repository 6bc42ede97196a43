"""AWQ's checkpoints in the gemm layout, as AutoAWQ, AutoRound and GPTQModel write them: integers of 4 bits, eight
outputs in a word, a scale and a zero point for each group of inputs (AutoAWQ 0.2.9, modules/linear/gemm.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dora_serve.errors import CheckpointError
from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.codings import AwqGroups
from dora_serve.quantized.unsound import FETCH_AGAIN, WAY_OUT, unsound
from dora_serve.safetensors_file import TensorEntry

_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_PARTS = ("qweight", "qzeros", "scales")
_PER_WORD = 8


def find_awq(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> Found:
    """Every AWQ weight. settings: the quantization_config, in transformers' words or in AutoAWQ's own.

    Raises CheckpointError for the other layouts, and for codes that are incomplete or inconsistent.
    """
    group_size = _require_plain(settings)
    weights: dict[str, TensorEntry] = {}
    parts: set[str] = set()
    for name, entry in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            weights[f"{module}.weight"] = _weight(tensors, module, entry, group_size)
            parts |= {f"{module}.{part}" for part in _PARTS}
        elif leaf in ("qzeros", "scales") and f"{module}.qweight" not in tensors:
            if leaf == "scales":
                raise _other_layout(f"{name} belongs to no codes, but divides activations as the model runs")
            raise _unsound(module, entry, f"{leaf} without its qweight", "both")
    return Found(weights, frozenset(parts & tensors.keys()))


_unsound = partial(unsound, "AWQ layer", remedy=f"{FETCH_AGAIN} Or: {WAY_OUT}")


def _require_plain(settings: Mapping[str, Any]) -> int:
    """The group size. Raises CheckpointError for what AutoAWQ's gemm kernel does not run."""
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    group_size = settings.get("group_size", settings.get("q_group_size"))
    if layout != "gemm" or settings.get("backend") == "llm-awq":
        raise _other_layout(f"its codes lie in the order of another kernel ({layout}, wanted gemm)")
    if bits != 4:
        raise _other_layout(f"its codes have {bits!r} bits, and the layout is one of 4")
    if settings.get("zero_point") is False:
        raise _other_layout("it has no zero points (zero_point), and no two readers agree on what stands for zero then")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise _other_layout(f"its group_size is {group_size!r}, wanted a size, or -1 for a whole row")
    return group_size


def _weight(tensors: Mapping[str, TensorEntry], module: str, codes: TensorEntry, group_size: int) -> TensorEntry:
    if f"{module}.weight" in tensors:
        raise _unsound(module, codes, "a qweight and a weight", "one of them")
    if codes.dtype != torch.int32 or len(codes.shape) != 2 or 0 in codes.shape:
        raise _unsound(module, codes, f"a qweight {list(codes.shape)} {codes.dtype}", "a matrix of words of int32")
    inputs, outputs = codes.shape[0], codes.shape[1] * _PER_WORD
    group = inputs if group_size == -1 else group_size
    if inputs % group:
        raise _unsound(module, codes, f"{inputs} inputs in groups of {group}", "whole groups")
    scales, zeros = tensors.get(f"{module}.scales"), tensors.get(f"{module}.qzeros")
    if scales is None or scales.dtype not in _SCALES or scales.shape != (inputs // group, outputs):
        got = "no scales" if scales is None else f"scales {list(scales.shape)} {scales.dtype}"
        raise _unsound(module, codes, got, f"[{inputs // group}, {outputs}] floats for groups of {group}")
    if zeros is None or zeros.dtype != torch.int32 or zeros.shape != (inputs // group, codes.shape[1]):
        got = "no qzeros" if zeros is None else f"qzeros {list(zeros.shape)} {zeros.dtype}"
        raise _unsound(module, codes, got, f"[{inputs // group}, {codes.shape[1]}] words of int32")
    coding = AwqGroups(codes, scales, zeros, group)
    return replace(codes, name=f"{module}.weight", dtype=scales.dtype, shape=(outputs, inputs), coding=coding)


def _other_layout(why: str) -> CheckpointError:
    return CheckpointError(
        f"The base is stored by AWQ in a layout that is not read here: {why}.", remedy=WAY_OUT, method="awq"
    )
