"""Both checks together: config.json is judged by the forward, and by comparison where no forward can be run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_serve.checkpoint import open_checkpoint
from dora_serve.formats import read_adapter
from dora_serve.forward_report import ForwardOptions
from dora_serve.resolve import plan_merge
from dora_serve.structure_check import config_difference
from dora_serve.verify import VerifyReport, verify
from exporters.report import verification_text
from tests.cases import rewrite_json
from tests.faults import World, llama


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A bfloat16 Llama, a DoRA on it, and PEFT's merge of the two."""
    return llama(tmp_path_factory.mktemp("sound"), "dora", torch.bfloat16, use_dora=True)


@pytest.fixture
def check(sound: World, tmp_path: Path) -> Callable[..., VerifyReport]:
    """Verifies PEFT's merge with changes in both configurations. runs: whether transformers knows the architecture."""

    def run(*, runs: bool, base: Mapping[str, Any] | None = None, merged: Mapping[str, Any] | None = None) -> Any:
        for folder, changes in ((sound.base, base), (sound.merged, merged)):
            shutil.copytree(folder, tmp_path / folder.name)
            architecture = {} if runs else {"architectures": ["LlamaOfOurOwnForCausalLM"]}
            rewrite_json(tmp_path / folder.name / "config.json", **architecture, **(changes or {}))
        plan = plan_merge(open_checkpoint(tmp_path / sound.base.name), read_adapter(sound.adapter))
        return verify(plan, tmp_path / sound.merged.name, ForwardOptions(device="cpu", greedy_tokens=2))

    return run


def test_the_same_configuration_is_no_note_and_no_failure(check: Callable[..., VerifyReport]) -> None:
    report = check(runs=True)
    assert report.passed
    assert report.notes == ()


def test_what_differs_is_a_note_where_the_forward_ran(check: Callable[..., VerifyReport]) -> None:
    report = check(runs=True, merged={"attention_dropout": 0.25, "max_position_embeddings": 4096})
    assert report.passed, report.failures
    assert len(report.notes) == 1
    assert "attention_dropout = 0.25, wanted 0.0" in report.notes[0]
    assert "max_position_embeddings = 4096, wanted " in report.notes[0]
    assert report.to_json()["notes"] == list(report.notes)
    assert f"Note: {report.notes[0]}" in verification_text(report)


def test_what_does_harm_fails_by_the_forward_and_is_noted(check: Callable[..., VerifyReport]) -> None:
    report = check(runs=True, merged={"rms_norm_eps": 0.5})
    assert report.forward is not None
    assert report.forward.failures
    assert report.failures == report.forward.failures
    assert "rms_norm_eps = 0.5" in report.notes[0]


def test_what_differs_fails_where_the_forward_was_not_run(check: Callable[..., VerifyReport]) -> None:
    report = check(runs=False, merged={"rms_norm_eps": 0.5})
    assert report.forward is not None
    assert not report.forward.ran
    assert report.tensors is not None
    assert report.tensors.passed
    assert not report.passed
    assert report.notes == ()
    assert len(report.failures) == 1
    assert "config.json says rms_norm_eps = 0.5, wanted 1e-06; the forward was not run" in report.failures[0]
    assert report.to_json()["passed"] is False
    assert report.failures[0] in verification_text(report)


ELSEWHERE = {
    "transformers_version": "4.44.0",
    "torch_dtype": "float32",
    "dtype": "float32",
    "use_cache": False,
    "_name_or_path": "elsewhere",
    "_attn_implementation_autoset": True,
    "auto_map": {"AutoModelForCausalLM": "user/model--modeling.Model"},
    "id2label": {"0": "no", "1": "yes"},
    "head_dim": None,
    "only_there": 1,
}


def test_what_is_not_the_model_is_no_failure(check: Callable[..., VerifyReport]) -> None:
    here = {"torch_dtype": "bfloat16", "use_cache": True, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    here |= {"_name_or_path": "here", "id2label": {"0": "a", "1": "b"}, "_attn_implementation_autoset": False}
    report = check(runs=False, base={**here, "only_here": 1}, merged=ELSEWHERE)
    assert report.forward is not None
    assert not report.forward.ran
    assert report.passed, report.failures


@pytest.mark.parametrize(
    ("base", "merged", "said"),
    [
        ({"architectures": ["A", "B"]}, {"architectures": ["B", "A"]}, None),
        ({"architectures": ["A", "B"]}, {"architectures": ["A"]}, "architectures = ['A'], wanted ['A', 'B']"),
        ({"rope": {"a": 1, "b": 2}}, {"rope": {"b": 3, "c": 4}}, "config.json says rope.b = 3, wanted 2"),
        ({"rope": {"a": 1}}, {"rope": "none"}, "rope = 'none', wanted {'a': 1}"),
        ({"text_config": {"use_cache": True, "_x": 1}}, {"text_config": {"use_cache": False, "_x": 2}}, None),
        ({"x": None, "y": 1}, {"x": 1, "y": None}, None),
        ({"x": 1, "y": 10000}, {"x": 1.0, "y": 10000.0}, None),
        ({f"x{i}": 1 for i in range(9)}, {f"x{i}": 2 for i in range(9)}, "x5 = 2, wanted 1; and 3 more"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, None),  # judged beside the tensors
    ],
)
def test_which_keys_are_compared(
    base: dict[str, Any], merged: dict[str, Any], said: str | None, sound: World, tmp_path: Path
) -> None:
    for folder, changes in ((sound.base, base), (sound.merged, merged)):
        shutil.copytree(folder, tmp_path / folder.name)
        rewrite_json(tmp_path / folder.name / "config.json", **changes)
    plan = plan_merge(open_checkpoint(tmp_path / sound.base.name), read_adapter(sound.adapter))
    found = config_difference(plan, open_checkpoint(tmp_path / sound.merged.name))
    assert (found is None) if said is None else (found is not None and found.endswith(said))


LLAMA_3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
}
QWEN_2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "max_window_layers": 21,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "use_mrope": False,
}
MISTRAL = {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096, "num_key_value_heads": 8}
LINEAR = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "num_key_value_heads": None}
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "n_ctx": 1024,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
GEMMA_2 = {
    "model_type": "gemma2",
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
BERT = {"model_type": "bert", "position_embedding_type": "absolute", "gradient_checkpointing": False}


@pytest.mark.parametrize(
    "config", [LLAMA_3, QWEN_2, MISTRAL, LINEAR, GPT2, GEMMA_2, BERT], ids=lambda c: c["model_type"]
)
def test_what_transformers_makes_of_an_older_configuration_is_no_difference(
    config: dict[str, Any], sound: World, tmp_path: Path
) -> None:
    """As its authors published it for transformers 4, against what saving writes now."""
    from transformers import AutoConfig

    for folder in (sound.base, sound.merged):
        shutil.copytree(folder, tmp_path / folder.name)
    old, new = tmp_path / sound.base.name, tmp_path / sound.merged.name
    (old / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(old).save_pretrained(new)
    assert json.loads((new / "config.json").read_text()) != config
    plan = plan_merge(open_checkpoint(sound.base), read_adapter(sound.adapter))
    differing = config_difference(replace(plan, base=open_checkpoint(old)), open_checkpoint(new))
    assert differing is None
