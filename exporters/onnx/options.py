"""What a user chooses of an ONNX export, and which choices go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dora_serve.errors import UnavailableError
from exporters.onnx.graph_cache import default_cache

OPSETS = range(18, 25)
QUANTIZED_BITS: Mapping[str, int] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class OnnxOptions:
    """opset: of the standard operators, 18 to 24. dtype: of weights, activations and cache. quantize: "int8" or
    "int4" for weights in blocks of 32 with a scale each, None for none. provider: of ONNX Runtime, what the graph is
    for. runtime: "genai" for the folder of ONNX Runtime GenAI, whose builder chooses the opset; genai_python: of the
    environment it is in. cache: the folder of traced graphs, None to trace anew and keep nothing.
    """

    opset: int = 23
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    quantize: Literal["int8", "int4"] | None = None
    provider: Literal["cpu", "cuda"] = "cpu"
    runtime: Literal["onnxruntime", "genai"] = "onnxruntime"
    genai_python: str | None = None
    cache: Path | None = field(default_factory=default_cache)

    @property
    def bits(self) -> int | None:
        return QUANTIZED_BITS[self.quantize] if self.quantize else None


def require_possible(options: OnnxOptions) -> None:
    """Raise UnavailableError for what no graph can be made of, or the provider cannot run."""
    if options.opset not in OPSETS:
        raise UnavailableError(
            f"ONNX opset {options.opset} was asked for; {OPSETS[0]} to {OPSETS[-1]} can be written.",
            remedy="Leave it at 23, or take 20 for an older runtime.",
            opset=options.opset,
        )
    if options.dtype == "bfloat16" and options.provider == "cpu":
        raise UnavailableError(
            "ONNX Runtime's CPU provider has no bfloat16 kernels, so it could not even load the graph.",
            remedy="Say --onnx-dtype float32 (every bfloat16 value is a float32 value), or --provider cuda.",
            dtype=options.dtype,
            provider=options.provider,
        )
    if options.quantize and options.dtype == "bfloat16":
        raise UnavailableError(
            f"ONNX Runtime has no kernel that looks {options.quantize} blocks up into bfloat16.",
            remedy=f"Say --quantize {options.quantize} --onnx-dtype float16 (or float32).",
            dtype=options.dtype,
            quantize=options.quantize,
        )
