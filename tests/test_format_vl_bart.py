"""VL-BART: the trainer of NVlabs/DoRA's image_video_text_understanding, after its code, on a tiny BART."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_serve.errors import AdapterError, UnmergeableError
from dora_serve.formats import ReadOptions, read_adapter
from exporters.convert.run import ConvertRequest, convert
from exporters.pipeline import ExportRequest, run_export
from tests.cases import ask_here, build, distance, load, logits, read_tensors, save, token_pairs
from tests.families import BART, SEQ2SEQ

ADDED = 6
"""Tokens that it adds for the places of what is seen."""

PICKLE = ReadOptions(format="vl-bart", allow_pickle=True)


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


class Decomposed(nn.Module):
    """A linear layer as its DoraLinear has it: the base's weight beside magnitude and factors, a scale of 1."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight_m = nn.Parameter(base.weight.detach().norm(dim=1, keepdim=True))
        self.weight_v = nn.Parameter(base.weight.detach().clone())
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / 4)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) / 4)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        direction = self.weight_v + self.lora_B @ self.lora_A
        return nn.functional.linear(x, self.weight_m / direction.norm(dim=1, keepdim=True) * direction, self.bias)


def train(base: Path) -> Any:
    """What `multitask.py --use_dora --lora_settings --unfreeze_bias --unfreeze_layer_norms` leaves."""
    model: Any = copy.deepcopy(load(base, build(SEQ2SEQ, "bart", **BART)))
    torch.manual_seed(4)
    model.resize_token_embeddings(BART["vocab_size"] + ADDED, mean_resizing=False)
    for name, module in list(model.named_modules()):
        if ".layers." in name and name.endswith(("q_proj", "v_proj")):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], Decomposed(module, 3))
    model.model.encoder.visual_embedding = nn.ModuleDict(
        {"feat_embedding": nn.Sequential(nn.Linear(5, 16)), "obj_order_embedding": model.model.shared}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_m"):
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape).clamp(-2, 2))
            elif name.endswith("bias") or "layer_norm" in name or "layernorm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def saved(model: Any) -> dict[str, Tensor]:
    """The state of the model within DistributedDataParallel."""
    return {f"module.{name}": value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("vl")
    base = save(build(SEQ2SEQ, "bart", **BART), root / "base")
    model = train(base)
    torch.save(saved(model), root / "LAST.pth")
    return root, model


def test_the_trained_model_and_the_merged_one_are_one(trained: tuple[Path, Any], tmp_path: Path) -> None:
    root, model = trained
    file = root / "LAST.pth"
    with pytest.raises(AdapterError, match="--allow-pickle"):
        read_adapter(file, ReadOptions(format="vl-bart"))
    made: Any = run_export(ExportRequest(str(file), str(root / "base"), tmp_path / "out", read=PICKLE)).verification
    assert made.tensors.exact
    assert made.forward.ran, made.forward.reason
    assert made.forward.passed
    merged = load(tmp_path / "out", build(SEQ2SEQ, "bart", **BART), spare="visual_embedding")
    inputs = token_pairs(merged)
    truth = logits(copy.deepcopy(model).double(), inputs)
    assert merged.config.vocab_size == BART["vocab_size"] + ADDED
    assert distance(logits(merged, inputs), truth) <= 4 * distance(logits(model, inputs), truth)
    tensors = read_tensors(tmp_path / "out")
    assert torch.equal(
        tensors["model.encoder.visual_embedding.feat_embedding.0.weight"],
        model.model.encoder.visual_embedding["feat_embedding"][0].weight,
    )
    assert not any("obj_order_embedding" in name or name.endswith(("weight_m", "weight_v")) for name in tensors)
    with pytest.raises(UnmergeableError, match="whole model"):
        convert(ConvertRequest(str(file), "peft", base=str(root / "base"), read=PICKLE))


def test_a_safetensors_copy_is_found_by_its_names(trained: tuple[Path, Any], tmp_path: Path) -> None:
    kept = {name: value.contiguous() for name, value in saved(trained[1]).items()}
    save_file(kept, tmp_path / "LAST.safetensors")
    adapter = read_adapter(tmp_path)
    assert (adapter.format, adapter.method) == ("vl-bart", "DoRA")
    assert {module.scaling for module in adapter.modules} == {1.0}
    assert len(adapter.modules) == 2 * (2 + 2 * 2)


def without(leaf: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith(f"layers.0.self_attn.q_proj.{leaf}")}


@pytest.mark.parametrize("leaf", ["weight_m", "weight_v", "lora_B"])
def test_what_is_not_whole_is_named(leaf: str, trained: tuple[Path, Any], tmp_path: Path) -> None:
    save_file(without(leaf, saved(trained[1])), tmp_path / "LAST.safetensors")
    with pytest.raises(AdapterError, match=r"encoder\.layers\.0\.self_attn\.q_proj: has .*, wanted weight_m"):
        read_adapter(tmp_path)
    assert load_file(tmp_path / "LAST.safetensors")
