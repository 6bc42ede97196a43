"""GPTQ's checkpoints, as AutoGPTQ, GPTQModel and AutoRound write them: integers of 2, 3, 4 or 8 bits packed down the
inputs, a scale and a zero point for each group of inputs (GPTQModel 7.7, nn_modules/qlinear and utils/model.py;
AutoRound 0.16, auto_round_extension/torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dora_serve.errors import CheckpointError
from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.codings import GptqGroups
from dora_serve.quantized.unsound import FETCH_AGAIN, WAY_OUT, unsound
from dora_serve.safetensors_file import TensorEntry, read_tensor

_BITS = (2, 3, 4, 8)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_OVERRIDES = ("bits", "group_size", "sym", "desc_act")
_LAYOUT = {"pack_dtype", "format", "checkpoint_format", "quant_method", "method", "adapter"}
_LESS_ONE = {"gptq": True, "gptq_v2": False}


@dataclass(frozen=True)
class _Scheme:
    """What config.json says of a layer. symmetric, ordered: None where it does not say."""

    bits: int
    group_size: int
    symmetric: bool | None
    ordered: bool | None
    less_one: bool


_unsound = partial(unsound, "GPTQ layer", remedy=f"{FETCH_AGAIN} Or: {WAY_OUT}")


def find_gptq(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> Found:
    """Every GPTQ weight. settings: the quantization_config.

    Raises CheckpointError for what no reader agrees on, and for codes that are incomplete or inconsistent.
    """
    less_one = _require_plain(settings)
    weights: dict[str, TensorEntry] = {}
    parts: set[str] = set()
    for name, codes in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            scheme = _scheme(module, codes, settings, less_one)
            weights[f"{module}.weight"] = _weight(tensors, module, codes, scheme)
            parts |= {f"{module}.{part}" for part in _PARTS}
        elif leaf in ("qzeros", "g_idx") and f"{module}.qweight" not in tensors:
            raise _unsound(module, codes, f"{leaf} without its qweight", "both")
    return Found(weights, frozenset(parts & tensors.keys()))


def _require_plain(settings: Mapping[str, Any]) -> bool:
    """Whether zero points are stored less one. Raises CheckpointError for the layouts of single kernels."""
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    why = None
    if layout not in _LESS_ONE or settings.get("is_marlin_format"):
        why = f"its codes lie in the order of one kernel ({'marlin' if layout in _LESS_ONE else layout})"
    elif settings.get("pack_dtype") not in (None, "int32"):
        why = f"its words are of {settings['pack_dtype']}, not int32"
    elif settings.get("adapter"):
        why = "an adapter of its own (EoRA) is added to its weights as it runs"
    if why is not None:
        raise CheckpointError(
            f"The base is stored by GPTQ in a layout that is not read here: {why}.", remedy=WAY_OUT, method="gptq"
        )
    return _LESS_ONE[layout]


def _scheme(module: str, codes: TensorEntry, settings: Mapping[str, Any], less_one: bool) -> _Scheme:
    """What holds for a layer: `dynamic` has expressions whose first match overrides what holds for all, or says with
    "-:" that the layer is not quantized (vLLM's gptq_utils.get_dynamic_override, and GPTQModel's dynamic_get)."""
    said = {key: settings.get(key) for key in _OVERRIDES}
    dynamic = settings.get("dynamic") or {}
    for pattern, changes in dynamic.items() if isinstance(dynamic, dict) else ():
        try:
            matches = re.match(re.sub(r"^[+-]:", "", pattern), module)
        except re.error:
            raise _unsound(module, codes, f"the dynamic rule {pattern!r}", "a regular expression") from None
        if not matches:
            continue
        if pattern.startswith("-:"):
            raise _unsound(module, codes, f"codes, and the dynamic rule {pattern!r}", "one or the other")
        changes = changes if isinstance(changes, dict) else {}
        if other := changes.keys() & _LAYOUT:
            raise _unsound(module, codes, f"{', '.join(sorted(other))} in the dynamic rule {pattern!r}", "one layout")
        said |= {key: value for key, value in changes.items() if key in _OVERRIDES}
        break
    bits, group_size = said["bits"], said["group_size"]
    if type(bits) is not int or bits not in _BITS:
        raise _unsound(module, codes, f"bits {bits!r} in config.json", f"one of {', '.join(map(str, _BITS))}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise _unsound(module, codes, f"the group_size {group_size!r} in config.json", "a size, or -1 for a whole row")
    return _Scheme(bits, group_size, _flag(said["sym"]), _flag(said["desc_act"]), less_one)


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _weight(tensors: Mapping[str, TensorEntry], module: str, codes: TensorEntry, scheme: _Scheme) -> TensorEntry:
    bits = scheme.bits
    if f"{module}.weight" in tensors:
        raise _unsound(module, codes, "a qweight and a weight", "one of them")
    if codes.dtype != torch.int32 or len(codes.shape) != 2 or 0 in codes.shape or codes.shape[0] % bits:
        got = f"a qweight {list(codes.shape)} {codes.dtype}"
        raise _unsound(module, codes, got, f"words of int32, {bits} of which hold 32 codes of {bits} bits")
    inputs, outputs = codes.shape[0] // bits * 32, codes.shape[1]
    group = inputs if scheme.group_size == -1 else min(scheme.group_size, inputs)
    groups = -(-inputs // group)
    scales = tensors.get(f"{module}.scales")
    if scales is None or scales.dtype not in _SCALES or scales.shape != (groups, outputs):
        got = "no scales" if scales is None else f"scales {list(scales.shape)} {scales.dtype}"
        raise _unsound(module, codes, got, f"[{groups}, {outputs}] floats for groups of {scheme.group_size}")
    zeros = tensors.get(f"{module}.qzeros")
    if outputs % 32:
        raise _unsound(module, codes, f"{outputs} outputs", "a multiple of 32, as every writer asks for")
    if zeros is None or zeros.dtype != torch.int32 or zeros.shape != (groups, outputs // 32 * bits):
        got = "no qzeros" if zeros is None else f"qzeros {list(zeros.shape)} {zeros.dtype}"
        raise _unsound(module, codes, got, f"[{groups}, {outputs // 32 * bits}] words of int32")
    coding = GptqGroups(
        codes=codes,
        scales=scales,
        zeros=_zeros(module, zeros, scales, scheme),
        bits=bits,
        less_one=scheme.less_one,
        group=group,
        order=_order(module, codes, tensors.get(f"{module}.g_idx"), scales, inputs, group, scheme),
    )
    return replace(codes, name=f"{module}.weight", dtype=scales.dtype, shape=(outputs, inputs), coding=coding)


def _zeros(module: str, zeros: TensorEntry, scales: TensorEntry, scheme: _Scheme) -> TensorEntry | None:
    """The zero points, None where all are the middle of the range, as symmetric codes have them.

    A symmetric kernel never looks at those that are stored, and one that does has to find the same.
    """
    stored, bits, less = read_tensor(zeros), scheme.bits, int(scheme.less_one)
    middle = (1 << (bits - 1)) - less
    if torch.equal(stored, _filled(middle, bits).repeat(len(stored), stored.shape[1] // bits)):
        return None
    if not read_tensor(scales).any():
        return None  # nothing is anything but zero; of a base on the Hub that is only looked at, no values are here
    if scheme.symmetric:
        got = "zero points that differ from the middle of the range, and symmetric codes (sym) in config.json"
        raise _unsound(module, zeros, got, "one or the other")
    if scheme.less_one and bits == 3:
        got = "codes of 3 bits with zero points of their own, in the first format"
        raise _unsound(module, zeros, got, "gptq_v2: AutoGPTQ and GPTQModel differ in what they stored for them")
    if scheme.less_one and _has(stored, (1 << bits) - 1, bits):
        got = f"a zero point stored as {(1 << bits) - 1}, which kernels take for 0 or for {1 << bits}"
        raise _unsound(module, zeros, got, "no such zero point, or the format gptq_v2")
    return zeros


def _filled(value: int, bits: int) -> Tensor:
    """The words (int32) that 32 codes of one value fill."""
    whole = sum(value << bits * place for place in range(32))
    words = [whole >> 32 * word & 0xFFFFFFFF for word in range(bits)]
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32)


def _has(words: Tensor, value: int, bits: int) -> bool:
    """Whether a code of a whole part of the words (not of 3 bits) is `value`."""
    return any(bool(((words >> shift & (1 << bits) - 1) == value).any()) for shift in range(0, 32, bits))


def _order(
    module: str,
    codes: TensorEntry,
    index: TensorEntry | None,
    scales: TensorEntry,
    inputs: int,
    group: int,
    scheme: _Scheme,
) -> TensorEntry | None:
    """The group of each input where that is not the plain order of them; all zeros are an index that was never set."""
    groups = -(-inputs // group)
    if index is not None and (index.dtype not in (torch.int32, torch.int64) or index.shape != (inputs,)):
        raise _unsound(module, codes, f"g_idx {list(index.shape)} {index.dtype}", f"[{inputs}] whole numbers")
    found = None if index is None else read_tensor(index).long()
    if groups == 1 and (found is None or not found.any()):
        return None
    if found is None or not found.any():
        if scheme.ordered and read_tensor(scales).any():
            raise _unsound(module, codes, "no g_idx, or one of zeros", "one, since config.json says desc_act")
        return None
    plain = torch.arange(inputs) // group
    if torch.equal(found, plain):
        return None
    if found.min() < 0 or found.max() >= groups or not torch.equal(found.bincount(minlength=groups), plain.bincount()):
        raise _unsound(module, codes, "a g_idx of uneven groups", f"{group} inputs in each of {groups}")
    if scheme.ordered is False:
        got = "a g_idx in another order, which desc_act in config.json says there is none of"
        raise _unsound(module, codes, got, "one or the other: kernels follow either")
    return index
