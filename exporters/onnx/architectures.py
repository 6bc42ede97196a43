"""Which graphs a checkpoint gets: its architecture, picked by config.json, and the outputs of its head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve.checkpoint import read_json
from dora_serve.errors import CheckpointError, UnavailableError, no_such_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INSTEAD = "Export safetensors instead (--to safetensors)."


# Architectures without a cache, by the end of their name: the outputs of their graph.
_HEAD_OUTPUTS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForMaskedLM": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "Model": ("last_hidden_state", "pooler_output"),
}


_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


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

    def refuse(reason: str, remedy: str = INSTEAD) -> UnavailableError:
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


def refuse_model(model: PreTrainedModel, reason: str) -> UnavailableError:
    name = type(model).__name__
    return UnavailableError(f"{name} cannot be exported to ONNX: {reason}", remedy=INSTEAD, architecture=name)
