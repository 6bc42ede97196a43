"""An ONNX graph as a file, and its weights as another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve.errors import OutputError

if TYPE_CHECKING:
    import onnx_ir


MODEL_FILE = "model.onnx"


DATA_FILE = "model.onnx.data"


# Tensors above this size lie in DATA_FILE; below it they are the constants of shape arithmetic.
_INLINE_BYTES = 1024


def strip_metadata(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes, which hold stack traces with this machine's paths; keep each node's module."""
    kept = "pkg.torch.onnx.name_scopes"
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        scope = node.metadata_props.get(kept)
        node.metadata_props.clear()
        if scope is not None:
            node.metadata_props[kept] = scope
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def save(model: onnx_ir.Model, out_folder: Path) -> int:
    """Write both files; their size in bytes."""
    import onnx_ir

    try:
        onnx_ir.save(model, out_folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=_INLINE_BYTES)
        return sum(
            (out_folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE) if (out_folder / name).exists()
        )
    except OSError as error:
        raise OutputError(
            f"The ONNX model cannot be written to {str(out_folder)!r}: {error.strerror or error}.",
            folder=str(out_folder),
        ) from error
