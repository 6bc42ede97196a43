"""Whether the graphs are well formed: ONNX's own checker, with full shape inference, and the data file they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def check_structure(graphs: Sequence[Path], failures: list[str]) -> None:
    """Add to `failures` what ONNX's checker finds, and bytes of the data files that no weight accounts for."""
    import onnx

    used: dict[str, dict[int, int]] = {}
    for path in graphs:
        try:
            onnx.checker.check_model(path, full_check=True)
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # its exceptions have no base of their own, and protobuf's are others
            failures.append(f"{path.name} is not well formed: {str(error).strip().splitlines()[0]}")
            continue
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if "location" in entries:
                spans = used.setdefault(entries["location"], {})
                spans[int(entries.get("offset", 0))] = int(entries.get("length", 0))
    for name, spans in used.items():
        data = graphs[0].parent / name
        if not data.is_file():
            continue  # ONNX Runtime says so
        size, weights = data.stat().st_size, sum(spans.values())
        if size - weights > 4096 * (len(spans) + 1):
            failures.append(f"{name} has {size - weights:,} bytes that no graph reads.")
