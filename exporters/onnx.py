"""A Hugging Face folder as one ONNX graph, by `torch.onnx.export(dynamo=True)`.

A causal language model becomes one graph that serves prefill and decode, with the cache as plain inputs and outputs
under the names that Optimum and ONNX Runtime GenAI use; an encoder or a model with a head becomes a graph without a
cache. Only standard operators are used, so any runtime with the opset runs the result.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_serve import __version__
from dora_serve.checkpoint import open_checkpoint, read_json
from dora_serve.errors import CheckpointError, OutputError, UnavailableError, no_such_path

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from transformers import PreTrainedModel

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
OPSETS = range(18, 25)

# Tensors above this size lie in DATA_FILE; below it they are the constants of shape arithmetic.
_INLINE_BYTES = 1024

# A weight that is stored transposed, as a matrix product wants it, has its parameter's name with this at the end.
TRANSPOSED = ".T"

_INSTEAD = "Export safetensors instead (--to safetensors)."

# Architectures without a cache, by the end of their name: the outputs of their graph.
_HEAD_OUTPUTS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForMaskedLM": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "Model": ("last_hidden_state", "pooler_output"),
}
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


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


@dataclass(frozen=True)
class _Traceable:
    """A module whose forward takes and gives tensors in the order of `inputs` and `outputs`, and how to trace it."""

    module: torch.nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]


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
        graph = _decoder(model) if is_causal(architecture_of(model_folder)) else _plain(model)
        tell(f"tracing {type(model).__name__}")
        ir_model = _trace(graph, opset, type(model).__name__)
        _strip_metadata(ir_model)
        ir_model.producer_name, ir_model.producer_version = "dora-serve", __version__
        ir_model.metadata_props.update(metadata or {})
        tell(f"writing {MODEL_FILE}")
        size = _save(ir_model, out_folder)
    return OnnxExport(
        path=out_folder / MODEL_FILE,
        opset=ir_model.opset_imports[""],
        dtype="float32",
        nodes=sum(1 for _ in ir_model.graph.all_nodes()),
        inputs=graph.inputs,
        outputs=graph.outputs,
        bytes=size,
    )


def require(*modules: str) -> None:
    """UnavailableError, naming the pip command, unless every one of `modules` is installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UnavailableError(
            f"ONNX needs {', '.join(missing)}, not installed here.",
            remedy="Install it with: pip install 'dora-serve[onnx]'",
            missing=missing,
        )


def architecture_of(model_folder: Path) -> str:
    """The class that config.json names, once it is known to be one that this exporter understands.

    Reads no weights and imports no model code. Raises CheckpointError without a usable config.json, UnavailableError
    for an architecture that has no graph here (encoder-decoder, vision-language, state-space, custom code, ...).
    """
    config = read_json(model_folder)
    if not config:
        raise CheckpointError(
            no_such_path("The model's config", model_folder / "config.json"), remedy="Give a Hugging Face folder."
        )
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "A model that names no architecture"

    def refuse(reason: str, remedy: str = _INSTEAD) -> UnavailableError:
        return UnavailableError(
            f"{architecture} cannot be exported to ONNX: {reason}", remedy=remedy, architecture=architecture
        )

    if config.get("is_encoder_decoder"):
        raise refuse("an encoder-decoder needs more than one graph, which this exporter does not write.")
    if "quantization_config" in config:
        raise refuse("its weights are quantized.", "Merge into the unquantized base model.")
    if architecture not in _known_architectures():
        raise refuse(
            "it is not one of transformers' causal language models, encoders, or their sequence classification, token "
            "classification, masked language model and question answering heads."
        )
    saved_by = str(config.get("transformers_version") or "0").split(".")[0]
    import transformers

    # A checkpoint of a later major version can load without a word and compute something else (its rope_theta is
    # where the earlier one does not look).
    if saved_by.isdigit() and int(saved_by) > int(transformers.__version__.split(".")[0]):
        raise refuse(
            f"transformers {config['transformers_version']} saved it and {transformers.__version__} is installed.",
            f"Install transformers {saved_by} or later.",
        )
    return architecture


def is_causal(architecture: str) -> bool:
    """Whether the graph of this architecture has a cache."""
    return architecture.endswith(_CAUSAL_ENDINGS)


def output_names(architecture: str) -> tuple[str, ...]:
    """The graph's outputs but for the cache, as transformers names them; `pooler_output` only where it is computed."""
    if is_causal(architecture):
        return ("logits",)
    return next(outputs for ending, outputs in _HEAD_OUTPUTS.items() if architecture.endswith(ending))


def load_model(model_folder: Path, *, attention: str | None = None, experts: str | None = None) -> PreTrainedModel:
    """The model in float32 on the CPU, for inference, from local safetensors and transformers' own code only.

    attention, experts: transformers' `attn_implementation` and `experts_implementation`; None is its default.
    Raises as `architecture_of` does, and CheckpointError where a weight is missing or of another shape.
    """
    import torch
    import transformers

    architecture = architecture_of(model_folder)
    open_checkpoint(model_folder)  # says what is wrong with the files better than transformers does
    try:
        model, info = getattr(transformers, architecture).from_pretrained(
            model_folder,
            dtype=torch.float32,
            attn_implementation=attention,
            experts_implementation=experts,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # for the sake of a better message, below
            output_loading_info=True,
        )
    except OSError as error:
        raise CheckpointError(
            f"{str(model_folder)!r} cannot be loaded as {architecture}: {error}", folder=str(model_folder)
        ) from error
    wrong = sorted([*info["missing_keys"], *(str(mismatch[0]) for mismatch in info["mismatched_keys"])])
    if wrong:
        raise CheckpointError(
            f"{str(model_folder)!r} does not hold the whole of {architecture}: {len(wrong)} tensors are missing or of "
            f"another shape, such as {', '.join(wrong[:3])}.",
            remedy="Merge again, or mend config.json.",
            tensors=wrong,
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings, log lines and progress bars of torch's exporter and of transformers."""
    from transformers.utils import logging as transformers_logging

    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")
    ]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _known_architectures() -> set[str]:
    from transformers.models.auto import modeling_auto

    known = {
        name for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if name.endswith(_CAUSAL_ENDINGS)
    }
    for mapping in (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        for names in mapping.values():
            several = [names] if isinstance(names, str) else names
            known.update(name for name in several if name.endswith(tuple(_HEAD_OUTPUTS)))
    return known


def _forward_arguments(model: PreTrainedModel) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def _refuse(model: PreTrainedModel, reason: str) -> UnavailableError:
    name = type(model).__name__
    return UnavailableError(f"{name} cannot be exported to ONNX: {reason}", remedy=_INSTEAD, architecture=name)


def _decoder(model: PreTrainedModel) -> _Traceable:
    """A causal language model with its cache as a flat list of keys and values."""
    import torch
    from torch.export import Dim
    from transformers import DynamicCache

    lacking = {"input_ids", "attention_mask", "position_ids", "past_key_values"} - _forward_arguments(model)
    if lacking:
        raise _refuse(model, f"its forward takes no {', '.join(sorted(lacking))}.")
    if model._is_stateful:
        raise _refuse(model, "it keeps a recurrent state, which the graph's cache of keys and values cannot hold.")

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[tuple[torch.Tensor, torch.Tensor]],
        ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
            # Without the config the cache keeps every token, and the mask alone makes a sliding window. A cache that
            # drops tokens branches on its length, and a trace would keep one branch.
            cache = DynamicCache()
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            layers: list[Any] = cache.layers
            return output.logits, [(layer.keys, layer.values) for layer in layers]

    # Distinct sizes above 1, so that no two axes can be taken for one another.
    batch, sequence, past = 2, 3, 5
    wrapper = Flat().eval()
    _, layers = wrapper(*_tokens(batch, past, past), [])
    if not layers or any(key is None for key, _ in layers):
        raise _refuse(model, "its forward fills no cache of keys and values.")
    batch_dim, sequence_dim = Dim("batch_size"), Dim("sequence_length")
    # The total is a dimension of its own: torch.export takes no sum of two as one.
    past_dim, total_dim = Dim("past_sequence_length"), Dim("total_sequence_length")
    cache_dims = {0: batch_dim, 2: past_dim}
    parts = [f"{layer}.{part}" for layer in range(len(layers)) for part in ("key", "value")]
    return _Traceable(
        module=wrapper,
        inputs=("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)),
        outputs=("logits", *(f"present.{part}" for part in parts)),
        args=(*_tokens(batch, sequence, past + sequence), layers),
        dynamic_shapes=(
            {0: batch_dim, 1: sequence_dim},
            {0: batch_dim, 1: total_dim},
            {0: batch_dim, 1: sequence_dim},
            [(cache_dims, cache_dims)] * len(layers),
        ),
    )


def _tokens(batch: int, sequence: int, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and position_ids for the last `sequence` of `total` tokens."""
    import torch

    ids = torch.ones(batch, sequence, dtype=torch.int64)
    positions = torch.arange(total - sequence, total).expand(batch, sequence).contiguous()
    return ids, torch.ones(batch, total, dtype=torch.int64), positions


def _plain(model: PreTrainedModel) -> _Traceable:
    """A model without a cache: token inputs to the outputs that its head names."""
    import torch
    from torch.export import Dim

    arguments = _forward_arguments(model)
    if model.main_input_name != "input_ids" or not {"input_ids", "attention_mask"} <= arguments:
        raise _refuse(model, f"its input is {model.main_input_name}, and only models of tokens are exported.")
    # A classifier on a decoder would otherwise return its cache beside the logits.
    fixed = {"return_dict": True, **({"use_cache": False} if "use_cache" in vars(model.config) else {})}
    # RotaryEmbedding does not broadcast: positions of the whole batch, where transformers would make one row of them.
    rotary = "position_ids" in arguments and any(name.endswith("rotary_emb") for name, _ in model.named_modules())
    segments = "token_type_ids" in arguments and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))

    class Named(torch.nn.Module):
        def __init__(self, outputs: Sequence[str]) -> None:
            super().__init__()
            self.model = model
            self.outputs = outputs

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, ...]:
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                given["token_type_ids"] = token_type_ids
            if rotary:
                given["position_ids"] = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
            output = self.model(**given, **fixed)
            return tuple(output[name] for name in self.outputs)

    batch, sequence = 2, 3
    args = tuple(
        torch.zeros(batch, sequence, dtype=torch.int64)
        if name == "token_type_ids"
        else torch.ones(batch, sequence, dtype=torch.int64)
        for name in inputs
    )
    probe = model(**dict(zip(inputs, args, strict=True)), **fixed)
    outputs = tuple(name for name in output_names(type(model).__name__) if probe.get(name) is not None)
    dims = {0: Dim("batch_size"), 1: Dim("sequence_length")}
    return _Traceable(
        module=Named(outputs).eval(), inputs=inputs, outputs=outputs, args=args, dynamic_shapes=(dims,) * len(inputs)
    )


def _trace(graph: _Traceable, opset: int, architecture: str) -> onnx_ir.Model:
    import torch

    try:
        program = torch.onnx.export(
            graph.module,
            graph.args,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes,
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnavailableError(
            f"{architecture} cannot be exported to ONNX: torch {torch.__version__} cannot trace it: "
            f"{_first_line(error)}.",
            remedy=_INSTEAD,
            architecture=architecture,
        ) from error
    assert program is not None
    _name_weights(program.model)  # first, because folding a transpose forgets whose it was
    _optimize(program.model)
    return program.model


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).strip() or 'no reason given').splitlines()[0]}"


_WRAPPED = "model."  # the attribute that _decoder's and _plain's modules keep the model in


def _name_weights(model: onnx_ir.Model) -> None:
    """Give initializers the names of the model's parameters, and a transposed one its parameter's name with `.T`."""
    import onnx_ir

    initializers = model.graph.initializers
    for name in list(initializers):
        if name.startswith(_WRAPPED):
            initializers[name].name = name.removeprefix(_WRAPPED)
    for node in model.graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.shape is None or not weight.is_initializer():
            continue
        axes, perm = list(range(len(weight.shape))), list(node.attributes["perm"].as_ints())
        if perm == axes:  # as indexing a stack of experts gives; folding it would copy them
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        elif perm == [*axes[:-2], axes[-1], axes[-2]]:
            node.outputs[0].name = f"{weight.name}{TRANSPOSED}"


def _optimize(model: onnx_ir.Model) -> None:
    """Fold constants (weight transposes among them), drop what does nothing, and fuse to opset 23's large operators.

    These are the passes of torch's own `ONNXProgram.optimize` with the rewrite rules that occur in transformers. One
    of the rules left out, which looks for pairs of slices, takes time with the square of the graph's size: 10 of 48
    CPU seconds for 30 layers.
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass, onnx_fusions
    from onnxscript.rewriter.rules import common as rules

    rewrite = RewritePass(
        [
            rules.add_0_rule,
            rules.sub_0_rule,
            rules.mul_by_1_rule,
            rules.div_by_1_rule,
            rules.cast_cast_rule,
            rules.no_op_cast_rule,
            rules.no_op_expand_rule,
            rules.no_op_transpose_rule,
            rules.transpose_transpose_rule,
            rules.unsqueeze_unsqueeze_rule,
            rules.squeeze_reshape_1d_rule,
            rules.reshape_reshape_rule,
            rules.collapse_slice_rule,
            rules.collapse_slice2_rule,
            rules.one_reshape_matmul_reshape_rule,
            rules.two_reshapes_matmul_reshape_rule,
            rules.materialize_reshape_shape_rule,
        ]
    )
    passes.InlinePass()(model)
    for _ in range(2):  # the first round uncovers what the second simplifies
        # A result larger than this is kept only where it replaces its operand: a tied embedding, which is looked up
        # and multiplied with, is then stored once and transposed by a node.
        fold_constants(model, output_size_limit=1024)
        rewrite(model)
        passes.RemoveUnusedNodesPass()(model)
    for tidy in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        tidy(model)
    onnx_fusions.fuse(model)
    for last in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        last(model)


def _strip_metadata(model: onnx_ir.Model) -> None:
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


def _save(model: onnx_ir.Model, out_folder: Path) -> int:
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
