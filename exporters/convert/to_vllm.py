"""An adapter for dora-serve's vLLM plugin: PEFT's folder, and for a DoRA its norm scales on one base beside it."""

from __future__ import annotations

from dataclasses import replace

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.norm_scale_file import FILE_NAME, NormScales, fingerprint
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.resolve import plan_merge
from dora_serve.stored_norm_scales import stored_norm_scales
from exporters.convert.meaning import Plain
from exporters.convert.to_peft import to_peft
from exporters.convert.written import Written


def to_vllm(
    given: Plain, base: str | None, checkpoint: ShardedCheckpoint, on_progress: OnProgress = ignore_progress
) -> Written:
    """The files of an adapter. base: what to name as the model that it was trained on; checkpoint: its tensors.

    Raises UnmergeableError, with everything that PEFT cannot say, PlanError.
    """
    written = to_peft(given, base)
    if given.adapter.method != "DoRA":
        return replace(written, notes=(*written.notes, "It is a plain LoRA, which needs no norm scales."))
    scales = stored_norm_scales(plan_merge(checkpoint, given.adapter), on_progress)
    note = f"{FILE_NAME} holds for this base alone: beside another one the server takes the norms anew."
    return replace(written, norm_scales=NormScales(scales, fingerprint(checkpoint)), notes=(*written.notes, note))
