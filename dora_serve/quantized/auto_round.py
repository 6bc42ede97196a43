"""AutoRound's own checkpoints, which lie as GPTQ's or AWQ's do and say so in words of their own (auto_round 0.16,
export/export_to_autoround and inference/backend.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dora_serve.errors import CheckpointError
from dora_serve.quantized.awq import find_awq
from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.gptq import find_gptq
from dora_serve.safetensors_file import TensorEntry

_GPTQ: Mapping[str, str] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}
_AWQ = "auto_round:auto_awq"
_DEFAULT = "auto_round:auto_gptq"
_DENSE_BITS = 16
_OF_EXPRESSIONS = set(r"*+?^$()[]{}|\\")


def find_auto_round(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> Found:
    """Every weight of integers. settings: the quantization_config.

    Raises CheckpointError for what it stores otherwise, and what `find_gptq` and `find_awq` raise.
    """
    packing = settings.get("packing_format") or _DEFAULT
    why = None
    if packing not in _GPTQ and packing != _AWQ:
        why = f"its packing_format is {packing!r}, wanted one of {', '.join((*_GPTQ, _AWQ))}"
    elif settings.get("data_type", "int") != "int":
        why = f"its data_type is {settings['data_type']!r}, wanted int"
    elif (settings.get("act_bits") or _DENSE_BITS) < _DENSE_BITS:
        why = f"its activations are rounded to {settings['act_bits']} bits with scales of their own"
    elif settings.get("rotation_config"):
        why = "its weights are rotated as it runs (rotation_config)"
    if why is not None:
        raise CheckpointError(
            f"The base is stored by AutoRound in a layout that is not read here: {why}.",
            remedy="Merge into the original weights (--base ORIGINAL --merge-into original), or dequantize it with "
            "auto-round first, save that, and give it as the base.",
            method="auto-round",
        )
    said = {key: settings.get(key) for key in ("bits", "group_size")}
    if packing == _AWQ:
        return find_awq(tensors, said)
    rules = {**said, "sym": settings.get("sym", True), "checkpoint_format": _GPTQ[packing]}
    return find_gptq(tensors, {**rules, "dynamic": _rules(settings.get("extra_config"))})


def _rules(extra: object) -> dict[str, Any]:
    """`extra_config` in GPTQ's words: names before expressions, which may match anywhere in a name."""
    table = {name: said for name, said in extra.items() if isinstance(said, dict)} if isinstance(extra, dict) else {}
    rules: dict[str, Any] = {}
    for name, said in sorted(table.items(), key=lambda item: bool(_OF_EXPRESSIONS & set(item[0]))):
        pattern = f".*(?:{name})" if _OF_EXPRESSIONS & set(name) else rf"(?:.*\.)?{re.escape(name)}$"
        bits = said.get("bits")
        sign = "-:" if isinstance(bits, int) and bits >= _DENSE_BITS else "+:"
        rules[sign + pattern] = {key: said[key] for key in ("bits", "group_size", "sym") if key in said}
    return rules
