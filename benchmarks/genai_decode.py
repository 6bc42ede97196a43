"""Decoding in ONNX Runtime GenAI, run by the Python of its environment: tokens a CPU-second by batch, as JSON.

PYTHON benchmarks/genai_decode.py FOLDER TOKENS ROUNDS
"""

from __future__ import annotations

import json
import statistics
import sys
import time

PROMPT_TOKENS = 38


def main() -> None:
    import numpy as np
    import onnxruntime_genai as og

    folder, tokens, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = og.Config(folder)
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    model = og.Model(config)
    speeds = {}
    for batch in (1, 8):
        prompt = np.tile(np.arange(100, 100 + PROMPT_TOKENS, dtype=np.int32), (batch, 1))
        taken = []
        for _ in range(rounds + 1):
            params = og.GeneratorParams(model)
            length = PROMPT_TOKENS + tokens + 1
            params.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
            generator = og.Generator(model, params)
            began = time.process_time()
            generator.append_tokens(prompt)
            for _ in range(tokens):
                generator.generate_next_token()
            taken.append(time.process_time() - began)
        speeds[f"batch {batch}"] = batch * tokens / statistics.median(taken[1:])
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
