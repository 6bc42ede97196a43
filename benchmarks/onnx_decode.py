"""Decoding with the exported ONNX graph beside transformers, in tokens per CPU-second at one thread.

    python benchmarks/onnx_decode.py BASE [--onnx FOLDER] [--tokens 32] [--rounds 5]

BASE is a Hugging Face folder of a causal language model. It is exported first unless --onnx names a folder that
`dora-export merge ... --to onnx` made. Both decode greedily on a cache from the same prompt, in turns; medians of CPU
seconds, which other work on the machine disturbs little. torch uses its default attention (sdpa), float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In place of this folder, whose onnx.py would be taken for the package.
sys.path[0] = str(ROOT)
RESULTS = ROOT / "benchmarks" / "results" / "onnx_decode.json"
PROMPT_TOKENS = 38


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    from exporters.onnx.export import export_onnx

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        graph = (options.onnx or Path(scratch)) / "model.onnx"
        if options.onnx is None:
            export_onnx(options.base, Path(scratch))
        table = measure(options.base, graph, options.tokens, options.rounds)
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "tokens_per_cpu_second": table,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0


def measure(base: Path, graph: Path, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """By batch size: tokens a CPU-second of both, and their ratio."""
    table = {}
    for batch in (1, 8):
        decoders = {"transformers": torch_decoder(base, batch), "onnx": onnx_decoder(graph, batch)}
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(rounds + 1):  # the first round warms up
            for name, decode in decoders.items():
                began = time.process_time()
                decode(tokens)
                seconds[name].append(time.process_time() - began)
        speeds = {name: batch * tokens / statistics.median(taken[1:]) for name, taken in seconds.items()}
        table[f"batch {batch}"] = {**speeds, "ratio": speeds["onnx"] / speeds["transformers"]}
    return table


def torch_decoder(base: Path, batch: int) -> Callable[[int], None]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    prompt = torch.arange(100, 100 + PROMPT_TOKENS).repeat(batch, 1)

    @torch.inference_mode()
    def decode(tokens: int) -> None:
        output = model(input_ids=prompt, use_cache=True)
        for _ in range(tokens):
            following = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)

    return decode


def onnx_decoder(graph: Path, batch: int) -> Callable[[int], None]:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    pasts = [node for node in session.get_inputs() if node.name.startswith("past_key_values")]
    empty = {node.name: np.zeros((batch, node.shape[1], 0, node.shape[3]), np.float32) for node in pasts}
    outputs = [node.name for node in session.get_outputs()]
    prompt = np.tile(np.arange(100, 100 + PROMPT_TOKENS), (batch, 1))

    def decode(tokens: int) -> None:
        ids, past, length = prompt, empty, 0
        for _ in range(tokens + 1):
            total = length + ids.shape[1]
            given = {
                "input_ids": ids,
                "position_ids": np.tile(np.arange(length, total), (batch, 1)),
                "attention_mask": np.ones((batch, total), np.int64),
            }
            got = dict(zip(outputs, session.run(outputs, {**given, **past}), strict=True))
            ids, length = got["logits"][:, -1:].argmax(-1), total
            past = {node.name: got[node.name.replace("past_key_values", "present")] for node in pasts}

    return decode


if __name__ == "__main__":
    sys.exit(main())
