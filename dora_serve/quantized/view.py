"""A quantized checkpoint seen as the dense one that its codes stand for: names, shapes, and how to make the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dora_serve.checkpoint import ShardedCheckpoint, read_json
from dora_serve.errors import CheckpointError
from dora_serve.quantized.auto_round import find_auto_round
from dora_serve.quantized.awq import find_awq
from dora_serve.quantized.bitsandbytes import Found, find_bitsandbytes
from dora_serve.quantized.codings import QuantizedOnLoad, Transposed
from dora_serve.quantized.compressed_tensors import find_compressed, rounds_activations
from dora_serve.quantized.float8 import find_float8
from dora_serve.quantized.gptq import find_gptq
from dora_serve.quantized.hqq import find_hqq
from dora_serve.quantized.mlx import find_mlx, says_mlx
from dora_serve.quantized.mxfp4 import find_mxfp4
from dora_serve.safetensors_file import TensorEntry

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LEAVES = ("c_attn", "q_attn", "c_proj", "c_fc")
_BLOCK = (128, 128)

_ORIGINAL = "merge into the unquantized base that it was made from (--base ORIGINAL --merge-into original)"

_REFUSED: Mapping[str, tuple[str, str]] = {
    "torchao": ("its tensors are Python objects of torchao, which safetensors files hold only in part", "torchao"),
    "quanto": ("its codes are objects of optimum-quanto", "optimum-quanto"),
    "aqlm": ("its codes point into learned codebooks", "aqlm"),
    "eetq": ("its int8 codes lie in the order of a CUDA kernel", "EETQ"),
}
"""What is not read, why, and what can dequantize it."""

SETTINGS_BESIDE: Mapping[str, str] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ say what they did, which config.json does not in their older checkpoints."""


def is_quantized(checkpoint: ShardedCheckpoint) -> bool:
    """Whether a checkpoint holds codes, or its config.json says so."""
    return bool(_settings(checkpoint))


def codes_in(checkpoint: ShardedCheckpoint) -> str | None:
    """What the weights of a checkpoint are coded with, None where they are dense, whatever its config.json says."""
    try:
        return dense_view(checkpoint).quantization
    except CheckpointError:
        return None


def dense_view(checkpoint: ShardedCheckpoint) -> ShardedCheckpoint:
    """The checkpoint with entries of dense tensors in place of their codes; itself where it is dense already.

    Reads small settings, no weights. Raises CheckpointError for a quantization that is not read here, with the way out,
    and for codes that are incomplete or inconsistent.
    """
    if checkpoint.quantization is not None or not is_quantized(checkpoint):
        return checkpoint
    settings = _settings(checkpoint)
    method = _method(settings)
    finder = _FINDERS.get(method)
    if finder is None:
        raise _refused(checkpoint, method)
    found = finder(checkpoint, settings)
    if not found.weights:
        raise CheckpointError(
            f"config.json of {str(checkpoint.folder)!r} says that it is quantized ({method}), and none of its tensors "
            "are such codes.",
            remedy="If its weights are dense, take quantization_config out of its config.json.",
            path=str(checkpoint.folder),
        )
    weights = {name: as_stored_dense(checkpoint.config, entry, name) for name, entry in found.weights.items()}
    label = _label(weights)
    if method == "compressed-tensors" and rounds_activations(settings):
        label += ", whose activations are rounded as it runs, which no dense weights do"
    return with_entries(checkpoint, weights, found.parts, label)


def _method(settings: Mapping[str, Any]) -> str:
    if named := settings.get("quant_method"):
        return str(named)
    if "load_in_4bit" in settings:
        return "bitsandbytes"
    return "mlx" if says_mlx(settings) else "unknown"


def with_entries(
    checkpoint: ShardedCheckpoint, weights: Mapping[str, TensorEntry], parts: frozenset[str], label: str
) -> ShardedCheckpoint:
    """The checkpoint with `weights` in place of the tensors of their names or of their codes, and without `parts`."""
    by_codes = {(entry.path, entry.start): entry for entry in weights.values()}
    files = {}
    for name, file in checkpoint.files.items():
        kept: dict[str, TensorEntry] = {}
        for stored in file.tensors.values():
            entry = by_codes.get((stored.path, stored.start)) if stored.nbytes else None
            if entry is not None and (stored.name == entry.name or stored.name in parts):
                kept[entry.name] = entry
            elif stored.name not in parts:
                kept[stored.name] = stored
        files[name] = replace(file, tensors=kept)
    tensors = {name: entry for file in files.values() for name, entry in file.tensors.items()}
    return replace(checkpoint, files=files, tensors=tensors, quantization=label)


def as_stored_dense(config: Mapping[str, object], entry: TensorEntry, name: str) -> TensorEntry:
    """The entry in the orientation in which a dense checkpoint of this family stores it."""
    entry = replace(entry, name=name)
    return transposed(entry) if is_conv1d(config, name) and len(entry.shape) == 2 else entry


def transposed(entry: TensorEntry) -> TensorEntry:
    """A matrix the other way round."""
    return replace(entry, shape=entry.shape[::-1], coding=Transposed(entry))


def is_conv1d(config: Mapping[str, object], weight: str) -> bool:
    """Whether a weight is that of transformers' Conv1D, which is stored as (in, out)."""
    leaf = weight.removesuffix(".weight").rpartition(".")[2]
    return config.get("model_type") in _CONV1D_MODELS and leaf in _CONV1D_LEAVES


def compute_dtype(config: Mapping[str, object]) -> torch.dtype | None:
    """What config.json says that the model computes in, None where it says nothing."""
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        dtype = getattr(torch, str(table.get("dtype") or table.get("torch_dtype")), None)
        if dtype in _DTYPES:
            return dtype  # type: ignore[no-any-return]
    return None


def dense_dtype(config: Mapping[str, object], entry: TensorEntry) -> torch.dtype:
    """The dtype in which a tensor is written. Of stored codes, that of the model: they may decode to float32 only
    because their scales are in it. Of what was quantized here, the one in which it is stored."""
    coding = entry.coding
    if isinstance(coding, Transposed):
        coding = coding.source.coding
    if isinstance(coding, QuantizedOnLoad):
        return coding.source.dtype
    return entry.dtype if coding is None else compute_dtype(config) or entry.dtype


def quantization_paths(config: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Where config.json says how the weights are quantized."""
    keys = ("quantization_config", "compression_config")
    found = [(key,) for key in keys if config.get(key)]
    found += [("quantization",)] if says_mlx(config.get("quantization")) else []
    nested = [
        (name, key) for name, table in config.items() if isinstance(table, dict) for key in keys if table.get(key)
    ]
    return [*found, *nested]


def _settings(checkpoint: ShardedCheckpoint) -> dict[str, Any]:
    """quantization_config, or what the names of the tensors tell where there is none."""
    for path in quantization_paths(checkpoint.config):
        table: Any = checkpoint.config
        for key in path:
            table = table[key]
        return table if isinstance(table, dict) else {"quant_method": str(table)}
    for name in checkpoint.tensors:
        if ".quant_state.bitsandbytes__" in name or name.endswith(".SCB"):
            return {"quant_method": "bitsandbytes"}
        if name.endswith(".W_q"):
            return {"quant_method": "hqq"}
        if name.endswith(".qweight"):
            return _beside(checkpoint)
    return {}


def _beside(checkpoint: ShardedCheckpoint) -> dict[str, Any]:
    for name, method in SETTINGS_BESIDE.items():
        found = read_json(checkpoint.folder, name)
        if found:
            return {"quant_method": method, **found}
    return {"quant_method": "unknown"}


def _label(weights: Mapping[str, TensorEntry]) -> str:
    labels = sorted({entry.coding.label for entry in weights.values() if entry.coding})
    return "; ".join(labels)


def _bitsandbytes(checkpoint: ShardedCheckpoint, _: Mapping[str, Any]) -> Found:
    return find_bitsandbytes(checkpoint.tensors)


def _hqq(checkpoint: ShardedCheckpoint, _: Mapping[str, Any]) -> Found:
    return find_hqq(checkpoint.tensors)


def _float8(checkpoint: ShardedCheckpoint, settings: Mapping[str, Any]) -> Found:
    block = settings.get("weight_block_size") or _BLOCK
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointError(
            f"config.json of {str(checkpoint.folder)!r} has the weight_block_size {block!r}, wanted two sizes.",
            remedy="Fetch it again.",
            path=str(checkpoint.folder),
        )
    dtype = compute_dtype(checkpoint.config) or torch.bfloat16
    return find_float8(checkpoint.tensors, (block[0], block[1]), dtype)


def _gptq(checkpoint: ShardedCheckpoint, settings: Mapping[str, Any]) -> Found:
    return find_gptq(checkpoint.tensors, settings)


def _awq(checkpoint: ShardedCheckpoint, settings: Mapping[str, Any]) -> Found:
    return find_awq(checkpoint.tensors, settings)


def _auto_round(checkpoint: ShardedCheckpoint, settings: Mapping[str, Any]) -> Found:
    return find_auto_round(checkpoint.tensors, settings)


def _mxfp4(checkpoint: ShardedCheckpoint, _: Mapping[str, Any]) -> Found:
    return find_mxfp4(checkpoint.tensors, compute_dtype(checkpoint.config) or torch.bfloat16)


def _compressed(checkpoint: ShardedCheckpoint, settings: Mapping[str, Any]) -> Found:
    return find_compressed(checkpoint.tensors, settings)


def _mlx(checkpoint: ShardedCheckpoint, settings: Mapping[str, Any]) -> Found:
    return find_mlx(checkpoint.tensors, settings)


_FINDERS: Mapping[str, Callable[[ShardedCheckpoint, Mapping[str, Any]], Found]] = {
    "bitsandbytes": _bitsandbytes,
    "hqq": _hqq,
    "fp8": _float8,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "mlx": _mlx,
}


def _refused(checkpoint: ShardedCheckpoint, method: str) -> CheckpointError:
    why, library = _REFUSED.get(method, ("its layout is not known here", "the library that wrote it"))
    return CheckpointError(
        f"The base {str(checkpoint.folder)!r} is quantized with {method}, which is not read here: {why}.",
        remedy=f"Either {_ORIGINAL}, or dequantize it with {library} first, save it with save_pretrained, and give "
        "that. bitsandbytes (nf4, fp4, int8), HQQ, float8 in blocks (fp8), GPTQ, AWQ, AutoRound, gpt-oss' MXFP4 and "
        "compressed-tensors and mlx's affine codes are read as they are.",
        path=str(checkpoint.folder),
        method=method,
    )
