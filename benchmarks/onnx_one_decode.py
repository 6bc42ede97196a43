"""One route's decoding in a process of its own: tokens a second by batch, as JSON; with one thread, a CPU-second.

PYTHON -P benchmarks/onnx_one_decode.py reading|transformers|onnx|genai FOLDER TOKENS ROUNDS THREADS

Greedy, on a cache, after the same prompt, which is not timed; float32 activations; medians. transformers with its
default attention (sdpa).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BATCHES = (1, 8)
PROMPT_TOKENS, MOST_TOKENS = 38, 256


def main() -> None:
    route, folder, (tokens, rounds, threads) = sys.argv[1], Path(sys.argv[2]), map(int, sys.argv[3:])
    # With one thread that of the processor, which what else runs disturbs less.
    clock = time.process_time if threads == 1 else time.perf_counter
    make = {"reading": reader, "transformers": transformers_decoder, "onnx": onnx_decoder, "genai": genai_decoder}[
        route
    ](folder, threads)
    speeds = {}
    for batch in BATCHES:
        taken = []
        for _ in range(rounds + 1):  # the first round warms up
            decode = make(batch)
            began = clock()
            decode(tokens)
            taken.append(clock() - began)
        speeds[batch] = batch * tokens / statistics.median(taken[1:])
    print(json.dumps(speeds))


Decoders = Callable[[int], Callable[[int], None]]
"""Reads the prompt, for a batch of rows, and gives what decodes so many tokens after it."""


def reader(folder: Path, threads: int) -> Decoders:
    """Not a decoder: what it reads for a token, every weight once in float32, by a product with a vector. No decoder
    of one row is faster, and none of several rows that computes nothing."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)
    numbers = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            numbers += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    weights, vector = torch.ones(numbers // 1024, 1024), torch.ones(1024)

    def make(batch: int) -> Callable[[int], None]:
        def decode(tokens: int) -> None:
            for _ in range(tokens):
                weights @ vector

        return decode

    return make


def transformers_decoder(folder: Path, threads: int) -> Decoders:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def make(batch: int) -> Callable[[int], None]:
        with torch.inference_mode():
            prompt = torch.arange(100, 100 + PROMPT_TOKENS).repeat(batch, 1)
            first = model(input_ids=prompt, use_cache=True)

        @torch.inference_mode()
        def decode(tokens: int) -> None:
            output = first
            for _ in range(tokens):
                following = output.logits[:, -1:].argmax(-1)
                output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)

        return decode

    return make


def onnx_decoder(folder: Path, threads: int) -> Decoders:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    pasts = [node for node in session.get_inputs() if node.name.startswith("past_key_values")]
    outputs = [node.name for node in session.get_outputs()]

    def make(batch: int) -> Callable[[int], None]:
        def step(ids: Any, past: Mapping[str, Any], length: int) -> tuple[Any, Mapping[str, Any]]:
            given = {
                "input_ids": ids,
                "position_ids": np.tile(np.arange(length, length + ids.shape[1]), (batch, 1)),
                "attention_mask": np.ones((batch, length + ids.shape[1]), np.int64),
            }
            got = dict(zip(outputs, session.run(outputs, {**given, **past}), strict=True))
            following = got["logits"][:, -1:].argmax(-1)
            return following, {node.name: got[node.name.replace("past_key_values", "present")] for node in pasts}

        empty = {node.name: np.zeros((batch, node.shape[1], 0, node.shape[3]), np.float32) for node in pasts}
        first = step(np.tile(np.arange(100, 100 + PROMPT_TOKENS), (batch, 1)), empty, 0)

        def decode(tokens: int) -> None:
            ids, past = first
            for length in range(PROMPT_TOKENS, PROMPT_TOKENS + tokens):
                ids, past = step(ids, past, length)

        return decode

    return make


def genai_decoder(folder: Path, threads: int) -> Decoders:
    """Run by the Python of ONNX Runtime GenAI's environment."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    session = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)

    def make(batch: int) -> Callable[[int], None]:
        params = og.GeneratorParams(model)
        length = PROMPT_TOKENS + MOST_TOKENS
        params.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.tile(np.arange(100, 100 + PROMPT_TOKENS, dtype=np.int32), (batch, 1)))
        generator.generate_next_token()  # from the prompt's logits

        def decode(tokens: int) -> None:
            for _ in range(tokens):
                generator.generate_next_token()

        return decode

    return make


if __name__ == "__main__":
    main()
