"""The forward check: clean merges by PEFT pass, planted faults do not, and nothing that stops it stays unsaid."""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from dora_serve import forward_check
from dora_serve.errors import DoraServeError, UnavailableError
from dora_serve.formats import read_adapter
from dora_serve.forward_check import check_forward
from dora_serve.forward_report import ForwardOptions, ForwardReport
from dora_serve.progress import Progress
from dora_serve.prompts import BUILT_IN_PROMPTS, read_prompts
from tests.tiny_models import SIZES, adapt, build, quiet, rewrite_tensors, save

ROOT = Path(__file__).resolve().parent.parent
QUICK = ForwardOptions(greedy_tokens=4)
BIGGER = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 120, "max_position_embeddings": 64}
CAUSAL = "AutoModelForCausalLM"
LINEAR = {"target_modules": "all-linear"}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
WHISPER = {
    "vocab_size": 120,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
CLIP = {
    "text_config": {**BIGGER, "num_hidden_layers": 1},
    "vision_config": {**BIGGER, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
    "projection_dim": 16,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": (CAUSAL, "llama", {**BIGGER, "tie_word_embeddings": False}, LINEAR),
    "gpt2": (CAUSAL, "gpt2", GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "t5": ("AutoModelForSeq2SeqLM", "t5", T5, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}),
    "bert classifier": (
        "AutoModelForSequenceClassification",
        "bert",
        {**BIGGER, "num_labels": 3},
        {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
    ),
    "bert encoder": ("AutoModel", "bert", BIGGER, {"target_modules": ["query", "value", "dense"]}),
    "roberta answers": (
        "AutoModelForQuestionAnswering",
        "roberta",
        BIGGER,
        {"target_modules": ["query", "dense"], "task_type": "QUESTION_ANS"},
    ),
    "qwen2": (CAUSAL, "qwen2", BIGGER, LINEAR),
    "mistral": (CAUSAL, "mistral", BIGGER, LINEAR),
    "gemma": (CAUSAL, "gemma", BIGGER, LINEAR),
    "opt": (
        CAUSAL,
        "opt",
        {**BIGGER, "ffn_dim": 48, "word_embed_proj_dim": 32},
        {"target_modules": ["q_proj", "fc1", "fc2", "out_proj"]},
    ),
    "mixtral": (CAUSAL, "mixtral", {**BIGGER, "num_local_experts": 4}, EXPERTS),
    "mamba": (CAUSAL, "mamba", {**BIGGER, "state_size": 4}, {"target_modules": ["in_proj", "x_proj"]}),
    "vit": (
        "AutoModelForImageClassification",
        "vit",
        {**BIGGER, "image_size": 16, "patch_size": 8, "num_labels": 5},
        {"target_modules": ["projection", "q_proj", "fc1", "classifier"]},
    ),
    "clip": ("AutoModel", "clip", CLIP, {"target_modules": ["q_proj", "fc1"]}),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        "whisper",
        WHISPER,
        {"target_modules": ["q_proj", "v_proj", "fc1", "fc2"]},
    ),
    "wav2vec2": (
        "AutoModelForCTC",
        "wav2vec2",
        {
            **BIGGER,
            "conv_dim": (8, 8),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 8),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        {"target_modules": ["q_proj", "output_dense"]},
    ),
}
CLEAN = [
    *((family, torch.bfloat16, family != "mixtral") for family in FAMILIES),
    ("llama", torch.float32, True),
    ("gpt2", torch.float32, True),
    ("bert classifier", torch.float32, False),
    ("mixtral", torch.float32, False),
    ("gemma", torch.float16, True),
    ("qwen2", torch.float16, False),
    ("llama", torch.float64, True),
]

Change = Callable[[PeftModel], None]


class World:
    """A base and an adapter in folders, and merges of them by PEFT, of which some are not as they should be."""

    def __init__(self, folder: Path, family: str, dtype: torch.dtype, use_dora: bool) -> None:
        self.folder = folder
        auto, model_type, sizes, targets = FAMILIES[family]
        model = build(auto, model_type, **sizes)
        self.kind: Any = type(model)
        self.base = save(model, folder / "base", dtype)
        self.adapter = folder / "adapter"
        adapt(model.to(dtype), self.adapter, use_dora=use_dora, r=4, lora_alpha=8, **targets)

    def merge(self, change: Change | None = None, name: str = "merged") -> Path:
        out = self.folder / name
        with quiet(), torch.no_grad():
            model = PeftModel.from_pretrained(self.kind.from_pretrained(self.base), self.adapter)
            if change is not None:
                change(model)
            model.merge_and_unload().save_pretrained(out)
        return out

    def check(self, merged: Path, options: ForwardOptions = QUICK, **more: Any) -> ForwardReport:
        return check_forward(self.base, read_adapter(self.adapter), merged, options, **more)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    """bfloat16 and DoRA. Shared: the base and the adapter are not written to."""
    return World(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16, True)


@pytest.fixture(scope="module")
def clean(llama: World) -> ForwardReport:
    return llama.check(llama.merge(name="clean"), ForwardOptions(greedy_tokens=6))


@pytest.mark.parametrize(("family", "dtype", "use_dora"), CLEAN, ids=str)
def test_a_clean_merge_passes(family: str, dtype: torch.dtype, use_dora: bool, tmp_path: Path) -> None:
    world = World(tmp_path, family, dtype, use_dora)
    report = world.check(world.merge())
    assert report.ran, report.reason
    assert report.failures == ()
    assert report.passed
    assert report.deployed_dtype == str(dtype).removeprefix("torch.")
    assert report.architecture == world.kind.__name__
    assert report.base is not None
    # What bfloat16 costs is up to the CPU's kernels: with AMX's a tiny wav2vec2 loses ten times what its adapter does.
    assert report.unmerged_deployed is not None
    drowned = family == "wav2vec2" and report.unmerged_deployed.rms > 5 * report.base.rms
    assert report.changes_nothing == drowned
    assert report.merged_wide is not None
    assert report.merged_deployed is not None
    assert drowned or report.base.rms > 2 * report.unmerged_deployed.rms
    if dtype in (torch.bfloat16, torch.float16):
        # PEFT merges in float32 and rounds once: all but a few elements in a hundred thousand are the formula's.
        assert report.rounded is not None
        assert report.merged_wide.rms == pytest.approx(report.rounded.rms, rel=0.25)


# --- faults -----------------------------------------------------------------------------------------------------------


def _layers(model: PeftModel, part: str = "") -> list[Any]:
    found = [module for name, module in model.named_modules() if hasattr(module, "get_delta_weight") and part in name]
    assert found
    return found


def _scale(factor: float) -> Change:
    def change(model: PeftModel) -> None:
        for layer in _layers(model):
            layer.scaling["default"] *= factor

    return change


def _magnitude_dropped(model: PeftModel) -> None:
    for layer in _layers(model):
        weight = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
        norms = weight.norm(dim=0 if layer.fan_in_fan_out else 1)
        layer.lora_magnitude_vector["default"].weight.data = norms


def _left_out(part: str) -> Change:
    def change(model: PeftModel) -> None:
        for layer in _layers(model, part):
            layer.lora_B["default"].weight.zero_()
            norms = layer.get_base_layer().weight.float().norm(dim=0 if layer.fan_in_fan_out else 1)
            layer.lora_magnitude_vector["default"].weight.data = norms

    return change


def _permuted(model: PeftModel) -> None:
    for layer in _layers(model):
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data = magnitude.data.flip(0)


FAULTS: dict[str, Change] = {
    "scale doubled": _scale(2),
    "magnitude dropped": _magnitude_dropped,
    "magnitude permuted": _permuted,
    "the adapter not merged": _left_out(""),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_faults_fail(family: str, tmp_path: Path) -> None:
    world = World(tmp_path, family, torch.bfloat16, True)
    layer = {"llama": "layers.1.", "gpt2": "h.1.", "t5": "decoder.block.1."}[family]
    for fault, change in {**FAULTS, "one layer left out": _left_out(layer)}.items():
        report = world.check(world.merge(change))
        assert report.ran, fault
        assert not report.passed, fault
        assert all("float32" in failure or "bfloat16" in failure for failure in report.failures)
        assert report.tolerance_wide is not None
        assert report.merged_wide is not None
        assert report.merged_wide.rms > 2 * report.tolerance_wide.rms, fault


def test_a_tied_merge_by_peft_fails(tmp_path: Path) -> None:
    """PEFT merges an embedding into both uses of a tied tensor, where its forward changes one (peft#2777)."""
    model = build(CAUSAL, "llama", **BIGGER, tie_word_embeddings=True)
    base = save(model, tmp_path / "base", torch.bfloat16)
    adapt(model, tmp_path / "adapter", target_modules=["embed_tokens"], r=4)
    with quiet():
        loaded = PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "adapter")  # type: ignore[attr-defined]
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert check_forward(base, read_adapter(tmp_path / "adapter"), tmp_path / "merged", QUICK).failures


def test_a_nan_fails(llama: World) -> None:
    merged = llama.merge(name="nan")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    rewrite_tensors(merged / "model.safetensors", spoil)
    failures = llama.check(merged).failures
    assert len(failures) == 2
    assert all("not finite" in failure for failure in failures)


def test_a_folder_that_does_not_load_fails(llama: World) -> None:
    merged = llama.merge(name="short")
    rewrite_tensors(merged / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    report = llama.check(merged)
    assert report.ran
    assert not report.passed
    assert "lacks model.layers.1.mlp.up_proj.weight" in report.failures[0]
    assert report.merged_wide is None

    weights = merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not a sound safetensors file" in llama.check(merged).failures[0]

    (merged / "config.json").unlink()
    report = llama.check(merged)
    assert not report.ran
    assert not report.passed
    assert "no config.json" in report.failures[0]


# --- what is reported -------------------------------------------------------------------------------------------------


def test_the_measure_is_pefts_unmerged_model(llama: World, clean: ForwardReport) -> None:
    with quiet():
        base = llama.kind.from_pretrained(llama.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, llama.adapter).eval()
    losses, predicted = 0.0, 0
    for sample, unmerged in zip(clean.samples, clean.unmerged_logits, strict=True):
        with torch.no_grad():
            output = model(**sample.inputs)
            prompt = sample.token_ids[None, : sample.prompt_length]
            losses += float(model(input_ids=prompt, labels=prompt).loss) * (sample.prompt_length - 1)
            predicted += sample.prompt_length - 1
            generated = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)
        # Two ways of computing one formula in float32, a few layers deep.
        scale = float(unmerged.abs().max())
        assert float((output.logits[0] - unmerged).abs().max()) <= 64 * torch.finfo(torch.float32).eps * scale
        assert generated[0].tolist() == sample.token_ids.tolist()
    assert clean.perplexity == pytest.approx(torch.tensor(losses / predicted).exp().item(), rel=1e-5)
    assert [ids.tolist() for ids in clean.token_ids] == [sample.token_ids.tolist() for sample in clean.samples]
    assert sum(map(len, clean.unmerged_logits)) == clean.positions


def test_greedy_continuations_are_compared(llama: World, clean: ForwardReport) -> None:
    assert clean.merged_wide is not None
    assert clean.merged_wide.greedy is not None
    assert clean.merged_wide.greedy.compared == len(clean.samples)
    report = llama.check(llama.merge(_left_out(""), name="base-itself"), ForwardOptions(greedy_tokens=6))
    assert report.merged_wide is not None
    assert report.merged_wide.greedy is not None
    assert report.merged_wide.greedy.equal < report.merged_wide.greedy.compared
    assert report.merged_wide.greedy.margin is not None
    assert report.merged_wide.greedy.margin > 0
    assert report.base is not None
    assert report.base.rms == pytest.approx(report.merged_wide.rms, rel=1e-3)


def test_peft_as_the_reference(llama: World, clean: ForwardReport) -> None:
    options = ForwardOptions(reference="peft", greedy_tokens=6)
    report = llama.check(llama.folder / "clean", options)
    assert report.passed
    assert report.reference == "peft"
    for theirs, ours in zip(report.unmerged_logits, clean.unmerged_logits, strict=True):
        assert float((theirs - ours).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(ours.abs().max())
    assert not llama.check(llama.merge(_scale(2), name="doubled"), options).passed


def test_an_adapter_that_changes_nothing_is_noticed(llama: World, tmp_path: Path) -> None:
    with quiet():
        from peft import LoraConfig, get_peft_model

        fresh = get_peft_model(
            llama.kind.from_pretrained(llama.base), LoraConfig(target_modules=["q_proj"], use_dora=True)
        )
        fresh.save_pretrained(tmp_path)
    report = check_forward(llama.base, read_adapter(tmp_path), llama.base, QUICK)
    assert report.passed
    assert report.changes_nothing
    assert any("changes nothing" in note for note in report.notes)


def test_the_report_is_plain_json(llama: World, clean: ForwardReport) -> None:
    told = json.loads(json.dumps(clean.to_json(), allow_nan=False))
    assert told["passed"] is True
    assert told["merged_wide"]["kl"] == clean.merged_wide.kl  # type: ignore[union-attr]
    assert told["tolerance_wide"]["rms"] == clean.allowed_rms
    assert "unmerged_logits" not in told
    stopped = check_forward(llama.folder, read_adapter(llama.adapter), llama.base).to_json()
    assert json.loads(json.dumps(stopped, allow_nan=False))["passed"] is False


def test_progress_reaches_its_total(llama: World) -> None:
    seen: list[Progress] = []
    llama.check(llama.base, on_progress=seen.append)
    assert [one.done for one in seen] == list(range(1, len(seen) + 1))
    assert {one.total for one in seen} == {len(seen)}


def test_nothing_reaches_the_terminal(llama: World, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    llama.check(llama.merge(name="quiet-missing"))
    capfd.readouterr()
    rewrite_tensors(llama.folder / "quiet-missing" / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    llama.check(llama.folder / "quiet-missing")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert transformers_logging.get_verbosity() == logging.WARNING
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("reference", ["native", "peft"])
def test_one_model_at_a_time(llama: World, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[nn.Module]] = []
    load = forward_check._Check._load

    def watched(self: Any, folder: Path, dtype: torch.dtype) -> Any:
        gc.collect()
        assert not [one for one in alive if one() is not None]
        model = load(self, folder, dtype)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(forward_check._Check, "_load", watched)
    assert llama.check(llama.merge(name="alone"), ForwardOptions(reference=reference, greedy_tokens=2)).passed
    assert len(alive) == (4 if reference == "native" else 5)


# --- what stops it ----------------------------------------------------------------------------------------------------


def test_says_why_it_was_not_run(llama: World, tmp_path: Path) -> None:
    adapter = read_adapter(llama.adapter)

    def reason(**config: Any) -> str:
        base = tmp_path / "base"
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(llama.base, base)
        path = base / "config.json"
        changed = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
        report = check_forward(base, adapter, base, QUICK)
        assert not report.ran
        assert not report.passed
        assert report.failures == ()
        assert report.reason
        return report.reason

    assert "no config.json" in str(check_forward(llama.folder, adapter, llama.base).reason)
    assert "names no architecture" in reason(architectures=None)
    assert "MyOwnForCausalLM is no architecture" in reason(architectures=["MyOwnForCausalLM"])
    assert "pipeline is no architecture" in reason(architectures=["pipeline"])
    assert "transformers cannot load" in reason(vocab_size=121)
    assert "cannot be attached" in reason(num_hidden_layers=1)
    assert "lacks score.weight" in reason(architectures=["LlamaForSequenceClassification"])


def test_an_input_that_cannot_be_made_up_is_said(tmp_path: Path) -> None:
    sizes = {**BIGGER, "num_hidden_layers": 1, "prediction_length": 4, "context_length": 8}
    model = build("AutoModel", "time_series_transformer", d_model=16, **sizes)
    base = save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    report = check_forward(base, read_adapter(tmp_path / "adapter"), base, QUICK)
    assert not report.ran
    assert report.reason


def test_without_peft(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="transformers"):
        llama.check(llama.base)


def test_a_model_that_overflows_in_float16(tmp_path: Path) -> None:
    """Its unmerged forward is not finite when deployed, so the weights are all that can be judged."""
    world = World(tmp_path, "llama", torch.float16, True)
    large = {"model.layers.1.mlp.up_proj.weight": 3e3, "model.layers.1.mlp.gate_proj.weight": 3e3}

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name, factor in large.items():
            tensors[name] = tensors[name] * factor

    rewrite_tensors(world.base / "model.safetensors", grow)
    adapter = world.adapter / "adapter_model.safetensors"

    def follow(tensors: dict[str, torch.Tensor]) -> None:
        for name, factor in large.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_B.weight"] *= factor
            tensors[f"{key}.lora_magnitude_vector"] *= factor

    rewrite_tensors(adapter, follow)
    report = world.check(world.merge())
    assert any("overflows in float16" in note for note in report.notes)
    assert report.passed
    assert report.merged_deployed is None
    assert not world.check(world.merge(_scale(2))).passed


# --- heads, tokens, prompts -------------------------------------------------------------------------------------------


def test_a_new_head_on_a_causal_base(llama: World, tmp_path: Path) -> None:
    with quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(llama.base, num_labels=3)
    trained: Any = adapt(model, tmp_path / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS")
    with quiet():
        trained.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = check_forward(llama.base, read_adapter(tmp_path / "adapter"), tmp_path / "merged", QUICK)
    assert report.passed
    assert report.architecture == "LlamaForSequenceClassification"
    assert report.unmerged_logits[0].shape == (1, 3)
    assert report.base is None
    assert any("effect was not measured" in note for note in report.notes)


def test_trained_tokens_are_among_the_inputs(tmp_path: Path) -> None:
    model = build(CAUSAL, "llama", **BIGGER, tie_word_embeddings=True)
    base = save(model, tmp_path / "base", torch.bfloat16)
    adapt(model.bfloat16(), tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[7, 101])
    with quiet():
        loaded = PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "adapter")  # type: ignore[attr-defined]
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = check_forward(base, read_adapter(tmp_path / "adapter"), tmp_path / "merged", QUICK)
    assert report.passed
    assert report.token_ids[-1][:2].tolist() == [7, 101]


@pytest.fixture
def spoken(llama: World, tmp_path: Path) -> Path:
    """The base with a tokenizer of single letters and a chat template, both made by other libraries."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = Tokenizer(models.WordLevel({"?": 3, "[": 4, "]": 5} | {c: 10 + i for i, c in enumerate(letters)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    base = tmp_path / "spoken"
    shutil.copytree(llama.base, base)
    fast.save_pretrained(base)
    return base


def test_prompts_go_through_tokenizer_and_template(llama: World, spoken: Path, tmp_path: Path) -> None:
    adapter = read_adapter(llama.adapter)
    merged = llama.merge(name="spoken")
    report = check_forward(spoken, adapter, merged, QUICK)
    assert report.passed
    assert report.inputs == f"{len(BUILT_IN_PROMPTS)} built-in prompts"
    chat = [ids[0] == 4 for ids in report.token_ids]
    assert chat == [number % 2 == 1 for number in range(len(BUILT_IN_PROMPTS))]

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "cab"}\n\n{"prompt": "bad", "more": 1}\n')
    report = check_forward(spoken, adapter, merged, ForwardOptions(prompts=file, greedy_tokens=0))
    assert report.passed
    assert [ids.tolist() for ids in report.token_ids] == [[4, 12, 10, 11, 5], [4, 11, 10, 13, 5]]
    assert report.merged_wide is not None
    assert report.merged_wide.greedy is None
    with pytest.raises(DoraServeError, match="no tokenizer"):
        llama.check(merged, ForwardOptions(prompts=file))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", " \n\n", "holds no prompts"),
        ("a.jsonl", "{", "line 1, is not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n["prompt"]', "line 2: got"),
        ("a.jsonl", '{"prompt": 3}', "wanted an object"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("a.txt", None, "does not exist"),
    ],
)
def test_bad_prompt_files(name: str, content: str | bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DoraServeError, match=words):
        read_prompts(tmp_path / name)


def test_lines_of_a_prompts_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two \n")
    assert read_prompts(tmp_path / "a.txt") == ("one", "  two ")


# --- the real model ---------------------------------------------------------------------------------------------------


def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """PEFT's merge of the adapter that is shipped passes; with one of its thirty layers left out it does not."""
    source = ROOT / "examples" / "adapters" / "dates-dora"
    adapter = read_adapter(source)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{BUILT_IN_PROMPTS[0]}\n{BUILT_IN_PROMPTS[1]}\n")
    options = ForwardOptions(prompts=prompts, greedy_tokens=4)
    with quiet():
        base = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
        PeftModel.from_pretrained(base, source).merge_and_unload().save_pretrained(tmp_path / "merged")
    report = check_forward(smollm2, adapter, tmp_path / "merged", options)
    assert report.passed, report.failures
    assert not report.changes_nothing
    assert report.inputs == "2 prompts, through the chat template"
    assert report.perplexity is not None
    assert report.perplexity < 1000

    stored = load_file(smollm2 / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    fault = {name: stored[name] if re.search(r"layers\.15\.", name) else value for name, value in merged.items()}
    save_file(fault, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    assert not check_forward(smollm2, adapter, tmp_path / "merged", options).passed
