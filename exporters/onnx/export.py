"""A Hugging Face folder as ONNX graphs, by `torch.onnx.export(dynamo=True)`.

The graphs are traced from a model without weights, or come from the cache of such traces; the weights are then written
beside them, straight from the checkpoint. Only standard operators are used unless the weights are quantized, so any
runtime with the opset runs the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from dora_serve.checkpoint import read_json
from dora_serve.errors import UnavailableError
from exporters.onnx import graph_cache
from exporters.onnx.architectures import architecture_of
from exporters.onnx.families import traceables
from exporters.onnx.loading import quiet, require
from exporters.onnx.options import OnnxOptions, require_possible
from exporters.onnx.saving import MODEL_FILE, strip_metadata, write_folder
from exporters.onnx.skeleton import GraphFacts, Skeleton, make_skeleton
from exporters.onnx.stored import StoredWeights, stored_weights

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from exporters.onnx.traceable import Traceable

# Keys of config.json that shape no graph.
_SHAPELESS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
_TRACERS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class OnnxExport:
    """What was written. bytes: of all graphs and their data. traced: whether the graphs were traced anew, and not
    taken from the cache. notes: what a user should know of them.
    """

    folder: Path
    graphs: tuple[GraphFacts, ...]
    opset: int
    dtype: str
    quantize: str | None
    bytes: int
    traced: bool
    notes: tuple[str, ...] = ()
    runtime: str = "onnxruntime"

    @property
    def path(self) -> Path:
        """The graph of a model that is one."""
        return self.folder / MODEL_FILE

    def to_json(self) -> dict[str, object]:
        """Plain values, without the place."""
        graphs = [
            {"file": one.file, "nodes": one.nodes, "inputs": list(one.inputs), "outputs": list(one.outputs)}
            for one in self.graphs
        ]
        return {
            "graphs": graphs,
            "opset": self.opset,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "bytes": self.bytes,
            "traced": self.traced,
            "notes": list(self.notes),
            "runtime": self.runtime,
        }


def export_onnx(
    model_folder: Path,
    out_folder: Path,
    options: OnnxOptions | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> OnnxExport:
    """Write the graphs of the model in `model_folder` to `out_folder`, and their weights to one file beside them.

    A causal language model is one graph, `model.onnx`, with these inputs and outputs, all axes but heads and head_dim
    being dynamic (past may be 0, sequence 1), N counting the layers of the cache:

        input_ids, position_ids        int64 (batch, sequence)
        attention_mask                 int64 (batch, past + sequence); 0 marks padding, on the left or the right
        past_key_values.N.key/.value   dtype (batch, key-value heads, past, head_dim)
        logits                         dtype (batch, sequence, vocabulary)
        present.N.key/.value           dtype (batch, key-value heads, past + sequence, head_dim)

    With left padding a token's position is the number of tokens before it, as transformers' generate has it. Sliding
    windows are in the mask: the cache keeps every token. The other kinds of model are described where their graphs are
    made: `plain.py`, `encoder_decoder.py`.

    Weights are always external data, a tied one stored once; constants stay in the graph. A mixture of experts gathers
    the weights of each token's experts, so that a prefill takes memory for every token. Attention, RMSNormalization
    and RotaryEmbedding are single operators at opset 23, which is why it is the default.

    out_folder: exists; files of these names are replaced. The caller makes the whole atomic.
    metadata: further `metadata_props`, such as the sources of the model.
    on_progress: is told each stage in words.

    Peak memory: that of the libraries, the graphs without weights, and one parameter in the dtype it is stored in.
    Raises UnavailableError for what this machine lacks or this exporter does not do, CheckpointError for a folder that
    does not hold the whole model, OutputError where the files cannot be written.
    """
    tell = on_progress or (lambda message: None)
    options = options or OnnxOptions()
    require("onnx", "onnxscript", "transformers", *(("onnxruntime",) if options.quantize else ()))
    require_possible(options)
    architecture = architecture_of(model_folder)
    with quiet():
        weights = stored_weights(model_folder, architecture)

        key = trace_key(model_folder, architecture, weights, options)
        build = _builder(model_folder, weights, options)
        return write_graphs(architecture, weights, key, build, out_folder, options, metadata or {}, tell)


def require_graphs(model_folder: Path, options: OnnxOptions) -> None:
    """Raise UnavailableError for a model that has no graphs here, as far as its forward says so without being traced:
    seconds, whatever its size. CheckpointError for a folder that does not hold the whole model.
    """
    import torch

    with quiet(), torch.no_grad():
        weights = stored_weights(model_folder, architecture := architecture_of(model_folder))
        if options.cache and graph_cache.holds(options.cache, trace_key(model_folder, architecture, weights, options)):
            return
        build = _builder(model_folder, weights, options)
        _with_attention(lambda attention: _require_made(build, architecture, attention))


def _require_made(
    build: Callable[[FakeTensorMode, str | None], Built], architecture: str, attention: str | None
) -> None:
    from exporters.onnx.empty_model import fake_mode
    from exporters.onnx.tracing import as_untraceable

    with fake_mode() as mode, as_untraceable(architecture):
        _, make_graphs = build(mode, attention)
        with mode:
            make_graphs()


def _builder(
    model_folder: Path, weights: StoredWeights, options: OnnxOptions
) -> Callable[[FakeTensorMode, str | None], Built]:
    def build(mode: FakeTensorMode, attention: str | None) -> Built:
        import torch

        from exporters.onnx.empty_model import empty_model

        model = empty_model(model_folder, getattr(torch, options.dtype), weights, mode, attention)
        return model, partial(traceables, model)

    return build


_Made = TypeVar("_Made")
Built: TypeAlias = "tuple[torch.nn.Module, Callable[[], Mapping[str, Traceable]]]"
"""A model without memory, and what makes its graphs; to be called where tensors have no values."""


def write_graphs(
    architecture: str,
    weights: StoredWeights,
    key: str,
    build: Callable[[FakeTensorMode, str | None], Built],
    out_folder: Path,
    options: OnnxOptions,
    metadata: Mapping[str, str],
    tell: Callable[[str], None],
) -> OnnxExport:
    """Trace what `build` makes for a kind of attention, or take its graphs from the cache; write them and the weights.

    Raises as `export_onnx` does.
    """
    kept = graph_cache.fetch(options.cache, key) if options.cache else None
    if kept is None:
        tell(f"tracing {architecture}")
        skeleton = _trace(architecture, build, options)
        if options.cache:
            graph_cache.keep(options.cache, key, skeleton.to_bytes())
    else:
        tell(f"taking the graph of {architecture} from the cache")
        skeleton = Skeleton.from_bytes(kept)
    weights.require_whole(skeleton.shapes, architecture)
    tell("writing the weights")
    size = write_folder(skeleton, weights, out_folder, metadata)
    return OnnxExport(
        folder=out_folder,
        graphs=skeleton.facts,
        opset=options.opset,
        dtype=options.dtype,
        quantize=options.quantize,
        bytes=size,
        traced=kept is None,
        notes=skeleton.notes,
    )


def _trace(architecture: str, build: Callable[[FakeTensorMode, str | None], Built], options: OnnxOptions) -> Skeleton:
    return _with_attention(lambda attention: _trace_with(attention, architecture, build, options))


def _with_attention(make: Callable[[str | None], _Made]) -> _Made:
    """By the attention that becomes one operator; where that cannot be translated, by the one written out."""
    try:
        return make(None)
    except UnavailableError as error:
        if not error.facts.get("untraceable"):
            raise
        try:
            return make("eager")
        except (UnavailableError, ValueError):
            raise error from None


def _trace_with(
    attention: str | None,
    architecture: str,
    build: Callable[[FakeTensorMode, str | None], Built],
    options: OnnxOptions,
) -> Skeleton:
    import torch

    from exporters.onnx.empty_model import fake_mode
    from exporters.onnx.quantizing import quantize_graph
    from exporters.onnx.tracing import as_untraceable, trace

    notes: list[str] = []
    models: dict[str, onnx_ir.Model] = {}
    with torch.no_grad(), fake_mode() as mode:
        with as_untraceable(architecture):
            model, make_graphs = build(mode, attention)
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        shapes = {name: tuple(tensor.shape) for name, tensor in named}
        with as_untraceable(architecture), mode:
            graphs = make_graphs()
        for file, graph in graphs.items():
            with as_untraceable(architecture):
                traced = trace(graph, options.opset)
            strip_metadata(traced)
            if options.bits:
                notes += quantize_graph(traced, options.bits)
            models[file] = traced
    return make_skeleton(models, shapes, tuple(dict.fromkeys(notes)))


def trace_key(model_folder: Path, architecture: str, weights: StoredWeights, options: OnnxOptions) -> str:
    """The name of the traced graphs in the cache, made of everything that shapes them: the configuration, which
    parameters there are and which are one, what was asked for, and whose code traces."""
    config = {key: value for key, value in read_json(model_folder).items() if key not in _SHAPELESS}
    return graph_cache.digest_of(
        {
            "architecture": architecture,
            "config": config,
            "parameters": sorted(weights.origins),
            "tied": dict(sorted(weights.tied.items())),
            "opset": options.opset,
            "dtype": options.dtype,
            "quantize": options.quantize,
            "versions": {name: version(name) for name in _TRACERS},
            "exporter": _own_digest(),
        }
    )


@cache
def _own_digest() -> str:
    """Of the sources of this package: another exporter traces another graph."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(json.dumps([path.read_text(encoding="utf-8") for path in sources]).encode()).hexdigest()
