"""Exporting a model of Llama-2-7B's shape: the time it takes, and the most memory.

    python benchmarks/onnx_large.py [--dtype float16] [--layers 32] [--quantize int8] [--folder DIR]

The checkpoint is one file that has a header and no contents: a hole that reads as zeros and takes no disk, so that
a disk that holds the result is enough (float32: 27 GB, float16: 13 GB). Neither time nor memory depends on the values.
Afterwards every weight of the graph is compared with the checkpoint's, which also streams. The result is removed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In place of this folder, whose onnx.py would be taken for the package.
sys.path[0] = str(ROOT)

from benchmarks.synthetic import Sizes, config_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "onnx_large.json"
LLAMA_7B = Sizes(hidden=4096, intermediate=11008, key_value=4096, vocabulary=32000, layers=32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float16")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--layers", type=int, default=LLAMA_7B.layers)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint and the result for a while")
    parser.add_argument("--one-export", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_export:
        print(json.dumps(one_export(*options.one_export)))
        return 0
    sizes = LLAMA_7B.with_layers(options.layers)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        write_hole(Path(scratch) / "base", sizes)
        exports = []
        for cache in ("cold", "warm"):
            command = [sys.executable, "-m", "benchmarks.onnx_large", "--dtype", options.dtype]
            command += ["--quantize", options.quantize] if options.quantize else []
            command += ["--one-export", scratch, options.dtype, options.quantize or ""]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            exports.append({"cache": cache, **json.loads(done.stdout.splitlines()[-1])})
            print(exports[-1], flush=True)
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "parameters": sizes.parameters,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "exports": exports,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def one_export(scratch: str, dtype: str, quantize: str) -> dict[str, float]:
    """In a process of its own, so that its largest resident set is the export's."""
    import resource

    from exporters.onnx.check.weights import compare_weights
    from exporters.onnx.export import export_onnx
    from exporters.onnx.options import OnnxOptions

    out = Path(scratch) / "onnx"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    began, cpu = time.perf_counter(), time.process_time()
    options = OnnxOptions(dtype=dtype, quantize=quantize or None, cache=Path(scratch) / "cache")  # type: ignore[arg-type]
    made = export_onnx(Path(scratch) / "base", out, options)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    failures: list[str] = []
    weights = compare_weights([made.path], Path(scratch) / "base", lambda name: None, failures) if made.traced else None
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_bytes": peak,
        "bytes": made.bytes,
        "weights": weights.total if weights else 0,
        "weights_equal": weights.equal if weights else 0,
    }


def write_hole(folder: Path, sizes: Sizes) -> None:
    """The configuration, and a safetensors file whose tensors are all zeros that take no disk."""
    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden)}
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (sizes.hidden,)
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in sizes.linears.items()}
    shapes["model.norm.weight"] = (sizes.hidden,)
    header, end = {}, 0
    for name, shape in shapes.items():
        elements = 1
        for size in shape:
            elements *= size
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * elements]}
        end += 2 * elements
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config_of(sizes)))


if __name__ == "__main__":
    sys.exit(main())
