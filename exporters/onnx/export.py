"""A Hugging Face folder as one ONNX graph, by `torch.onnx.export(dynamo=True)`.

A causal language model becomes one graph that serves prefill and decode, with the cache as plain inputs and outputs
under the names that Optimum and ONNX Runtime GenAI use; an encoder or a model with a head becomes a graph without a
cache. Only standard operators are used, so any runtime with the opset runs the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_serve import __version__
from dora_serve.errors import UnavailableError
from exporters.onnx.architectures import architecture_of, is_causal
from exporters.onnx.decoder import decoder_graph
from exporters.onnx.loading import load_model, quiet, require
from exporters.onnx.plain import plain_graph
from exporters.onnx.saving import MODEL_FILE, save, strip_metadata
from exporters.onnx.tracing import trace

OPSETS = range(18, 25)


@dataclass(frozen=True)
class OnnxExport:
    """What was written. `bytes` counts the graph and its external data; `nodes` those of subgraphs too."""

    path: Path
    opset: int
    dtype: str
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int


def export_onnx(
    model_folder: Path,
    out_folder: Path,
    *,
    opset: int = 23,
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> OnnxExport:
    """Write `out_folder/model.onnx` and its weights `out_folder/model.onnx.data` from the model in `model_folder`.

    A causal language model has these inputs and outputs, all axes but heads and head_dim being dynamic (past may be
    0, sequence 1), N counting the layers of the cache:

        input_ids, position_ids        int64 (batch, sequence)
        attention_mask                 int64 (batch, past + sequence); 0 marks padding, on the left or the right
        past_key_values.N.key/.value   float32 (batch, key-value heads, past, head_dim)
        logits                         float32 (batch, sequence, vocabulary)
        present.N.key/.value           float32 (batch, key-value heads, past + sequence, head_dim)

    With left padding a token's position is the number of tokens before it, as transformers' generate has it. Sliding
    windows are in the mask: the cache keeps every token. Other models take `input_ids`, `attention_mask` and, where
    they tell segments apart, `token_type_ids`, and give the outputs that transformers names.

    The weights are always float32: ONNX Runtime's CPU provider has no bfloat16 kernels and few float16 ones, and a
    bfloat16 or float16 value is a float32 value exactly. They are always external data, a tied one stored once;
    constants up to 1 KiB stay in the graph. A mixture of experts gathers the weights of each token's experts, so that
    a prefill takes memory for every token. Attention, RMSNormalization and RotaryEmbedding are single operators at
    opset 23, which is why it is the default; 18 to 24 are possible.

    out_folder: exists; files of these two names are replaced. The caller makes the whole atomic.
    metadata: further `metadata_props`, such as the sources of the model.
    on_progress: is told each stage in words.

    Raises UnavailableError for what this machine lacks or this exporter does not do, CheckpointError for a folder that
    does not hold the whole model, OutputError where the files cannot be written.
    """
    tell = on_progress or (lambda message: None)
    require("onnx", "onnxscript", "transformers")
    if opset not in OPSETS:
        raise UnavailableError(
            f"ONNX opset {opset} was asked for; {OPSETS[0]} to {OPSETS[-1]} can be written.",
            remedy="Leave it at 23, or take 20 for an older runtime.",
            opset=opset,
        )
    import torch

    with quiet(), torch.no_grad():
        tell("loading the model in float32")
        # One matrix product over all experts traces to standard operators; the other implementations do not.
        model = load_model(model_folder, experts="batched_mm")
        graph = decoder_graph(model) if is_causal(architecture_of(model_folder)) else plain_graph(model)
        tell(f"tracing {type(model).__name__}")
        ir_model = trace(graph, opset, type(model).__name__)
        strip_metadata(ir_model)
        ir_model.producer_name, ir_model.producer_version = "dora-serve", __version__
        ir_model.metadata_props.update(metadata or {})
        tell(f"writing {MODEL_FILE}")
        size = save(ir_model, out_folder)
    return OnnxExport(
        path=out_folder / MODEL_FILE,
        opset=ir_model.opset_imports[""],
        dtype="float32",
        nodes=sum(1 for _ in ir_model.graph.all_nodes()),
        inputs=graph.inputs,
        outputs=graph.outputs,
        bytes=size,
    )
