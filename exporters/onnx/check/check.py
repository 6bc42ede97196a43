"""ONNX Runtime against torch: do the exported graphs compute what the model in the folder computes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve.errors import CheckpointError, no_such_path
from dora_serve.onnx_engine.genai_runner import is_genai
from exporters.onnx.architectures import architecture_of
from exporters.onnx.check.answers import Expected, Got, Inputs, Weights
from exporters.onnx.check.coded_weights import serve_codes
from exporters.onnx.check.comparing import compare, compare_exactly
from exporters.onnx.check.genai_runner import GenaiRunner
from exporters.onnx.check.memory import why_not_run
from exporters.onnx.check.onnx_side import Runner, run_onnx
from exporters.onnx.check.report import OnnxCheck
from exporters.onnx.check.row_weights import compare_rows, is_quantized_by_another
from exporters.onnx.check.session import Opening
from exporters.onnx.check.structure import check_structure
from exporters.onnx.check.torch_side import half_limits, run_torch
from exporters.onnx.check.weights import compare_weights, numbers_of, storage_dtype
from exporters.onnx.loading import load_model, quiet, require

if TYPE_CHECKING:
    from torch import Tensor


def check_onnx(
    folder: Path,
    model_folder: Path,
    samples: Sequence[Inputs],
    *,
    reference_logits: Sequence[Tensor] | None = None,
    device: str = "cpu",
    greedy_tokens: int = 16,
    max_kl: float | None = None,
    genai_python: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> OnnxCheck:
    """Compare the graphs in `folder` with the model they were made from, and with the unmerged model where its logits
    are given.

    Torch runs `model_folder` in float32 with eager attention, which shares nothing with the attention that was traced,
    and has left memory before ONNX Runtime starts. Logits of all prompts are held, so a prompt should have tens to
    hundreds of tokens.

    The tolerance follows from the graph's dtype. Torch's float32 and ONNX Runtime's are two evaluations of one
    expression in different orders, so both err by about as much as torch's float32 differs from its float64, at most
    over these prompts. Eight times that is allowed between them, because the largest of many errors varies by a few
    times, and at least 16 spacings of float32 at the largest logit; of KL 1e-8. In half precision four times as much is
    allowed as torch itself loses by computing in it. What quantizing loses has no tolerance: it is measured (kl,
    perplexity, top1). But every code is compared with the checkpoint's weight, and the graph, its activations left in
    floats, with torch on the numbers that the codes stand for, as strictly as a graph of whole weights.

    reference_logits: float32 (tokens, vocabulary) per prompt, of the unmerged model. ONNX Runtime may be no further
    from them than torch on the merged folder is, nor than one rounding of the weights explains, plus the tolerance.
    Rounding explains 3 times the effect of errors drawn uniformly within half a spacing of the checkpoint's dtype on
    every weight. So a fault that torch and ONNX share, both having read the folder wrongly, is seen as well.

    device: "cuda" puts torch on the GPU, and ONNX Runtime where it has its CUDA provider (with TF32 off).
    max_kl: fail above this mean KL divergence from torch's float32, in nats, in place of the dtype's own limit.
    genai_python: of the environment of onnxruntime-genai, for a folder of its builder; that runtime gives the greedy
    tokens then. Its weights have names and forms of their own, and are compared row by row.

    Where memory does not suffice for the model in torch, the graphs' weights and structure are compared all the same,
    and `not_run` says what was not. Raises ValueError for samples that cannot be compared, CheckpointError and
    UnavailableError as export_onnx does. What is wrong with the graphs is in `failures`.
    """
    require("onnx", "onnxruntime", "onnx_ir", "transformers")
    graphs = sorted(folder.glob("*.onnx"))
    if not graphs:
        raise CheckpointError(no_such_path("The ONNX model", folder / "model.onnx"))
    if not samples or not all(value.shape[-1] for sample in samples for value in sample.values()):
        raise ValueError("check_onnx needs at least one prompt, and none may be empty")
    if reference_logits is not None and len(reference_logits) != len(samples):
        raise ValueError(f"{len(reference_logits)} reference logits were given for {len(samples)} prompts")
    import torch

    tell = on_progress or (lambda message: None)
    architecture = architecture_of(model_folder)
    failures: list[str] = []
    with quiet(), torch.no_grad():
        tell("checking the graphs")
        dtype, quantize = numbers_of(graphs)
        genai = is_genai(folder)
        if not genai:  # its graphs use operators of ONNX Runtime's that ONNX's checker takes for its own
            check_structure(graphs, failures)
        too_large = why_not_run(model_folder, folder)
        if too_large is not None:
            weights = compare_any(graphs, model_folder, lambda name: None, failures)
            return _not_run(dtype, weights, too_large, len(samples), failures)
        tell("running torch in float32 and float64")
        # Eager everything: what the exporter traced is sdpa and batched_mm.
        model = load_model(model_folder, attention="eager", experts="eager")
        state: Mapping[str, Tensor] = model.state_dict()
        weights = compare_any(graphs, model_folder, state.get, failures)
        torch.nn.Module.to(model, device)
        stored = storage_dtype(model_folder) if reference_logits is not None else None
        expected = run_torch(model, samples, greedy_tokens, stored)
        del model, state
        if dtype != "float32":
            tolerance, kl_limit = half_limits(model_folder, getattr(torch, dtype), device, samples, expected)
            expected = replace(expected, tolerance=tolerance, kl_limit=kl_limit)
        if reason := _no_provider(dtype, device):
            return _not_run(dtype, weights, reason, len(samples), failures)
        coded = _run_coded(graphs, model_folder, dtype, device, samples) if quantize else None
        tell("running ONNX Runtime")

        def genai_runner(opening: Opening) -> Runner:
            return GenaiRunner(folder, architecture, opening, samples, genai_python)

        make = genai_runner if genai else None
        got: Got = run_onnx(folder, architecture, Opening(device), samples, greedy_tokens, failures, make)
        exact = None
        if coded is not None and got.answers:
            exactly = run_onnx(folder, architecture, Opening(device, exact=True), samples, 0, failures, make)
            exact = compare_exactly(coded, exactly, failures)
    return compare(
        expected,
        got,
        weights,
        samples,
        dtype=dtype,
        quantize=quantize,
        exact=exact,
        reference_logits=reference_logits,
        greedy_tokens=greedy_tokens,
        max_kl=max_kl,
        failures=failures,
    )


def _run_coded(
    graphs: Sequence[Path], model_folder: Path, dtype: str, device: str, samples: Sequence[Inputs]
) -> Expected | None:
    """What torch computes with the numbers that the codes stand for; None where some have no place in its model."""
    import torch

    model = load_model(model_folder, attention="eager", experts="eager")
    if serve_codes(graphs, model):
        return None
    torch.nn.Module.to(model, device)
    expected = run_torch(model, samples, 0, None)
    del model
    if dtype == "float32":
        return expected
    half = getattr(torch, dtype)
    tolerance, kl_limit = half_limits(
        model_folder, half, device, samples, expected, lambda model: serve_codes(graphs, model)
    )
    return replace(expected, tolerance=tolerance, kl_limit=kl_limit)


def compare_any(
    graphs: Sequence[Path], model_folder: Path, loaded: Callable[[str], Tensor | None], failures: list[str]
) -> Weights:
    """The weights of graphs, by their names where these are the model's, and row by row where they are not: those of
    ONNX Runtime GenAI's builder, and integers of another quantizer."""
    if is_genai(graphs[0].parent) or is_quantized_by_another(graphs):
        return compare_rows(graphs, model_folder, failures)
    return compare_weights(graphs, model_folder, loaded, failures)


def _no_provider(dtype: str, device: str) -> str | None:
    """Why graphs of that dtype are not run on that device."""
    import onnxruntime

    cuda = device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if dtype != "bfloat16" or cuda:
        return None
    return "bfloat16 graphs run on CUDA only, which is not here: the weights and the structure were compared."


def _not_run(dtype: str, weights: Weights, reason: str, prompts: int, failures: list[str]) -> OnnxCheck:
    return OnnxCheck(prompts, dtype, weights.total, weights.equal, not_run=(reason,), failures=tuple(failures))
