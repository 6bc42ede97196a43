"""An adapter as PEFT's folder: adapter_config.json and adapter_model.safetensors (peft 0.21.2; formats.md 1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from dora_serve.adapter import Adapter, LoraWeights, Replacement
from exporters.convert.meaning import Plain
from exporters.convert.written import Written, alpha_of, refuse

PREFIX = "base_model.model."


def to_peft(given: Plain, base: str | None) -> Written:
    """The files of an adapter. base: what to name as the model that it was trained on.

    Raises UnmergeableError, with everything that PEFT cannot say.
    """
    adapter = given.adapter
    with_magnitude = [module for module in adapter.modules if module.magnitude is not None]
    problems = [f"{one.module}: LoRA on parameters of experts" for one in adapter.experts]
    problems += [f"{rows.module}: trained token rows" for rows in adapter.token_rows]
    if with_magnitude and len(with_magnitude) < len(adapter.modules):
        plain = [module.module for module in adapter.modules if module.magnitude is None]
        problems += [f"{name}: no magnitude, where {len(with_magnitude)} other modules have one" for name in plain]
    problems += [f"{module.module}: a bias of its own" for module in with_magnitude if module.lora_bias is not None]
    refuse("PEFT", problems)
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules:
        tensors |= {f"{PREFIX}{name}": value for name, value in _tensors(module, given.kernels).items()}
    adapted = {module.module for module in adapter.modules}
    for change in adapter.replacements:
        tensors[f"{PREFIX}{_saved_name(change, adapted)}"] = change.tensor.load().contiguous()
    return Written(
        file="adapter_model.safetensors",
        tensors=tensors,
        metadata={"format": "pt"},
        config={"adapter_config.json": _config(adapter, base, use_dora=bool(with_magnitude))},
    )


def _tensors(module: LoraWeights, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    lora_a, lora_b = module.lora_A.load(), module.lora_B.load()
    magnitude = module.magnitude.load() if module.magnitude is not None else None
    name = module.module
    if module.kind == "embedding":
        keys = (f"{name}.lora_embedding_A", f"{name}.lora_embedding_B")
    else:
        keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    if module.kind == "conv":
        shape = kernels[name]
        ones = [1] * len(shape[2:])
        lora_a, lora_b = lora_a.reshape(module.rank, *shape[1:]), lora_b.reshape(*lora_b.shape, *ones)
        magnitude = magnitude.reshape(1, -1, *ones) if magnitude is not None else None
    tensors = {keys[0]: lora_a.contiguous(), keys[1]: lora_b.contiguous()}
    if magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = magnitude.contiguous()
    if module.lora_bias is not None:
        tensors[f"{name}.lora_B.bias"] = module.lora_bias.load().contiguous()
    return tensors


def _saved_name(change: Replacement, adapted: Collection[str]) -> str:
    """PEFT, and vLLM, know the base's own tensors of an adapted layer by `base_layer`."""
    path, _, leaf = change.name.rpartition(".")
    if change.role == "bias" or (change.role == "base_layer" and path in adapted):
        return f"{path}.base_layer.{leaf}"
    return change.name


def _config(adapter: Adapter, base: str | None, *, use_dora: bool) -> dict[str, object]:
    ranks = {module.module: module.rank for module in adapter.modules}
    alphas = {module.module: alpha_of(module) for module in adapter.modules}
    rank, alpha = _most_common(ranks.values(), 8), _most_common(alphas.values(), 8.0)
    biases = any(change.role == "bias" for change in adapter.replacements)
    saved = {change.name.rpartition(".")[0] for change in adapter.replacements if change.role == "modules_to_save"}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": base or adapter.base,
        "revision": adapter.base_revision if base is None else None,
        "inference_mode": True,
        "r": int(rank),
        "lora_alpha": _number(alpha),
        "rank_pattern": {_pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(name): _number(value) for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(ranks),
        "modules_to_save": sorted(saved) or None,
        "lora_dropout": 0.0,
        "use_dora": use_dora,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "lora_only" if biases else "none",
        "lora_bias": any(module.lora_bias is not None for module in adapter.modules),
        "init_lora_weights": True,
    }


def _pattern(name: str) -> str:
    """A key that means this module alone."""
    return f"^{re.escape(name)}"


def _targets(names: Iterable[str]) -> list[str]:
    """Whole paths, so that no module is meant that has no tensors."""
    return sorted(names)


def _most_common(values: Iterable[float], default: float) -> float:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
