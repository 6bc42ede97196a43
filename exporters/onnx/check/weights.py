"""Every weight of a graph, bit for bit, against the checkpoint's tensors."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.safetensors_file import read_tensor
from exporters.onnx.check.answers import Weights
from exporters.onnx.weight_form import TRANSPOSED

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    Array: TypeAlias = NDArray[Any]


def compare_weights(onnx_path: Path, model_folder: Path, model: PreTrainedModel, failures: list[str]) -> Weights:
    """Every float initializer that is a matrix, or has a parameter's name, against the checkpoint's tensors."""
    import onnx_ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    loaded = model.state_dict()
    try:
        initializers = onnx_ir.load(onnx_path).graph.initializers
    except DecodeError:
        failures.append("The graph is not an ONNX file.")
        return Weights(0, 0)
    weights = {
        name: value.const_value
        for name, value in initializers.items()
        if value.const_value is not None
        and not value.is_graph_input()  # a default that is fed over, not a weight
        and value.const_value.dtype.is_floating_point()
        and (len(value.const_value.shape) > 1 or name in loaded)
    }
    outside = sorted({str(place) for tensor in weights.values() if (place := _outside(tensor)) is not None})
    if outside:
        failures.append(f"Weights lie outside the model's folder, in {', '.join(outside)}.")
        return Weights(len(weights), 0)
    checkpoint = open_checkpoint(model_folder)
    digests = _checkpoint_digests(checkpoint, {tuple(tensor.shape.numpy()) for tensor in weights.values()})
    unequal = [name for name, tensor in weights.items() if not _equals(name, tensor, checkpoint, digests, loaded)]
    for tensor in weights.values():
        if isinstance(tensor, onnx_ir.ExternalTensor):
            tensor.release()  # a view that somebody still holds would keep the file in memory
    if unequal:
        failures.append(
            f"{len(unequal)} of {len(weights)} weights in the graph do not equal the checkpoint's, such as "
            f"{', '.join(unequal[:3])}."
        )
    return Weights(len(weights), len(weights) - len(unequal))


def _outside(tensor: onnx_ir.TensorProtocol) -> str | None:
    """Where the tensor's data lies, unless that is the graph itself or a file beside it."""
    location = getattr(tensor, "location", None)
    return None if location is None or PurePath(location).name == str(location) else str(location)


def _checkpoint_digests(checkpoint: ShardedCheckpoint, shapes: set[tuple[int, ...]]) -> dict[bytes, set[str]]:
    """Digests of the checkpoint's tensors in float32, and of matrices' transposes, to their names; one at a time.

    shapes: of the weights to look for; what has another is left out.
    """
    digests: dict[bytes, set[str]] = {}
    for name, entry in checkpoint.tensors.items():
        turned = (*entry.shape[:-2], *entry.shape[:-3:-1])
        if not {entry.shape, turned} & shapes or not entry.dtype.is_floating_point:
            continue
        tensor = read_tensor(entry).float()
        if entry.shape in shapes:
            digests.setdefault(_digest(tensor.numpy()), set()).add(name)
        if turned in shapes and len(turned) > 1:
            digests.setdefault(_digest(tensor.mT.contiguous().numpy()), set()).add(name + TRANSPOSED)
    return digests


def _equals(
    name: str,
    tensor: onnx_ir.TensorProtocol,
    checkpoint: ShardedCheckpoint,
    digests: Mapping[bytes, set[str]],
    loaded: Mapping[str, torch.Tensor],
) -> bool:
    """Whether an initializer is its tensor of the checkpoint, or any where its name says nothing."""
    try:
        array = tensor.numpy()
    except (OSError, ValueError):  # the file is not there or too short
        return False
    parameter = name.removesuffix(TRANSPOSED)
    if found := digests.get(_digest(array)):
        return parameter not in checkpoint.tensors or name in found
    # What transformers makes of several tensors, such as a stack of experts, is in no file.
    expected = loaded.get(parameter)
    return expected is not None and _digest(array) == _digest(expected.cpu().numpy())


def _digest(array: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B") if array.size else b"").digest()


def storage_dtype(model_folder: Path) -> torch.dtype:
    """The dtype that most of the checkpoint's elements have."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for entry in open_checkpoint(model_folder).tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.nbytes // entry.dtype.itemsize
    return sizes.most_common(1)[0][0] if sizes else torch.float32
