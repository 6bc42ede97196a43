"""Adapters of other trainers in the engine: served as their trainer runs them, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_serve.engine import Engine
from dora_serve.errors import AdapterError, PlanError
from dora_serve.formats import ReadOptions
from tests.cases import adapt, distance, llama, load, merge_to, read_tensors, save, tokens
from tests.test_format_kohya import train as train_lycoris
from tests.test_format_mlx import train as train_mlx
from tests.test_format_nvlabs import write as write_nvlabs
from tests.test_format_trainers import write_torchtune

TOLERANCE = 3e-6
"""Logits of about 1 in float32, after some dozens of roundings."""


def served(root: Path, adapter: Path, read: ReadOptions | None = None) -> None:
    """The engine's logits are those of the merged model, which others' tests hold to the trainer's own."""
    start = llama()
    merge_to(root / "base", adapter, root / "merged", read=read)
    ids = tokens(start)["input_ids"]
    engine = Engine.load(root / "base", dtype=torch.float32, device="cpu")
    engine.pool.load("a", adapter, options=read)
    with engine.pool.lease("a") as prepared:
        got = torch.cat([engine.logits_alone(prepared, row) for row in ids.tolist()]).double()
    last = [load(folder, start)(input_ids=ids).logits[:, -1] for folder in (root / "merged", root / "base")]
    merged, own = (logits.detach().double().flatten() for logits in last)
    assert distance(got, merged) <= TOLERANCE
    assert distance(own, merged) > 100 * TOLERANCE


def test_lycoris_whose_norms_have_an_epsilon(tmp_path: Path) -> None:
    start = llama()
    save(start, tmp_path / "base")
    file = tmp_path / "adapter" / "x.safetensors"
    train_lycoris(start, file, targets=["LlamaAttention"], dtype=torch.bfloat16, dora_wd=True, wd_on_output=True)
    served(tmp_path, tmp_path / "adapter")


def test_mlx_and_torchtune(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    train_mlx(base, tmp_path / "mlx", "dora")
    served(tmp_path, tmp_path / "mlx")
    (tmp_path / "merged").rename(tmp_path / "merged mlx")
    write_torchtune(base, tmp_path / "torchtune", pairs=True, exported=False)
    served(tmp_path, tmp_path / "torchtune")


def test_what_has_no_unmerged_form_is_refused(tmp_path: Path) -> None:
    start = llama(tie_word_embeddings=True)
    base = save(start, tmp_path / "base")
    file = tmp_path / "in" / "x.safetensors"
    train_lycoris(start, file, targets=["LlamaAttention"], dora_wd=True, wd_on_output=False)
    train_mlx(base, tmp_path / "tied", "lora", keys=["model.embed_tokens"])
    write_nvlabs(base, tmp_path / "alone")
    engine = Engine.load(base, dtype=torch.float32, device="cpu")
    for name, message in (("in", "for each input"), ("tied", "tied head"), ("alone", "a magnitude alone")):
        with pytest.raises(PlanError, match=message):
            engine.pool.load(name, tmp_path / name)


def test_magnitudes_near_1_are_asked_about(tmp_path: Path) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    adapt(start, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)
    file, weights = tmp_path / "adapter" / "adapter_model.safetensors", read_tensors(base)
    tensors = {name: 0.02 * value if "lora_B" in name else value for name, value in load_file(file).items()}
    for name in [name for name in tensors if name.endswith("lora_magnitude_vector")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        tensors[name] = tensors[name] / weights[f"{module}.weight"].norm(dim=1)
    save_file(tensors, file)
    engine = Engine.load(base, dtype=torch.float32, device="cpu")
    with pytest.raises(AdapterError, match="--magnitudes"):
        engine.pool.load("a", tmp_path / "adapter")
    served(tmp_path, tmp_path / "adapter", ReadOptions(magnitudes="norm-scale"))
