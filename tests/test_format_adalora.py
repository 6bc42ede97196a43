"""AdaLoRA, trained, pruned, saved and run by PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

from dora_serve.errors import AdapterError
from dora_serve.formats import read_adapter
from tests.cases import compare_with_unmerged, llama, merge_to, quiet, rewrite_tensors, save, tokens


def train(base: Any, folder: Path, **config: Any) -> Any:
    """A model of PEFT whose ranks were allocated once, so that modules have kept different ones."""
    torch.manual_seed(3)
    with quiet():
        given = {"init_r": 6, "target_r": 3, "lora_alpha": 9, "total_step": 10, "tinit": 0, "tfinal": 2, "deltaT": 1}
        model = get_peft_model(copy.deepcopy(base), AdaLoraConfig(**{**given, **config}))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for step in range(10):
            model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
            model.base_model.update_and_allocate(step)
            model.zero_grad()
        model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("alpha", [9, 0])
def test_merged_is_what_peft_runs(tmp_path: Path, alpha: int) -> None:
    start = llama()
    save(start, tmp_path / "base")
    train(start, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "up_proj"], lora_alpha=alpha)
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.format == "adalora"
    assert len({module.rank for module in adapter.modules}) > 1
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    compare_with_unmerged(tmp_path, start, tokens(start))


def test_saved_modules_and_what_does_not_fit(tmp_path: Path) -> None:
    start = llama()
    save(start, tmp_path / "base")
    train(start, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert [change.name for change in read_adapter(tmp_path / "adapter").replacements] == ["lm_head.weight"]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    rewrite_tensors(file, lambda tensors: tensors.pop(next(name for name in tensors if "lora_E" in name)))
    with pytest.raises(AdapterError, match="wanted lora_A, lora_B and lora_E"):
        read_adapter(tmp_path / "adapter")
