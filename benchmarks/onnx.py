"""Every ONNX route beside transformers: decoding speed, size, export time and memory with a cold and a warm cache.

    python benchmarks/onnx.py BASE ADAPTER [--tokens 32] [--rounds 5] [--genai-python PYTHON]

BASE and ADAPTER are folders of a causal language model and a PEFT adapter on it, such as .cache/smollm2-135m and
examples/adapters/dates-dora. The adapter is merged once, and the merged model exported by each route. All routes
decode greedily on a cache from the same prompt, in turns, one thread, float32 activations; medians of tokens per CPU-
second. On an idle machine: a decoder waits for memory, which other work takes a share of. ONNX Runtime GenAI runs in
the Python of its own environment, by itself, and is timed there. Each export is a process of its own, whose largest
resident set is given above that of one that has only imported what it needs. The loss is the mean KL divergence from
torch in float32, on the verification's built-in prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# In place of this folder, whose onnx.py would be taken for the package.
sys.path[0] = str(ROOT)

from benchmarks.onnx_decode import PROMPT_TOKENS, onnx_decoder, torch_decoder  # noqa: E402
from benchmarks.page import write_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "onnx.json"
BATCHES = (1, 8)
ROUTES: Mapping[str, Mapping[str, Any]] = {
    "merged ONNX": {},
    "merged ONNX, int8": {"quantize": "int8"},
    "merged ONNX, int4": {"quantize": "int4"},
    "GenAI": {"runtime": "genai"},
    "GenAI, int8": {"runtime": "genai", "quantize": "int8"},
    "GenAI, int4": {"runtime": "genai", "quantize": "int4"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--genai-python")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        merged = folder / "merged"
        command = ["-m", "exporters.cli", "merge", options.adapter, "--base", options.base, "-o", merged, "--no-verify"]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        exports = {
            name: export(merged, folder, name, {**route, "genai_python": options.genai_python})
            for name, route in ROUTES.items()
        }
        decoders = {"transformers": lambda batch: torch_decoder(merged, batch)}
        for name in ROUTES:
            if not name.startswith("GenAI"):
                decoders[name] = onnx_route(folder / slug(name))
        print("exported; decoding", file=sys.stderr, flush=True)
        speeds = in_turns(decoders, options.tokens, options.rounds)
        for name in ROUTES:
            if name.startswith("GenAI"):
                speeds[name] = genai_speed(folder / slug(name), options.genai_python, options.tokens, options.rounds)
        losses = {name: loss(folder / slug(name), merged, options.genai_python) for name in ROUTES}
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "prompt_tokens": PROMPT_TOKENS,
        "tokens_per_cpu_second": speeds,
        "exports": exports,
        "losses": losses,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_table("onnx", table(result))
    print(table(result))
    return 0


def slug(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def export(merged: Path, folder: Path, name: str, route: Mapping[str, Any]) -> dict[str, Any]:
    """Twice, on an empty cache and on what that left; the seconds and the most memory of each."""
    runs = {}
    for cache in ("cold", "warm"):
        out = folder / slug(name)
        given = json.dumps({**route, "cache": str(folder / f"cache-{slug(name)}")})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.onnx_one_export", str(merged), str(out), given],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        runs[cache] = json.loads(done.stdout.splitlines()[-1])
    return runs


def onnx_route(folder: Path) -> Callable[[int], Callable[[int], None]]:
    return lambda batch: onnx_decoder(folder / "model.onnx", batch)


def in_turns(
    decoders: Mapping[str, Callable[[int], Callable[[int], None]]], tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens a CPU-second by route and batch."""
    speeds: dict[str, dict[str, float]] = {name: {} for name in decoders}
    for batch in BATCHES:
        ready = {name: make(batch) for name, make in decoders.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(rounds + 1):  # the first round warms up
            for name, decode in ready.items():
                began = time.process_time()
                decode(tokens)
                seconds[name].append(time.process_time() - began)
        for name, taken in seconds.items():
            speeds[name][f"batch {batch}"] = batch * tokens / statistics.median(taken[1:])
    return speeds


def genai_speed(folder: Path, python: str | None, tokens: int, rounds: int) -> dict[str, float]:
    from exporters.onnx.genai import genai_environment

    program = ROOT / "benchmarks" / "genai_decode.py"
    command = [genai_environment(python).python, "-P", str(program), str(folder), str(tokens), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    speeds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return speeds


def loss(folder: Path, merged: Path, python: str | None) -> dict[str, float | None]:
    from transformers import AutoTokenizer

    from dora_serve.prompts import BUILT_IN_PROMPTS
    from exporters.onnx.check.answers import token_inputs
    from exporters.onnx.check.check import check_onnx

    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = [tokenizer(prompt).input_ids for prompt in BUILT_IN_PROMPTS]
    found = check_onnx(folder, merged, token_inputs(rows), greedy_tokens=4, genai_python=python)
    return {"kl": found.kl, "top1": found.top1, "perplexity": found.perplexity, "torch": found.torch_perplexity}


def table(result: Mapping[str, Any]) -> str:
    speeds, exports, losses = result["tokens_per_cpu_second"], result["exports"], result["losses"]
    eager = speeds["transformers"]
    lines = [
        f"Tokens a CPU-second at one thread, {result['cpu']}, torch {result['torch']}, {result['date'][:10]}; a prompt "
        f"of {result['prompt_tokens']} tokens.",
        "",
        "| route | batch 1 | batch 8 | size | KL from torch | same top-1 | export, cold cache | warm | most memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, by_batch in speeds.items():
        cells = [f"{value:.1f} ({value / eager[batch]:.2f}x)" for batch, value in by_batch.items()]
        if name in exports:
            cold, warm = exports[name]["cold"], exports[name]["warm"]
            lost = losses[name]
            cells += [f"{cold['bytes'] / 1e6:,.0f} MB", f"{lost['kl']:.1e}", f"{lost['top1']:.1%}"]
            cells += [f"{cold['seconds']:.0f} s", f"{warm['seconds']:.1f} s", f"{cold['peak'] / 2**20:,.0f} MiB"]
        else:
            cells += ["", "", "", "", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
