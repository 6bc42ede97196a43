"""What is done where a model does not fit into memory: the forward is left out, and said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from dora_serve.forward_memory import why_not_run
from dora_serve.memory import available_memory
from dora_serve.safetensors_file import TensorEntry
from exporters.cli import main
from tests.cases import adapt, vary
from tests.onnx_models import GROUPED


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and a DoRA on it."""
    root = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))).save_pretrained(root / "base")
    start = transformers.LlamaForCausalLM.from_pretrained(root / "base")
    adapt(start, root / "adapter", target_modules="all-linear", r=4, use_dora=True)
    return root


def merge(root: Path, out: Path, *options: str) -> int:
    return main(["merge", str(root / "adapter"), "--base", str(root / "base"), "-o", str(out), *options])


@pytest.mark.parametrize("to", ["safetensors", "onnx", "onnx-adapters"])
def test_a_model_that_does_not_fit_is_verified_by_its_tensors(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    monkeypatch.setattr("dora_serve.forward_memory.available_memory", lambda: 1000)
    monkeypatch.setattr("exporters.onnx.check.memory.available_memory", lambda: 1000)
    assert merge(root, tmp_path / "out", "--to", to) == 0
    shown = capsys.readouterr().out
    assert "Forward: not run" in shown
    assert "Verified by its tensors alone" in shown
    assert ("NOT RUN" in shown) == (to != "safetensors")
    record = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert record["verification"]["forward"]["ran"] is False
    assert "GB" in record["verification"]["forward"]["reason"]
    asked = ["verify", str(tmp_path / "out"), "--adapter", str(root / "adapter"), "--base", str(root / "base")]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["forward"]["ran"] is False
    check = found["onnx_check"] or found["swap_check"]
    assert (check is not None) == (to != "safetensors")
    assert check is None or check["not_run"]


def test_a_fault_is_seen_by_the_tensors_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dora_serve.forward_memory.available_memory", lambda: 1000)
    asked = ["verify", str(root / "base"), "--adapter", str(root / "adapter"), "--base", str(root / "base")]
    assert main(asked) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("elements", "said"), [(6_370_000, "6.37 million"), (6_740_000_000, "6.74 billion"), (71_000, "71,000")]
)
def test_a_model_s_size_is_said_in_a_unit_that_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elements: int, said: str
) -> None:
    monkeypatch.setattr("dora_serve.forward_memory.available_memory", lambda: 1000)
    entry = TensorEntry("x", torch.float32, (elements,), tmp_path, 0, 4 * elements)
    why = why_not_run([[entry]], {}, torch.float32)
    assert why is not None
    assert why.startswith(f"A model of {said} parameters in float32 ")


def test_a_control_group_limits_what_is_available(tmp_path: Path) -> None:
    """As a container has it, in both versions of control groups; cached files are not in the way."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/a/b\n")
    group = tmp_path / "sys" / "fs" / "cgroup" / "a"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 2000000\n")
    assert available_memory(tmp_path) == 3_000_000
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (tmp_path / "proc" / "self" / "cgroup").write_text("5:cpu:/x\n4:memory:/x\n")
    first = tmp_path / "sys" / "fs" / "cgroup" / "memory"
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text("3000000\n")
    (first / "memory.usage_in_bytes").write_text("2500000\n")
    (first / "memory.stat").write_text("total_inactive_file 500000\n")
    assert available_memory(tmp_path) == 1_000_000
    assert available_memory(tmp_path / "nothing") is None
