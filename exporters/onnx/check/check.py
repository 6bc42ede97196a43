"""ONNX Runtime against torch: does the exported graph compute what the model in the folder computes?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve.errors import CheckpointError, no_such_path
from exporters.onnx.architectures import architecture_of
from exporters.onnx.check.comparing import compare
from exporters.onnx.check.onnx_side import run_onnx
from exporters.onnx.check.report import OnnxCheck
from exporters.onnx.check.torch_side import run_torch
from exporters.onnx.check.weights import compare_weights, storage_dtype
from exporters.onnx.loading import load_model, quiet, require

if TYPE_CHECKING:
    import torch


def check_onnx(
    onnx_path: Path,
    model_folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    reference_logits: Sequence[torch.Tensor] | None = None,
    device: str = "cpu",
    greedy_tokens: int = 16,
    on_progress: Callable[[str], None] | None = None,
) -> OnnxCheck:
    """Compare `onnx_path` with the model it was made from, and with the unmerged model where its logits are given.

    Torch runs `model_folder` in float32 with eager attention, which shares nothing with the attention that was traced,
    and has left memory before ONNX Runtime starts. Logits of all prompts are held, so a prompt should have tens to
    hundreds of tokens.

    The tolerance follows from float32. Torch's float32 and ONNX Runtime's are two evaluations of one expression in
    different orders, so both err by about as much as torch's float32 differs from its float64, at most over these
    prompts. Eight times that is allowed between them, because the largest of many errors varies by a few times, and at
    least 16 spacings of float32 at the largest logit.

    reference_logits: float32 (tokens, vocabulary) per prompt, of the unmerged model. ONNX Runtime may be no further
    from them than torch on the merged folder is, nor than one rounding of the weights explains, plus the tolerance.
    Rounding explains 3 times the effect of errors drawn uniformly within half a spacing of the checkpoint's dtype on
    every weight. So a fault that torch and ONNX share, both having read the folder wrongly, is seen as well.

    device: "cuda" puts torch on the GPU, and ONNX Runtime where it has its CUDA provider (with TF32 off).

    Raises ValueError for prompts that cannot be compared, CheckpointError and UnavailableError as export_onnx does.
    What is wrong with the ONNX model is in `failures`.
    """
    require("onnxruntime", "onnx_ir", "transformers")
    if not onnx_path.is_file():
        raise CheckpointError(no_such_path("The ONNX model", onnx_path))
    if not prompts or not all(prompts):
        raise ValueError("check_onnx needs at least one prompt, and none may be empty")
    if reference_logits is not None and len(reference_logits) != len(prompts):
        raise ValueError(f"{len(reference_logits)} reference logits were given for {len(prompts)} prompts")
    import torch

    tell = on_progress or (lambda message: None)
    failures: list[str] = []
    with quiet(), torch.no_grad():
        tell("running torch in float32 and float64")
        # Eager everything: what the exporter traced is sdpa and batched_mm.
        model = load_model(model_folder, attention="eager", experts="eager")
        torch.nn.Module.to(model, device)
        weights = compare_weights(onnx_path, model_folder, model, failures)
        expected = run_torch(
            model, prompts, greedy_tokens, storage_dtype(model_folder) if reference_logits is not None else None
        )
        del model
        tell("running ONNX Runtime")
        got = run_onnx(onnx_path, device, architecture_of(model_folder), prompts, greedy_tokens, failures)
    return compare(expected, got, weights, reference_logits, greedy_tokens, failures)
