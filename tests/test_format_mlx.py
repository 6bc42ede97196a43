"""Adapters of mlx-lm, made and run by it on mlx's CPU backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import mlx.core as mx
import mlx_lm.tuner.utils as tuner
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from torch import Tensor

from dora_serve.errors import AdapterError, PlanError
from dora_serve.formats import ReadOptions, read_adapter
from tests.cases import LINEARS, SIZES, build, llama, merge_to, plan, rewrite_json, rewrite_tensors, save, tokens
from tests.format_oracle import check_forward

TOLERANCE = 3e-6
"""Logits of about 1 in float32 (6e-8 relative), after some dozens of roundings in each of two libraries."""

PARAMETERS = {
    "rank": 4,
    "scale": 1.5,
    "dropout": 0.0,
    "keys": [f"self_attn.{name}" for name in LINEARS[:4]] + ["mlp.down_proj"],
}


def train(base: Path, folder: Path, kind: str, *, num_layers: int = 1, **parameters: Any) -> Any:
    """A model of mlx-lm with an adapter that moved, saved as its trainer saves it (mlx_lm/tuner/trainer.py)."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(base)
    chosen = PARAMETERS | parameters
    model.freeze()
    tuner.linear_to_lora_layers(model, num_layers, chosen, use_dora=kind == "dora")
    mx.random.seed(5)
    for name, value in tree_flatten(model.parameters()):
        leaf = name.rpartition(".")[2]
        if leaf in ("lora_a", "lora_b"):
            model.load_weights([(name, value + 0.2 * mx.random.normal(value.shape))], strict=False)
        elif leaf == "m":
            model.load_weights([(name, value * (1 + 0.2 * mx.random.normal(value.shape)))], strict=False)
    folder.mkdir()
    learned = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), learned)
    config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": chosen,
        "model": str(base),
        "iters": 1,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


def their_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.from_numpy(np.array(model(mx.array(inputs["input_ids"].numpy()))))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_what_mlx_runs(tmp_path: Path, kind: str, tied: bool) -> None:
    start = llama(tie_word_embeddings=tied)
    save(start, tmp_path / "base")
    keys = [*PARAMETERS["keys"], "model.embed_tokens"]  # type: ignore[misc]
    model = train(tmp_path / "base", tmp_path / "adapter", kind, keys=keys)
    theirs = their_logits(model, tokens(start))
    check_forward(tmp_path, start, tokens(start), theirs, TOLERANCE)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"num_key_value_heads": 1}),
        ("phi3", {}),
    ],
)
def test_other_families(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    start = build("AutoModelForCausalLM", model_type, **{**SIZES, **changes})
    save(start, tmp_path / "base")
    rewrite_json(tmp_path / "base" / "config.json", rope_theta=10000.0)  # where mlx-lm looks for it
    model = train(tmp_path / "base", tmp_path / "adapter", "dora", keys=None)
    check_forward(tmp_path, start, tokens(start), their_logits(model, tokens(start)), TOLERANCE)


def test_experts(tmp_path: Path) -> None:
    start = build(
        "AutoModelForCausalLM",
        "mixtral",
        **{**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    )
    save(start, tmp_path / "base")
    model = train(tmp_path / "base", tmp_path / "adapter", "lora", keys=None)
    assert any("switch_mlp" in name for name, _ in tree_flatten(model.parameters()))
    check_forward(tmp_path, start, tokens(start), their_logits(model, tokens(start)), 2 * TOLERANCE)


# The four generations of its configuration


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mlx")
    save(llama(), root / "base")
    train(root / "base", root / "adapter", "dora")
    return root


def scalings(folder: Path, read: ReadOptions | None = None) -> set[float]:
    return {module.scaling for module in read_adapter(folder, read).modules}


def test_generations(trained: Path, tmp_path: Path) -> None:
    folder = copytree(trained / "adapter", tmp_path / "adapter")
    config = folder / "adapter_config.json"
    assert read_adapter(folder).format == "mlx"
    assert scalings(folder) == {1.5}
    rewrite_json(config, fine_tune_type=None, num_layers=None, use_dora=True, lora_layers=1)
    adapter = read_adapter(folder)
    assert {module.scaling for module in adapter.modules} == {1.5}
    assert adapter.method == "DoRA"
    assert any("832" in note for note in adapter.notes)
    rewrite_json(config, lora_parameters={"rank": 4, "scale": 1.5, "alpha": 12.0})
    assert scalings(folder) == {4.5}
    tensors = mx.load(str(folder / "adapters.safetensors"))
    mx.savez(str(folder / "adapters.npz"), **tensors)
    (folder / "adapters.safetensors").unlink()
    config.unlink()
    with pytest.raises(AdapterError, match="--lora-alpha"):
        read_adapter(folder)
    oldest = read_adapter(folder, ReadOptions(lora_alpha=6.0))
    assert {module.scaling for module in oldest.modules} == {1.5}
    newest = {module.module: module for module in read_adapter(trained / "adapter").modules}
    for module in oldest.modules:
        assert torch.equal(module.lora_A.load(), newest[module.module].lora_A.load())


def test_a_checkpoint_file_beside_its_configuration(trained: Path, tmp_path: Path) -> None:
    folder = copytree(trained / "adapter", tmp_path / "adapter")
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    merge_to(trained / "base", folder / "0000100_adapters.safetensors", tmp_path / "merged")


def test_full_fine_tuning_is_replacement(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    model, _ = load_model(trained / "base")
    weights = {name: value + 1 for name, value in tree_flatten(model.layers[1].parameters())}
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {f"model.layers.1.{name}": value for name, value in weights.items()}
    )
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
    planned = plan(trained / "base", folder)
    assert {tensor.action for tensor in planned.edited} == {"replaced"}
    assert len(planned.edited) == len(weights)


def rewrite_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_json(folder / "adapter_config.json", **changes)


def rewrite_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder / "adapters.safetensors", change)


FAULTS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "lora with m": (rewrite_config(fine_tune_type="lora"), "has an m"),
    "other method": (rewrite_config(fine_tune_type="lokr"), "fine_tune_type"),
    "other rank": (rewrite_config(lora_parameters={"rank": 8, "scale": 1}), "rank 4"),
    "no scale": (rewrite_config(lora_parameters={"rank": 4}), "scale"),
    "unknown key": (rewrite_config(lora_parameters={"rank": 4, "scale": 1, "rs": 1}), "--ignore-config"),
    "m lost": (rewrite_weights(lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.m")), "has no m"),
    "extra": (rewrite_weights(lambda tensors: tensors.update(extra=torch.ones(2))), "not understood"),
    "nan": (rewrite_weights(lambda tensors: tensors["model.layers.1.mlp.down_proj.m"].fill_(torch.nan)), "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(trained: Path, tmp_path: Path, fault: str) -> None:
    folder = copytree(trained / "adapter", tmp_path / "adapter")
    plant, message = FAULTS[fault]
    plant(folder)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


def test_a_base_of_another_size(trained: Path, tmp_path: Path) -> None:
    save(llama(hidden_size=24, num_attention_heads=3, num_key_value_heads=3), tmp_path / "other")
    with pytest.raises(PlanError):
        plan(tmp_path / "other", trained / "adapter")
