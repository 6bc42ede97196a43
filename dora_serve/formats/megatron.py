"""Megatron-Bridge (peft/{lora,dora,dora_layers}.py at 067f987; formats.md 7), as one file of tensors.

`adapter.linear_in.weight` (r, in), `adapter.linear_out.weight` (out, r), `adapter.weight_magnitude` (out,): the formula
of the paper, s = alpha / dim, which are in the training's run configuration. linear_qkv and linear_fc1 are fused, and
their outputs in Megatron's order (row_order.py). The export to Hugging Face names leaves the magnitudes out; such a
folder says use_dora, and the reader of PEFT refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights, RowOrder
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import Roles, group, of_each, pair
from dora_serve.formats.files import find_weights, open_finite, tensor_names
from dora_serve.formats.mixed import require_all_or_none
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.values import stated_scaling

_ROLES: Roles = (
    ("linear_in", re.compile(r"^(.+)\.adapter\.linear_in\.weight$")),
    ("linear_out", re.compile(r"^(.+)\.adapter\.linear_out\.weight$")),
    ("magnitude", re.compile(r"^(.+)\.adapter\.weight_magnitude$")),
)
_LAYER = re.compile(r"^(?:module\.|model\.)*(?:language_model\.)?decoder\.layers\.(\d+)\.(self_attention|mlp)\.(\w+)$")
_NAMES: Mapping[str, tuple[str, RowOrder]] = {
    "self_attention.linear_qkv": ("self_attn.qkv_proj", "megatron_qkv"),
    "self_attention.linear_proj": ("self_attn.o_proj", "base"),
    "mlp.linear_fc1": ("mlp.gate_up_proj", "megatron_gate_up"),
    "mlp.linear_fc2": ("mlp.down_proj", "base"),
}
_WHY = "Megatron-Bridge keeps dim and alpha in its run configuration"


def sniff(path: Path) -> bool:
    """Whether the names are Megatron-Bridge's."""
    return any(".adapter.linear_in." in name for name in tensor_names(find_weights(path, single=True)))


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a file or a folder with one. Raises AdapterError, with every problem at once."""
    weights = open_finite(path, find_weights(path, single=True), ("one .safetensors file",), options.allow_pickle)
    parts = group(weights.tensors, _ROLES)
    modules = of_each(weights.file, parts, lambda module, found: _of_module(module, found, options))
    require_all_or_none(weights.file, modules)
    return Adapter(path=path, format="megatron", modules=tuple(modules), files=(weights.file,))


def _of_module(module: str, found: Mapping[str, LazyTensor], options: ReadOptions) -> LoraWeights:
    match = _LAYER.match(module)
    named = _NAMES.get(f"{match[2]}.{match[3]}") if match else None
    if match is None or named is None:
        raise AdapterError(
            f"The adapter adapts {module!r}, whose name in a Hugging Face model is not known here.",
            remedy="linear_qkv, linear_proj, linear_fc1 and linear_fc2 of a decoder's layers are; export the adapter "
            "with Megatron-Bridge if it is a LoRA.",
            module=module,
        )
    if "linear_in" not in found or "linear_out" not in found:
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted linear_in and linear_out")
    both = pair(module, found["linear_in"], found["linear_out"], ("linear_in", "linear_out"))
    magnitude = found.get("magnitude")
    if magnitude is not None and magnitude.shape != (both.lora_B.shape[0],):
        raise ValueError(f"{module}: weight_magnitude {list(magnitude.shape)}, wanted [{both.lora_B.shape[0]}]")
    return LoraWeights(
        module=f"model.layers.{match[1]}.{named[0]}",
        kind=both.kind,
        lora_A=both.lora_A,
        lora_B=both.lora_B,
        scaling=stated_scaling(options, both.rank, _WHY),
        magnitude=magnitude,
        row_order=named[1],
        scaling_is_stated=True,
    )
