"""The weight decomposition analysis, against PEFT's merged weights and numpy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from dora_serve.decomposition import ModuleChange, decompose, trend
from dora_serve.decomposition_plot import plot_svg
from dora_serve.errors import CheckpointError
from exporters.cli import main
from tests.cases import LINEARS, SIZES, adapt, build, llama, plan, quiet, rewrite_tensors, save

PNG = b"\x89PNG\r\n\x1a\n"


def _merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights of PEFT's own merge in float64."""
    with quiet():
        start = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(start, str(adapter), torch_dtype=torch.float32).double()
        return dict(model.merge_and_unload().state_dict())


def _expected(base: np.ndarray[Any, Any], merged: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """(mean m, delta_magnitude, delta_direction) of (out, in) matrices."""
    own, new = np.linalg.norm(base, axis=1), np.linalg.norm(merged, axis=1)
    cosine = (base * merged).sum(axis=1) / (own * new)
    return own.mean(), np.abs(new - own).mean(), (1 - cosine).mean()


def _check(root: Path, model: Any, transposed: tuple[str, ...] = (), **config: Any) -> tuple[ModuleChange, ...]:
    base = save(model, root / "base")
    adapt(model, root / "adapter", **config)
    found = decompose(plan(base, root / "adapter"))
    before, after = model.state_dict(), _merged(base, root / "adapter")
    assert found.modules
    for change in found.modules:
        weights = [state[f"{change.module}.weight"].double().numpy() for state in (before, after)]
        if change.kind in transposed:
            weights = [weight.T for weight in weights]
        got = (change.magnitude, change.delta_magnitude, change.delta_direction)
        # PEFT computes a DoRA's norms in float32 at times, so the oracle is that good.
        assert got == pytest.approx(_expected(*weights), rel=2e-5)
        assert change.outputs == len(weights[0])
    xs, ys = ([getattr(c, name) for c in found.modules] for name in ("delta_direction", "delta_magnitude"))
    assert found.trend.correlation == pytest.approx(np.corrcoef(xs, ys)[0, 1])
    slope, intercept = np.polyfit(xs, ys, 1)
    assert found.trend.slope == pytest.approx(slope)
    assert found.trend.intercept == pytest.approx(intercept)
    return found.modules


@pytest.mark.parametrize("use_dora", [False, True])
def test_it_is_that_of_the_merged_weights(tmp_path: Path, use_dora: bool) -> None:
    changes = _check(tmp_path, llama(), target_modules=list(LINEARS), use_dora=use_dora)
    assert [change.kind for change in changes].count("q_proj") == 2
    assert {change.layer for change in changes} == {0, 1}


@pytest.mark.parametrize("use_dora", [False, True])
def test_outputs_are_columns_where_the_weight_is_stored_in_out(tmp_path: Path, use_dora: bool) -> None:
    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = build("AutoModelForCausalLM", "gpt2", **sizes)
    _check(
        tmp_path, model, ("c_attn", "c_fc"), target_modules=["c_attn", "c_fc"], use_dora=use_dora, fan_in_fan_out=True
    )


def test_the_block_size_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(llama(), tmp_path / "base", torch.bfloat16)
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)
    planned = plan(base, tmp_path / "adapter")
    whole = decompose(planned)
    monkeypatch.setattr("dora_serve.decomposition.BLOCK_ELEMENTS", 40)
    for one, other in zip(whole.modules, decompose(planned).modules, strict=True):
        assert one.delta_magnitude == pytest.approx(other.delta_magnitude, rel=1e-12)
        assert one.delta_direction == pytest.approx(other.delta_direction, rel=1e-12)


def test_an_adapter_that_changes_nothing_does_not_move(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    rewrite_tensors(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda tensors: tensors.update({k: torch.zeros_like(v) for k, v in tensors.items() if "lora_B" in k}),
    )
    found = decompose(plan(base, tmp_path / "adapter"))
    assert [(c.delta_magnitude, c.delta_direction) for c in found.modules] == [(0, pytest.approx(0, abs=1e-15))] * 2


def test_a_magnitude_alone_turns_nothing_and_a_negative_one_turns_round(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if "lora_B" in name:
                value.zero_()
            if "magnitude" in name:
                value.copy_(value.abs() * (-1 if ".layers.1." in name else 1))

    rewrite_tensors(tmp_path / "adapter" / "adapter_model.safetensors", change)
    first, second = decompose(plan(base, tmp_path / "adapter")).modules
    assert first.delta_direction == pytest.approx(0, abs=1e-15)
    assert second.delta_direction == pytest.approx(2)
    assert first.delta_magnitude > 0


def test_rows_of_zeros_have_no_direction(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:8].zero_()
    base = save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[0])
    rewrite_tensors(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda tensors: [
            v[part].zero_() for k, v in tensors.items() if "lora_B" in k for part in (slice(4), slice(8, 16))
        ],
    )
    (change,) = decompose(plan(base, tmp_path / "adapter")).modules
    assert change.delta_direction == pytest.approx(4 / 16)  # four of sixteen rows have come out of nothing


def test_a_trend_needs_two_modules_that_differ() -> None:
    one = ModuleChange("a.0.q", "q", 0, 4, 1.0, 0.5, 0.25)
    assert trend([]).correlation is None
    assert trend([one]).slope is None
    assert trend([one, one]).slope is None
    flat = [one, ModuleChange("a.1.q", "q", 1, 4, 1.0, 0.5, 0.5)]
    assert (trend(flat).correlation, trend(flat).slope) == (None, 0.0)


def test_a_base_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    planned = plan(base, tmp_path / "adapter")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError):
        decompose(planned)


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    save(llama(), root / "base")
    adapt(llama(), root / "adapter", target_modules=list(LINEARS), use_dora=True)
    return root


def test_inspect_draws_and_says_the_numbers(folders: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["inspect", str(folders / "adapter"), "--base", str(folders / "base")]
    assert main([*given, "--plot", str(tmp_path / "out.png"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    found = decompose(plan(folders / "base", folders / "adapter"))
    assert printed["decomposition"] == found.to_json()
    assert len(printed["decomposition"]["modules"]) == SIZES["num_hidden_layers"] * len(LINEARS)
    assert main([*given, "--decompose"]) == 0
    assert "correlation" in capsys.readouterr().out
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decomposition"] is None


def test_the_picture_for_a_page_has_its_colours_and_no_markup_of_others(folders: Path) -> None:
    found = decompose(plan(folders / "base", folders / "adapter"))
    svg = plot_svg({"<b>one</b>": found, "a$b^$": found})
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "&lt;b&gt;one&lt;/b&gt; (DoRA): correlation" in svg
    assert "a$b^$ (DoRA)" in svg
    assert "<b>" not in svg


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_inspect_draws_what_the_suffix_says(folders: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    assert main(["inspect", str(folders / "adapter"), "--base", str(folders / "base"), "--plot", str(out)]) == 0
    assert {"svg": b"<svg", "pdf": b"%PDF"}[suffix] in out.read_bytes()


def test_a_picture_that_cannot_be_drawn_is_said_first(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["inspect", str(folders / "adapter"), "--base", str(folders / "base"), "--plot"]
    assert main([*given, str(tmp_path / "out.txt")]) == 1
    assert "wanted .png, .svg, .pdf" in capsys.readouterr().err
    assert main([*given, str(tmp_path / "none" / "out.png")]) == 1
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*given, str(tmp_path / "out.png")]) == 1
    assert "pip install 'dora-serve[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plot_without_a_base_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "adapter", "--plot", "out.png"])
    assert stop.value.code == 2
    assert "--base" in capsys.readouterr().err
