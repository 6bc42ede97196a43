"""What a merge will do, tensor by tensor: frozen and printable, and made before a byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from dora_serve.adapter import PAPER_NORM, Adapter, LazyTensor, Norm
from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.safetensors_file import DTYPE_NAMES, TensorEntry


@dataclass(frozen=True)
class Region:
    """The part of a stored tensor that one update covers.

    The tensor is seen as a matrix of `width` columns (its last dimension; for a convolution all but its first); the
    region is its rows [start, stop). transposed: the matrix holds (in, out) rather than (out, in).
    """

    start: int
    stop: int
    width: int
    transposed: bool

    @property
    def out_in(self) -> tuple[int, int]:
        """(out, in) of the function that the region computes."""
        rows = self.stop - self.start
        return (self.width, rows) if self.transposed else (rows, self.width)


@dataclass(frozen=True)
class LoraEdit:
    """A LoRA or DoRA update of one region.

    lora_A (r, in), lora_B (out, r), magnitude (out,) or None; where `norm` runs along the outputs, it is (in,), of
    whose channels a convolution has as many columns each as its kernel has elements. module: for messages, the name in
    the adapter.
    """

    module: str
    region: Region
    lora_A: LazyTensor
    lora_B: LazyTensor
    scaling: float
    magnitude: LazyTensor | None
    norm: Norm = PAPER_NORM

    @property
    def scales_columns(self) -> bool:
        """Whether the magnitude belongs to the columns of the region as it is stored, not to its rows."""
        return (self.norm.axis == "in") != self.region.transposed

    @property
    def is_paper(self) -> bool:
        """Whether this is plain LoRA, or DoRA as the paper has it."""
        return self.magnitude is None or self.norm == PAPER_NORM


@dataclass(frozen=True)
class RowEdit:
    """Rows of the stored tensor that are replaced: indices (n,), rows (n, dim)."""

    module: str
    indices: tuple[int, ...]
    rows: LazyTensor


@dataclass(frozen=True)
class VectorEdit:
    """`scaling * vector` is added to elements [start, start + n) of a 1-D tensor (PEFT's lora_bias)."""

    module: str
    start: int
    scaling: float
    vector: LazyTensor


@dataclass(frozen=True)
class VectorScale:
    """Elements [start, start + n) of a 1-D tensor are multiplied by the factor of `edit`'s n outputs, m / ||V||.

    weight: the plan of the tensor that `edit` updates, which is what V is made of.
    """

    start: int
    edit: LoraEdit
    weight: TensorPlan


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: `source`, then the row replacements, then the updates, rounded once to `dtype`.

    source: the base's tensor, or one of the adapter's that takes its place.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: TensorEntry | LazyTensor
    loras: tuple[LoraEdit, ...] = ()
    rows: tuple[RowEdit, ...] = ()
    vectors: tuple[VectorEdit, ...] = ()
    scales: tuple[VectorScale, ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def is_copy(self) -> bool:
        """Whether the output's bytes are the base's."""
        plain = not (self.loras or self.rows or self.vectors or self.scales)
        if not plain or not isinstance(self.source, TensorEntry) or self.source.coding is not None:
            return False
        return self.source.dtype == self.dtype

    @property
    def action(self) -> str:
        """One word for what happens to the tensor."""
        if self.loras:
            return "DoRA" if any(edit.magnitude is not None for edit in self.loras) else "LoRA"
        if isinstance(self.source, LazyTensor) or self.rows:
            return "replaced"
        if self.vectors:
            return "lora_bias"
        if self.scales:
            return "scaled bias"
        if isinstance(self.source, TensorEntry) and self.source.coding is not None:
            return "dequantized"
        return "copied" if self.is_copy else "cast"


@dataclass(frozen=True)
class MergePlan:
    """A whole merge.

    tensors: in output order within each file; files: file name to tensor names. config_changes: what config.json
    gets, by path, None for a key that it loses. side_files: (from, relative to). untied: tensors that the base stores
    once and the output apart.
    """

    base: ShardedCheckpoint
    adapter: Adapter
    tensors: Mapping[str, TensorPlan]
    files: Mapping[str, tuple[str, ...]]
    config_changes: Mapping[tuple[str, ...], object]
    side_files: tuple[tuple[Path, Path], ...]
    untied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def edited(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.tensors.values() if not tensor.is_copy)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def summary(self) -> dict[str, object]:
        """The plan as plain values, for --json and for a person."""
        return {
            "base": str(self.base.folder),
            "adapter": str(self.adapter.path),
            "format": self.adapter.format,
            "method": self.adapter.method,
            "tensors": len(self.tensors),
            "actions": dict(Counter(tensor.action for tensor in self.tensors.values())),
            "bytes": self.nbytes,
            "files": {name: len(tensors) for name, tensors in self.files.items()},
            "dtypes": dict(Counter(DTYPE_NAMES[tensor.dtype] for tensor in self.tensors.values())),
            "quantization": self.base.quantization,
            "config_changes": {".".join(path): value for path, value in self.config_changes.items()},
            "untied": list(self.untied),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. unchanged: adapted tensors whose output equals the base's in every element."""

    plan: MergePlan
    seconds: float
    unchanged: tuple[str, ...] = ()
