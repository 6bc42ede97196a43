"""An adapter as ONNX Runtime's own adapter file, for one exported base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_serve.adapter import PAPER_NORM, Adapter, LoraWeights
from dora_serve.errors import CheckpointError, OutputError, no_such_path
from dora_serve.magnitudes import RowLengths, require_plausible
from dora_serve.onnx_engine.slots import METADATA_KEY, SlotTable
from dora_serve.ops import row_norms
from dora_serve.progress import OnProgress, ignore_progress
from exporters.onnx.linears import Linear, find_linears
from exporters.onnx.loading import require
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.weight_blocks import weight_blocks
from exporters.onnx_adapters.fitting import SlotTensors, fit_adapter, slot_tensors

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class WrittenAdapter:
    """ranks: the least and the largest. method: LoRA or DoRA. base_sha256: the fingerprint of the export it fits."""

    file: str
    method: str
    slots: int
    ranks: tuple[int, int]
    bytes: int
    base_sha256: str


@dataclass(frozen=True)
class SlottedBase:
    """An exported base: its graph, without its weights, and what it says of its slots."""

    path: Path
    model: onnx_ir.Model
    table: SlotTable
    linears: Mapping[str, Linear]


def open_slotted(folder: Path) -> SlottedBase:
    """The base in a folder that `--to onnx-adapters` made, or in a graph file of one. Its weights are not read.

    Raises CheckpointError where there is none, or it has no slots.
    """
    require("onnx_ir")
    import onnx_ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = folder / MODEL_FILE if folder.is_dir() else folder
    remedy = "Make one with: dora-export merge ADAPTER --to onnx-adapters -o FOLDER"
    if not path.is_file():
        raise CheckpointError(no_such_path("The exported base", path), remedy=remedy, path=str(path))
    try:
        model = onnx_ir.load(path)
        said = model.metadata_props.get(METADATA_KEY)
        table = SlotTable.from_json(said) if said is not None else None
    except (DecodeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as an exported base: {error}.", remedy=remedy, path=str(path)
        ) from error
    if table is None:
        raise CheckpointError(f"{str(path)!r} has no adapter slots.", remedy=remedy, path=str(path))
    return SlottedBase(path, model, table, find_linears(model))


def write_adapter(
    adapter: Adapter, base: SlottedBase, path: Path, on_progress: OnProgress = ignore_progress
) -> WrittenAdapter:
    """Write `path`, an adapter file for `base`. Memory: the adapter, and a block of rows of one weight.

    Raises PlanError, before anything is written, for an adapter that does not fit the slots; AdapterError where its
    magnitudes may be m / ||V|| already and the user has not said so.
    """
    table = base.table
    fitted = fit_adapter(adapter, table, base.linears, base.path)
    values = {table.guard: _ort_value(torch.zeros(0), table.dtype)}
    sampled: list[tuple[float, Callable[[], RowLengths]]] = []
    for module, filled in slot_tensors(fitted, base.linears, on_progress):
        sampled += _magnitudes_of(fitted[module], filled, base.linears[module])
        slot, padded = table.slots[module], _padded(filled, table.rank)
        for name in ("lora_A", "lora_B", "norm_scale"):
            values[getattr(slot, name)] = _ort_value(getattr(padded, name), table.dtype)
    if not adapter.magnitudes_are_norms:
        require_plausible(sampled)
    _export(values, table, path)
    ranks = [weights.rank for weights in fitted.values()]
    return WrittenAdapter(
        file=path.name,
        method=adapter.method,
        slots=len(fitted),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        bytes=path.stat().st_size,
        base_sha256=table.fingerprint,
    )


def _magnitudes_of(
    weights: LoraWeights, filled: SlotTensors, linear: Linear
) -> list[tuple[float, Callable[[], RowLengths]]]:
    """The median of the magnitudes of a DoRA and the lengths of its rows, for `require_plausible`."""
    if weights.magnitude is None or weights.norm != PAPER_NORM:
        return []
    magnitude = weights.magnitude.load().double().abs()
    adapted = float((magnitude / filled.norm_scale.abs()).median())

    def lengths() -> RowLengths:
        return RowLengths(adapted, float(torch.cat([row_norms(rows) for _, rows in weight_blocks(linear)]).median()))

    return [(float(magnitude.median()), lengths)]


def _padded(filled: SlotTensors, rank: int | None) -> SlotTensors:
    """With zeros up to a fixed rank."""
    missing = 0 if rank is None else rank - filled.lora_A.shape[1]
    if not missing:
        return filled
    pad = torch.nn.functional.pad
    return SlotTensors(pad(filled.lora_A, (0, missing)), pad(filled.lora_B, (0, 0, 0, missing)), filled.norm_scale)


def _ort_value(tensor: torch.Tensor, dtype: str) -> Any:
    """A tensor rounded once to the dtype of the graph's slots, as ONNX Runtime holds it."""
    import onnxruntime

    rounded = tensor.to(getattr(torch, dtype)).contiguous()
    if rounded.dtype != torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(rounded.numpy())
    import ml_dtypes
    import onnx_ir

    bits = rounded.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx_ir.DataType.BFLOAT16.value)


def _export(values: Mapping[str, Any], table: SlotTable, path: Path) -> None:
    import onnxruntime

    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(int(table.fingerprint[:7], 16))
    file.set_parameters(dict(values))
    try:
        file.export_adapter(str(path))
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise OutputError(f"The adapter file {str(path)!r} cannot be written: {error}.", path=str(path)) from error
