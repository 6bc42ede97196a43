"""One export in a process of its own, for benchmarks/onnx.py: its seconds and its largest resident set as JSON.

python -m benchmarks.onnx_one_export MODEL OUT OPTIONS_AS_JSON
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path


def main() -> None:
    from exporters.onnx.architectures import architecture_of
    from exporters.onnx.export import export_onnx
    from exporters.onnx.genai import export_genai
    from exporters.onnx.options import OnnxOptions

    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    given = json.loads(sys.argv[3])
    options = OnnxOptions(**{**given, "cache": Path(given["cache"])})
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    began = time.perf_counter()
    if options.runtime == "genai":
        made = export_genai(model, out, options, architecture_of(model))
    else:
        made = export_onnx(model, out, options)
    seconds = time.perf_counter() - began
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (model / name).is_file() and not (out / name).exists():
            shutil.copyfile(model / name, out / name)
    whose = resource.RUSAGE_CHILDREN if options.runtime == "genai" else resource.RUSAGE_SELF
    peak = resource.getrusage(whose).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "bytes": made.bytes, "traced": made.traced}))


if __name__ == "__main__":
    main()
