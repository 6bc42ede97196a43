"""The one in-memory form of an adapter, whatever trainer wrote it.

Every format's reader ends here and everything else starts here. Shapes are canonical: `in` and `out` are those of the
function the module computes, whatever way its weight is stored (formats.md 1.2):

    module            weight as stored     lora_A                lora_B      magnitude
    nn.Linear         (out, in)            (r, in)               (out, r)    (out,)
    HF Conv1D         (in, out)            (r, in)               (out, r)    (out,)
    nn.ConvNd         (out, in, *kernel)   (r, in * kernel)      (out, r)    (out,)
    nn.Embedding      (num, dim)           (r, num)              (dim, r)    (dim,)

so that the adapted weight, as an (out, in) matrix, is `V = W + scaling * lora_B @ lora_A` for LoRA and
`W' = magnitude / ||V|| * V` for DoRA with the norm over each output row (arXiv 2402.09353, section 4). Where a trainer
means another norm, `Norm` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "conv", "embedding"]
Axis = Literal["out", "in"]
RowOrder = Literal["base", "torchtune", "torchtune_export", "megatron_qkv", "megatron_gate_up"]
ReplacementRole = Literal["modules_to_save", "bias", "base_layer", "beside"]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when asked for. Peak memory: that of what `load` returns, while it is held."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor] = field(repr=False, compare=False)

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """A LazyTensor over one already in memory."""
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> LazyTensor:
        """The same values under `view`, which must give `shape` and keep the dtype."""
        return LazyTensor(shape, self.dtype, lambda: view(self.load()))

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Norm:
    """What a magnitude is set against: `W' = magnitude / (||V|| + eps) * V`.

    axis: "out", a norm for each output, over its inputs (the paper, PEFT and most others); "in", one for each input,
    over all outputs and the kernel of a convolution (LyCORIS with wd_on_output=False, embeddings of mlx-lm), and then a
    magnitude is (in,), in being channels; None, no norm: the magnitude is m / ||V|| already (TensorRT-LLM).
    eps: what is added to the norm (LyCORIS). scales_bias: the bias is multiplied by the same factor (fsdp_qlora).
    """

    axis: Axis | None = "out"
    eps: float = 0.0
    scales_bias: bool = False


PAPER_NORM = Norm()


@dataclass(frozen=True)
class LoraWeights:
    """One adapted module.

    module: its path in the model that was trained, without the trainer's prefix.
    kind: what its tensors' names or shapes say it is; "linear" covers HF Conv1D, which only the base tells apart.
    lora_A (r, in), lora_B (out, r), magnitude (out,) or None for plain LoRA, lora_bias (out,) or None. A module of
    which only the magnitude was trained has rank 0, and its lora_A is (0, 0): only the base knows its inputs.
    norm: what the magnitude is set against. row_order: whose order the outputs are in, where that is not the base's;
    `row_order.in_base_order` puts them into it. scaling_is_stated: the files do not hold the scale, a user said it.
    """

    module: str
    kind: Kind
    lora_A: LazyTensor
    lora_B: LazyTensor
    scaling: float
    magnitude: LazyTensor | None = None
    lora_bias: LazyTensor | None = None
    norm: Norm = PAPER_NORM
    row_order: RowOrder = "base"
    scaling_is_stated: bool = False

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def of_width(self, width: int) -> LoraWeights:
        """The same with factors for `width` inputs: zeros of rank 1 where only the magnitude was trained."""
        if self.rank:
            return self
        dtype, out = self.lora_A.dtype, self.lora_B.shape[0]
        lora_a = LazyTensor((1, width), dtype, lambda: torch.zeros(1, width, dtype=dtype))
        lora_b = LazyTensor((out, 1), dtype, lambda: torch.zeros(out, 1, dtype=dtype))
        return replace(self, lora_A=lora_a, lora_B=lora_b)


@dataclass(frozen=True)
class ExpertLora:
    """LoRA on one 2-D or 3-D parameter of a module (PEFT `target_parameters`, formats.md 1.6).

    Which parameter is told by the base's shapes: `depth` 0 is the outermost wrapper, and wrappers nest in the order
    in which the module registers its parameters, the first innermost.
    lora_A (experts * r, in), expert slowest; lora_B (out, r * experts), expert fastest unless `expert_slowest`.
    """

    module: str
    depth: int
    lora_A: LazyTensor
    lora_B: LazyTensor
    rank: int
    scaling: float
    expert_slowest: bool
    parameters: tuple[str, ...]
    in_is_dim_1: bool | None


@dataclass(frozen=True)
class Replacement:
    """A whole trained tensor that takes the place of the base's, before any LoRA is applied to it.

    name: the parameter's path in the model that was trained, e.g. "score.weight". role: how it came to be whole; one
    "beside" the rest belongs to a part of the trained model that the base's class may not have.
    """

    name: str
    tensor: LazyTensor
    role: ReplacementRole


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding (PEFT `trainable_token_indices`): they replace, they are not added.

    module: the embedding's path; indices (n,), rows (n, dim).
    """

    module: str
    indices: tuple[int, ...]
    rows: LazyTensor


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, read and checked as far as that goes without its base.

    format: the reader's name. config: the adapter's own configuration, as it stands on disk.
    base, base_revision: what the adapter says it was trained on. notes: what a user should be told.
    keeps_ties: whether an update of an embedding reaches what is tied to it (mlx-lm), which with PEFT it does not.
    magnitudes_are_norms: whether the user has said so; else magnitudes that look like m / ||V|| are asked about.
    """

    path: Path
    format: str
    modules: tuple[LoraWeights, ...]
    experts: tuple[ExpertLora, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    token_rows: tuple[TokenRows, ...] = ()
    base: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    files: tuple[Path, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    keeps_ties: bool = False
    magnitudes_are_norms: bool = False

    @property
    def method(self) -> str:
        """ "DoRA" where any module has a magnitude, else "LoRA", else what it replaces."""
        if any(module.magnitude is not None for module in self.modules):
            return "DoRA"
        return "LoRA" if self.modules or self.experts else "full tensors"
