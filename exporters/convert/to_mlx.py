"""An adapter as mlx-lm's folder: adapter_config.json and adapters.safetensors (mlx-lm 0.32; formats.md 5)."""

from __future__ import annotations

import re

from torch import Tensor
from torch.nn import functional

from dora_serve.adapter import LoraWeights
from exporters.convert.meaning import Plain
from exporters.convert.written import Written, refuse

_LAYER = re.compile(r"^model\.layers\.\d+\.(.+)$")


def to_mlx(given: Plain, base: str | None) -> Written:
    """The files of an adapter. Raises UnmergeableError, with everything that mlx-lm cannot say.

    mlx-lm has one rank: factors of a lower one are filled up with zeros, which changes nothing.
    """
    adapter = given.adapter
    with_magnitude = sum(module.magnitude is not None for module in adapter.modules)
    scalings = sorted({module.scaling for module in adapter.modules})
    problems = [f"{one.module}: LoRA on parameters of experts" for one in adapter.experts]
    problems += [f"{change.name}: a whole trained tensor" for change in adapter.replacements]
    problems += [f"{rows.module}: trained token rows" for rows in adapter.token_rows]
    if 0 < with_magnitude < len(adapter.modules):
        problems.append(f"{with_magnitude} of {len(adapter.modules)} modules have magnitudes: mlx-lm has all or none")
    if len(scalings) > 1:
        problems.append(f"scalings from {scalings[0]:.6g} to {scalings[-1]:.6g}: mlx-lm has one for all modules")
    for module in adapter.modules:
        problems += _problems(module, keeps_ties=adapter.keeps_ties)
    refuse("mlx-lm", problems)
    rank = max((module.rank for module in adapter.modules), default=1)
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules:
        tensors |= _tensors(module, rank)
    keys = sorted({match[1] if (match := _LAYER.match(m.module)) else m.module for m in adapter.modules})
    config: dict[str, object] = {
        "fine_tune_type": "dora" if with_magnitude else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scalings[0] if scalings else 1.0, "dropout": 0.0, "keys": keys},
        "model": base or adapter.base,
    }
    return Written("adapters.safetensors", tensors, {"format": "mlx"}, {"adapter_config.json": config})


def _problems(module: LoraWeights, *, keeps_ties: bool) -> list[str]:
    found = []
    if module.kind == "conv":
        found.append(f"{module.module}: a convolution")
    if module.kind == "embedding" and (module.magnitude is not None or not keeps_ties):
        found.append(f"{module.module}: an embedding: mlx-lm shares its update with the head, its norm is a token's")
    if module.lora_bias is not None:
        found.append(f"{module.module}: a bias of its own")
    if not _LAYER.match(module.module) and module.module not in ("lm_head", "model.embed_tokens"):
        found.append(f"{module.module}: a name that mlx-lm has otherwise, or not at all")
    return found


def _tensors(module: LoraWeights, rank: int) -> dict[str, Tensor]:
    missing = rank - module.rank
    lora_a = functional.pad(module.lora_A.load(), (0, 0, 0, missing)).T
    lora_b = functional.pad(module.lora_B.load(), (0, missing)).T
    tensors = {f"{module.module}.lora_a": lora_a.contiguous(), f"{module.module}.lora_b": lora_b.contiguous()}
    if module.magnitude is not None:
        tensors[f"{module.module}.m"] = module.magnitude.load().contiguous()
    return tensors
