"""Whether this machine has the memory for a comparison in float32, asked before it is begun."""

from __future__ import annotations

from pathlib import Path

from dora_serve.checkpoint import open_checkpoint

# Of torch's model in float32: the embedding goes through float64, and activations and logits come on top.
_TORCH = 1.2
# Of the data file: ONNX Runtime reads it, and packs matrices anew while it does.
_RUNTIME = 1.3


def why_not_run(model_folder: Path, onnx_folder: Path) -> str | None:
    """A sentence where either side needs more memory than there is, None where both fit one after the other."""
    available = available_memory()
    if available is None:
        return None
    elements = sum(entry.nbytes // entry.dtype.itemsize for entry in open_checkpoint(model_folder).tensors.values())
    data = sum(path.stat().st_size for path in onnx_folder.glob("*.data"))
    needed = int(max(_TORCH * 4 * elements, _RUNTIME * data))
    if needed <= available:
        return None
    return (
        f"Comparing the graphs' results needs about {needed / 1e9:.0f} GB of memory and {available / 1e9:.0f} GB are "
        "available, so neither torch nor ONNX Runtime was run: the weights and the structure were compared."
    )


def available_memory() -> int | None:
    """Bytes that a process can take without swapping, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None
