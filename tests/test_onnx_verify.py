"""`merge --to onnx` and `verify` of what it made: faults that other tools make are planted in the folder, and fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from exporters.cli import main
from exporters.onnx.export import export_onnx
from exporters.onnx.options import OnnxOptions
from tests.cases import LINEARS, adapt, llama, quiet, save


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a DoRA by PEFT, the merge of it that forgets the magnitudes, and ONNX folders of the right merge."""
    root = tmp_path_factory.mktemp("verify")
    base = llama(num_hidden_layers=1, hidden_size=32, head_dim=16, intermediate_size=64)
    save(base, root / "base")
    adapt(base, root / "dora", r=4, lora_alpha=8, target_modules=list(LINEARS), use_dora=True)
    shutil.copytree(root / "dora", root / "lora")
    weights = load_file(root / "lora" / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "magnitude" not in name}
    save_file(kept, root / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "lora" / "adapter_config.json").read_text())
    (root / "lora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, str(root / "lora")).merge_and_unload()
    merged.save_pretrained(root / "without_magnitude")
    return root


def merge(root: Path, out: Path, *options: str) -> int:
    command = ["merge", root / "dora", "--base", root / "base", "--to", "onnx", "-o", out, "--device", "cpu", *options]
    return main(list(map(str, command)))


def verify(root: Path, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    command = ["verify", folder, "--adapter", root / "dora", "--base", root / "base", "--json", *options]
    code = main(list(map(str, command)))
    return code, json.loads(capsys.readouterr().out)["failures"]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_export_whose_adapter_or_magnitude_was_ignored_fails(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quantize: str | None
) -> None:
    assert merge(root, tmp_path / "onnx", *(["--quantize", quantize] if quantize else [])) == 0
    assert verify(root, tmp_path / "onnx", capsys) == (0, [])
    for wrong in ("base", "without_magnitude"):
        export_onnx(root / wrong, tmp_path / "onnx", OnnxOptions(quantize=quantize))  # type: ignore[arg-type]
        code, failures = verify(root, tmp_path / "onnx", capsys)
        assert code == 1
        assert any("do not equal the checkpoint's" in failure for failure in failures)
        if quantize is None:
            assert any("whole prompt differs" in failure for failure in failures)
            assert any("unmerged model's logits" in failure for failure in failures)


def test_a_loss_above_max_kl_fails_and_leaves_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(root, tmp_path / "onnx", "--quantize", "int4", "--max-kl", "1e-7") == 1
    assert "KL divergence" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert merge(root, tmp_path / "onnx", "--quantize", "int4", "--max-kl", "5") == 0
    shown = capsys.readouterr().out
    for said in ("int4", "KL divergence from torch", "perplexity", "tokens a second", "in steps of their scales"):
        assert said in shown
    record = json.loads((tmp_path / "onnx" / "dora_export.json").read_text())
    assert record["onnx"]["quantize"] == "int4"
    assert 1e-7 < record["onnx_check"]["kl"] < 5
    code, failures = verify(root, tmp_path / "onnx", capsys, "--max-kl", "1e-7")
    assert code == 1
    assert any("KL divergence" in failure for failure in failures)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--onnx-dtype", "bfloat16"], "no bfloat16 kernels"),
        (["--opset", "30"], "opset 30"),
        (["--runtime", "genai", "--onnx-dtype", "float16"], "float16 on the CPU"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_merged(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert merge(root, tmp_path / "onnx", *options) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "safetensors", "--quantize", "int8"],
        ["--max-kl", "much"],
        ["--max-kl", "1", "--no-verify"],
        ["--genai-python", "python"],
        ["--runtime", "genai", "--opset", "20"],
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(root: Path, tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        merge(root, tmp_path / "onnx", *options)
    assert stop.value.code == 2


def test_a_weight_that_is_stored_twice_fails(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data file with a part of it once more, and the graph reading one weight from there."""
    import onnx

    assert merge(root, tmp_path / "onnx") == 0
    data = tmp_path / "onnx" / "model.onnx.data"
    data.write_bytes(data.read_bytes() + bytes(1 << 20))
    code, failures = verify(root, tmp_path / "onnx", capsys)
    assert code == 1
    assert any("bytes that no graph reads" in failure for failure in failures)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, tmp_path / "onnx" / "model.onnx")
    code, failures = verify(root, tmp_path / "onnx", capsys)
    assert code == 1
    assert any("not well formed" in failure for failure in failures)


def test_a_dry_run_tells_of_the_graphs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it says of size and cache is held against the export that follows."""

    def foreseen(*options: str) -> dict[str, Any]:
        assert merge(root, tmp_path / "onnx", "--dry-run", "--json", *options) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["onnx"]
        return found

    for options in ((), ("--quantize", "int8"), ("--onnx-dtype", "float16", "--no-verify")):
        before = foreseen(*options)
        assert merge(root, tmp_path / "onnx", "--overwrite", *options) == 0
        capsys.readouterr()
        made = json.loads((tmp_path / "onnx" / "dora_export.json").read_text())["onnx"]
        assert [before[key] for key in ("dtype", "quantize", "opset")] == [made["dtype"], made["quantize"], 23]
        assert {graph["file"] for graph in made["graphs"]} < set(before["files"])
        data = (tmp_path / "onnx" / "model.onnx.data").stat().st_size
        assert abs(before["bytes"] - data) < 0.1 * data
        assert foreseen(*options)["cached"] is True
    assert foreseen("--opset", "20")["opset"] == 20
    assert merge(root, tmp_path / "other", "--dry-run", "--quantize", "int4") == 0
    shown = capsys.readouterr().out
    for said in ("LlamaForCausalLM", "model.onnx.data", "weights int4", "traced graph in the cache", "memory"):
        assert said in shown
    assert ".safetensors" not in shown
    assert not (tmp_path / "other").exists()


def test_graphs_for_a_gpu_that_is_not_here_say_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(root, tmp_path / "onnx", "--provider", "cuda", "--onnx-dtype", "float16") == 0
    said = "nothing was run on a GPU"
    made = json.loads((tmp_path / "onnx" / "dora_export.json").read_text())["onnx"]
    assert (said in capsys.readouterr().out) == any(said in note for note in made["notes"]) == (not _has_cuda())
    assert merge(root, tmp_path / "onnx", "--provider", "cuda", "--dry-run") == 0
    assert (said in capsys.readouterr().out) == (not _has_cuda())


def _has_cuda() -> bool:
    return torch.cuda.is_available()
