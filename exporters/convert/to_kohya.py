"""An adapter as one file with kohya's names, as LyCORIS writes it (4.1.3; formats.md 6.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_serve.adapter import LoraWeights
from dora_serve.formats.lycoris import EPS_KEY
from exporters.convert.meaning import Plain
from exporters.convert.written import Written, alpha_of, refuse

FILE = "adapter.safetensors"
_UNET = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
_NOTE = (
    "LyCORIS adds the epsilon of dora_scale's dtype to the norm; others that read these names do as well, or take the "
    "norm of the base's weight (ComfyUI). The metadata say that none was added in training, and dora-export heeds it."
)


def to_kohya(given: Plain, base: str | None) -> Written:
    """The file of an adapter. Raises UnmergeableError, with everything that LyCORIS cannot say."""
    adapter = given.adapter
    problems = [f"{one.module}: LoRA on parameters of experts" for one in adapter.experts]
    problems += [f"{change.name}: a whole trained tensor" for change in adapter.replacements]
    problems += [f"{rows.module}: trained token rows" for rows in adapter.token_rows]
    problems += [f"{module.module}: an embedding" for module in adapter.modules if module.kind == "embedding"]
    problems += [f"{module.module}: a bias of its own" for module in adapter.modules if module.lora_bias is not None]
    names = {module.module: _prefixed(module.module) for module in adapter.modules}
    if len(set(names.values())) < len(names):
        problems.append("modules whose names are the same once dots are underscores")
    refuse("a file with kohya's names", problems)
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules:
        tensors |= {f"{names[module.module]}.{leaf}": value for leaf, value in _tensors(module, given.kernels).items()}
    has_magnitudes = any(module.magnitude is not None for module in adapter.modules)
    metadata = {"format": "pt"} | ({EPS_KEY: "0"} if has_magnitudes else {})
    return Written(FILE, tensors, metadata, notes=(_NOTE,) if has_magnitudes else ())


def _prefixed(module: str) -> str:
    prefix = "lycoris_"
    if module.startswith(_UNET):
        prefix = "lora_unet_"
    elif module.startswith("text_model."):
        prefix = "lora_te_"
    return prefix + module.replace(".", "_")


def _tensors(module: LoraWeights, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    down, up = module.lora_A.load(), module.lora_B.load()
    ones: list[int] = []
    if module.kind == "conv":
        shape = kernels[module.module]
        ones = [1] * len(shape[2:])
        down, up = down.reshape(module.rank, *shape[1:]), up.reshape(*up.shape, *ones)
    alpha = torch.tensor(alpha_of(module), dtype=torch.float64)
    tensors = {
        "lora_down.weight": down.contiguous(),
        "lora_up.weight": up.contiguous(),
        "alpha": alpha.float() if float(alpha.float()) == float(alpha) else alpha,
    }
    if module.magnitude is not None:
        tensors["dora_scale"] = module.magnitude.load().reshape(-1, 1, *ones).contiguous()
    return tensors
