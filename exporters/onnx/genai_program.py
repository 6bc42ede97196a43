"""Run by the Python that onnxruntime-genai is in, which need not have this package: only its file.

PYTHON genai_program.py describe    version and architectures of the builder, as JSON
PYTHON genai_program.py generate    greedy tokens; a JSON object on standard input, a list of lists on the output
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path

_ARCHITECTURE = re.compile(r'"(\w+(?:ForCausalLM|ForConditionalGeneration|LMHeadModel|ForConditionalGen))"')


def describe() -> dict[str, object]:
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or found.origin is None:
        raise SystemExit("No module named onnxruntime_genai")
    builder = Path(found.origin).parent / "models" / "builder.py"
    architectures = sorted(set(_ARCHITECTURE.findall(builder.read_text(encoding="utf-8"))))
    version = next(
        importlib.metadata.version(name)
        for name in ("onnxruntime-genai", "onnxruntime-genai-cuda")
        if _is_installed(name)
    )
    return {"version": version, "architectures": architectures}


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def generate(folder: str, prompts: list[list[int]], count: int, adapter: str | None = None) -> list[list[int]]:
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(folder)
    # The runtime takes trailing padding off a prompt, and the token that pads often is one that ends a text.
    config.overlay('{"model": {"pad_token_id": -1}}')
    model = og.Model(config)
    adapters = og.Adapters(model)
    if adapter is not None:
        adapters.load(adapter, "adapter")
    answers = []
    for prompt in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + count, do_sample=False)
        generator = og.Generator(model, params)
        if adapter is not None:
            generator.set_active_adapter(adapters, "adapter")
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        tokens: list[int] = []
        while len(tokens) < count:
            # The likeliest token is fed back by hand, so that an end token ends nothing.
            tokens.append(int(np.asarray(generator.get_logits()).reshape(-1).argmax()))
            if len(tokens) < count:
                generator.append_tokens(np.array([[tokens[-1]]], dtype=np.int32))
        answers.append(tokens)
    return answers


if __name__ == "__main__":
    if sys.argv[1] == "describe":
        sys.stdout.write(json.dumps(describe()))
    else:
        sys.stdout.write(json.dumps(generate(**json.load(sys.stdin))))
