"""Dynamic Low-Rank Adaptation, the other DoRA (arXiv 2405.17357; MIkumikumi0116/DoRA at 235e21f; formats.md 4).

`W' = W + s B diag(c) A`, no norm: c is `lora_scaler` (r0,), and s = alpha / r0 even after ranks were pruned. A
component that `finally_mask_dict` of prune_state_dict.pt marks is pruned, whatever the optimizer made of its c since.
The folder is accelerate's `checkpoint/`, a state of the whole model. Without `lora_scaler` it is their plain LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights, Replacement
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import Roles, group, misfit, of_each, pair
from dora_serve.formats.files import find_weights, load_pickle, open_finite, tensor_names
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.values import stated_scaling

WEIGHTS = ("checkpoint/model.safetensors", "checkpoint/pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
PRUNED = "prune_state_dict.pt"
_ROLES: Roles = (
    ("lora_A", re.compile(r"^(.+)\.lora_a_linear\.weight$")),
    ("lora_B", re.compile(r"^(.+)\.lora_b_linear\.weight$")),
    ("scaler", re.compile(r"^(.+)\.lora_scaler$")),
)
_OWN = re.compile(r"^(.+)\.linear\.(weight|bias)$")
_HEAD = re.compile(r"(^|\.)(classifier|score|qa_outputs|lm_head|pooler)\.")
_WHY = "they hold no alpha (the published configurations have 8), and are scaled by alpha / start_rank"


def sniff(path: Path) -> bool:
    """Whether the names are this code's, or its file of pruned components lies there."""
    if (path / PRUNED).is_file():
        return True
    return any(".lora_a_linear." in name for name in tensor_names(find_weights(path, *WEIGHTS)))


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read the folder of a training, or the state of a model. Raises AdapterError, with every problem at once."""
    weights = open_finite(path, find_weights(path, *WEIGHTS), WEIGHTS, options.allow_pickle)
    masks = _masks(path, options)
    parts = group(weights.tensors, _ROLES, _renamed, keeps_rest=True)
    scaled = {module for module, found in parts.modules.items() if "scaler" in found}
    if lost := sorted(parts.modules.keys() - scaled if scaled else ()):
        raise misfit(weights.file, [f"{module}: has no lora_scaler, and others have" for module in lost])
    made = of_each(weights.file, parts, lambda module, found: _of_module(module, found, masks, options))
    modules = tuple(module for module in made if module is not None)
    kept = sum(module.rank for module in modules)
    pruned = sum(found["lora_A"].shape[0] for found in parts.modules.values()) - kept
    files = (weights.file, path / PRUNED) if masks is not None else (weights.file,)
    return Adapter(
        path=path,
        format="dynamic",
        modules=modules,
        replacements=tuple(_replacement(_renamed(name), tensor) for name, tensor in parts.rest.items()),
        files=files,
        notes=(f"{pruned} components were pruned in training, {kept} are left.",),
    )


def _renamed(name: str) -> str:
    """Accelerate saves the wrapper's attribute, `model.`, before the names of the model."""
    return name.removeprefix("module.").removeprefix("model.")


def _masks(path: Path, options: ReadOptions) -> Mapping[str, Tensor] | None:
    """True where a component is pruned, by module; None where there is no such file."""
    file = path / PRUNED
    if not file.is_file():
        return None
    state = load_pickle(file, options.allow_pickle)
    table = state.get("finally_mask_dict") if isinstance(state, dict) else None
    if not isinstance(table, dict) or not all(isinstance(mask, Tensor) for mask in table.values()):
        raise AdapterError(
            f"{str(file)!r} holds no finally_mask_dict of tensors.",
            remedy="Copy it again from the training's folder: without it, pruned components would come back.",
            path=str(file),
        )
    return {str(name).removesuffix(".lora_scaler"): mask for name, mask in table.items()}


def _of_module(
    module: str, found: Mapping[str, LazyTensor], masks: Mapping[str, Tensor] | None, options: ReadOptions
) -> LoraWeights | None:
    """The module as plain LoRA of the components that are left, None for none."""
    if "lora_A" not in found or "lora_B" not in found:
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted both factors")
    both = pair(module, found["lora_A"], found["lora_B"], ("lora_a_linear", "lora_b_linear"))
    scaling = stated_scaling(options, both.rank, _WHY)
    scaler = found.get("scaler")
    if scaler is None:
        return LoraWeights(module, both.kind, both.lora_A, both.lora_B, scaling, scaling_is_stated=True)
    if scaler.shape != (both.rank,):
        raise ValueError(f"{module}: lora_scaler {list(scaler.shape)}, wanted [{both.rank}]")
    kept = torch.arange(both.rank)
    if masks is not None:
        named = (masks.get(f"{wrapper}{module}") for wrapper in ("", "model.", "module.model."))
        mask = next((mask for mask in named if mask is not None), None)
        if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != (both.rank,):
            got = "nothing" if mask is None else f"{list(mask.shape)} {mask.dtype}"
            raise ValueError(f"{module}: finally_mask_dict has {got} for it, wanted [{both.rank}] bool")
        kept = (~mask).nonzero().flatten()
    count = len(kept)
    if not count:
        return None
    lora_a, lora_b = both.lora_A, both.lora_B

    def scaled() -> Tensor:
        return (scaler.load().double()[:, None] * lora_a.load().double())[kept]

    scaled_a = LazyTensor((count, lora_a.shape[1]), torch.float64, scaled)
    kept_b = lora_b.map((lora_b.shape[0], count), lambda tensor: tensor[:, kept])
    return LoraWeights(module, both.kind, scaled_a, kept_b, scaling, scaling_is_stated=True)


def _replacement(name: str, tensor: LazyTensor) -> Replacement:
    """Of the whole model's state, heads were trained; the rest is the base as it was, which it replaces."""
    if match := _OWN.match(name):
        return Replacement(f"{match[1]}.{match[2]}", tensor, "base_layer")
    return Replacement(name, tensor, "modules_to_save" if _HEAD.search(name) else "base_layer")
