"""AdaLoRA as PEFT writes it (tuners/adalora/{layer,config}.py of 0.21.2; formats.md 8).

`W' = W + s B (A * E)`: `lora_A` (r, in), `lora_B` (out, r), `lora_E` (r, 1), without `.weight`, of the ranks that were
kept. s = lora_alpha / (init_r + 1e-5), init_r being what every module began with and `r` of the configuration nothing;
an alpha that is not positive stands for the rank that the module kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights
from dora_serve.formats.factors import Roles, group, not_understood, of_each, pair
from dora_serve.formats.files import (
    CONFIG_NAME,
    find_weights,
    open_finite,
    peek_config,
    read_config,
)
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft import WEIGHTS, saved_tensor, strip_prefix
from dora_serve.formats.peft_config import checked_config, require_mergeable
from dora_serve.formats.values import number, rank_of

_NAMED = r"(?:\.[^.]+)?"
_ROLES: Roles = (
    ("lora_A", re.compile(rf"^(.+)\.lora_A{_NAMED}$")),
    ("lora_B", re.compile(rf"^(.+)\.lora_B{_NAMED}$")),
    ("lora_E", re.compile(rf"^(.+)\.lora_E{_NAMED}$")),
    ("ranknum", re.compile(rf"^(.+)\.ranknum{_NAMED}$")),
)
_TRAINING = {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
_RANK_EPS = 1e-5


def sniff(path: Path) -> bool:
    """Whether the configuration says ADALORA."""
    return peek_config(path).get("peft_type") == "ADALORA"


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read an adapter folder. Raises AdapterError, with every problem at once, and UnmergeableError."""
    raw = read_config(path)
    plain = {key: value for key, value in raw.items() if key not in _TRAINING | {"rank_pattern"}}
    require_mergeable(plain, options.ignore_config, str(path / CONFIG_NAME))
    config = checked_config(plain, path / CONFIG_NAME)
    start = rank_of(raw, "init_r", 12)
    alpha = number(raw, "lora_alpha", 8)
    weights = open_finite(path, find_weights(path, *WEIGHTS), WEIGHTS[:1], options.allow_pickle)
    tensors = {strip_prefix(name): tensor for name, tensor in weights.tensors.items()}
    parts = group(tensors, _ROLES, keeps_rest=True)
    saved = {name: saved_tensor(name, tensor, config) for name, tensor in parts.rest.items()}
    unknown = {name: parts.rest[name] for name, change in saved.items() if change is None}
    if unknown:
        raise not_understood(unknown)
    made = of_each(weights.file, parts, lambda module, found: _of_module(module, found, alpha, start))
    modules = tuple(module for module in made if module is not None)
    pruned = len(made) - len(modules)
    base, revision, task = (raw.get(key) for key in ("base_model_name_or_path", "revision", "task_type"))
    return Adapter(
        path=path,
        format="adalora",
        modules=modules,
        replacements=tuple(change for change in saved.values() if change is not None),
        base=str(base) if base else None,
        base_revision=str(revision) if revision else None,
        task_type=str(task) if task else None,
        files=(path / CONFIG_NAME, weights.file),
        config=raw,
        notes=(f"All ranks of {pruned} modules were pruned: nothing is added to them.",) if pruned else (),
    )


def _is_pruned(found: Mapping[str, LazyTensor]) -> bool:
    """Whether no rank of a module was kept."""
    shapes = {role: tensor.shape for role, tensor in found.items()}
    return shapes.get("lora_E") == (0, 1) and shapes.get("lora_A", (1,))[0] == 0 and shapes.get("lora_B", (0,))[-1] == 0


def _of_module(module: str, found: Mapping[str, LazyTensor], alpha: float, start: int) -> LoraWeights | None:
    """None where no rank was kept."""
    if _is_pruned(found):
        return None
    if not {"lora_A", "lora_B", "lora_E"} <= found.keys():
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted lora_A, lora_B and lora_E")
    both = pair(module, found["lora_A"], found["lora_B"], ("lora_A", "lora_B"))
    lora_a, singular = both.lora_A, found["lora_E"]
    if singular.shape != (both.rank, 1):
        raise ValueError(f"{module}: lora_E {list(singular.shape)}, wanted [{both.rank}, 1]")

    def scaled() -> Tensor:
        return lora_a.load().double() * singular.load().double()

    scaling = (alpha if alpha > 0 else both.rank) / (start + _RANK_EPS)
    return LoraWeights(module, both.kind, LazyTensor(lora_a.shape, torch.float64, scaled), both.lora_B, scaling)
