"""`--runtime genai`: folders of onnxruntime-genai's builder, in the environment that `make genai-env` makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers

from dora_serve.errors import OutputError, UnavailableError
from dora_serve.onnx_engine.engine import OnnxEngine
from exporters.onnx.check.answers import token_inputs
from exporters.onnx.check.check import check_onnx
from exporters.onnx.check.report import OnnxCheck
from exporters.onnx.export import OnnxExport
from exporters.onnx.genai import export_genai, genai_environment, require_genai
from exporters.onnx.options import OnnxOptions
from tests.engine_tokenizers import byte_tokenizer
from tests.onnx_models import GROUPED, PROMPTS, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {**GROUPED, "vocab_size": 259, "hidden_size": 64}
    save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)), folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def export(model: Path, out: Path, **options: str) -> OnnxExport:
    out.mkdir()
    return export_genai(model, out, OnnxOptions(runtime="genai", **options), "LlamaForCausalLM")  # type: ignore[arg-type]


def check(model: Path, out: Path) -> OnnxCheck:
    return check_onnx(out, model, token_inputs(PROMPTS))


def test_a_folder_agrees_with_torch_and_generates_the_same(model: Path, tmp_path: Path) -> None:
    made = export(model, tmp_path / "out")
    assert made.runtime == "genai"
    assert "right" in made.notes[0]
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= {path.name for path in made.folder.iterdir()}
    report = check(model, made.folder)
    assert report.failures == ()
    assert report.greedy_equal == report.greedy_total == len(PROMPTS)
    assert report.initializers == report.initializers_equal > 0
    assert report.kl is not None
    assert report.kl < 1e-8
    assert report.tolerance is not None


def test_a_prompt_may_end_with_the_token_that_pads(tmp_path: Path) -> None:
    """The runtime itself takes it off. The last prompt goes on with an end token."""
    sizes = {**GROUPED, "vocab_size": 259, "hidden_size": 64, "eos_token_id": [2, 5], "pad_token_id": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    save(model, tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    made = export(tmp_path / "model", tmp_path / "out")
    said = json.loads((made.folder / "genai_config.json").read_text())["model"]
    assert (said["eos_token_id"], said["pad_token_id"]) == ([2, 5], 2)
    for prompt in ([7, 9, 2], [9, 2, 2], [7, 9, 5]):
        report = check_onnx(made.folder, tmp_path / "model", token_inputs([prompt]))
        assert report.failures == (), prompt
        assert report.greedy_equal == 1


def test_a_wrong_element_is_found_row_by_row(model: Path, tmp_path: Path) -> None:
    """Of one token, in the table that embedding and head share, here (hidden, vocabulary)."""
    made = export(model, tmp_path / "out")
    graph = onnx.load(made.folder / "model.onnx", load_external_data=False)
    (table,) = (one for one in graph.graph.initializer if one.name == "lm_head.MatMul.weight")
    said = {entry.key: entry.value for entry in table.external_data}
    with (made.folder / said["location"]).open("r+b") as file:
        file.seek(int(said["offset"]) + 4 * 7)
        file.write(np.float32(1e-4).tobytes())
    report = check(model, made.folder)
    assert any("lm_head.MatMul.weight" in failure for failure in report.failures)
    assert report.initializers_equal == report.initializers - 1


def test_the_loss_of_a_quantized_folder_is_measured_and_its_codes_are_compared(model: Path, tmp_path: Path) -> None:
    made = export(model, tmp_path / "out", quantize="int8")
    report = check(model, made.folder)
    assert report.failures == ()
    assert report.initializers == report.initializers_equal == 12  # five of each layer, the head and the embedding
    assert report.tolerance is None
    assert report.kl is not None
    assert 1e-8 < report.kl < 0.1
    assert report.exact_kl is not None
    assert report.exact_kl < 1e-8
    graph = onnx.load(made.folder / "model.onnx", load_external_data=False).graph
    codes = max((one for one in graph.initializer if one.data_type == onnx.TensorProto.UINT8), key=lambda one: one.name)
    said = {entry.key: entry.value for entry in codes.external_data}
    with (made.folder / said["location"]).open("r+b") as file:
        file.seek(int(said["offset"]) + 5)
        byte = file.read(1)[0]
        file.seek(int(said["offset"]) + 5)
        file.write(bytes([byte ^ 1]))
    report = check(model, made.folder)
    assert report.initializers_equal == report.initializers - 1
    assert any(codes.name in failure for failure in report.failures)


def test_the_folder_of_another_model_fails(model: Path, tmp_path: Path) -> None:
    """As one whose adapter was ignored: the graph of the base, compared with the merged model."""
    made = export(model, tmp_path / "out")
    sizes = {**GROUPED, "vocab_size": 259, "hidden_size": 64, "rms_norm_eps": 0.05}
    other = save(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)), tmp_path / "other"
    )
    report = check(other, made.folder)
    assert any("whole prompt" in failure for failure in report.failures)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_the_cpu_is_refused(dtype: str) -> None:
    with pytest.raises(UnavailableError, match=dtype):
        require_genai(OnnxOptions(dtype=dtype, runtime="genai"), "LlamaForCausalLM")  # type: ignore[arg-type]


def test_an_architecture_that_the_builder_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(UnavailableError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        require_genai(OnnxOptions(runtime="genai"), "GPT2LMHeadModel")


def test_an_environment_without_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="make genai-env"):
        genai_environment(sys.executable)
    with pytest.raises(UnavailableError, match="cannot be run"):
        genai_environment(str(tmp_path / "python"))


def test_a_python_may_be_named_from_where_one_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(genai_environment(None).python)
    monkeypatch.chdir(python.parent.parent)
    made = export(model, tmp_path / "out", genai_python=f"bin/{python.name}")
    assert (made.folder / "model.onnx").is_file()


def test_a_folder_for_a_gpu_is_compared_without_one(model: Path, tmp_path: Path) -> None:
    """In plain ONNX Runtime: the runtime itself does not load it."""
    made = export(model, tmp_path / "out", dtype="float16", provider="cuda")
    report = check(model, made.folder)
    assert report.failures == ()
    assert report.dtype == "float16"
    assert report.greedy_total == len(PROMPTS)


def test_folders_may_be_named_from_where_one_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "out").mkdir()
    export_genai(Path("model"), Path("out"), OnnxOptions(runtime="genai"), "LlamaForCausalLM")
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_the_engine_names_the_environment_that_it_needs(model: Path, tmp_path: Path) -> None:
    """What it does where the runtime is installed is tested there: tests/genai."""
    made = export(model, tmp_path / "out")
    with pytest.raises(UnavailableError, match=r"onnxruntime-genai is not installed.*make genai-env"):
        OnnxEngine.load(made.folder)


def test_a_builder_that_fails_says_why(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(OutputError, match="builder"):
        export(broken, tmp_path / "out")
