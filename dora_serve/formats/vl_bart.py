"""VL-BART as NVlabs/DoRA trains it (image_video_text_understanding/VL-T5/src/trainer_base.py at 7e2f10a; formats.md 2).

`W' = weight_m / ||V|| * V`, `V = weight_v + lora_B @ lora_A` over output rows: the scale is 1 whatever the rank, and
weight_v (out, in) is the base's weight. The trainer saves the whole model, so that the file brings its base: biases and
layer norms, which were trained, the vocabulary, which is longer than BART's, and the embedding of what is seen, which
BART does not have and the output gets besides.

The published code adapts q_proj and v_proj of what is called `layers`: of T5, which has neither, it adapts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights, Replacement
from dora_serve.formats.factors import Roles, group, of_each, pair
from dora_serve.formats.files import find_weights, open_finite, tensor_names
from dora_serve.formats.options import ReadOptions

WEIGHTS = ("LAST.safetensors", "LAST.pth")
_MODULE = r"^(?:module\.)?(.+)"  # the trainer saves what DistributedDataParallel wraps
_ROLES: Roles = tuple(
    (role, re.compile(rf"{_MODULE}\.{role}$")) for role in ("lora_A", "lora_B", "weight_m", "weight_v")
)
_BESIDE = re.compile(r"(^|\.)visual_embedding\.|^final_logits_bias$")
"""What a BART lacks, and what not every checkpoint of one holds."""
_SHARED = re.compile(r"(^|\.)(shared|embed_tokens|obj_order_embedding|lm_head)\.weight$")


def sniff(path: Path) -> bool:
    """Whether layers lie there with their direction, their magnitude and factors."""
    leaves = {name.rpartition(".")[2] for name in tensor_names(find_weights(path, *WEIGHTS, single=True))}
    return {"weight_m", "weight_v", "lora_A", "lora_B"} <= leaves


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a checkpoint of the trainer. Raises AdapterError, with every problem of the tensors at once."""
    weights = open_finite(path, find_weights(path, *WEIGHTS, single=True), WEIGHTS, options.allow_pickle)
    parts = group(weights.tensors, _ROLES, keeps_rest=True)
    modules = tuple(of_each(weights.file, parts, _of_module))
    directions = [
        Replacement(f"{module}.weight", found["weight_v"], "base_layer") for module, found in parts.modules.items()
    ]
    rest = {re.sub(r"^module\.", "", name): tensor for name, tensor in parts.rest.items()}
    return Adapter(
        path=path,
        format="vl-bart",
        modules=modules,
        replacements=(*directions, *_replacements(rest)),
        files=(weights.file,),
        notes=("The file holds the whole model: what it does not adapt replaces the base's tensors.",),
    )


def _of_module(module: str, found: Mapping[str, LazyTensor]) -> LoraWeights:
    if len(found) < len(_ROLES):
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted weight_m, weight_v, lora_A and lora_B")
    both = pair(module, found["lora_A"], found["lora_B"], ("lora_A", "lora_B"))
    out, width = both.lora_B.shape[0], both.lora_A.shape[1]
    magnitude, direction = found["weight_m"], found["weight_v"]
    if magnitude.shape != (out, 1) or direction.shape != (out, width):
        shapes = f"weight_m {list(magnitude.shape)} and weight_v {list(direction.shape)}"
        raise ValueError(f"{module}: {shapes}, wanted [{out}, 1] and [{out}, {width}]")
    flat = magnitude.map((prod(magnitude.shape),), torch.flatten)
    return LoraWeights(module, both.kind, both.lora_A, both.lora_B, 1.0, flat)


def _replacements(rest: Mapping[str, LazyTensor]) -> Iterator[Replacement]:
    """Tensors that take the base's place. Names of the one table of the vocabulary are one of them, where they are."""
    tables = [name for name in rest if _SHARED.search(name)]
    source = next((name for name in tables if name.endswith("shared.weight")), None)
    for name, tensor in rest.items():
        if source is not None and name in tables and name != source and _are_equal(tensor, rest[source]):
            continue
        yield Replacement(name, tensor, "beside" if _BESIDE.search(name) else "base_layer")


def _are_equal(one: LazyTensor, other: LazyTensor) -> bool:
    return one.shape == other.shape and torch.equal(one.load(), other.load())
