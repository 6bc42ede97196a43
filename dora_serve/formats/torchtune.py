"""torchtune (modules/peft/{lora,dora}.py, models/convert_weights.py of 0.6.1; formats.md 7): its own names, and its
export under PEFT's.

`lora_a.weight` (r, in), `lora_b.weight` (out, r), `magnitude` (out,); the formula of the paper, s = alpha / r. The
outputs of query and key are in torchtune's own order (row_order.py); the export puts lora_B into transformers' and
leaves the magnitude, and writes a configuration that does not say use_dora.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights, RowOrder
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import Roles, group, is_embedding, of_each, pair
from dora_serve.formats.files import (
    CONFIG_NAME,
    find_weights,
    no_weights,
    open_finite,
    peek_config,
    read_config,
    tensor_names,
)
from dora_serve.formats.mixed import require_all_or_none
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft import strip_prefix
from dora_serve.formats.values import number, rank_of, require_known, stated_scaling

WEIGHTS = ("adapter_model.safetensors", "adapter_model.pt", "adapter_model.bin")
_EPOCH = re.compile(r"adapter_\d+\.pt")
_NATIVE: Roles = (
    ("lora_a", re.compile(r"^(.+)\.lora_a\.weight$")),
    ("lora_b", re.compile(r"^(.+)\.lora_b\.weight$")),
    ("magnitude", re.compile(r"^(.+)\.magnitude$")),
)
_EXPORTED: Roles = (
    ("lora_a", re.compile(r"^(.+)\.lora_A\.weight$")),
    ("lora_b", re.compile(r"^(.+)\.lora_B\.weight$")),
    ("magnitude", re.compile(r"^(.+)\.lora_magnitude_vector$")),
)
_CONFIG_KEYS = frozenset({"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"})
_RENAMES: Mapping[str, str] = {
    r"^layers\.(\d+)\.attn\.output_proj$": r"model.layers.\1.self_attn.o_proj",
    r"^layers\.(\d+)\.attn\.(\w+)$": r"model.layers.\1.self_attn.\2",
    r"^layers\.(\d+)\.mlp\.w1$": r"model.layers.\1.mlp.gate_proj",
    r"^layers\.(\d+)\.mlp\.w2$": r"model.layers.\1.mlp.down_proj",
    r"^layers\.(\d+)\.mlp\.w3$": r"model.layers.\1.mlp.up_proj",
    r"^tok_embeddings$": "model.embed_tokens",
    r"^output$": "lm_head",
}


def sniff(path: Path) -> bool:
    """Whether the names are torchtune's, or its export lies beside its own file."""
    file = find_weights(path, *WEIGHTS, single=True)
    if any(name.endswith(".lora_a.weight") for name in tensor_names(file)):
        return True
    if file is None or file.suffix == ".pt":  # whose names are not read before that is allowed
        return _EPOCH.fullmatch(path.name) is not None or bool(_epochs(path)) or _is_export(path, file)
    return _is_export(path, file)


def _is_export(path: Path, file: Path | None) -> bool:
    """Whether this is an export for PEFT, beside which torchtune leaves the same as adapter_model.pt."""
    config = peek_config(path)
    if config.keys() - _CONFIG_KEYS:
        return False
    pickled = file is not None and file.name == "adapter_model.pt"
    return pickled or (bool(config) and (path / "adapter_model.pt").is_file())


def _epochs(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("adapter_*.pt") if _EPOCH.fullmatch(file.name)) if path.is_dir() else []


def _file(path: Path) -> Path | None:
    """Raises AdapterError for a folder with the adapters of several epochs, which are adapters of their own."""
    found = find_weights(path, *WEIGHTS) or find_weights(path, single=True)
    if found is not None:
        return found
    epochs = _epochs(path)
    if len(epochs) > 1:
        raise AdapterError(
            f"{str(path)!r} holds the adapters of {len(epochs)} epochs: {', '.join(file.name for file in epochs)}.",
            remedy=f"Give one of the files, for example {str(epochs[-1])!r}.",
            path=str(path),
        )
    return epochs[0] if epochs else None


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a folder of torchtune's, or one of its files. Raises AdapterError, with every problem at once."""
    folder = path if path.is_dir() else path.parent
    file = _file(path)
    if file is None:
        raise no_weights(path, WEIGHTS)
    config = read_config(folder) if (folder / CONFIG_NAME).is_file() else {}
    require_known(folder, config, _CONFIG_KEYS, options)
    weights = open_finite(folder, file, WEIGHTS, options.allow_pickle)
    exported = not any(name.endswith(".lora_a.weight") for name in weights.tensors)
    if exported:
        parts = group(weights.tensors, _EXPORTED, strip_prefix)
    else:
        parts = group(weights.tensors, _NATIVE, _renamed)
    order: RowOrder = "torchtune_export" if exported else "torchtune"
    modules = of_each(file, parts, lambda module, found: _of_module(module, found, config, options, order))
    require_all_or_none(file, modules)
    base = config.get("base_model_name_or_path")
    return Adapter(
        path=path,
        format="torchtune",
        modules=tuple(modules),
        base=str(base) if base else None,
        files=(folder / CONFIG_NAME, file) if config else (file,),
        config=config,
    )


def _renamed(module: str) -> str:
    for pattern, replacement in _RENAMES.items():
        if re.match(pattern, module):
            return re.sub(pattern, replacement, module)
    raise AdapterError(
        f"The adapter adapts {module!r}, which no text model of torchtune has under this name.",
        remedy="Only adapters of torchtune's text models are read; report the format of others.",
        module=module,
    )


def _of_module(
    module: str,
    found: Mapping[str, LazyTensor],
    config: Mapping[str, object],
    options: ReadOptions,
    order: RowOrder,
) -> LoraWeights:
    if "lora_a" not in found or "lora_b" not in found:
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted lora_a and lora_b")
    rank = rank_of(config, "r") if config else None
    both = pair(module, found["lora_a"], found["lora_b"], ("lora_a", "lora_b"), rank)
    magnitude = found.get("magnitude")
    if magnitude is not None and magnitude.shape != (both.lora_B.shape[0],):
        raise ValueError(f"{module}: magnitude {list(magnitude.shape)}, wanted [{both.lora_B.shape[0]}]")
    if config:
        scaling = number(config, "lora_alpha") / both.rank
    else:
        scaling = stated_scaling(options, both.rank, f"torchtune keeps it in {CONFIG_NAME}, which is missing")
    is_rotary = module.endswith((".self_attn.q_proj", ".self_attn.k_proj"))
    return LoraWeights(
        module=module,
        kind="embedding" if is_embedding(module) else both.kind,
        lora_A=both.lora_A,
        lora_B=both.lora_B,
        scaling=scaling,
        magnitude=magnitude,
        row_order=order if is_rotary else "base",
        scaling_is_stated=not config,
    )
