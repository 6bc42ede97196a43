"""Bases that mlx-lm quantized, on mlx's CPU backend: its codes, its forward, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import CheckpointError
from dora_serve.quantized.decode import open_decoder
from dora_serve.quantized.view import dense_view
from dora_serve.reference_decode import decoded_range
from exporters.pipeline import ExportRequest, run_export
from tests.cases import ask_here, build, distance, llama, load, logits, rewrite_json, save, tokens
from tests.test_format_mlx import TOLERANCE, their_logits, train

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    mx.set_default_device(mx.cpu)
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


def quantized(folder: Path, model: Any, group_size: int = 32, bits: int = 4, **options: Any) -> Path:
    """A model of transformers, saved dense, then as `mlx_lm.convert --quantize` saves it."""
    dense = save(model, folder / "dense")
    loaded, _ = load_model(dense)
    config = json.loads((dense / "config.json").read_text())
    loaded, config = quantize_model(loaded, config, group_size, bits, **options)
    save_model(folder / "base", loaded)
    save_config(config, config_path=folder / "base" / "config.json")
    return folder / "base"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_values_are_those_of_mlx(bits: int, dtype: str, tmp_path: Path) -> None:
    """Code by code: mlx's own product rounds once more, so it is held to scale * code + bias in float64."""
    group = {2: 128, 3: 64}.get(bits, 32)
    weight = mx.random.normal((5, 256), key=mx.random.key(bits)).astype(getattr(mx, dtype))
    codes, scales, biases = mx.quantize(weight, group, bits)
    arrays = {"a.weight": codes, "a.scales": scales, "a.biases": biases, "b.weight": weight}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": group, "bits": bits}}))
    view = dense_view(open_checkpoint(tmp_path))
    assert view.quantization == f"mlx {bits} bit, groups of {group}"
    assert view.tensors.keys() == {"a.weight", "b.weight"}
    entry = view.tensors["a.weight"]
    # Codes as mlx itself takes them apart: with scales of 1 and biases of 0 its dequantization is exact.
    ones, zeros = mx.ones(scales.shape, dtype=mx.float32), mx.zeros(scales.shape, dtype=mx.float32)
    plain = torch.from_numpy(np.array(mx.dequantize(codes, ones, zeros, group, bits)))
    assert plain.unique().numel() > 2**bits // 2

    def wide(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(array.astype(mx.float32))).double().repeat_interleave(group, 1)

    wanted = (plain.double() * wide(scales) + wide(biases)).float().flatten()
    for start, stop in ((0, 1280), (3, 700), (255, 257)):
        assert torch.equal(open_decoder(entry)(start, stop), wanted[start:stop])
        assert torch.equal(decoded_range(entry, start, stop), wanted[start:stop])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_on_a_quantized_base_is_what_mlx_runs(kind: str, tmp_path: Path) -> None:
    start = llama(**WIDE)
    base = quantized(tmp_path, start)
    model = train(base, tmp_path / "adapter", kind)
    theirs = their_logits(model, tokens(start))
    made: Any = run_export(ExportRequest(str(tmp_path / "adapter"), str(base), tmp_path / "merged")).verification
    assert made.tensors.exact
    assert made.forward.ran, made.forward.reason
    assert made.forward.passed
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"}
    merged = load(tmp_path / "merged", start)
    assert distance(logits(merged, tokens(start)), theirs.double().flatten()) <= TOLERANCE
    dense = load(tmp_path / "dense", start)
    assert distance(logits(dense, tokens(start)), theirs.double().flatten()) > 100 * TOLERANCE


def test_layers_with_bits_of_their_own(tmp_path: Path) -> None:
    def mixed(path: str, _: Any) -> Any:
        return {"group_size": 64, "bits": 8, "mode": "affine"} if "down_proj" in path else "embed" not in path

    base = quantized(tmp_path, llama(**WIDE), quant_predicate=mixed)
    view = dense_view(open_checkpoint(base))
    assert view.quantization == "mlx 4 bit, groups of 32; mlx 8 bit, groups of 64"
    assert view.tensors["model.layers.0.mlp.down_proj.weight"].shape == (64, 128)
    assert view.tensors["model.embed_tokens.weight"].coding is None


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    base = quantized(tmp_path / "mxfp4", llama(**WIDE), mode="mxfp4")
    with pytest.raises(CheckpointError, match="in the mode 'mxfp4'") as caught:
        dense_view(open_checkpoint(base))
    assert "--merge-into original" in str(caught.value.remedy)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 40, "tie_word_embeddings": False}
    base = quantized(tmp_path / "moe", build("AutoModelForCausalLM", "mixtral", **WIDE, **experts))
    with pytest.raises(CheckpointError, match="holds all experts in one tensor"):
        dense_view(open_checkpoint(base))
    base = quantized(tmp_path / "group", llama(**WIDE))
    rewrite_json(base / "config.json", quantization={"group_size": 48, "bits": 4}, quantization_config=None)
    with pytest.raises(CheckpointError, match="does not fit its scales"):
        dense_view(open_checkpoint(base))
