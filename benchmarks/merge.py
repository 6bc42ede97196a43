"""How long a merge takes and how much memory, beside `cp -r` of the checkpoint and beside PEFT, measured in one run.

    python benchmarks/merge.py [--pairs 5] [--layers 16] [--skip-peft] [--workdir DIR] [--keep]

The checkpoint is made up: Llama-3.2-1B's sizes, 1.24 billion parameters in bfloat16 in 5 shards, and a DoRA of rank 16
in float32 on all linears. Ours and `cp` take turns, so that what else the machine does falls on both, and the medians
are compared. Before each the output is removed and the inputs are read once, so that they are in the page cache.

Ours is a fresh process and the whole of `dora-export merge --no-verify` between its start and its end: adapter and base
are opened, planned, merged, flushed to the disk, recorded and renamed. The interpreter's start and the import of torch
are measured apart, and so is `cp` with a flush; `cp -r` itself flushes nothing.

Memory is the largest resident set (VmHWM) less that of the same process when it had imported torch and nothing else;
it is measured on a model of twice as many layers as well.

Needs 11 GB on the disk, and 6 GB of memory for PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
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
RESULTS = ROOT / "benchmarks" / "results" / "merge.json"

SHARDS, RANK, PEFT_RUNS = 5, 16, 2
MIB = 1 << 20


# What runs in a process of its own


def _merge_ours(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    started = time.perf_counter()
    import torch  # noqa: F401

    baseline, importing = _peak_memory(), time.perf_counter() - started
    from exporters.pipeline import ExportRequest, run_export

    began, cpu = time.perf_counter(), os.times()
    export = run_export(ExportRequest(str(adapter), str(base), out, verify=False))
    ended, cpu_ended = time.perf_counter(), os.times()
    return {
        "seconds": ended - began,
        "merge_seconds": export.merged.seconds,
        "import_seconds": importing,
        "user_seconds": cpu_ended.user - cpu.user,
        "system_seconds": cpu_ended.system - cpu.system,
        "memory_mib": (_peak_memory() - baseline) / MIB,
    }


def _merge_peft(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    import torch

    baseline = _peak_memory()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged = time.perf_counter()
    model.save_pretrained(out)
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "load_seconds": loaded - began,
        "merge_seconds": merged - loaded,
        "save_seconds": ended - merged,
        "memory_mib": (_peak_memory() - baseline) / MIB,
    }


CHILDREN: Mapping[str, Callable[[Path, Path, Path], dict[str, float]]] = {"ours": _merge_ours, "peft": _merge_peft}


def _peak_memory() -> int:
    """Bytes: the largest resident set of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say VmHWM in /proc/self/status")


# The measurements


def _in_child(kind: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Run one of CHILDREN in a fresh process; adds the seconds of the whole process and the load when it began."""
    load, began = os.getloadavg()[0], time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, str(base), str(adapter), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment())
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "process_seconds": time.perf_counter() - began, "load_average": load}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def _copy(base: Path, out: Path, *, flush: bool) -> dict[str, float]:
    """`cp -r`; with `flush`, until the copy is on the disk."""
    load, began = os.getloadavg()[0], time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    if flush:
        for path in out.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return {"seconds": time.perf_counter() - began, "load_average": load}


def _prepare(out: Path, *inputs: Path) -> None:
    """No output, nothing left to be written back, and the inputs in the page cache."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for folder in inputs:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def _count_differing(ours: Path, theirs: Path) -> dict[str, int]:
    """Elements that are not the same in both folders. Both are read by the safetensors library."""
    from safetensors import safe_open

    def where(folder: Path) -> dict[str, Path]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    mine, other = where(ours), where(theirs)
    elements = differing = 0
    for name in sorted(mine.keys() | other.keys()):
        with safe_open(mine[name], framework="pt") as one, safe_open(other[name], framework="pt") as two:
            first, second = one.get_tensor(name), two.get_tensor(name)
        if name.endswith("_proj.weight"):
            elements += first.numel()
        differing += int((first != second).sum())
    return {"adapted_elements": elements, "differing": differing}


def measure(workdir: Path, layers: int, pairs: int, peft: int) -> dict[str, Any]:
    """Everything, with the single values beside the medians. Writes only in `workdir`."""
    from benchmarks.synthetic import LLAMA_1B, write_adapter, write_base

    sizes = LLAMA_1B.with_layers(layers)
    base, adapter, out = workdir / "base", workdir / "adapter", workdir / "out"
    _say(f"making {sizes.parameters / 1e9:.2f} billion parameters in {workdir}")
    write_base(base, sizes, SHARDS)
    write_adapter(adapter, base, sizes, RANK)
    nbytes = sum(path.stat().st_size for path in base.iterdir())
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "model": {
            "parameters": sizes.parameters,
            "adapted": sizes.adapted,
            "bytes": nbytes,
            "layers": layers,
            "shards": SHARDS,
            "rank": RANK,
        },
        "ours": [],
        "cp": [],
        "cp_flushed": [],
        "peft": [],
    }

    def ours() -> None:
        _prepare(out, base, adapter)
        result["ours"].append(_in_child("ours", base, adapter, out))

    def copy(name: str, *, flush: bool) -> None:
        _prepare(out, base, adapter)
        result[name].append(_copy(base, out, flush=flush))

    for pair in range(pairs):
        # Who is first changes, so that neither always follows the other.
        turns: list[Callable[[], None]] = [
            ours,
            lambda: copy("cp", flush=False),
            lambda: copy("cp_flushed", flush=True),
        ]
        for turn in turns[pair % 3 :] + turns[: pair % 3]:
            turn()
        _say(
            f"pair {pair + 1} of {pairs}: ours {result['ours'][-1]['seconds']:.2f} s, cp "
            f"{result['cp'][-1]['seconds']:.2f} s, cp flushed {result['cp_flushed'][-1]['seconds']:.2f} s, "
            f"load {os.getloadavg()[0]:.1f}"
        )
    if peft:
        _prepare(out, base, adapter)
        _in_child("ours", base, adapter, out)
    for _ in range(peft):
        theirs = workdir / "peft"
        _prepare(theirs, base, adapter)
        result["peft"].append(_in_child("peft", base, adapter, theirs))
        _say(f"PEFT {result['peft'][-1]['seconds']:.1f} s")
        result["elements"] = _count_differing(out, theirs)
    for folder in (out, workdir / "peft", base, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    double = sizes.with_layers(2 * layers)
    _say(f"memory with {double.parameters / 1e9:.2f} billion parameters")
    write_base(base, double, SHARDS)
    write_adapter(adapter, base, double, RANK)
    result["double"] = {"parameters": double.parameters, **_in_child("ours", base, adapter, out)}
    result["summary"] = _summary(result)
    return result


def _summary(result: Mapping[str, Any]) -> dict[str, float]:
    def median(kind: str, key: str = "seconds") -> float:
        return float(statistics.median(run[key] for run in result[kind]))

    summary = {
        "ours_seconds": median("ours"),
        "cp_seconds": median("cp"),
        "cp_flushed_seconds": median("cp_flushed"),
        "ours_to_cp": median("ours") / median("cp"),
        "ours_to_cp_median_of_pairs": statistics.median(
            one["seconds"] / other["seconds"] for one, other in zip(result["ours"], result["cp"], strict=True)
        ),
        "ours_to_cp_flushed": median("ours") / median("cp_flushed"),
        "start_and_import_seconds": statistics.median(
            run["process_seconds"] - run["seconds"] for run in result["ours"]
        ),
        "user_seconds": median("ours", "user_seconds"),
        "system_seconds": median("ours", "system_seconds"),
        "memory_mib": max(run["memory_mib"] for run in result["ours"]),
        "double_memory_mib": result["double"]["memory_mib"],
    }
    if result["peft"]:
        summary |= {
            "peft_seconds": median("peft"),
            "peft_to_ours": median("peft") / median("ours"),
            "peft_memory_mib": max(run["memory_mib"] for run in result["peft"]),
        }
    return summary


def _machine() -> dict[str, Any]:
    import numpy
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "load_average": list(os.getloadavg()),
    }


# What is shown


def table(result: Mapping[str, Any]) -> str:
    """The figures as Markdown, with what produced them."""
    summary, model, machine = result["summary"], result["model"], result["machine"]
    flushed = summary["cp_flushed_seconds"] / summary["cp_seconds"]
    loads = [run["load_average"] for run in (*result["ours"], *result["cp"])]
    rows = [
        ("`cp -r` of the checkpoint", f"{summary['cp_seconds']:.2f} s", "1", ""),
        ("`cp -r`, then flushed", f"{summary['cp_flushed_seconds']:.2f} s", f"{flushed:.2f}", ""),
        (
            "`dora-export merge --no-verify`",
            f"{summary['ours_seconds']:.2f} s",
            f"{summary['ours_to_cp']:.2f}",
            f"{summary['memory_mib']:.0f} MiB",
        ),
        ("the same, twice the layers", "", "", f"{summary['double_memory_mib']:.0f} MiB"),
    ]
    if result["peft"]:
        rows.append(
            (
                "PEFT: load, `merge_and_unload`, `save_pretrained`",
                f"{summary['peft_seconds']:.1f} s",
                f"{summary['peft_seconds'] / summary['cp_seconds']:.0f}",
                f"{summary['peft_memory_mib']:,.0f} MiB",
            )
        )
    text = (
        f"{model['parameters'] / 1e9:.2f} billion parameters in bfloat16 ({model['bytes'] / 1e9:.2f} GB in "
        f"{model['shards']} shards), DoRA of rank {model['rank']} in float32 on all its linears "
        f"({model['adapted'] / 1e9:.2f} billion elements); {machine['cores']} cores of {machine['cpu']}, torch "
        f"{machine['torch']}, {result['date'][:10]}. Medians of {len(result['ours'])} interleaved pairs; the load was "
        f"{min(loads):.1f} to {max(loads):.1f} while they ran.",
        "",
        "| | wall time | in times of `cp -r` | peak memory above torch's import |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"CPU time of the merge: {summary['user_seconds']:.2f} s user, {summary['system_seconds']:.2f} s system. "
        f"Not counted: {summary['start_and_import_seconds']:.1f} s in which the interpreter starts and "
        "imports torch; the verification, and the hashes of base and output that come with it.",
        *_beside_peft(result),
    )
    return "\n".join(text) + "\n"


def _beside_peft(result: Mapping[str, Any]) -> tuple[str, ...]:
    if not result["peft"]:
        return ()
    merged, differing = (result["elements"][key] for key in ("adapted_elements", "differing"))
    return (
        "",
        f"PEFT takes {result['summary']['peft_to_ours']:.1f} times as long. Of the {merged:,} merged elements "
        f"{differing:,} ({100 * differing / merged:.4f} %) differ from PEFT's, which computes in float32.",
    )


def _write(result: Mapping[str, Any]) -> None:
    from benchmarks.page import write_table

    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    write_table("merge", table(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a merge beside cp -r and beside PEFT.")
    parser.add_argument("--pairs", type=int, default=5, help="of ours and cp (%(default)s)")
    parser.add_argument("--skip-peft", action="store_true", help=f"leave out its {PEFT_RUNS} runs, 90 s each")
    parser.add_argument("--layers", type=int, default=16, help="16 make 1.24 billion parameters (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="where the models lie; a temporary folder unless given")
    parser.add_argument("--keep", action="store_true", help="leave the models of the last measurement there")
    parser.add_argument("--dry", action="store_true", help=f"print the table, leave {RESULTS.name} and the page alone")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *folders = options.child
        print(json.dumps(CHILDREN[kind](*map(Path, folders))))
        return
    sys.path.insert(0, str(ROOT))
    workdir = Path(tempfile.mkdtemp(prefix="merge-benchmark-", dir=options.workdir))
    try:
        _require_space(workdir, options.layers)
        result = measure(workdir, options.layers, options.pairs, 0 if options.skip_peft else PEFT_RUNS)
    finally:
        if not options.keep:
            shutil.rmtree(workdir, ignore_errors=True)
    if not options.dry:
        _write(result)
    print(table(result))


def _require_space(workdir: Path, layers: int) -> None:
    """Base, ours and PEFT's at a time; then twice the layers, and ours."""
    from benchmarks.synthetic import LLAMA_1B

    needed = 2 * max(3 * LLAMA_1B.with_layers(layers).parameters, 2 * LLAMA_1B.with_layers(2 * layers).parameters)
    free = shutil.disk_usage(workdir).free
    if free < 1.1 * needed:
        raise SystemExit(
            f"{workdir} has {free / 1e9:.1f} GB left, and this takes {1.1 * needed / 1e9:.1f}: see --workdir"
        )


if __name__ == "__main__":
    main()
