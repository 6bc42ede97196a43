"""The code on a card runs as it is printed: on SmolLM2 and on small models of other tasks, from the loopback Hub.

vLLM's is run in its own environment (tests/vllm/test_card_code.py), and compiled here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporters.card_snippets import Published, snippets
from exporters.cli import main
from tests.fake_hub import FakeHub
from tests.hub_cases import TOKEN, environment_of
from tests.tiny_models import SIZES, adapt, build, save

ROOT = Path(__file__).parent.parent
# The code does not depend on the proof, and both kinds of weights are to give one answer.
QUICKLY = ("--no-verify", "--dtype", "float32")


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub().running() as running:
        running.log_in(TOKEN, "anna")
        yield running


@pytest.fixture(scope="module")
def environment(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, **environment_of(hub, tmp_path_factory.mktemp("cache"))}


def publish(folder: Path, repo_id: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "exporters.cli", "push", str(folder), repo_id, "--unverified"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def code_of(hub: FakeHub, repo_id: str) -> dict[str, str]:
    """What stands in the card's blocks of Python, by the library that it is for."""
    card = hub.files(repo_id)["README.md"].decode()
    return dict(re.findall(r"^With ([\w ]+):\n\n```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL))


def run(code: str, environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert done.stdout.strip()
    return done.stdout.strip()


@pytest.fixture(scope="module")
def answer(hub: FakeHub, environment: dict[str, str], smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What transformers' code prints of the merged SmolLM2, which is published as anna/dates."""
    out = tmp_path_factory.mktemp("smollm2") / "merged"
    adapter = str(ROOT / "examples" / "adapters" / "dates-dora")
    assert main(["merge", adapter, "--base", str(smollm2), "-o", str(out), *QUICKLY]) == 0
    publish(out, "anna/dates", environment)
    return run(code_of(hub, "anna/dates")["transformers"], environment, out.parent)


def test_transformers_answers(answer: str) -> None:
    assert "2025" in answer or "{" in answer or "Paris" in answer


def test_onnx_runtime_answers_the_same(
    answer: str, hub: FakeHub, environment: dict[str, str], smollm2: Path, tmp_path: Path
) -> None:
    adapter = str(ROOT / "examples" / "adapters" / "dates-dora")
    merge = ["merge", adapter, "--base", str(smollm2), "-o", str(tmp_path / "out"), "--to", "onnx"]
    assert main([*merge, *QUICKLY]) == 0
    publish(tmp_path / "out", "anna/dates-onnx", environment)
    code = code_of(hub, "anna/dates-onnx")
    assert set(code) == {"ONNX Runtime"}
    assert run(code["ONNX Runtime"], environment, tmp_path) == answer


def test_the_code_for_vllm_is_whole(answer: str, hub: FakeHub) -> None:
    code = code_of(hub, "anna/dates")["vLLM"]
    compile(code, "card", "exec")
    assert 'LLM("anna/dates")' in code


@pytest.mark.parametrize(
    ("auto_class", "model_type", "task", "sizes", "to"),
    [
        ("AutoModelForCausalLM", "llama", "CAUSAL_LM", {}, "safetensors"),
        ("AutoModelForCausalLM", "llama", "CAUSAL_LM", {}, "onnx"),
        ("AutoModelForSequenceClassification", "bert", "SEQ_CLS", {"num_labels": 3}, "safetensors"),
        ("AutoModelForSequenceClassification", "bert", "SEQ_CLS", {"num_labels": 3}, "onnx"),
        ("AutoModelForImageClassification", "vit", None, {"image_size": 8, "patch_size": 4}, "safetensors"),
    ],
)
def test_models_of_other_tasks(
    hub: FakeHub,
    environment: dict[str, str],
    tmp_path: Path,
    auto_class: str,
    model_type: str,
    task: str | None,
    sizes: dict[str, Any],
    to: str,
) -> None:
    model = build(auto_class, model_type, **{**SIZES, **sizes})
    base = save(model, tmp_path / "base")
    if model_type == "bert":
        tokenizer(base)
    targets = ["query", "value"] if model_type == "bert" else "all-linear"
    adapt(model, tmp_path / "adapter", r=2, use_dora=True, target_modules=targets, task_type=task)
    merge = ["merge", str(tmp_path / "adapter"), "--base", str(base), "-o", str(tmp_path / "out"), "--to", to]
    assert main([*merge, "--no-verify"]) == 0
    repo_id = f"anna/{model_type}-{to}"
    publish(tmp_path / "out", repo_id, environment)
    (code,) = code_of(hub, repo_id).values()
    run(code, environment, tmp_path)


def tokenizer(folder: Path) -> None:
    from tests.engine_tokenizers import word_tokenizer

    word_tokenizer(("some", "text", "that", "is", "good", "news")).save_pretrained(folder)


def test_a_branch_is_named_in_the_code() -> None:
    published = Published("anna/x", "try", ["config.json"], {"architectures": ["LlamaForCausalLM"]}, "text-generation")
    assert 'from_pretrained("anna/x", revision="try")' in snippets(published)["transformers"]


def test_nothing_is_printed_that_is_not_known_to_run() -> None:
    assert snippets(Published("anna/x", None, ["model.safetensors"], {}, None)) == {}
    assert snippets(Published("anna/x", None, ["adapter_model.safetensors"], {}, None)) == {}
