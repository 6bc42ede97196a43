"""A base as GPTQ leaves it, and the dense base of the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.vllm.cases import LINEAR

GROUP = 32
_BITS, _PER_WORD, _MIDDLE = 4, 8, 8


def gptq_and_dense(base: Path, quantized: Path, dense: Path) -> None:
    """From `base`: its linear layers in int4 with a scale for each GROUP of inputs (GPTQ's packing, symmetric), and
    what these integers stand for, in the dtype of the scales."""
    weights = load_file(base / "model.safetensors")
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2] not in LINEAR:
            packed[name] = plain[name] = weight.bfloat16()
            continue
        grouped = weight.unflatten(1, (-1, GROUP))
        scale = (grouped.abs().amax(2, keepdim=True) / 7).bfloat16().float()
        integers = (grouped / scale).round().clamp(-8, 7)
        plain[name] = (integers * scale).flatten(1).bfloat16()
        packed[f"{module}.qweight"] = _words((integers + _MIDDLE).flatten(1).T.int())
        packed[f"{module}.scales"] = scale.squeeze(2).T.bfloat16().contiguous()
        groups, rows = packed[f"{module}.scales"].shape
        # Stored less one, as GPTQ's first format does.
        packed[f"{module}.qzeros"] = _words(torch.full((rows, groups), _MIDDLE - 1).int()).T.contiguous()
        packed[f"{module}.g_idx"] = torch.arange(weight.shape[1]).int() // GROUP
    for folder, tensors in ((quantized, packed), (dense, plain)):
        folder.mkdir()
        shutil.copyfile(base / "config.json", folder / "config.json")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": _BITS,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    (quantized / "config.json").write_text(json.dumps(config))


def _words(integers: Tensor) -> Tensor:
    """int32 (n / 8, m) of 4-bit integers (n, m), the first in the lowest bits."""
    by_word = integers.unflatten(0, (-1, _PER_WORD)).long()
    shifts = (torch.arange(_PER_WORD) * _BITS)[None, :, None]
    words = (by_word << shifts).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()
