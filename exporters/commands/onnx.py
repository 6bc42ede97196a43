"""The options of `merge --to onnx` and `--to onnx-adapters`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporters.onnx.options import OnnxOptions

_FLAGS = {
    "opset": "--opset",
    "onnx_dtype": "--onnx-dtype",
    "quantize": "--quantize",
    "max_kl": "--max-kl",
    "provider": "--provider",
    "runtime": "--runtime",
    "genai_python": "--genai-python",
}


def add(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for --to onnx and onnx-adapters")
    group.add_argument(
        "--onnx-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of weights, activations and cache (float32); bfloat16 runs on CUDA only",
    )
    group.add_argument(
        "--quantize", choices=("int8", "int4"), help="weights in blocks of 32; the loss is measured and shown"
    )
    add_judging(group)
    group.add_argument("--opset", type=int, metavar="N", help="of the standard operators, 18 to 24 (23)")
    group.add_argument("--provider", choices=("cpu", "cuda"), help="of ONNX Runtime, what the graph is for (cpu)")
    group.add_argument(
        "--runtime", choices=("onnxruntime", "genai"), help="genai: the folder of ONNX Runtime GenAI, by its builder"
    )


def add_judging(parser: argparse._ActionsContainer) -> None:
    """What the verification of ONNX graphs is told."""
    parser.add_argument(
        "--genai-python",
        metavar="PYTHON",
        help="of the environment that onnxruntime-genai is in; default: $DORA_SERVE_GENAI_PYTHON",
    )
    parser.add_argument(
        "--max-kl",
        type=_nats,
        metavar="NATS",
        help="fail where the mean KL divergence of an ONNX graph from torch in float32 is larger",
    )


def misused(options: argparse.Namespace) -> str | None:
    given = [flag for name, flag in _FLAGS.items() if getattr(options, name) is not None]
    if given and options.to not in ("onnx", "onnx-adapters"):
        return f"{given[0]} says how to export with --to onnx"
    if options.genai_python is not None and options.runtime != "genai":
        return "--genai-python is for --runtime genai"
    if options.runtime == "genai" and options.opset is not None:
        return "--opset is not for --runtime genai, whose builder chooses it"
    if options.max_kl is not None and options.no_verify:
        return "--max-kl is judged by the verification, which --no-verify leaves out"
    return None


def onnx_options(options: argparse.Namespace) -> OnnxOptions:
    from exporters.onnx.options import OnnxOptions

    return OnnxOptions(
        opset=options.opset or 23,
        dtype=options.onnx_dtype or "float32",
        quantize=options.quantize,
        provider=options.provider or "cpu",
        runtime=options.runtime or "onnxruntime",
        genai_python=options.genai_python,
    )


def _nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no KL divergence: a number of nats, 0 or more")
    return value
