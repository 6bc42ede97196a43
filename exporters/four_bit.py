"""A merged model as bitsandbytes stores it, in four bits, with what that costs measured.

Written as `Params4bit` saves itself (bitsandbytes 0.50, functional.QuantState.as_dict), so transformers loads it as any
model that was saved quantized. Peak memory: a block of values, and the absmax of one tensor's blocks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.checkpoint import CONFIG_NAME, ShardedCheckpoint, open_checkpoint, side_files
from dora_serve.comparison import Comparison
from dora_serve.errors import CheckpointError
from dora_serve.forward_check import measure_loss
from dora_serve.forward_report import ForwardReport
from dora_serve.progress import OnProgress, Progress
from dora_serve.quantized.base import quantize_on_load
from dora_serve.quantized.codings import Quantization, QuantizedOnLoad, Transposed
from dora_serve.quantized.decode import open_values
from dora_serve.quantized.quantize import (
    NESTED_BLOCKSIZE,
    BlockScales,
    block_scales,
    code_of,
    dynamic_code,
    nearest_codes,
)
from dora_serve.quantized.view import dense_view
from dora_serve.reference_weight import read_elements
from dora_serve.safetensors_file import TensorEntry, encode_header

_STEP = 1 << 20
_STATE_BYTES = 256
"""Room for a quant_state, whose length depends on a number that is known only once a tensor has been read."""


@dataclass(frozen=True)
class FourBitExport:
    """What was written and what it costs.

    relative_error: ||deq(Wq) - W'|| / ||W'|| over all weights that were quantized; worst: the largest of one, and its
    name. differing: elements that do not decode to what they should. logits: of the quantized model against the
    unmerged one's, None where no forward was run.
    """

    label: str
    tensors: int
    nbytes: int
    relative_error: float
    worst: tuple[str, float]
    differing: int
    logits: Comparison | None


def export_four_bit(
    merged: Path,
    out: Path,
    quantization: Quantization,
    *,
    metadata: Mapping[str, str],
    forward: ForwardReport | None,
    device: str,
    on_progress: OnProgress,
) -> FourBitExport:
    """Write `out` from the dense folder `merged`, and compare it with that and with the unmerged model's logits.

    Raises what `quantize_on_load` raises; OSError for a disk that is full.
    """
    dense = open_checkpoint(merged)
    quantized = quantize_on_load(dense, quantization).checkpoint
    done, total = 0, sum(entry.nbytes for entry in dense.tensors.values())

    def advance(nbytes: int, stage: str) -> None:
        nonlocal done
        done += nbytes
        on_progress(Progress(stage, done, total))

    weight_map: dict[str, str] = {}
    for name, file in quantized.files.items():
        layout = {part: where for entry in file.tensors.values() for part, where in _layout(entry).items()}
        weight_map |= dict.fromkeys(layout, name)
        with (out / name).open("wb") as target:
            target.write(encode_header(layout, metadata))
            for entry in file.tensors.values():
                for data in _data(entry):
                    target.write(data.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                advance(dense.tensors[entry.name].nbytes, "quantizing")
    _write_beside(dense, out, weight_map, _config(dense, quantization))
    done = 0
    view = dense_view(open_checkpoint(out))
    errors: dict[str, tuple[float, float]] = {}
    differing = 0
    for name, entry in quantized.tensors.items():
        if entry.coding is not None:
            differing += _differing(view.tensors[name], entry)
            errors[name] = _squares(view.tensors[name], dense.tensors[name])
        advance(dense.tensors[name].nbytes, "checking the codes")
    relative = {name: sqrt(error / norm) if norm else 0.0 for name, (error, norm) in errors.items()}
    norm = sum(norm for _, norm in errors.values())
    return FourBitExport(
        label=quantization.label,
        tensors=len(errors),
        nbytes=sum(path.stat().st_size for path in out.glob("*.safetensors")),
        relative_error=sqrt(sum(error for error, _ in errors.values()) / norm) if norm else 0.0,
        worst=max(relative.items(), key=lambda item: item[1]),
        differing=differing,
        logits=measure_loss(view, forward, device) if forward is not None and forward.ran else None,
    )


def _coded(entry: TensorEntry) -> tuple[TensorEntry, QuantizedOnLoad] | None:
    """The entry as it is quantized, which for a Conv1D is the other way round, and its coding."""
    turned = entry.coding.source if isinstance(entry.coding, Transposed) else entry
    return (turned, turned.coding) if isinstance(turned.coding, QuantizedOnLoad) else None


def _layout(entry: TensorEntry) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of all that is stored of a tensor, in the order of `_data`."""
    coded = _coded(entry)
    if coded is None:
        return {entry.name: (entry.dtype, entry.shape)}
    count, quantization = prod(entry.shape), coded[1].quantization
    blocks, name = -(-count // quantization.blocksize), entry.name
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.uint8, ((count + 1) // 2, 1)),
        f"{name}.absmax": (torch.uint8 if quantization.double else torch.float32, (blocks,)),
        f"{name}.quant_map": (torch.float32, (16,)),
    }
    if quantization.double:
        layout[f"{name}.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCKSIZE),))
        layout[f"{name}.nested_quant_map"] = (torch.float32, (256,))
    layout[f"{name}.quant_state.bitsandbytes__{quantization.kind}"] = (torch.uint8, (_STATE_BYTES,))
    return layout


def _data(entry: TensorEntry) -> Iterator[Tensor]:
    coded = _coded(entry)
    count = prod(entry.shape)
    if coded is None:
        read = open_values(entry)
        for start in range(0, count, _STEP):
            yield read(start, min(start + _STEP, count))
        return
    turned, coding = coded
    quantization, read = coding.quantization, open_values(coding.source)
    scales = block_scales(read, count, quantization)
    step = _STEP // quantization.blocksize * quantization.blocksize
    for start in range(0, count, step):
        values = read(start, min(start + step, count)).float()
        codes = nearest_codes(values, scales.absmax, start // quantization.blocksize, quantization)
        if len(codes) % 2:
            # bitsandbytes fills the last byte with the code of zero.
            codes = torch.cat([codes, nearest_codes(torch.zeros(1), torch.ones(1), 0, quantization)])
        yield codes[::2] << 4 | codes[1::2]
    yield scales.absmax if scales.nested_codes is None else scales.nested_codes
    assert quantization.kind != "int8"
    yield code_of(quantization.kind)
    if scales.nested_absmax is not None:
        yield scales.nested_absmax
        yield dynamic_code()
    yield _state(turned, quantization, scales)


def _state(entry: TensorEntry, quantization: Quantization, scales: BlockScales) -> Tensor:
    facts: dict[str, object] = {
        "quant_type": quantization.kind,
        "blocksize": quantization.blocksize,
        "dtype": str(entry.dtype).removeprefix("torch."),
        "shape": list(entry.shape),
    }
    if scales.offset is not None:
        facts |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": scales.offset.item(),
        }
    return torch.tensor(list(json.dumps(facts).encode().ljust(_STATE_BYTES)), dtype=torch.uint8)


def _config(dense: ShardedCheckpoint, quantization: Quantization) -> dict[str, object]:
    dtype = str(dense.config.get("dtype") or dense.config.get("torch_dtype") or "float32")
    return {
        **dense.config,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": quantization.kind,
            "bnb_4bit_use_double_quant": quantization.double,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
        },
    }


def _write_beside(
    dense: ShardedCheckpoint, out: Path, weight_map: Mapping[str, str], config: Mapping[str, object]
) -> None:
    """The index, the configuration and the side files."""
    if dense.index is not None:
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (out / dense.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for relative in side_files(dense.folder):
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        if str(relative) != CONFIG_NAME:
            shutil.copyfile(dense.folder / relative, out / relative)
    (out / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _differing(written: TensorEntry, wanted: TensorEntry) -> int:
    """Elements in which what was written decodes to something else than was meant, by the verifier's decoder."""
    count = prod(wanted.shape)
    if (written.shape, written.dtype) != (wanted.shape, wanted.dtype):
        return count
    return sum(int((got != other).sum()) for got, other in _pairs(written, wanted))


def _squares(written: TensorEntry, dense: TensorEntry) -> tuple[float, float]:
    """||deq(Wq) - W'||^2 and ||W'||^2."""
    error = norm = 0.0
    for got, exact in _pairs(written, dense):
        error += float((got.double() - exact.double()).square().sum())
        norm += float(exact.double().square().sum())
    return error, norm


def _pairs(one: TensorEntry, other: TensorEntry) -> Iterator[tuple[Tensor, Tensor]]:
    count = prod(one.shape)
    for start in range(0, count, _STEP):
        stop = min(start + _STEP, count)
        yield read_elements(one, start, stop), read_elements(other, start, stop)


def require_four_bit(base: ShardedCheckpoint, dtypes: set[torch.dtype]) -> None:
    """Raise CheckpointError where bitsandbytes would not take the merged weights."""
    wrong = dtypes - {torch.float32, torch.bfloat16, torch.float16}
    floating = {dtype for dtype in wrong if dtype.is_floating_point}
    if floating:
        raise CheckpointError(
            f"bitsandbytes quantizes float32, bfloat16 and float16, and weights of {str(base.folder)!r} are "
            f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in floating))}.",
            remedy="Give another dtype with --dtype, for example --dtype bfloat16.",
            path=str(base.folder),
        )
