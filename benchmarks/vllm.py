"""vLLM with the plugin: what DoRA costs over LoRA, a mixed batch over one of LoRA, and the plugin over none.

    make vllm-venv && .venv-vllm/bin/python -m benchmarks.vllm

A measurement is ROUND_TOKENS greedy tokens for each of REQUESTS prompts in one batch of the demo base, and its time
that of the processor alone. What is compared is measured in one process, where vLLM's own functions are put back in the
place of the plugin's and these in theirs again: where the system has put the weights of a process makes it a few
hundredths faster or slower than its twin, which is more than what is looked for. There are COPIES processes all the
same, which take turns and go through their measurements forth and back. A ratio is the median of those of the
measurements that belong together: of one round and process. All are in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import FunctionType
from typing import Any

from benchmarks.page import write_table

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".cache" / "smollm2-135m"
ADAPTERS = ROOT / "examples" / "adapters"
RESULTS = ROOT / "benchmarks" / "results" / "vllm.json"
REQUESTS, ROUND_TOKENS = 16, 24
COPIES = 3
BATCHES: Mapping[str, Sequence[str | None]] = {
    "base": (None,),
    "lora": ("dates-lora",),
    "two_loras": ("dates-lora", "style-lora"),
    "dora": ("dates-dora",),
    "lora_and_dora": ("dates-lora", "dates-dora"),
    "base_lora_and_dora": (None, "dates-lora", "dates-dora"),
    "base_and_lora": (None, "dates-lora"),
}
WITHOUT_PLUGIN = ("base", "lora", "two_loras")
ROUND = [
    (kind, batch)
    for batch in BATCHES
    # So that what slows down or speeds up meanwhile falls on both alike.
    for kind in (("with", "without", "without", "with") if batch in WITHOUT_PLUGIN else ("with",))
]
RATIOS = (
    # What, of which engine and batch, over which, and the least that is wanted.
    ("dora over lora", ("with", "dora"), ("with", "lora"), 0.95),
    ("lora and dora over two loras", ("with", "lora_and_dora"), ("with", "two_loras"), 0.95),
    ("base, lora and dora over base and lora", ("with", "base_lora_and_dora"), ("with", "base_and_lora"), 0.95),
    ("base with the plugin over without", ("with", "base"), ("without", "base"), 0.99),
    ("lora with the plugin over without", ("with", "lora"), ("without", "lora"), 0.99),
)


def serve() -> None:
    """One engine, in a process of its own: reads `with` or `without` and a batch a line, answers with tokens a
    CPU-second."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    names = sorted({name for batch in BATCHES.values() for name in batch if name})
    loras = {name: LoRARequest(name, number, str(ADAPTERS / name)) for number, name in enumerate(names, start=1)}
    llm: Any = LLM(
        str(BASE),
        dtype=os.environ["BENCHMARK_DTYPE"],
        max_model_len=256,
        max_num_seqs=REQUESTS,
        enable_lora=True,
        max_loras=3,
        max_lora_rank=8,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=ROUND_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": [number + 5, *range(100, 115)]} for number in range(REQUESTS)]
    patched = list(patched_functions())
    if len(patched) < 10:
        raise SystemExit(f"the plugin is not there: {[name for _, name, _ in patched]}")
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        kind, name = line.split()
        for owner, attribute, function in patched:
            setattr(owner, attribute, function if kind == "with" else _of_vllm(function))
        batch = BATCHES[name]
        adapters = [batch[number % len(batch)] for number in range(REQUESTS)]
        requests = [loras[name] if name else None for name in adapters]
        began = time.process_time()
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        print(REQUESTS * ROUND_TOKENS / (time.process_time() - began), file=sys.stderr, flush=True)


def patched_functions() -> Iterator[tuple[Any, str, Any]]:
    """Whose, its name and the plugin's function: all of vLLM's that a step may call in another form. Those that load
    adapters stay as they are: they do not run here, and what they have read does not change."""
    modules = [module for name, module in sys.modules.items() if name.startswith("vllm.")]
    owners = {id(one): one for module in modules for one in (module, *filter(_is_class, vars(module).values()))}
    for owner in owners.values():
        for attribute, function in list(vars(owner).items()):
            if _is_patch(function) and attribute not in LOADING:
                yield owner, attribute, function


def _is_patch(function: Any) -> bool:
    from dora_serve.vllm_plugin import patches

    return isinstance(function, FunctionType) and function.__code__.co_filename == patches.__file__


def _of_vllm(function: Any) -> Any:
    """What a patch replaces, or several of one function."""
    return _of_vllm(function.__wrapped__) if _is_patch(function) else function


LOADING = ("activate_adapter", "_load_adapter", "__init__", "set_mapping", "set_lora")
"""What makes and fills what the others look at."""


def _is_class(value: Any) -> bool:
    return isinstance(value, type)


class Engine:
    """stderr carries the answers: vLLM talks on stdout."""

    def __init__(self, threads: int, dtype: str) -> None:
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "BENCHMARK_DTYPE": dtype,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm", "--engine"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._read(lambda line: line == "ready")

    def run(self, kind: str, batch: str) -> float:
        """Tokens a CPU-second. kind: with the plugin or without."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {batch}\n")
        self._process.stdin.flush()
        return float(self._read(_is_number))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # vLLM takes its time to end

    def _read(self, wanted: Any) -> str:
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            if wanted(line.strip()):
                return line.strip()
            said.append(line)
        raise SystemExit(f"an engine ended: {''.join(said[-30:])}")


def _is_number(line: str) -> bool:
    try:
        float(line)
    except ValueError:
        return False
    return True


def measure(rounds: int, threads: int, dtype: str) -> dict[str, Any]:
    engines = [Engine(threads, dtype) for _ in range(COPIES)]
    for kind, batch in dict.fromkeys(ROUND):  # adapters are loaded, kernels chosen
        for engine in engines:
            engine.run(kind, batch)
    found: dict[tuple[str, str], list[float]] = {one: [] for one in ROUND}
    for number in range(rounds):
        for engine in engines:
            engine.run(*ROUND[0])  # what the engine before has pushed out of the caches comes back
            taken: dict[tuple[str, str], list[float]] = {one: [] for one in found}
            for one in ROUND if number % 2 == 0 else ROUND[::-1]:
                taken[one].append(engine.run(*one))
            for one, speeds in taken.items():
                found[one].append(statistics.harmonic_mean(speeds))
        so_far = (f"{what} {_ratio(found[over], found[under]):.3f}" for what, over, under, _ in RATIOS)
        print(f"round {number + 1} of {rounds}: {', '.join(so_far)}", file=sys.stderr, flush=True)
    for engine in engines:
        engine.close()
    ratios = {
        what: {"median": _ratio(found[over], found[under]), "least_wanted": least}
        for what, over, under, least in RATIOS
    }
    return {
        "date": date.today().isoformat(),
        "machine": _machine(),
        "dtype": dtype,
        "threads": threads,
        "requests": REQUESTS,
        "tokens": ROUND_TOKENS,
        "rounds": rounds,
        "copies": COPIES,
        "tokens_per_cpu_second": {
            f"{engine} plugin, {batch}": {"median": statistics.median(values), "rounds": values}
            for (engine, batch), values in found.items()
        },
        "ratios": ratios,
    }


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def _machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {model or platform.processor()}"


def table(result: Mapping[str, Any]) -> str:
    lines = [
        f"SmolLM2-135M in {result['dtype']}, {result['requests']} requests of {result['tokens']} tokens in one batch, "
        f"medians of {result['rounds']} rounds in {result['copies']} processes, adapters of rank 4 on all "
        "linears; vLLM 0.32.0 for CPUs, "
        f"{result['threads']} thread"
        f"{'' if result['threads'] == 1 else 's'} of {result['machine']}, {result['date']}.",
        "",
        "| | tokens a CPU-second |",
        "|---|---:|",
    ]
    for name, values in result["tokens_per_cpu_second"].items():
        lines.append(f"| {name.replace('_', ' ')} | {values['median']:.1f} |")
    lines += ["", "| ratio | | wanted |", "|---|---:|---:|"]
    for name, values in result["ratios"].items():
        lines.append(f"| {name} | {values['median']:.3f} | {values['least_wanted']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="write no file")
    options = parser.parse_args()
    if options.engine:
        serve()
        return
    result = measure(options.rounds, options.threads, options.dtype)
    print(table(result))
    if not options.print:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_table("vllm", table(result))


if __name__ == "__main__":
    main()
