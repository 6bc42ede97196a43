"""Which graphs a checkpoint gets: its architecture, picked by config.json, and the outputs of its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dora_serve.checkpoint import read_json
from dora_serve.errors import CheckpointError, UnavailableError, no_such_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INSTEAD = "Export safetensors instead (--to safetensors)."


Kind = Literal["decoder", "encoder-decoder", "vision-language", "plain"]
"""What graphs an architecture gets: one with a cache, an encoder and a decoder with one, a decoder beside an image
encoder, or one graph without a cache."""

# Architectures without a cache, by the end of their name: the outputs of their graph.
_HEAD_OUTPUTS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForImageClassification": ("logits",),
    "ForMaskedLM": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "Model": ("last_hidden_state", "pooler_output"),
}
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def architecture_of(model_folder: Path, *, becomes_dense: bool = False) -> str:
    """The class that config.json names, once it is known to be one that this exporter understands.

    Reads no weights and imports no model code. Raises CheckpointError without a usable config.json, UnavailableError
    for an architecture that has no graph here (state-space, detection, custom code, ...).

    becomes_dense: whether a merge takes the quantization, if there is any, out of what is exported.
    """
    config = read_json(model_folder)
    if not config:
        raise CheckpointError(
            no_such_path("The model's config", model_folder / "config.json"), remedy="Give a Hugging Face folder."
        )
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "A model that names no architecture"

    def refuse(reason: str, remedy: str = INSTEAD) -> UnavailableError:
        return UnavailableError(
            f"{architecture} cannot be exported to ONNX: {reason}", remedy=remedy, architecture=architecture
        )

    if "quantization_config" in config and not becomes_dense:
        raise refuse("its weights are quantized.", "Merge into the unquantized base model.")
    if architecture not in _known_architectures():
        raise refuse(
            "it is not one of transformers' causal language models, encoder-decoders, vision-language models and "
            "encoders, or their sequence, token and image classification, masked language model and question "
            "answering heads."
        )
    if config.get("is_encoder_decoder") and kind_of(architecture) == "plain":
        raise refuse("of encoder-decoders only those that generate are exported.")
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


def kind_of(architecture: str) -> Kind:
    """Of an architecture that `architecture_of` let pass."""
    from transformers.models.auto import modeling_auto

    if architecture.endswith(_CAUSAL_ENDINGS):
        return "decoder"
    if architecture in _named(
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        return "encoder-decoder"
    if architecture in _named(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        return "vision-language"
    return "plain"


def output_names(architecture: str) -> tuple[str, ...]:
    """The graph's outputs but for the cache, as transformers names them; `pooler_output` only where it is computed."""
    if kind_of(architecture) != "plain":
        return ("logits",)
    return next(outputs for ending, outputs in _HEAD_OUTPUTS.items() if architecture.endswith(ending))


def _known_architectures() -> set[str]:
    from transformers.models.auto import modeling_auto

    generating = _named(
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    causal = _named(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    plain = _named(
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    )
    known = generating | {name for name in causal if name.endswith(_CAUSAL_ENDINGS)}
    return known | {name for name in plain if name.endswith(tuple(_HEAD_OUTPUTS))}


def _named(*mappings: Mapping[str, str | Sequence[str]]) -> set[str]:
    """The classes that transformers' mappings name."""
    values = [names for mapping in mappings for names in mapping.values()]
    return {name for names in values for name in ([names] if isinstance(names, str) else names)}


def refuse_model(model: PreTrainedModel, reason: str) -> UnavailableError:
    name = type(model).__name__
    return UnavailableError(f"{name} cannot be exported to ONNX: {reason}", remedy=INSTEAD, architecture=name)
