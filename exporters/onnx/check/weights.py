"""Every weight of the graphs, bit for bit, against the checkpoint's tensors; and that each is stored once."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.safetensors_file import read_tensor
from exporters.onnx.check.answers import Weights
from exporters.onnx.quantizing import dequantize_rows
from exporters.onnx.weight_form import TRANSPOSED, WeightForm, form_of

if TYPE_CHECKING:
    import onnx_ir

    Found: TypeAlias = Mapping[str, onnx_ir.TensorProtocol]

# A symmetric scale is the largest element of its block over the most negative integer, whose opposite is one too many:
# what would be there is a whole step away, and all else at most half of one.
_STEPS = 1e-3
_LARGE = 1 << 16
_COMPUTED = re.compile(r"val_\d+$")
"""What torch's exporter calls a value without a name in the model, such as a table of positions that was computed."""


def compare_weights(
    graphs: Sequence[Path],
    model_folder: Path,
    loaded: Callable[[str], Tensor | None],
    failures: list[str],
) -> Weights:
    """Every float initializer that is a matrix, or has a parameter's name, and every quantized one.

    loaded: the run-time tensor of a name as transformers has it, for what it makes of several stored ones.
    Peak memory: one tensor, a few times over.
    """
    checkpoint = open_checkpoint(model_folder)
    tensors: dict[str, onnx_ir.TensorProtocol] = {}
    for path in graphs:
        model = load_graph(path, failures)
        tensors.update(initializers_of(model) if model is not None else {})
    weights = {
        name: tensor
        for name, tensor in tensors.items()
        if form_of(name).bits is not None
        or (
            tensor.dtype.is_floating_point()
            and not _COMPUTED.match(name)
            and (_is_matrix(tensor) or name in checkpoint.tensors or loaded(name) is not None)
        )
    }
    outside = sorted({str(place) for tensor in weights.values() if (place := _outside(tensor)) is not None})
    if outside:
        failures.append(f"Weights lie outside the model's folder, in {', '.join(outside)}.")
        return Weights(len(weights), 0)
    whole = {name: tensor for name, tensor in weights.items() if form_of(name).bits is None}
    digests = _checkpoint_digests(checkpoint, whole)
    equal, places = 0, defaultdict[str, set[object]](set)
    unequal = []
    for name, tensor in weights.items():
        stored = read_initializer(tensor)
        if stored is None:
            unequal.append(name)
        elif form_of(name).bits is not None:
            fits = _is_quantized(form_of(name), stored, tensors, checkpoint, loaded)
            equal, unequal = (equal + 1, unequal) if fits else (equal, [*unequal, name])
        else:
            found = digests.get(_digest(stored), set())
            own = name.removesuffix(TRANSPOSED)
            fits = name in found if own in checkpoint.tensors else bool(found) or _is_loaded(name, stored, loaded)
            equal, unequal = (equal + 1, unequal) if fits else (equal, [*unequal, name])
            if stored.numel() * stored.itemsize >= _LARGE:
                for origin in {one.removesuffix(TRANSPOSED) for one in found} or {own}:
                    places[origin].add(getattr(tensor, "offset", name))
        release(tensor)
    if unequal:
        failures.append(
            f"{len(unequal)} of {len(weights)} weights in the graph do not equal the checkpoint's, such as "
            f"{', '.join(unequal[:3])}."
        )
    failures += _stored_twice(weights, places, checkpoint)
    return Weights(len(weights), equal)


def _stored_twice(weights: Found, places: Mapping[str, set[object]], checkpoint: ShardedCheckpoint) -> Iterator[str]:
    """Weights that the folder holds more often than the checkpoint does."""
    forms = [form_of(name) for name in weights]
    kinds = defaultdict[str, set[object]](set)
    for form in forms:
        kinds[form.parameter].add((form.transposed, form.bits))
    twice = {name for name, found in kinds.items() if len(found) > 1}
    # Tensors that are equal in the checkpoint itself may be two in the graph as well.
    by_places = Counter(frozenset(map(str, found)) for found in places.values() if len(found) > 1)
    for found, owners in by_places.items():
        if len(found) > owners:
            twice |= {name for name, offsets in places.items() if frozenset(map(str, offsets)) == found}
    if twice:
        yield f"{len(twice)} weights are stored more than once, such as {', '.join(sorted(twice)[:3])}."


def load_graph(path: Path, failures: list[str]) -> onnx_ir.Model | None:
    """A graph whose data is not read yet; a failure for a file that is none."""
    import onnx_ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx_ir.load(path)
    except DecodeError:
        failures.append(f"{path.name} is not an ONNX file.")
        return None


def initializers_of(model: onnx_ir.Model) -> dict[str, onnx_ir.TensorProtocol]:
    """Of a graph, by name. A default that is fed over is no weight."""
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and not value.is_graph_input()
    }


def _is_matrix(tensor: onnx_ir.TensorProtocol) -> bool:
    """Whether it is wide along two axes: a constant of shape arithmetic or of positions is so along one at most."""
    return sum(int(size) > 1 for size in tensor.shape.numpy()) > 1


def _outside(tensor: onnx_ir.TensorProtocol) -> str | None:
    """Where the tensor's data lies, unless that is the graph itself or a file beside it."""
    location = getattr(tensor, "location", None)
    return None if location is None or PurePath(location).name == str(location) else str(location)


def release(tensor: onnx_ir.TensorProtocol) -> None:
    """Let go of the mapped file."""
    import onnx_ir

    if isinstance(tensor, onnx_ir.ExternalTensor):
        tensor.release()  # a view that somebody still holds would keep the file in memory


def read_initializer(tensor: onnx_ir.TensorProtocol) -> Tensor | None:
    """A copy of the tensor, None where the file is not there or too short."""
    dtype = dtype_of(tensor)
    try:
        raw = bytearray(tensor.tobytes())
    except (OSError, ValueError):
        return None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def dtype_of(tensor: onnx_ir.TensorProtocol) -> torch.dtype:
    """Of a floating tensor or one of integers."""
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    dtype: torch.dtype = getattr(torch, names.get(tensor.dtype.name, tensor.dtype.name.lower()))
    return dtype


def _checkpoint_digests(checkpoint: ShardedCheckpoint, weights: Found) -> dict[bytes, set[str]]:
    """Digests of the checkpoint's tensors in the weights' dtypes, and of matrices' transposes, to their names."""
    shapes = {tuple(int(size) for size in tensor.shape.numpy()) for tensor in weights.values()}
    dtypes = {dtype_of(tensor) for tensor in weights.values()}
    digests: dict[bytes, set[str]] = {}
    for name, entry in checkpoint.tensors.items():
        turned = (*entry.shape[:-2], *entry.shape[:-3:-1])
        if not {entry.shape, turned} & shapes or not entry.dtype.is_floating_point:
            continue
        stored = read_tensor(entry)
        for dtype in dtypes:
            tensor = stored.to(dtype)
            if entry.shape in shapes:
                digests.setdefault(_digest(tensor), set()).add(name)
            if turned in shapes and len(turned) > 1:
                digests.setdefault(_digest(tensor.mT.contiguous()), set()).add(name + TRANSPOSED)
    return digests


def _is_loaded(name: str, stored: Tensor, loaded: Callable[[str], Tensor | None]) -> bool:
    """Whether a weight is what transformers makes of several tensors, such as a stack of experts."""
    form = form_of(name)
    expected = loaded(form.parameter)
    if expected is None:
        return False
    turned = (expected.mT if form.transposed else expected).cpu()
    return turned.shape == stored.shape and torch.equal(turned.to(stored.dtype), stored)


def _is_quantized(
    form: WeightForm,
    stored: Tensor,
    tensors: Found,
    checkpoint: ShardedCheckpoint,
    loaded: Callable[[str], Tensor | None],
) -> bool:
    """Whether integers and scales are those of the checkpoint's tensor: each integer the nearest one, the scale being
    that of the largest element of its block."""
    assert form.bits is not None
    entry = checkpoint.tensors.get(form.parameter)
    expected = read_tensor(entry).float() if entry is not None else loaded(form.parameter)
    values = tensors.get(WeightForm(form.parameter, form.transposed, form.bits, "values").name)
    scales = tensors.get(WeightForm(form.parameter, form.transposed, form.bits, "scales").name)
    if expected is None or values is None or scales is None:
        return False
    matrix = (expected.mT if form.transposed else expected).float().cpu().contiguous()
    scale = stored if form.part == "scales" else read_initializer(scales)
    if scale is None or scale.shape[:-1] != matrix.shape[:-1]:
        return False
    block = (scale.shape[-1], -1)
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % 32))
    if form.part == "scales":
        wanted = padded.unflatten(-1, block).abs().amax(-1) / (1 << (form.bits - 1))
        return torch.equal(scale.abs(), wanted.to(scale.dtype))  # exact but for the cast: a power of two divides
    codes = dequantize_rows(stored, torch.ones_like(scale), form.bits, matrix.shape[-1])
    steps = matrix / scale.float().repeat_interleave(32, -1)[..., : matrix.shape[-1]]
    wanted = torch.where(matrix == 0, 0.0, steps)  # a block of zeros has the scale 0
    # The scale was rounded to its dtype after the integers were chosen by it.
    slack = _STEPS + 2.0 ** (form.bits - 1) * torch.finfo(scale.dtype).eps
    top = 2 ** (form.bits - 1) - 1
    fits = ((wanted - codes).abs() <= 0.5 + slack) | ((codes == top) & (wanted > top) & (wanted <= top + 1 + slack))
    return bool(fits.all())


def _digest(tensor: Tensor) -> bytes:
    raw: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    return hashlib.sha256(raw).digest()


def storage_dtype(model_folder: Path) -> torch.dtype:
    """The dtype that most of the checkpoint's elements have."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in open_checkpoint(model_folder).tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.nbytes // entry.dtype.itemsize
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def numbers_of(graphs: Sequence[Path]) -> tuple[str, str | None]:
    """The dtype that most of the graphs' floating weights have, and how weights are quantized, as the nodes say."""
    import onnx_ir
    from google.protobuf.message import DecodeError

    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
    sizes: dict[str, int] = {}
    bits: set[int] = set()
    for path in graphs:
        try:
            graph = onnx_ir.load(path).graph
        except DecodeError:
            continue  # the structure's check says so
        for value in graph.initializers.values():
            kind = names.get(value.const_value.dtype.name) if value.const_value is not None else None
            if kind is not None and value.const_value is not None:
                sizes[kind] = sizes.get(kind, 0) + int(value.const_value.size)
        bits |= {int(node.attributes["bits"].as_int()) for node in graph if node.op_type == "MatMulNBits"}
    return max(sizes, key=lambda kind: sizes[kind], default="float32"), f"int{min(bits)}" if bits else None
