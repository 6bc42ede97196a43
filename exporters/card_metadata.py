"""The metadata of a model card: what the Hub reads to find a model, show its licence and draw its family tree.

The keys are those of huggingface_hub's ModelCardData and of the Hub's page on model cards
(huggingface.co/docs/hub/model-cards); `base_model_relation` may be adapter, merge, quantized or finetune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dora_serve.hub import hub_repository
from exporters.manifest import recorded_files

RELATIONS = ("adapter", "merge", "quantized", "finetune")
_CARRIED = ("license", "license_name", "license_link", "language")
# What an architecture's name ends with, and the Hub's task.
_TASKS: Mapping[str, str] = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
    "ForImageTextToText": "image-text-to-text",
}


def metadata_of(record: Mapping[str, Any], config: Mapping[str, Any], base_card: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of an export. config: its config.json. base_card: the metadata of the base's own card."""
    files = list(recorded_files(record))
    found: dict[str, Any] = {}
    base = base_id(record)
    if base is not None:
        found["base_model"] = base
        found["base_model_relation"] = relation_of(record)
    library = _library(files)
    if library is not None:
        found["library_name"] = library
    task = task_of(config) or base_card.get("pipeline_tag")
    if isinstance(task, str):
        found["pipeline_tag"] = task
    found |= {key: base_card[key] for key in _CARRIED if base_card.get(key)}
    found["tags"] = tags_of(record, files)
    return found


def base_id(record: Mapping[str, Any]) -> str | None:
    """The base's id on the Hub: its own, or what the adapter says it was trained on. None where neither is one."""
    base, adapter = record.get("base"), record.get("adapter")
    if isinstance(base, Mapping) and base.get("revision") and base.get("id"):
        return str(base["id"])
    trained_on = adapter.get("trained_on") if isinstance(adapter, Mapping) else None
    return hub_repository(trained_on) if isinstance(trained_on, str) else None


def is_adapter(record: Mapping[str, Any]) -> bool:
    """Whether an adapter was written, and no weights that it is folded into."""
    return record.get("exporter") == "convert"


def relation_of(record: Mapping[str, Any]) -> str:
    """The place in the base's family tree.

    An adapter folded into one base is a fine-tune of it: the Hub keeps `merge` for a model made of several models.
    """
    if is_adapter(record):
        return "adapter"
    onnx = record.get("onnx")
    return "quantized" if isinstance(onnx, Mapping) and onnx.get("quantize") else "finetune"


def tags_of(record: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    adapter = record.get("adapter")
    method = str(adapter.get("method", "")) if isinstance(adapter, Mapping) else ""
    tags = [method.lower()] if method in ("DoRA", "LoRA") else []
    if not is_adapter(record):
        tags.append("merged")
    if any(name.endswith(".onnx") for name in files):
        tags.append("onnx")
    return [*tags, "dora-serve"]


def task_of(config: Mapping[str, Any]) -> str | None:
    """The Hub's task of an architecture, None where its name does not tell."""
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    return next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None)


def _library(files: Sequence[str]) -> str | None:
    if "adapter_model.safetensors" in files:
        return "peft"
    if "adapters.safetensors" in files:
        return "mlx"
    if any(name.endswith(".onnx") for name in files):
        return "onnx"
    return "transformers" if "config.json" in files else None
