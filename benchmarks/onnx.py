"""Every ONNX route beside transformers: decoding speed, size, export time and memory with a cold and a warm cache.

    python benchmarks/onnx.py BASE ADAPTER [--tokens 32] [--rounds 5] [--genai-python PYTHON]

BASE and ADAPTER are folders of a causal language model and a PEFT adapter on it, such as .cache/smollm2-135m and
examples/adapters/dates-dora. The adapter is merged once, and the merged model exported by each route. All routes
decode greedily on a cache after the same prompt, which is not timed, each in processes of its own that take turns,
float32 activations: with one thread, in tokens a CPU-second, and with one for each core, in tokens a second; medians of
rounds, the faster of PASSES processes. On an idle machine: a decoder waits for memory, which other work takes a share
of. ONNX Runtime GenAI runs in the Python of its own environment. Each export is a process of its own, whose largest
resident set is given above that of one that has only imported what it needs. The loss is the mean KL divergence from
torch in float32, on the verification's built-in prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# In place of this folder, whose onnx.py would be taken for the package.
sys.path[0] = str(ROOT)

from benchmarks.onnx_one_decode import PROMPT_TOKENS  # noqa: E402
from benchmarks.page import write_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "onnx.json"
THREADS = tuple(sorted({1, os.cpu_count() or 1}))
PASSES = 2
READING = "the weights read once, in float32"
"""For comparison: no float32 decoder can be faster than that at batch 1."""
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

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        merged = folder / "merged"
        command = ["-m", "exporters.cli", "merge", options.adapter, "--base", options.base, "-o", merged, "--no-verify"]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        exports = {
            name: export(merged, folder, name, {**route, "genai_python": options.genai_python})
            for name, route in ROUTES.items()
        }
        print("exported; decoding", file=sys.stderr, flush=True)
        routes = {"transformers": merged, READING: merged, **{name: folder / slug(name) for name in ROUTES}}
        speeds = decode(routes, options.genai_python, options.tokens, options.rounds)
        losses = {name: loss(folder / slug(name), merged, options.genai_python) for name in ROUTES}
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "prompt_tokens": PROMPT_TOKENS,
        "tokens_per_second": speeds,
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


def decode(
    routes: Mapping[str, Path], genai_python: str | None, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens a second by route and case."""
    from exporters.onnx.genai import genai_environment

    found: dict[str, dict[str, list[float]]] = {name: {} for name in routes}
    for threads in (number for number in THREADS for _ in range(PASSES)):
        for name, folder in routes.items():
            genai = name.startswith("GenAI")
            kind = "genai" if genai else "onnx" if name in ROUTES else "reading" if name == READING else name
            python = genai_environment(genai_python).python if genai else sys.executable
            program = [python, "-P", str(ROOT / "benchmarks" / "onnx_one_decode.py"), kind, str(folder)]
            given = [*program, *map(str, (tokens, rounds, threads))]
            done = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True)
            for batch, speed in json.loads(done.stdout.splitlines()[-1]).items():
                case = f"{threads} thread{'' if threads == 1 else 's'}, batch {batch}"
                found[name].setdefault(case, []).append(speed)
    return {name: {case: max(taken) for case, taken in cases.items()} for name, cases in found.items()}


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
    speeds, exports, losses = result["tokens_per_second"], result["exports"], result["losses"]
    eager = speeds["transformers"]
    lines = [
        f"Tokens a second, {result['cpu']}, torch {result['torch']}, {result['date'][:10]}; a prompt of "
        f"{result['prompt_tokens']} tokens, which is not timed.",
        "",
        f"| route | {' | '.join(eager)} | size | KL from torch | same top-1 | export, cold cache | warm "
        "| most memory |",
        f"|---|{'---:|' * (len(eager) + 6)}",
    ]
    for name, by_case in speeds.items():
        cells = [f"{value:.1f} ({value / eager[key]:.2f}x)" for key, value in by_case.items()]
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
