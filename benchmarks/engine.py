"""The engine beside PEFT, measured in one run: decoding, mixed batches, loading, switching, memory.

    python benchmarks/engine.py BASE [--rank 16] [--tokens 24] [--rounds 5] [--dtype float32] [--device cpu] [--dry]

BASE is a Hugging Face folder of a causal language model. The adapters are made up with PEFT: LoRA and DoRA of one rank
on all linears, 8 of each, with B and the magnitudes moved at random. Every figure is the median of rounds in which all
contenders take turns, so that what else the machine does falls on all of them. Decoding is greedy and on a key-value
cache, PEFT's through its own model's forward with transformers' dynamic cache; prompts are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.page import write_table  # noqa: E402 - the repository need not be installed

RESULTS = ROOT / "benchmarks" / "results" / "engine.json"

PROMPT_TOKENS, BATCH = 32, 8


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the engine beside PEFT.")
    parser.add_argument("base", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry", action="store_true", help=f"print the table, leave {RESULTS.name} and the page alone")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory(prefix="engine-benchmark-") as scratch:
        result = measure(options, Path(scratch))
    if not options.dry:
        _write(result)
    print(table(result))
    return 0


def make_adapters(base: Path, folder: Path, rank: int) -> tuple[list[Path], list[Path]]:
    """BATCH LoRA and BATCH DoRA adapters on all linears, by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made: list[list[Path]] = []
    for use_dora in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", use_dora=use_dora)
        peft = get_peft_model(model, config)
        kind: list[Path] = []
        for number in range(BATCH):
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in peft.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.01, generator=generator)
                    elif "lora_magnitude_vector" in name:
                        parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
            path = folder / f"{'dora' if use_dora else 'lora'}-{number}"
            peft.save_pretrained(str(path))
            kind.append(path)
        made.append(kind)
    return made[0], made[1]


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dora_serve.engine import Engine

    dtype = getattr(torch, options.dtype)
    _say("making adapters")
    loras, doras = make_adapters(options.base, scratch, options.rank)
    engine = Engine.load(options.base, dtype=dtype, device=options.device, max_rows=BATCH)
    base_bytes = sum(parameter.nbytes for parameter in engine.model.parameters())
    for path in (*loras, *doras):
        engine.pool.load(path.name, path)
    theirs: dict[str, Any] = {}
    for path in (loras[0], doras[0]):
        model = AutoModelForCausalLM.from_pretrained(options.base, dtype=dtype).to(options.device)
        theirs[path.name] = PeftModel.from_pretrained(model, path).eval()

    names: dict[str, list[str | None]] = {"base": [None], "lora": [loras[0].name], "dora": [doras[0].name]}
    mixed = [path.name for path in (*loras[: BATCH // 2], *doras[: BATCH // 2])]
    contenders: dict[str, Callable[[], float]] = {
        **{f"engine_{kind}_1": _engine_steps(engine, rows, options.tokens) for kind, rows in names.items()},
        f"engine_base_{BATCH}": _engine_steps(engine, [None] * BATCH, options.tokens),
        f"engine_doras_{BATCH}": _engine_steps(engine, [path.name for path in doras], options.tokens),
        f"engine_loras_{BATCH}": _engine_steps(engine, [path.name for path in loras], options.tokens),
        f"engine_mixed_{BATCH}": _engine_steps(engine, mixed, options.tokens),
        "peft_lora_1": _peft_steps(theirs[loras[0].name], 1, options.tokens, options.device),
        "peft_dora_1": _peft_steps(theirs[doras[0].name], 1, options.tokens, options.device),
        f"peft_lora_{BATCH}": _peft_steps(theirs[loras[0].name], BATCH, options.tokens, options.device),
        f"peft_dora_{BATCH}": _peft_steps(theirs[doras[0].name], BATCH, options.tokens, options.device),
        "engine_load_dora": _engine_load(engine, doras),
        "peft_load_dora": _peft_load(theirs[doras[0].name], doras),
        "engine_load_dora_seen": _engine_load_seen(engine, doras, scratch / "norm_scales"),
        "engine_load_lora": _engine_load(engine, loras),
        "engine_load_dora_again": _engine_load_again(engine, doras),
        "peft_load_lora": _peft_load(theirs[loras[0].name], loras),
        "engine_first_token_same": _first_token(engine, [doras[0].name]),
        "engine_first_token_switching": _first_token(engine, [path.name for path in doras]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name, run in contenders.items():
            took = run()
            if number:  # the first round warms up
                seconds[name].append(took)
        _say(f"round {number} of {options.rounds}, load {os.getloadavg()[0]:.1f}")
    reports = {info.name: info for info in engine.pool.list()}
    extra = reports[doras[0].name].nbytes - reports[loras[0].name].nbytes
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(options.device),
        "base_bytes": base_bytes,
        "dtype": options.dtype,
        "rank": options.rank,
        "tokens": options.tokens,
        "seconds": seconds,
        "dora_extra_bytes": extra,
    }
    result["summary"] = _summary(result)
    return result


def _engine_steps(engine: Any, adapters: Sequence[str | None], tokens: int) -> Callable[[], float]:
    """Seconds a decoding step: all rows have their first token, then `tokens` more each."""
    from dora_serve.engine import Request

    prompt = list(range(100, 100 + PROMPT_TOKENS))
    requests = [Request(prompt, adapter=name, max_tokens=tokens + 1, ignore_eos=True) for name in adapters]

    def run() -> float:
        made, began = 0, 0.0
        for event in engine.generate(requests):
            made += event.token_id is not None
            if made == len(requests) and not began:
                began = time.perf_counter()
        return (time.perf_counter() - began) / tokens

    return run


def _peft_steps(model: Any, rows: int, tokens: int, device: str) -> Callable[[], float]:
    import torch

    def run() -> float:
        ids = torch.arange(100, 100 + PROMPT_TOKENS, device=device).expand(rows, -1)
        with torch.inference_mode():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            began = time.perf_counter()
            for _ in range(tokens):
                ids = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
            int(out.logits[:, -1:].argmax(-1)[0])
        return (time.perf_counter() - began) / tokens

    return run


def _engine_load(engine: Any, paths: Sequence[Path]) -> Callable[[], float]:
    """Seconds to load a DoRA from disk, probe included."""
    counter = iter(range(1 << 30))

    def run() -> float:
        path = paths[next(counter) % len(paths)]
        began = time.perf_counter()
        engine.pool.load("again", path)
        took = time.perf_counter() - began
        engine.pool.unload("again")
        return took

    return run


def _engine_load_seen(engine: Any, paths: Sequence[Path], kept: Path) -> Callable[[], float]:
    """Seconds to load a DoRA that was loaded before, in another process perhaps: its norm scales are in the cache."""
    from dora_serve.engine import AdapterPool
    from dora_serve.engine.scale_cache import ScaleCache

    base = replace(engine.base, kept=ScaleCache(kept, engine.base.fingerprint))
    pool = AdapterPool(base, engine.device, probe=engine.probe)
    for path in paths:
        pool.load("again", path, replace=True)
    counter = iter(range(1 << 30))

    def run() -> float:
        path = paths[next(counter) % len(paths)]
        began = time.perf_counter()
        pool.load("again", path, replace=True)
        return time.perf_counter() - began

    return run


def _engine_load_again(engine: Any, paths: Sequence[Path]) -> Callable[[], float]:
    """Seconds until a DoRA that left memory is back from the disk: a pool of one takes the adapters in turns."""
    from dora_serve.engine import AdapterPool, Limits

    one, none = Limits(count=1), Limits(count=0)
    pool = AdapterPool(engine.base, engine.device, device_limits=one, host_limits=none)
    for path in paths[:2]:
        pool.load(path.name, path)
    counter = iter(range(1 << 30))

    def run() -> float:
        name = paths[next(counter) % 2].name
        began = time.perf_counter()
        with pool.lease(name):
            return time.perf_counter() - began

    return run


def _peft_load(model: Any, paths: Sequence[Path]) -> Callable[[], float]:
    counter = iter(range(1 << 30))

    def run() -> float:
        path = paths[next(counter) % len(paths)]
        began = time.perf_counter()
        model.load_adapter(path, "again")
        took = time.perf_counter() - began
        model.delete_adapter("again")
        return took

    return run


def _first_token(engine: Any, adapters: Sequence[str]) -> Callable[[], float]:
    """Seconds to the first token of one short request after another, each with the next of the adapters."""
    from dora_serve.engine import Request

    def run() -> float:
        began = time.perf_counter()
        for number in range(BATCH):
            adapter = adapters[number % len(adapters)]
            engine.complete([Request([100, 101, 102], adapter=adapter, max_tokens=1, ignore_eos=True)])
        return (time.perf_counter() - began) / BATCH

    return run


def _summary(result: Mapping[str, Any]) -> dict[str, float]:
    def median(name: str) -> float:
        return float(statistics.median(result["seconds"][name]))

    def ratio(slow: str, fast: str) -> float:
        """The median over rounds of slow / fast: both of a round met the same machine."""
        pairs = zip(result["seconds"][slow], result["seconds"][fast], strict=True)
        return float(statistics.median(one / other for one, other in pairs))

    batch = str(BATCH)
    return {
        "dora_to_lora_speed": ratio("engine_lora_1", "engine_dora_1"),
        "doras_to_loras_speed_in_a_batch": ratio(f"engine_loras_{batch}", f"engine_doras_{batch}"),
        "dora_speed_to_peft": ratio("peft_dora_1", "engine_dora_1"),
        "dora_speed_to_peft_in_a_batch": ratio(f"peft_dora_{batch}", f"engine_doras_{batch}"),
        "lora_speed_to_peft": ratio("peft_lora_1", "engine_lora_1"),
        "peft_dora_to_lora_time": ratio("peft_dora_1", "peft_lora_1"),
        "eight_doras_to_base_speed": ratio(f"engine_base_{batch}", f"engine_doras_{batch}"),
        "eight_loras_to_base_speed": ratio(f"engine_base_{batch}", f"engine_loras_{batch}"),
        "mixed_to_base_speed": ratio(f"engine_base_{batch}", f"engine_mixed_{batch}"),
        "one_lora_to_base_speed": ratio("engine_base_1", "engine_lora_1"),
        "load_dora_speed_to_peft": ratio("peft_load_dora", "engine_load_dora"),
        "load_dora_seen_speed_to_peft": ratio("peft_load_dora", "engine_load_dora_seen"),
        "load_lora_speed_to_peft": ratio("peft_load_lora", "engine_load_lora"),
        "load_dora_again_speed_to_peft": ratio("peft_load_dora", "engine_load_dora_again"),
        **{f"{name}_seconds": median(name) for name in result["seconds"] if "load" in name},
        "switching_to_staying": ratio("engine_first_token_switching", "engine_first_token_same"),
        "dora_extra_share_of_base": result["dora_extra_bytes"] / result["base_bytes"],
        **{f"{name}_ms": 1000 * median(name) for name in result["seconds"] if "load" not in name},
    }


def _machine(device: str) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "load_average": list(os.getloadavg()),
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    s, machine, b = result["summary"], result["machine"], BATCH
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['threads']} threads of {machine['cpu']}"
    lora, dora = s["lora_speed_to_peft"], s["dora_speed_to_peft"]
    rows = [
        ("base", "1", f"{s['engine_base_1_ms']:.1f} ms", "", ""),
        (
            "LoRA",
            "1",
            f"{s['engine_lora_1_ms']:.1f} ms",
            f"{s['peft_lora_1_ms']:.1f} ms",
            f"{lora:.2f}x",
        ),
        (
            "DoRA",
            "1",
            f"{s['engine_dora_1_ms']:.1f} ms",
            f"{s['peft_dora_1_ms']:.1f} ms",
            f"{dora:.1f}x",
        ),
        ("base", f"{b}", f"{s[f'engine_base_{b}_ms']:.1f} ms", "", ""),
        (
            f"{b} LoRAs",
            f"{b}",
            f"{s[f'engine_loras_{b}_ms']:.1f} ms",
            f"{s[f'peft_lora_{b}_ms']:.1f} ms (one LoRA)",
            "",
        ),
        (
            f"{b} DoRAs",
            f"{b}",
            f"{s[f'engine_doras_{b}_ms']:.1f} ms",
            f"{s[f'peft_dora_{b}_ms']:.1f} ms (one DoRA)",
            f"{s['dora_speed_to_peft_in_a_batch']:.1f}x",
        ),
        (f"{b // 2} LoRAs and {b // 2} DoRAs", f"{b}", f"{s[f'engine_mixed_{b}_ms']:.1f} ms", "refused", ""),
    ]
    text = (
        f"One decoding step, {result['dtype']}, adapters of rank {result['rank']} on all linears of a base of "
        f"{result['base_bytes'] / 1e6:.0f} MB; {where}, torch {machine['torch']}, peft {machine['peft']}, "
        f"{result['date'][:10]}; medians of {len(result['seconds']['engine_base_1'])} rounds.",
        "",
        "| adapters | rows | engine | PEFT | engine's speed to PEFT's |",
        "|---|---:|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"DoRA decodes at {s['dora_to_lora_speed']:.2f} of LoRA's speed "
        f"({s['doras_to_loras_speed_in_a_batch']:.2f} in a batch of {b}; PEFT: {1 / s['peft_dora_to_lora_time']:.2f}). "
        f"A batch of {b} different DoRAs runs at {s['eight_doras_to_base_speed']:.2f} of the speed of the same batch "
        f"without adapters, {b} LoRAs at {s['eight_loras_to_base_speed']:.2f}, {b // 2} of each at "
        f"{s['mixed_to_base_speed']:.2f}. Loading from disk, the probe of the output included, takes "
        f"{1000 * s['engine_load_dora_seconds']:.0f} ms for a DoRA and {1000 * s['engine_load_lora_seconds']:.0f} ms "
        f"for a LoRA; PEFT's `load_adapter` takes {1000 * s['peft_load_dora_seconds']:.0f} ms "
        f"({s['load_dora_speed_to_peft']:.1f}x) and {1000 * s['peft_load_lora_seconds']:.0f} ms "
        f"({s['load_lora_speed_to_peft']:.1f}x). A DoRA that was loaded before, in another process perhaps, has "
        f"its norm scales in the cache and takes {1000 * s['engine_load_dora_seen_seconds']:.0f} ms "
        f"({s['load_dora_seen_speed_to_peft']:.1f}x); one that the pool knows and has moved out to the disk is back in "
        f"{1000 * s['engine_load_dora_again_seconds']:.0f} ms ({s['load_dora_again_speed_to_peft']:.1f}x). "
        "Requests that each take another loaded adapter need "
        f"{s['switching_to_staying']:.3f} times as long to their first token as requests that keep one. A DoRA takes "
        f"{result['dora_extra_bytes'] / 1e3:.0f} kB more than a LoRA, {100 * s['dora_extra_share_of_base']:.2f} % of "
        "the base.",
    )
    return "\n".join(text) + "\n"


def _write(result: Mapping[str, Any]) -> None:
    on_cpu = result["machine"]["device"] == "cpu"
    path = RESULTS if on_cpu else RESULTS.with_name("engine-gpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if on_cpu:
        write_table("engine", table(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
