"""An ONNX folder: the graphs, and one file with all of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve import __version__
from dora_serve.errors import OutputError
from exporters.onnx.filling import write_data
from exporters.onnx.skeleton import Skeleton
from exporters.onnx.stored import StoredWeights

if TYPE_CHECKING:
    import onnx_ir

MODEL_FILE = "model.onnx"
_KEPT = "pkg.torch.onnx.name_scopes"


def strip_metadata(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes, which hold stack traces with this machine's paths; keep each node's module."""
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        scope = node.metadata_props.get(_KEPT)
        node.metadata_props.clear()
        if scope is not None:
            node.metadata_props[_KEPT] = scope
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def write_folder(
    skeleton: Skeleton,
    weights: StoredWeights,
    folder: Path,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Write the graphs, with `metadata` in each, and their data; the size of all in bytes.

    Raises OutputError where a file cannot be written, and what `write_data` raises.
    """
    from onnx import ModelProto, StringStringEntryProto

    size = 0
    for name, serialized in skeleton.graphs.items():
        model = ModelProto.FromString(serialized)
        model.producer_name, model.producer_version = "dora-serve", __version__
        model.metadata_props.extend(StringStringEntryProto(key=key, value=value) for key, value in metadata.items())
        contents = model.SerializeToString(deterministic=True)
        size += len(contents)
        try:
            (folder / name).write_bytes(contents)
        except OSError as error:
            raise OutputError(
                f"The ONNX model cannot be written to {str(folder)!r}: {error.strerror or error}.",
                folder=str(folder),
            ) from error
    write_data(skeleton, weights, folder, on_bytes)
    return size + skeleton.nbytes
