"""An exported base with adapter slots beside the same base without, in tokens decoded per CPU-second at one thread.

    python benchmarks/onnx_swap.py BASE ADAPTER [--tokens 8] [--rounds 15] [--prompt 38]

BASE is a Hugging Face folder of a causal language model, ADAPTER one for it. The base is exported three times: without
slots, with slots, and with slots for mixed batches. All decode the same tokens after the same prompt, in turns, so that
what else runs on the machine meets them alike; medians of CPU-seconds, the prompt not counted, and of the ratios of
each turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
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

from benchmarks.page import write_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "onnx_swap.json"
BATCHES = (1, 8)
SWAPS = 50
OF_IT = ", of it"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=38, help="tokens of the prompt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = export(options.base, options.adapter, Path(scratch))
        result = {
            "command": "python " + " ".join(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu": platform.processor() or platform.machine(),
            "adapter": swap_times(folders["slots"], options.adapter),
            "tokens_per_cpu_second": decode_speeds(folders, options.tokens, options.rounds, options.prompt),
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_table("onnx-swap", table(result))
    print(table(result))
    return 0


def table(result: Mapping[str, Any]) -> str:
    speeds, adapter = result["tokens_per_cpu_second"], result["adapter"]
    lines = [
        "SmolLM2-135M with a DoRA of rank 4 on all 210 linear layers, float32, one thread, tokens a CPU-second after a "
        f"prompt, {result['date'][:10]}.",
        "",
        f"| | {' | '.join(f'{batch} | of it' for batch in speeds)} |",
        f"|---|{'---:|---:|' * len(speeds)}",
    ]
    for name in next(iter(speeds.values())):
        if not name.endswith(OF_IT):
            cells = (f"{one[name]:.1f} | {one.get(name + OF_IT, 1):.2f}" for one in speeds.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"A file of an adapter ({adapter['bytes'] / 1e6:.1f} MB) is made in {adapter['make']:.2f} s, all norms "
        f"included, loaded in {1000 * adapter['load']:.1f} ms, since it is mapped, and switched to in "
        f"{1e6 * adapter['switch']:.1f} us.",
    ]
    return "\n".join([*lines, ""])


def export(base: Path, adapter: Path, scratch: Path) -> dict[str, Path]:
    """The base without slots, with them, and for mixed batches; the adapter's file in the folders that have slots."""
    from dora_serve.formats import read_adapter
    from exporters.onnx.export import export_onnx
    from exporters.onnx_adapters.adapter_file import open_slotted, write_adapter
    from exporters.onnx_adapters.export import put_slots
    from exporters.onnx_adapters.options import SlotOptions

    folders = {name: scratch / name for name in ("plain", "slots", "mixed")}
    folders["plain"].mkdir()
    export_onnx(base, folders["plain"])
    for name in ("slots", "mixed"):
        shutil.copytree(folders["plain"], folders[name])
        put_slots(folders[name] / "model.onnx", None, SlotOptions(mixed=name == "mixed"))
        write_adapter(read_adapter(adapter), open_slotted(folders[name]), folders[name] / "it.onnx_adapter")
    return folders


def swap_times(folder: Path, adapter: Path) -> dict[str, float]:
    """Seconds: to make the file, to load it, and to switch between two loaded adapters before a run (medians)."""
    import onnxruntime

    from dora_serve.formats import read_adapter
    from exporters.onnx_adapters.adapter_file import open_slotted, write_adapter

    file = folder / "made.onnx_adapter"
    began = time.perf_counter()
    write_adapter(read_adapter(adapter), open_slotted(folder), file)
    made = time.perf_counter() - began
    loaded: list[Any] = []

    def load() -> None:
        loaded.append(onnxruntime.LoraAdapter())
        loaded[-1].Load(str(file))

    def switch() -> None:
        options = onnxruntime.RunOptions()
        options.add_active_adapter(loaded[len(loaded) // 2])

    return {
        "bytes": file.stat().st_size,
        "make": made,
        "load": _median(load, SWAPS),
        "switch": _median(switch, SWAPS),
    }


def decode_speeds(folders: Mapping[str, Path], tokens: int, rounds: int, prompt: int) -> dict[str, dict[str, float]]:
    """By batch size: tokens a CPU-second of each, and each beside the graph without slots."""
    from dora_serve.onnx_engine.adapters import OneSlot, Switch, TableRows, Tables, read_adapter_file
    from dora_serve.onnx_engine.graph import Graph

    graphs = {name: Graph(folder / "model.onnx", threads=1) for name, folder in folders.items()}
    files = {}
    for name in ("slots", "mixed"):
        table = graphs[name].table
        assert table is not None
        files[name] = read_adapter_file(folders[name] / "it.onnx_adapter", table)
    mixed = graphs["mixed"].table
    assert mixed is not None
    tables = Tables(mixed)
    slots = [tables.fill(files["mixed"]) for _ in range(max(BATCHES))]
    found = {}
    for batch in BATCHES:
        feedings: dict[str, tuple[Graph, Any]] = {
            "without slots": (graphs["plain"], Switch()),
            "slots, no adapter": (graphs["slots"], Switch()),
            "slots, the adapter": (graphs["slots"], Switch(files["slots"])),
            "mixed batches, no adapter": (graphs["mixed"], OneSlot(mixed)),
            "mixed batches, one adapter": (graphs["mixed"], TableRows(tables, slots[:1] * batch)),
            "mixed batches, an adapter a row": (graphs["mixed"], TableRows(tables, slots[:batch])),
        }
        decoders = {name: _Decoding(graph, feeding, batch, prompt) for name, (graph, feeding) in feedings.items()}
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(rounds + 1):  # the first round warms up
            for name, decoding in decoders.items():
                seconds[name].append(decoding.run(tokens))
        speeds = {name: batch * tokens / statistics.median(taken[1:]) for name, taken in seconds.items()}
        plain = seconds["without slots"][1:]
        ratios = {
            name + OF_IT: statistics.median(one / other for one, other in zip(plain, taken[1:], strict=True))
            for name, taken in seconds.items()
            if name != "without slots"
        }
        found[f"batch {batch}"] = {**speeds, **ratios}
    return found


class _Decoding:
    """Greedy decoding from the end of a prompt, again and again."""

    def __init__(self, graph: Any, feeding: Any, batch: int, prompt: int) -> None:
        import numpy as np

        self._np, self._graph, self._feeding = np, graph, feeding
        ids = np.tile(np.arange(100, 100 + prompt), (batch, 1))
        self._mask = np.ones_like(ids)
        logits, self._past = graph.run(ids, self._mask, graph.empty_cache(batch), feeding)
        self._first = logits[:, -1:].argmax(-1)

    def run(self, tokens: int) -> float:
        """CPU-seconds of so many steps."""
        ids, mask, past = self._first, self._mask, self._past
        began = time.process_time()
        for _ in range(tokens):
            mask = self._np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            logits, past = self._graph.run(ids, mask, past, self._feeding)
            ids = logits[:, -1:].argmax(-1)
        return time.process_time() - began


def _median(call: Callable[[], None], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    sys.exit(main())
