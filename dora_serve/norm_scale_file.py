"""`norm_scale.safetensors`: the norm scales of a DoRA, computed once, beside the adapter's own files.

A norm scale `m / ||W + s B A||` is a constant of the base and the adapter. A server that finds this file need not read
its base again for every adapter that it loads, nor have the weights in a form in which they can be read: they may be
quantized, or spread over machines. The adapter's own files are untouched, and any other program sees a PEFT adapter.

The file holds one tensor (out,) in float32 for each module, by the module's name in the adapter, and says in its
metadata which base and which adapter it was made for. Where either is another one, the file says nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.errors import AdapterError, CheckpointError
from dora_serve.safetensors_file import TensorEntry, WholeFile, encode_header, open_safetensors, read_bytes

FILE_NAME = "norm_scale.safetensors"
FORMAT = "dora-serve norm_scale 1"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_SAMPLES, _SAMPLE_BYTES = 16, 256


@dataclass(frozen=True)
class NormScales:
    """scales (out,) by the adapter's name of each module. base: the fingerprint of the base they were made for."""

    scales: Mapping[str, Tensor]
    base: str


def fingerprint(base: ShardedCheckpoint | Path) -> str:
    """What tells one base from another: the name, dtype, shape and 16 evenly spread samples of every tensor.

    The files that the tensors lie in do not count. Reads 4 kB a tensor, so that a base of any size takes no time.

    Raises CheckpointError for a folder that holds no safetensors checkpoint.
    """
    checkpoint = open_checkpoint(base) if isinstance(base, Path) else base
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        entry = checkpoint.tensors[name]
        digest.update(json.dumps([name, str(entry.dtype), list(entry.shape)]).encode())
        for sample in _samples(entry):
            digest.update(sample)
    return digest.hexdigest()


def _samples(entry: TensorEntry) -> Iterable[bytearray]:
    if entry.nbytes <= _SAMPLES * _SAMPLE_BYTES:
        yield read_bytes(entry.path, entry.start, entry.stop)
        return
    for number in range(_SAMPLES):
        start = entry.start + (entry.nbytes - _SAMPLE_BYTES) * number // (_SAMPLES - 1)
        yield read_bytes(entry.path, start, start + _SAMPLE_BYTES)


def write_norm_scales(folder: Path, scales: Mapping[str, Tensor], base: str) -> None:
    """Write the file into the folder of an adapter that is complete otherwise. base: its `fingerprint`."""
    tensors = {f"{module}.norm_scale": scale.to(torch.float32) for module, scale in scales.items()}
    metadata = {"format": FORMAT, "base": base, "adapter": _adapter_digest(folder)}
    with (folder / FILE_NAME).open("wb") as file:
        file.write(encode_header({name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}, metadata))
        for one in tensors.values():
            file.write(one.numpy().tobytes())


def read_norm_scales(folder: Path) -> NormScales | None:
    """The norm scales beside an adapter; None where there are none, or they are those of other weights.

    Raises AdapterError where the file is corrupt.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        file = open_safetensors(path)
        if file.metadata.get("format") != FORMAT or file.metadata.get("adapter") != _adapter_digest(folder):
            return None
        whole = WholeFile(file)
        scales = {
            name.removesuffix(".norm_scale"): whole.read(entry)
            for name, entry in file.tensors.items()
            if entry.dtype == torch.float32 and len(entry.shape) == 1
        }
    except CheckpointError as error:
        raise AdapterError(error.message, remedy=f"Make {FILE_NAME} anew, or remove it.", path=str(path)) from error
    if any(not torch.isfinite(scale).all() for scale in scales.values()):
        raise AdapterError(
            f"{str(path)!r} holds values that are not finite.", remedy="Make it anew, or remove it.", path=str(path)
        )
    return NormScales(scales, file.metadata.get("base", ""))


def _adapter_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _ADAPTER_FILES:
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
