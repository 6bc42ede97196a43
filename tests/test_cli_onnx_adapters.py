"""`merge --to onnx-adapters`, `onnx-adapter` and `verify` from end to end, on a tiny model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from exporters.cli import main
from tests.cases import SIZES, adapt, vary
from tests.onnx_swap import activate, open_session, read_arrays, run

PROMPT = [3, 9, 27, 17, 5]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a bfloat16 Llama. dates, style, deep: adapters that PEFT trained on it. out: what the command makes."""
    root = tmp_path_factory.mktemp("swap")
    torch.manual_seed(0)
    model = vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))).to(torch.bfloat16)
    model.save_pretrained(root / "base")
    start = transformers.LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    adapt(start, root / "dates", target_modules="all-linear", use_dora=True)
    adapt(start, root / "style", target_modules=["q_proj", "v_proj"], r=2, use_rslora=True)
    adapt(start, root / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert main(["merge", *at(root, "dates", "--base", "base"), "--to", "onnx-adapters", "-o", str(root / "out")]) == 0
    return root


def at(root: Path, *names: str) -> list[str]:
    return [name if name.startswith("-") else str(root / name) for name in names]


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_record_says_what_was_made_and_how_it_was_checked(world: Path) -> None:
    record = read(world / "out" / "dora_export.json")
    assert record["exporter"] == "onnx-adapters"
    assert record["slots"]["count"] == 14
    assert record["onnx_adapter"]["file"] == "dates.onnx_adapter"
    assert record["swap_check"]["passed"]
    assert record["swap_check"]["kl"] < 1e-8
    assert record["swap_check"]["without_magnitude_max_abs"] > record["swap_check"]["tolerance"]
    for name, facts in record["files"].items():
        assert facts["sha256"] == sha256(world / "out" / name)
    assert (world / "out" / "config.json").is_file()


def test_another_adapter_comes_later_without_a_model(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_model(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", no_model)
    kept = [path for path in (world / "out").rglob("*") if path.is_file() and path.name != "dora_export.json"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main(["onnx-adapter", *at(world, "style", "--for", "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    file = world / "out" / "adapters" / "style.onnx_adapter"
    assert said["out"] == str(file)
    whole = read(world / "out" / "dora_export.json")
    assert whole["files"]["adapters/style.onnx_adapter"] == {"bytes": file.stat().st_size, "sha256": sha256(file)}
    record = whole["added"]["adapters/style.onnx_adapter"]
    assert main(["verify", str(world / "out")]) == 0  # every file against its hash
    elsewhere = world / "elsewhere.onnx_adapter"
    assert main(["onnx-adapter", *at(world, "style", "--for", "out"), "-o", str(elsewhere)]) == 0
    assert sha256(elsewhere) == sha256(file)
    assert read(world / "elsewhere.onnx_adapter.json")["files"] == {"elsewhere.onnx_adapter": sha256(file)}
    capsys.readouterr()
    assert record["adapter"]["sha256"]["adapter_model.safetensors"] == sha256(
        world / "style" / "adapter_model.safetensors"
    )
    assert record["onnx_adapter"]["base_sha256"] == read(world / "out" / "dora_export.json")["slots"]["base_sha256"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    monkeypatch.undo()
    assert main(["verify", *at(world, "out", "--adapter", "style", "--base", "base"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["swap_check"]["kl"] < 1e-8
    # The name of the file tells which one is meant, so a wrong one is seen.
    shutil.copyfile(world / "out" / "adapters" / "dates.onnx_adapter", file)
    assert main(["verify", *at(world, "out", "--adapter", "style", "--base", "base")]) == 1
    assert "differs from the unmerged model" in capsys.readouterr().out
    assert main(["onnx-adapter", *at(world, "style", "--for", "out")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["onnx-adapter", *at(world, "style", "--for", "out", "--overwrite")]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("head", "--for", "out"), "lm_head.weight: got a whole trained tensor"),
        (("style", "--for", "base"), "--to onnx-adapters"),
        (("nothing", "--for", "out"), "does not exist"),
    ],
)
def test_nothing_is_written_for_what_does_not_fit(
    world: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["onnx-adapter", *at(world, *arguments), "-o", str(tmp_path / "made.onnx_adapter")]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_no_slot_can_hold_is_refused_before_the_base_is_exported(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["merge", *at(world, "dates", "--base", "base"), "--to", "onnx-adapters", "-o", str(tmp_path / "out")]
    assert main([*given, "--slot-rank", "2"]) == 1
    assert "rank 4, wanted at most 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["merge", *at(world, "dates", "--base", "base"), "--to", "onnx", "--slot-rank", "2", "-o", "out"])
    assert "--to onnx-adapters" in capsys.readouterr().err


def test_a_graph_for_mixed_batches_from_the_command_line(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["merge", *at(world, "dates", "--base", "base"), "--to", "onnx-adapters", "--mixed-batches"]
    assert main([*given, "-o", str(out)]) == 0
    record = read(out / "dora_export.json")
    assert record["slots"]["mixed_batches"]
    assert record["swap_check"]["kl"] < 1e-8
    # As another language would serve it: the file's tensors as rows of tables, and an id for each row of the batch.
    tables = {
        name: np.stack([np.ones_like(one) if name.endswith("norm_scale") else 0 * one, one])
        for name, one in read_arrays(out / "adapters" / "dates.onnx_adapter").items()
        if not name.startswith("base_sha256.")
    }
    session = open_session(out / "model.onnx")
    rows = run(session, [PROMPT, PROMPT], None, {**tables, "adapter_ids": np.array([0, 1])})
    single = open_session(world / "out" / "model.onnx")
    base = run(single, [PROMPT])[0]
    swapped = run(single, [PROMPT], activate(world / "out" / "adapters" / "dates.onnx_adapter"))[0]
    assert np.abs(rows[0] - base).max() < 1e-5 < np.abs(base - swapped).max()
    assert np.abs(rows[1] - swapped).max() < 1e-5


def test_a_quantized_base_swaps_over_its_own_numbers_and_its_loss_is_judged(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["merge", *at(world, "dates", "--base", "base"), "--to", "onnx-adapters", "--quantize", "int8"]
    assert main([*given, "-o", str(tmp_path / "int8")]) == 0
    check = read(tmp_path / "int8" / "dora_export.json")["swap_check"]
    assert (check["passed"], check["reference"]) == (True, "dequantized")
    assert check["kl"] < check["effect_max_abs"]
    assert 1e-9 < check["lost_kl"] < 1e-2
    assert main([*given, "--max-kl", "1e-9", "-o", str(tmp_path / "strict")]) == 1
    assert "--max-kl is 1e-09" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()
