"""The order of a projection's outputs, where a trainer's own model has another than the base.

Rotary embeddings turn pairs of numbers. The original Llama has the two of a pair side by side in a head, transformers
has all first ones before all second ones, and so the rows of q_proj and k_proj are permuted between the two. torchtune
trains the original order for the families of Llama, Mistral and Gemma, and transformers' own for Qwen and Phi. Its
export for PEFT permutes lora_B of every family, and no magnitude (torchtune/models/convert_weights.py,
tune_to_peft_adapter_weights): so of an export the magnitudes are out of order in the former, and lora_B in the latter.

Megatron fuses query, key and value, for each group of heads that share a key its queries, the key, the value; and gate
and up, the one after the other (megatron/core/transformer/{attention,mlp}.py). They become the base's own modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dora_serve.adapter import Adapter, LoraWeights
from dora_serve.errors import AdapterError

_HALVES_IN_TORCHTUNE = ("qwen2", "qwen2_5", "qwen3", "phi3", "phi4")


def in_base_order(adapter: Adapter, config: Mapping[str, object]) -> Adapter:
    """The adapter with the outputs of every module in the order of the base; itself where they are already.

    config: the base's. Raises AdapterError where it does not tell the size of a head.
    """
    if all(module.row_order == "base" for module in adapter.modules):
        return adapter
    text = config.get("text_config")
    table = text if isinstance(text, dict) and "model_type" in text else config
    modules = tuple(one for module in adapter.modules for one in _in_base_order(module, table))
    return replace(adapter, modules=modules)


def _in_base_order(module: LoraWeights, config: Mapping[str, object]) -> tuple[LoraWeights, ...]:
    if module.row_order == "base":
        return (module,)
    if module.row_order == "megatron_qkv":
        return _query_key_value(module, config)
    if module.row_order == "megatron_gate_up":
        return _gate_and_up(module)
    return (_reordered(module, config),)


def halves_from_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """rows (heads * head_dim, ...), the two of every pair side by side -> all first ones before all second ones."""
    halves: Tensor = rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
    return halves


def pairs_from_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    pairs: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)
    return pairs


def _reordered(module: LoraWeights, config: Mapping[str, object]) -> LoraWeights:
    head_dim = _head_dim(config)
    if not head_dim or head_dim % 2 or module.lora_B.shape[0] % head_dim:
        raise AdapterError(
            f"{module.module}: its {module.lora_B.shape[0]} outputs are in torchtune's order of the rotary embedding, "
            f"and the base's config.json gives a head_dim of {head_dim}, which does not divide them into pairs.",
            remedy="Give the base that the adapter was trained on, with its config.json.",
            module=module.module,
        )
    has_halves = config.get("model_type") in _HALVES_IN_TORCHTUNE
    lora_b, magnitude = module.lora_B, module.magnitude
    if module.row_order == "torchtune" and not has_halves:
        lora_b = lora_b.map(lora_b.shape, lambda rows: halves_from_pairs(rows, head_dim))
    if module.row_order == "torchtune_export" and has_halves:
        lora_b = lora_b.map(lora_b.shape, lambda rows: pairs_from_halves(rows, head_dim))
    if magnitude is not None and not has_halves:
        magnitude = magnitude.map(magnitude.shape, lambda rows: halves_from_pairs(rows, head_dim))
    return replace(module, lora_B=lora_b, magnitude=magnitude, row_order="base")


def _query_key_value(module: LoraWeights, config: Mapping[str, object]) -> tuple[LoraWeights, ...]:
    head_dim, out = _head_dim(config), module.lora_B.shape[0]
    heads = _whole(config, "num_attention_heads")
    groups = _whole(config, "num_key_value_heads") or heads
    if not groups or heads % groups or out != head_dim * (heads + 2 * groups):
        raise AdapterError(
            f"{module.module}: {out} outputs of a fused query, key and value, which {heads} heads of {head_dim} and "
            f"{groups} groups in the base's config.json do not make.",
            remedy="Give the base that the adapter was trained on, with its config.json.",
            module=module.module,
        )
    rows = torch.arange(out).view(groups, -1, head_dim)
    owner = module.module.removesuffix("qkv_proj")
    parts = {"q_proj": rows[:, :-2], "k_proj": rows[:, -2], "v_proj": rows[:, -1]}
    return tuple(_outputs(module, f"{owner}{name}", index.flatten()) for name, index in parts.items())


def _gate_and_up(module: LoraWeights) -> tuple[LoraWeights, ...]:
    gate, up = torch.arange(module.lora_B.shape[0]).chunk(2)
    owner = module.module.removesuffix("gate_up_proj")
    return _outputs(module, f"{owner}gate_proj", gate), _outputs(module, f"{owner}up_proj", up)


def _outputs(module: LoraWeights, name: str, rows: Tensor) -> LoraWeights:
    """Some outputs of a module as a module of their own."""
    count, magnitude = len(rows), module.magnitude
    return replace(
        module,
        module=name,
        lora_B=module.lora_B.map((count, module.rank), lambda tensor: tensor[rows]),
        magnitude=None if magnitude is None else magnitude.map((count,), lambda tensor: tensor[rows]),
        row_order="base",
    )


def _head_dim(config: Mapping[str, object]) -> int:
    heads = _whole(config, "num_attention_heads")
    return _whole(config, "head_dim") or (_whole(config, "hidden_size") // heads if heads else 0)


def _whole(config: Mapping[str, object], key: str) -> int:
    """A whole number of the configuration, 0 where there is none."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0
