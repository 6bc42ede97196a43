"""Other trainers' adapters through the commands: merged, proven, and their faults named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.cli import main
from tests.cases import adapt, llama, save
from tests.test_format_kohya import train as train_lycoris
from tests.test_format_mlx import train as train_mlx

Q = "model.layers.0.self_attn.q_proj.weight"


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def norms_of_inputs(root: Path) -> Path:
    file = root / "adapter" / "x.safetensors"
    train_lycoris(llama(), file, targets=["LlamaAttention"], dora_wd=True, wd_on_output=False)
    return root / "adapter"


def shared_embedding(root: Path) -> Path:
    train_mlx(root / "base", root / "adapter", "dora", keys=["self_attn.q_proj", "model.embed_tokens"])
    return root / "adapter"


@pytest.mark.parametrize(("make", "tied"), [(norms_of_inputs, False), (shared_embedding, True)])
def test_merge_proves_and_verify_finds_the_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], tied: bool
) -> None:
    base = save(llama(tie_word_embeddings=tied), tmp_path / "base", torch.bfloat16 if not tied else torch.float32)
    adapter, out = make(tmp_path), tmp_path / "out"
    code, record = command(capsys, "merge", str(adapter), "--base", str(base), "-o", str(out))
    assert code == 0
    verification = record["verification"]
    assert verification["passed"]
    assert verification["tensors"]["exact"]
    assert verification["forward"]["ran"]
    assert (out / "config.json").read_text() == (base / "config.json").read_text()  # what is tied stays tied
    code, inspection = command(capsys, "inspect", str(adapter), "--base", str(base), "--decompose")
    assert code == 0
    assert inspection["decomposition"]["modules"]
    own, merged = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    save_file({**merged, Q: own[Q]} if not tied else {**merged, Q: merged[Q] * 1.01}, out / "model.safetensors")
    code, report = command(capsys, "verify", str(out), "--adapter", str(adapter), "--base", str(base))
    assert code == 1
    wanted = "the adapter was not merged in" if not tied else "q_proj"
    assert any(wanted in failure for failure in report["failures"])


def test_a_missing_scale_is_asked_with_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(llama(), tmp_path / "base")
    key = "unet.model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora.down.weight": torch.ones(2, 16), f"{key}.lora.up.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    arguments = ("merge", str(tmp_path / "pytorch_lora_weights.safetensors"), "--base", str(base), "--dry-run")
    code, error = command(capsys, *arguments)
    assert code == 1
    assert "--lora-alpha" in error["error"]["remedy"]
    code, plan = command(capsys, *arguments, "--lora-alpha", "rank")
    assert code == 0
    assert plan["format"] == "diffusers"
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--lora-alpha", "much"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "said", [("--lora-alpha", "16"), ("--lora-alpha", "rank"), ("--norm-eps", "0.5"), ("--magnitudes", "norm-scale")]
)
def test_what_is_said_in_vain_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: tuple[str, str]
) -> None:
    """The record would say that it was used."""
    base = save(llama(), tmp_path / "base")
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    code, answer = command(capsys, "merge", str(tmp_path / "adapter"), "--base", str(base), "--dry-run", *said)
    assert code == 1
    assert said[0] in answer["error"]["message"]
    code, _ = command(capsys, "merge", str(tmp_path / "adapter"), "--base", str(base), "--dry-run")
    assert code == 0


@pytest.mark.parametrize("said", [("--norm-eps", "-1"), ("--lora-alpha", "0"), ("--lora-alpha", "-2")])
def test_numbers_that_mean_nothing_are_wrong_usage(said: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "adapter", f"{said[0]}={said[1]}"])
    assert ended.value.code == 2
