"""The norm scales `m / ||W + s B A||` of an adapter, from the tensors of its base as they are stored.

Peak memory: a block of rows in float64.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from dora_serve.adapter import LazyTensor
from dora_serve.errors import AdapterError, UnmergeableError
from dora_serve.ops import add_delta, norm_scale
from dora_serve.plan import LoraEdit, MergePlan, TensorPlan
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.reference_weight import read_elements

_BLOCK_ELEMENTS = 1 << 22


def stored_norm_scales(plan: MergePlan, on_progress: OnProgress = ignore_progress) -> dict[str, Tensor]:
    """norm_scale (out,) in float64 of each module with a magnitude, by its name in the adapter.

    plan: of the adapter's merge into its base. A module that the base stores in several tensors has its outputs in
    their order.

    Raises AdapterError where the adapter has no magnitudes, UnmergeableError for a magnitude that is set against
    another norm than the paper's or a row of W + s B A that is zero.
    """
    found = [(tensor, edit) for tensor in plan.tensors.values() for edit in tensor.loras if edit.magnitude is not None]
    if not found:
        raise AdapterError(
            f"The adapter {str(plan.adapter.path)!r} is a {plan.adapter.method} and has no norm scales.",
            remedy="Serve it as it is.",
        )
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for number, (tensor, edit) in enumerate(found):
        on_progress(Progress("norm scales", number, len(found), "modules"))
        parts[edit.module].append(_norm_scale(tensor, edit))
    return {module: torch.cat(scales) for module, scales in parts.items()}


def _norm_scale(tensor: TensorPlan, edit: LoraEdit) -> Tensor:
    if not edit.is_paper:
        raise UnmergeableError(
            f"The magnitude of {edit.module} is set against another norm than the paper's.",
            remedy="Merge the adapter: `dora-export merge`.",
            module=edit.module,
        )
    assert edit.magnitude is not None
    lora_a, lora_b = edit.lora_A.load().double(), edit.lora_B.load().double()
    squares = torch.zeros(edit.region.out_in[0], dtype=torch.float64)
    source = tensor.source.load() if isinstance(tensor.source, LazyTensor) else tensor.source
    width = edit.region.width
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(edit.region.start, edit.region.stop, step):
        stop = min(start + step, edit.region.stop)
        weight = read_elements(source, start * width, stop * width).double().view(-1, width)
        here = slice(start - edit.region.start, stop - edit.region.start)
        if edit.region.transposed:
            squares += add_delta(weight.T, lora_a[:, here], lora_b, edit.scaling).square_().sum(dim=1)
        else:
            squares[here] = add_delta(weight, lora_a, lora_b[here], edit.scaling).square_().sum(dim=1)
    scale = norm_scale(edit.magnitude.load().double(), squares.sqrt_())
    if not torch.isfinite(scale).all():
        raise UnmergeableError(
            f"A row of W + s B A of {edit.module} is zero, and no magnitude can scale it.",
            remedy="Train the adapter again: this one has no meaning there.",
            module=edit.module,
        )
    return scale
