"""What diffusers' save_lora_weights writes (loaders/lora_base.py of 0.42; formats.md 6.5).

One file for all parts of a pipeline: `unet.<module>.lora.down.weight` (r, in), `.lora.up.weight` (out, r), or
`lora_A`, `lora_B`, and `lora_magnitude_vector` (out,) with PEFT's formula. alpha is in the metadata, or nowhere: then
diffusers' own loader takes alpha = rank, whatever it was trained with, and ai-toolkit's files are of that kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import Roles, group, of_each, pair
from dora_serve.formats.files import open_finite, tensor_names
from dora_serve.formats.kohya_names import DIFFUSERS_NAME, weights_file
from dora_serve.formats.mixed import require_magnitudes
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft_config import PeftConfig, checked_config, require_mergeable
from dora_serve.formats.values import stated_scaling

METADATA_KEY = "lora_adapter_metadata"
_WHY = (
    f"the metadata have no {METADATA_KEY}, and diffusers' loader takes alpha = rank then, whatever it was trained with"
)
_AI_TOOLKIT = "ai-toolkit"
"""It says so in its metadata, and trains with alpha = rank whatever it saves under these names (lora_special.py)."""
COMPONENT = re.compile(r"^(unet|transformer(?:_2)?|prior|text_encoder(?:_[234])?|controlnet|decoder)\.")
_DOWN = r"(?:lora\.down|lora_linear_layer\.down|lora_A(?:\.default(?:_\d+)?)?)"
_UP = r"(?:lora\.up|lora_linear_layer\.up|lora_B(?:\.default(?:_\d+)?)?)"
_ROLES: Roles = (
    ("lora_A", re.compile(rf"^(.+)\.{_DOWN}\.weight$")),
    ("lora_B", re.compile(rf"^(.+)\.{_UP}\.weight$")),
    ("lora_A", re.compile(r"^(.+\.to_(?:q|k|v|out))_lora\.down\.weight$")),
    ("lora_B", re.compile(r"^(.+\.to_(?:q|k|v|out))_lora\.up\.weight$")),
    ("magnitude", re.compile(r"^(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")),
    ("alpha", re.compile(r"^(.+?)(?:\.lora)?\.alpha$")),
)


def sniff(path: Path) -> bool:
    """Whether the names begin with a pipeline's part and end as diffusers' or PEFT's do."""
    names = tensor_names(weights_file(path))
    return any(COMPONENT.match(name) and any(role.match(name) for _, role in _ROLES[:4]) for name in names)


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a file or a folder with one. Raises AdapterError, with every problem at once, or where alpha is not said."""
    weights = open_finite(path, weights_file(path), (DIFFUSERS_NAME,), options.allow_pickle)
    configs = _configs(weights.file, weights.metadata, options)
    parts = group(weights.tensors, _ROLES, _renamed)
    unscaled = _AI_TOOLKIT in weights.metadata.get("software", "")
    modules = of_each(weights.file, parts, lambda module, found: _of_module(module, found, configs, options, unscaled))
    unsaid = [module for module in modules if _component(module.module) not in configs]
    return Adapter(
        path=path,
        format="diffusers",
        modules=tuple(modules),
        files=(weights.file,),
        config={name: config.raw for name, config in configs.items()},
        notes=tuple(require_magnitudes(weights.file, unsaid, options)),
    )


def _component(module: str) -> str:
    match = COMPONENT.match(module)
    return match[1] if match else ""


def _renamed(module: str) -> str:
    """Attention processors of old held the factors beside the layers that they belong to."""
    renamed = module.replace(".processor.", ".")
    if renamed != module and renamed.endswith(".to_out"):
        renamed += ".0"
    if renamed.startswith("text_encoder"):
        for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
            renamed = re.sub(rf"\.{old}$", f".{new}", renamed)
    return renamed


def _configs(file: Path, metadata: Mapping[str, str], options: ReadOptions) -> dict[str, PeftConfig]:
    """LoraConfig of each part of the pipeline, from the metadata; of none where there are no such metadata."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{METADATA_KEY} of {str(file)!r} is no JSON: {error}.", remedy="Save it again.") from error
    if not isinstance(table, dict):
        raise AdapterError(f"{METADATA_KEY} of {str(file)!r} is no JSON object.", remedy="Save it again.")
    by_component: dict[str, dict[str, object]] = {}
    for key, value in table.items():
        component = _component(str(key))
        by_component.setdefault(component, {})[str(key).removeprefix(f"{component}.")] = value
    for raw in by_component.values():
        require_mergeable(raw, options.ignore_config, str(file))
    return {component: checked_config(raw, file) for component, raw in by_component.items()}


def _of_module(
    module: str,
    found: Mapping[str, LazyTensor],
    configs: Mapping[str, PeftConfig],
    options: ReadOptions,
    unscaled: bool,
) -> LoraWeights:
    if "lora_A" not in found or "lora_B" not in found:
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted both of its factors")
    component = _component(module)
    name = module.removeprefix(f"{component}.")
    config = configs.get(component)
    both = pair(module, found["lora_A"], found["lora_B"], ("down", "up"), config.rank(name) if config else None)
    magnitude = found.get("magnitude")
    if magnitude is not None and prod(magnitude.shape) != both.lora_B.shape[0]:
        raise ValueError(
            f"{module}: lora_magnitude_vector {list(magnitude.shape)}, wanted {both.lora_B.shape[0]} values"
        )
    if config is not None and config.use_dora != (magnitude is not None):
        raise ValueError(
            f"{module}: has {'a' if magnitude is not None else 'no'} lora_magnitude_vector, and the metadata say "
            f"use_dora = {config.use_dora}"
        )
    said = _scaling(module, name, found.get("alpha"), both.rank, config)
    if said is None and unscaled:
        said = 1.0
    return LoraWeights(
        module=module,
        kind=both.kind,
        lora_A=both.lora_A,
        lora_B=both.lora_B,
        scaling=stated_scaling(options, both.rank, _WHY) if said is None else said,
        scaling_is_stated=said is None,
        magnitude=magnitude.map((prod(magnitude.shape),), torch.flatten) if magnitude is not None else None,
    )


def _scaling(module: str, name: str, alpha: LazyTensor | None, rank: int, config: PeftConfig | None) -> float | None:
    """What the file says, None where it says nothing."""
    if alpha is not None:
        if prod(alpha.shape) != 1:
            raise ValueError(f"{module}: alpha {list(alpha.shape)}, wanted a scalar")
        return float(alpha.load()) / rank
    if config is not None and "lora_alpha" in config.raw:
        return config.scaling(name)
    return None
