"""Three columns of the app against one: the base, a LoRA and a DoRA on one prompt, from the click to the last token.

    python benchmarks/columns.py BASE [--tokens 64] [--rounds 7] [--dtype D] [--dry]

BASE is what `dora-export demo-base` makes; the adapters are the examples'. Both go through the engine as the page does,
in turns; medians of the ratio within a round. dtype: of the base, by default its own, as in `dora-serve app`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "columns.json"
ADAPTERS = ("dates-lora", "dates-dora")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure three columns against one.")
    parser.add_argument("base", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--dry", action="store_true", help=f"leave {RESULTS.name} alone")
    options = parser.parse_args()
    import torch

    from dora_serve.engine import Engine, Request

    engine = Engine.load(options.base, dtype=getattr(torch, options.dtype) if options.dtype else None)
    for name in ADAPTERS:
        engine.pool.load(name, ROOT / "examples" / "adapters" / name)
    messages = [{"role": "user", "content": "To JSON (what, date, time): choir practice, 14 March 2025, 7 pm"}]

    def seconds(adapters: tuple[str | None, ...]) -> float:
        began = time.perf_counter()
        engine.complete(
            [Request(messages=messages, adapter=name, max_tokens=options.tokens, ignore_eos=True) for name in adapters]
        )
        return time.perf_counter() - began

    one, three = [], []
    for number in range(options.rounds + 1):
        took = seconds((ADAPTERS[1],)), seconds((None, *ADAPTERS))
        if number:  # the first round warms up
            one.append(took[0])
            three.append(took[1])
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "tokens": options.tokens,
        "one_column_seconds": one,
        "three_columns_seconds": three,
        "three_to_one": statistics.median(long / short for long, short in zip(three, one, strict=True)),
        "load_average": list(os.getloadavg()),
    }
    if not options.dry:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
