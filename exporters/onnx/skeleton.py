"""Graphs that know where their weights lie in the one data file beside them, and not what the weights are.

The graphs of a folder share the file, so that what an encoder and a decoder have in common is stored once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from exporters.onnx.tracing import weight_names
from exporters.onnx.weight_form import WeightForm, form_of

if TYPE_CHECKING:
    import onnx_ir

DATA_FILE = "model.onnx.data"

# Small tensors need no more than their own alignment; a large one can be mapped by itself from the start of a page.
_ALIGNMENT, _PAGE, _LARGE = 64, 4096, 1 << 20


@dataclass(frozen=True)
class Place:
    """One tensor of the data file. dtype: as ONNX names it, such as FLOAT."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def form(self) -> WeightForm:
        return form_of(self.name)


@dataclass(frozen=True)
class GraphFacts:
    """nodes: those of subgraphs too."""

    file: str
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Skeleton:
    """graphs: serialized ModelProtos by file name. places: of all their weights, by offset. nbytes: of the data file.
    shapes: of the parameters that the weights are made of, by run-time name.

    notes: what a user should know of how the graphs were made.
    """

    graphs: Mapping[str, bytes]
    facts: tuple[GraphFacts, ...]
    places: tuple[Place, ...]
    nbytes: int
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        header = {
            "graphs": {name: len(graph) for name, graph in self.graphs.items()},
            "facts": [asdict(facts) for facts in self.facts],
            "places": [asdict(place) for place in self.places],
            "nbytes": self.nbytes,
            "shapes": self.shapes,
            "notes": self.notes,
        }
        return json.dumps(header).encode() + b"\n" + b"".join(self.graphs.values())

    @staticmethod
    def from_bytes(contents: bytes) -> Skeleton:
        """What `to_bytes` made."""
        header, _, rest = contents.partition(b"\n")
        values = json.loads(header)
        graphs, start = {}, 0
        for name, length in values["graphs"].items():
            graphs[name] = rest[start : start + length]
            start += length
        return Skeleton(
            graphs=graphs,
            facts=tuple(
                GraphFacts(one["file"], one["nodes"], tuple(one["inputs"]), tuple(one["outputs"]))
                for one in values["facts"]
            ),
            places=tuple(Place(**{**one, "shape": tuple(one["shape"])}) for one in values["places"]),
            nbytes=values["nbytes"],
            shapes={name: tuple(shape) for name, shape in values["shapes"].items()},
            notes=tuple(values["notes"]),
        )


def make_skeleton(
    models: Mapping[str, onnx_ir.Model], shapes: Mapping[str, tuple[int, ...]], notes: tuple[str, ...] = ()
) -> Skeleton:
    """Give every weight its place, and serialize. The models are changed: their weights become external.

    shapes: of all parameters, by run-time name.
    """
    import onnx_ir

    places: dict[str, Place] = {}
    end = 0
    for model in models.values():
        for name in weight_names(model):
            value = model.graph.initializers[name]
            assert value.shape is not None
            assert value.dtype is not None
            if name not in places:
                shape = tuple(int(size) for size in value.shape.numpy())
                nbytes = _nbytes(shape, value.dtype)
                step = _PAGE if nbytes >= _LARGE else _ALIGNMENT
                offset = -(-end // step) * step
                places[name] = Place(name, value.dtype.name, shape, offset, nbytes)
                end = offset + nbytes
            place = places[name]
            value.const_value = onnx_ir.ExternalTensor(
                DATA_FILE, place.offset, place.nbytes, value.dtype, shape=value.shape, name=name, base_dir=""
            )
    serialized = {file: onnx_ir.to_proto(model).SerializeToString(deterministic=True) for file, model in models.items()}
    read = {place.form.parameter: shapes[place.form.parameter] for place in places.values()}
    return Skeleton(serialized, tuple(_facts(models)), tuple(places.values()), end, read, notes)


def _facts(models: Mapping[str, onnx_ir.Model]) -> Iterator[GraphFacts]:
    for file, model in models.items():
        yield GraphFacts(
            file,
            sum(1 for _ in model.graph.all_nodes()),
            tuple(str(value.name) for value in model.graph.inputs),
            tuple(str(value.name) for value in model.graph.outputs),
        )


def _nbytes(shape: tuple[int, ...], dtype: onnx_ir.DataType) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return int(elements * dtype.itemsize)
