"""Which stored tensor a trained one belongs to: the merged folder, loaded by transformers, is the unmerged PEFT model.

Over the families whose stored names, shapes, ties or heads are not those of the running model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import CheckpointError, PlanError, UnmergeableError
from dora_serve.names import ParameterNames
from dora_serve.resolve import HINTED_PROBLEMS
from dora_serve.runtime_names import runtime_names
from dora_serve.ties import _HEAD, _PLAIN_CAUSAL
from tests.cases import (
    ATTENTION,
    LINEARS,
    SIZES,
    Case,
    adapt,
    ask_here,
    build,
    check_merged_is_unmerged,
    compare_with_unmerged,
    distance,
    llama,
    load,
    logits,
    merge_to,
    noise,
    plan,
    quiet,
    read_tensors,
    rewrite_json,
    rewrite_tensors,
    save,
    token_pairs,
    tokens,
    vary,
)

CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
IMAGES, VLM, SPEECH = "AutoModelForImageClassification", "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq"

GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
BERT: dict[str, Any] = {
    **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
BART: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
BART |= {"max_position_embeddings": 32}
DISTILBERT: dict[str, Any] = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
WHISPER: dict[str, Any] = {**BART, "max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 4}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
FALCON: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT: dict[str, Any] = {**FALCON, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 8}
CTRL: dict[str, Any] = {**GPT2, "dff": 24}
CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
TEXT: dict[str, Any] = {**SIZES, "pad_token_id": None}
UNTIED = {"tie_word_embeddings": False}
UNTIED_VLM = {"tie_word_embeddings": False, "text_config.tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


def pixels(_: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 16, 16)}


def speech(model: nn.Module) -> dict[str, Tensor]:
    return {"input_features": noise(2, 4, 32), "decoder_input_ids": token_pairs(model)["decoder_input_ids"]}


def images_and_words(_: nn.Module) -> dict[str, Tensor]:
    """38 is the image's token; a picture of 16 pixels has four patches."""
    sentences = [[1, 38, 38, 38, 38, 5, 9, 3, 2], [1, 38, 38, 38, 38, 4, 30, 11, 2]]
    return {"input_ids": torch.tensor(sentences), "pixel_values": noise(2, 3, 16, 16)}


def gemma3_inputs(model: nn.Module) -> dict[str, Tensor]:
    given = images_and_words(model)
    return given | {"token_type_ids": (given["input_ids"] == 38).long()}


def qwen2_vl_inputs(_: nn.Module) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 36, 38, 38, 38, 38, 35, 5, 9, 3, 2]])
    patches = {"pixel_values": noise(16, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": ids, "mm_token_type_ids": (ids == 38).int(), **patches}


def llava(tied: bool) -> Any:
    text = {**TEXT, "model_type": "llama", "tie_word_embeddings": tied}
    vision = {**VISION, "model_type": "clip_vision_model"}
    return build(VLM, "llava", text_config=text, vision_config=vision, image_token_id=38, tie_word_embeddings=tied)


def qwen2_vl(tied: bool) -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": tied}
    marks = {"image_token_id": 38, "video_token_id": 37, "vision_start_token_id": 36, "vision_end_token_id": 35}
    return build(VLM, "qwen2_vl", text_config=text, vision_config=vision, **marks, tie_word_embeddings=tied)


def gemma3() -> Any:
    text = {**TEXT, "sliding_window": 8, "tie_word_embeddings": True}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    marks = {"mm_tokens_per_image": 4, "image_token_index": 38, "boi_token_index": 36, "eoi_token_index": 37}
    return build(VLM, "gemma3", text_config=text, vision_config=vision, **marks)


def case(name: str, architecture: str, model_type: str, sizes: Mapping[str, Any], **rest: Any) -> Case:
    keys = ("inputs", "untied", "changed", "acts")
    own = {key: rest.pop(key) for key in keys if key in rest}
    return Case(name, lambda: build(architecture, model_type, **sizes), rest, **own)


def dora(*targets: str) -> dict[str, Any]:
    return {"target_modules": list(targets), "use_dora": True}


# Names

NAMES = (
    case("llama", CAUSAL, "llama", {**SIZES, "attention_bias": True}, **dora(*LINEARS)),
    case("gpt2", CAUSAL, "gpt2", GPT2, **dora("c_attn", "c_proj", "c_fc")),
    case("gpt2 positions", CAUSAL, "gpt2", GPT2, **dora("wpe")),
    case("gemma2", CAUSAL, "gemma2", SIZES, **dora(*LINEARS)),
    case("phi3, fused q k v", CAUSAL, "phi3", SIZES, **dora("qkv_proj", "gate_up_proj")),
    case("falcon", CAUSAL, "falcon", FALCON, **dora("query_key_value", "dense")),
    case("gpt_neox, renamed head", CAUSAL, "gpt_neox", BERT, **dora("query_key_value", "lm_head")),
    case("bert", MASKED, "bert", BERT, **dora("query", "value", "dense")),
    case("roberta", MASKED, "roberta", BERT, **dora("query", "value", "dense")),
    case("t5", SEQ2SEQ, "t5", T5, **dora("q", "v", "k", "o", "wi", "wo"), inputs=token_pairs),
    case("bart", SEQ2SEQ, "bart", BART, **dora("q_proj", "out_proj", "fc1", "fc2"), inputs=token_pairs),
    case("whisper", SPEECH, "whisper", WHISPER, **dora("q_proj", "v_proj", "fc1"), inputs=speech),
    case("vit", IMAGES, "vit", {**VISION, "num_labels": 3}, **dora("q_proj", "fc1", "projection"), inputs=pixels),
    case("convnext", IMAGES, "convnext", CONVNEXT, **dora("pwconv1", "pwconv2", "patch_embeddings"), inputs=pixels),
    case("resnet", IMAGES, "resnet", RESNET, **dora("convolution"), inputs=pixels),
    Case("llava", lambda: llava(False), dora(*LINEARS, "linear_1", "patch_embedding"), images_and_words),
    Case("llava head", lambda: llava(False), dora("lm_head", "embed_tokens"), images_and_words),
    Case("qwen2_vl", lambda: qwen2_vl(False), dora("q_proj", "qkv", "proj", "fc1", "lm_head"), qwen2_vl_inputs),
    Case("gemma3", gemma3, dora("q_proj", "v_proj", "fc1"), gemma3_inputs),
)


@pytest.mark.parametrize("case", NAMES, ids=str)
def test_names_of_the_running_model_find_the_stored_tensors(case: Case, tmp_path: Path) -> None:
    check_merged_is_unmerged(case, tmp_path)


def test_a_base_saved_without_its_prefix(tmp_path: Path) -> None:
    """As the Hub's gpt2, bert and others are: `h.0.attn...` where the running model has `transformer.h.0.attn...`."""
    model = build(CAUSAL, "gpt2", **GPT2)
    save(model, tmp_path / "base")
    shorter = {name.removeprefix("transformer."): value for name, value in read_tensors(tmp_path / "base").items()}
    save_file(shorter, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    adapt(load(tmp_path / "base", model), tmp_path / "adapter", **dora("c_attn", "c_proj", "wte"))
    planned = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert planned.untied == ("lm_head.weight",)
    assert set(read_tensors(tmp_path / "merged")) == {*shorter, "lm_head.weight"}
    compare_with_unmerged(tmp_path, model, tokens(model))


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path) -> None:
    """Trained in an AutoModel, `layers.0...`, on the checkpoint of a causal model, `model.layers.0...`."""
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    headless = transformers.AutoModel.from_pretrained(tmp_path / "base")
    adapt(headless, tmp_path / "adapter", **dora("q_proj", "embed_tokens"))
    planned = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    compare_with_unmerged(tmp_path, type(headless), tokens(model), spare="^lm_head")
    # The head was not part of what was trained, so it stays what it was.
    assert planned.untied == ("lm_head.weight",)
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])


class Plain(nn.Module):
    """What no library knows the names of: every kind of layer that PEFT adapts, square wherever it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 12)
        self.conv1 = nn.Conv1d(12, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 12, (1, 3), padding=(0, 1))
        self.conv3 = nn.Conv3d(12, 12, (1, 1, 2), stride=(1, 1, 2))
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.flipped = Conv1D(20, 12)
        self.linear = nn.Linear(20, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.conv1(self.table(input_ids).transpose(1, 2))
        x = self.conv2(x.mean(1)[:, None, None])
        x = self.conv3(x[:, :, None]).flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.linear(torch.tanh(self.flipped(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_dora", [False, True])
def test_every_kind_of_layer_of_a_model_without_a_configuration(use_dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vary(Plain())
    save(model, tmp_path / "base")
    targets = ["table", "conv1", "conv2", "conv3", "flipped", "linear"]
    trained = adapt(model, tmp_path / "adapter", target_modules=targets, use_dora=use_dora)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = Plain()
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    inputs = {"input_ids": torch.randint(0, 12, (2, 8))}
    own_error = distance(logits(trained, inputs), truth := logits(trained.double(), inputs))
    assert distance(logits(merged.eval(), inputs), truth) <= 4 * own_error
    assert distance(logits(model, inputs), truth) > 1000 * own_error


def test_multihead_attention_is_refused(tmp_path: Path) -> None:
    """PEFT 0.21.2 adds the update of `out_proj` twice, in the forward and in its merge; a later one may not."""
    model = vary(Plain())
    save(model, tmp_path / "base")
    trained = adapt(model, tmp_path / "adapter", target_modules=["attention"])
    with pytest.raises(UnmergeableError, match="out_proj twice"):
        plan(tmp_path / "base", tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.attention.base_layer.out_proj"
    delta = 1.5 * held[f"{name}.lora_B.weight"] @ held[f"{name}.lora_A.weight"]
    with quiet():
        merged = trained.merge_and_unload()
    moved = merged.attention.out_proj.weight - model.attention.out_proj.weight
    torch.testing.assert_close(moved, 2 * delta)


def test_a_square_weight_of_unknown_orientation_is_refused(tmp_path: Path) -> None:
    """Without config.json nothing tells GPT-2's square Conv1D, stored as (in, out), from a Linear."""
    model = build(CAUSAL, "gpt2", **GPT2)
    save(model, tmp_path / "base")
    adapt(load(tmp_path / "base", model), tmp_path / "adapter", **dora("c_attn", "c_proj"))
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(PlanError) as caught:
        plan(tmp_path / "base", tmp_path / "adapter")
    assert {problem.subject for problem in caught.value.problems} == {
        f"transformer.h.{layer}.attn.c_proj" for layer in (0, 1)
    }
    assert "config.json" in str(caught.value)


# Ties

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {**SIZES, "tie_word_embeddings": True}
BART_TIES = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
T5_TIES = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
BERT_TIES = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")


def tied(name: str, **rest: Any) -> Case:
    return case(f"llama {name}", CAUSAL, "llama", TIED, **rest)


def apart(*names: str, **changes: object) -> dict[str, Any]:
    return {"untied": names, "changed": {**UNTIED, **changes}}


TIES = (
    tied("embedding, LoRA", target_modules=["embed_tokens"], **apart(HEAD)),
    tied("embedding, DoRA", **dora("q_proj", "embed_tokens"), **apart(HEAD)),
    tied("head, LoRA", target_modules=["lm_head"], **apart(HEAD)),
    tied("head, DoRA", **dora("lm_head"), **apart(HEAD)),
    tied("both, DoRA", **dora("embed_tokens", "lm_head"), **apart(HEAD)),
    tied("neither", **dora(*ATTENTION)),
    tied("embedding, ensured", target_modules=["embed_tokens"], ensure_weight_tying=True, **apart(HEAD)),
    tied("embedding, ensured, DoRA", **dora("embed_tokens"), ensure_weight_tying=True, **apart(HEAD)),
    tied("head, ensured", target_modules=["lm_head"], ensure_weight_tying=True, **apart(HEAD)),
    tied("saved embedding", target_modules=["q_proj"], modules_to_save=["embed_tokens"], **apart(HEAD)),
    tied("saved head", target_modules=["q_proj"], modules_to_save=["lm_head"], **apart(HEAD)),
    tied("both saved", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], **apart(HEAD)),
    tied(
        "saved embedding, ensured",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    tied("saved head, ensured", target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    tied("rows", target_modules=["q_proj"], trainable_token_indices=[3, 5, 39]),
    tied("rows, by name", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]}),
    tied("rows of both", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3], "lm_head": [3]}),
    tied("rows of the head", target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]}, **apart(HEAD)),
    tied(
        "other rows of each",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [7, 9]},
        **apart(HEAD),
    ),
    tied(
        "rows and an adapted head",
        target_modules=["q_proj", "lm_head"],
        trainable_token_indices=[3, 5, 39],
        **apart(HEAD),
    ),
    tied("saved by the way", target_modules=["q_proj"], saving={"save_embedding_layers": True}),
    case("gpt2 both", CAUSAL, "gpt2", GPT2, **dora("wte", "lm_head", "c_fc"), **apart(HEAD)),
    case("gemma, scaled", CAUSAL, "gemma", SIZES, **dora("embed_tokens"), **apart(HEAD)),
    case("gemma, rows", CAUSAL, "gemma", SIZES, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    case("opt", CAUSAL, "opt", OPT, **dora("embed_tokens", "q_proj"), **apart(HEAD)),
    case("ctrl, names of its own", CAUSAL, "ctrl", CTRL, target_modules=["transformer.w"], **apart(HEAD)),
    case("openai-gpt", CAUSAL, "openai-gpt", {**GPT2, "pad_token_id": None}, **dora("tokens_embed"), **apart(HEAD)),
    case("biogpt", CAUSAL, "biogpt", BERT, target_modules=["output_projection"], **apart("output_projection.weight")),
    case("bert", MASKED, "bert", BERT, target_modules=["word_embeddings"], **apart(*BERT_TIES)),
    case("bert biases", MASKED, "bert", BERT, target_modules=["query"], bias="all"),
    case(
        "bert, saved head",
        MASKED,
        "bert",
        BERT,
        target_modules=["query"],
        modules_to_save=["decoder"],
        **apart(*BERT_TIES),
    ),
    case(
        "roberta",
        MASKED,
        "roberta",
        BERT,
        **dora("word_embeddings"),
        **apart("lm_head.decoder.weight", "lm_head.decoder.bias"),
    ),
    case(
        "t5 head", SEQ2SEQ, "t5", T5, **dora("lm_head"), inputs=token_pairs, **apart(HEAD, scale_decoder_outputs=True)
    ),
    case(
        "t5 1.1 head",
        SEQ2SEQ,
        "t5",
        {**T5, "tie_word_embeddings": False},
        **dora("lm_head"),
        inputs=token_pairs,
        **apart(HEAD, scale_decoder_outputs=False),
    ),
    case(
        "t5 table",
        SEQ2SEQ,
        "t5",
        T5,
        target_modules=["shared"],
        inputs=token_pairs,
        acts=False,
        **apart(*T5_TIES, scale_decoder_outputs=True),
    ),
    case(
        "t5 tables",
        SEQ2SEQ,
        "t5",
        T5,
        target_modules=["embed_tokens"],
        inputs=token_pairs,
        **apart(*T5_TIES[1:], scale_decoder_outputs=True),
    ),
    case(
        "t5 rows",
        SEQ2SEQ,
        "t5",
        T5,
        target_modules=["q"],
        trainable_token_indices={"shared": [3, 5]},
        inputs=token_pairs,
    ),
    case("mt5 head", SEQ2SEQ, "mt5", T5, **dora("lm_head"), inputs=token_pairs, **apart(HEAD)),
    case("bart head", SEQ2SEQ, "bart", BART, target_modules=["lm_head"], inputs=token_pairs, **apart(*BART_TIES)),
    case(
        "bart rows",
        SEQ2SEQ,
        "bart",
        BART,
        target_modules=["q_proj"],
        trainable_token_indices={"shared": [3, 5]},
        inputs=token_pairs,
    ),
    case("whisper head", SPEECH, "whisper", WHISPER, **dora("proj_out"), inputs=speech, **apart("proj_out.weight")),
    Case("llava", lambda: llava(True), dora("embed_tokens"), images_and_words, (HEAD,), UNTIED_VLM),
    Case("qwen2_vl", lambda: qwen2_vl(True), dora("lm_head", "q_proj"), qwen2_vl_inputs, (HEAD,), UNTIED_VLM),
    Case("gemma3", gemma3, dora("embed_tokens"), gemma3_inputs, (HEAD,), UNTIED_VLM),
)


@pytest.mark.parametrize("case", TIES, ids=str)
def test_what_is_tied_is_parted_where_the_adapter_parts_it(case: Case, tmp_path: Path) -> None:
    check_merged_is_unmerged(case, tmp_path)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj"]])
def test_a_file_that_holds_both_tied_tensors(targets: list[str], tmp_path: Path) -> None:
    """transformers 4 would tie them again, so config.json has to say that they no longer are."""
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    rewrite_tensors(tmp_path / "base" / "model.safetensors", lambda held: held.update({HEAD: held[EMBED].clone()}))
    adapt(load(tmp_path / "base", model), tmp_path / "adapter", **dora(*targets))
    planned = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert planned.untied == ()
    assert bool(planned.config_changes) == (targets != ["q_proj"])
    compare_with_unmerged(tmp_path, model, tokens(model))


def test_a_tie_that_peft_kept_over_a_file_that_holds_both(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    rewrite_tensors(tmp_path / "base" / "model.safetensors", lambda held: held.update({HEAD: held[EMBED].clone()}))
    config: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapt(load(tmp_path / "base", model), tmp_path / "adapter", target_modules=["q_proj"], **config)
    planned = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not planned.config_changes
    merged = read_tensors(tmp_path / "merged")
    assert torch.equal(merged[HEAD], merged[EMBED])
    compare_with_unmerged(tmp_path, model, tokens(model))


def test_the_table_of_plain_architectures_is_transformers_own() -> None:
    for architecture, embedding in _PLAIN_CAUSAL.items():
        assert getattr(transformers, architecture)._tied_weights_keys == {_HEAD: embedding}


def test_ties_of_an_unknown_architecture_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers is not installed, BERT's ties are not known; adapters that leave the table alone are fine."""
    monkeypatch.setattr("dora_serve.names.runtime_names", lambda *_: None)
    model = build(MASKED, "bert", **BERT)
    save(model, tmp_path / "base")
    for name, target in (("linear", "query"), ("table", "word_embeddings")):
        adapt(load(tmp_path / "base", model), tmp_path / name, target_modules=[target])
    assert plan(tmp_path / "base", tmp_path / "linear").edited
    with pytest.raises(PlanError, match="BertForMaskedLM may share with others") as caught:
        plan(tmp_path / "base", tmp_path / "table")
    assert "transformers" in str(caught.value.problems[0].hint)


def test_ties_of_a_causal_model_that_only_its_own_code_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", lambda *_: None)
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    adapt(load(tmp_path / "base", model), tmp_path / "adapter", **dora("embed_tokens"))
    rewrite_json(tmp_path / "base" / "config.json", model_type="homemade", architectures=["HomemadeForCausalLM"])
    assert plan(tmp_path / "base", tmp_path / "adapter").untied == (HEAD,)


def test_a_tie_that_scales_the_outputs_is_kept(tmp_path: Path) -> None:
    """Switch Transformers scales where tie_word_embeddings is true: parted, it would compute something else."""
    model = build(SEQ2SEQ, "switch_transformers", **T5, num_experts=2)
    save(model, tmp_path / "base")
    adapt(load(tmp_path / "base", model), tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(PlanError, match="scales its outputs"):
        plan(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("model_type", ["phi", "gptj"])
def test_rows_of_a_head_with_a_bias_are_refused(model_type: str, tmp_path: Path) -> None:
    """PEFT 0.21 leaves the bias out while the rows are active, and puts it back when it merges."""
    sizes = SIZES if model_type == "phi" else {**GPT2, "rotary_dim": 4}
    model = build(CAUSAL, model_type, **{**sizes, "tie_word_embeddings": True})
    save(model, tmp_path / "base")
    target = "q_proj"
    trained = adapt(
        load(tmp_path / "base", model), tmp_path / "adapter", target_modules=[target], trainable_token_indices=[3]
    )
    with pytest.raises(PlanError, match="which has a bias"):
        plan(tmp_path / "base", tmp_path / "adapter")
    active = logits(trained, tokens(model))
    with quiet():
        merged = trained.merge_and_unload()
    assert distance(logits(merged, tokens(model)), active) > 1e-3


# Heads


def train_head(root: Path, base: Any, kind: Any, task: str, config: Mapping[str, Any]) -> Any:
    """Load a base into a class with a head that it lacks, as one does to train a classifier; save the adapter."""
    save(base, root / "base")
    torch.manual_seed(1)
    labels = {} if task == "QUESTION_ANS" else {"num_labels": 3}
    with quiet():
        start = kind.from_pretrained(root / "base", **labels)
        return adapt(start, root / "adapter", task_type=task or None, **config)


HEADS = (
    ("SEQ_CLS", CAUSAL, "llama", TIED, "q_proj"),
    ("SEQ_CLS", CAUSAL, "llama", SIZES, "embed_tokens"),
    ("SEQ_CLS", CAUSAL, "gpt2", GPT2, "c_attn"),
    ("SEQ_CLS", "AutoModel", "bert", BERT, "query"),
    ("SEQ_CLS", MASKED, "roberta", BERT, "query"),
    ("SEQ_CLS", MASKED, "distilbert", DISTILBERT, "q_lin"),
    ("TOKEN_CLS", MASKED, "bert", BERT, "query"),
    ("TOKEN_CLS", CAUSAL, "llama", SIZES, "q_proj"),
    ("QUESTION_ANS", MASKED, "bert", BERT, "query"),
)


@pytest.mark.parametrize(("task", "own", "model_type", "sizes", "target"), HEADS)
def test_a_head_that_the_base_lacks(
    task: str, own: str, model_type: str, sizes: dict[str, Any], target: str, tmp_path: Path
) -> None:
    """The merged folder loads into the class with the head, with as many labels, and gives PEFT's scores."""
    suffix = {
        "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification",
        "QUESTION_ANS": "QuestionAnswering",
    }
    auto = getattr(transformers, f"AutoModelFor{suffix[task]}")
    trained = train_head(tmp_path, build(own, model_type, **sizes), auto, task, dora(target))
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    # What the base's own class needs and this one does not is left in the file, as it is in the base.
    merged = load(tmp_path / "merged", auto, spare=r"^(lm_head|cls|vocab_|(bert\.)?pooler)")
    assert type(merged).__name__.endswith(suffix[task])
    assert merged.config.architectures == [type(merged).__name__]
    inputs = tokens(merged)
    own_error = distance(logits(trained, inputs), truth := logits(trained.double(), inputs))
    assert distance(logits(merged, inputs), truth) <= 4 * own_error


def test_a_head_whose_class_peft_names(tmp_path: Path) -> None:
    """Without a task type: auto_mapping in adapter_config.json says what the encoder was loaded into."""
    auto = transformers.AutoModelForImageClassification
    config = dora("q_proj") | {"modules_to_save": ["classifier"]}
    vit = build("AutoModel", "vit", **VISION)
    trained = train_head(tmp_path, vit, auto, "", config)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged", auto, spare="pooler")
    assert merged.config.architectures == ["ViTForImageClassification"]
    own_error = distance(logits(trained, pixels(vit)), truth := logits(trained.double(), pixels(vit)))
    assert distance(logits(merged, pixels(vit)), truth) <= 4 * own_error


def test_a_head_that_never_was_saved_is_told_of(tmp_path: Path) -> None:
    """Nothing of the classifier reached the file: the output is the base's own class, and says so."""
    auto = transformers.AutoModelForSequenceClassification
    train_head(tmp_path, build(CAUSAL, "llama", **SIZES), auto, "SEQ_CLS", dora("q_proj"))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    rewrite_tensors(weights, lambda held: held.pop("base_model.model.score.weight"))
    planned = plan(tmp_path / "base", tmp_path / "adapter")
    assert not planned.config_changes
    assert any("trained in a LlamaForSequenceClassification, whose score.weight" in note for note in planned.notes)


def test_a_head_that_was_drawn_at_random_and_never_saved_is_refused(tmp_path: Path) -> None:
    """BERT's pooler: a checkpoint of masked words has none, and PEFT saves none, so the trained model is lost."""
    auto = transformers.AutoModelForSequenceClassification
    train_head(tmp_path, build(MASKED, "bert", **BERT), auto, "SEQ_CLS", dora("query"))
    with pytest.raises(PlanError) as caught:
        plan(tmp_path / "base", tmp_path / "adapter")
    subjects = {problem.subject for problem in caught.value.problems}
    assert subjects == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert "modules_to_save" in str(caught.value)


def test_a_head_without_transformers_is_said_not_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = transformers.AutoModelForSequenceClassification
    train_head(tmp_path, build(CAUSAL, "llama", **SIZES), auto, "SEQ_CLS", dora("q_proj"))
    monkeypatch.setattr("dora_serve.names.runtime_names", lambda *_: None)
    planned = plan(tmp_path / "base", tmp_path / "adapter")
    assert planned.config_changes[("architectures",)] == ["LlamaForSequenceClassification"]
    assert any("was not asked" in note for note in planned.notes)


# Experts

MIXTRAL = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN_MOE = {**SIZES, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 1}
QWEN_MOE |= {"num_experts": 3, "num_experts_per_tok": 2}
ARIA = {**SIZES, "moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1}
LLAMA4 = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
LLAMA4 |= {"interleave_moe_layer_step": 1}
SQUARE = {"intermediate_size": 16}


def experts(*targets: str, **rest: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj"], "target_parameters": list(targets), **rest}


BOTH = experts("experts.gate_up_proj", "experts.down_proj")
EXPERTS = (
    case("mixtral, an expert a tensor", CAUSAL, "mixtral", MIXTRAL, **BOTH),
    case("mixtral, gate and up alone", CAUSAL, "mixtral", MIXTRAL, **experts("mlp.experts.gate_up_proj")),
    case("mixtral, down alone", CAUSAL, "mixtral", MIXTRAL, **experts("down_proj", use_rslora=True)),
    case("mixtral, both of one shape", CAUSAL, "mixtral", {**MIXTRAL, "intermediate_size": 8}, **BOTH),
    case("mixtral, square", CAUSAL, "mixtral", {**MIXTRAL, **SQUARE}, **BOTH),
    case("mixtral, router", CAUSAL, "mixtral", MIXTRAL, **experts("gate.weight", "experts.down_proj")),
    case(
        "mixtral, ranks of their own",
        CAUSAL,
        "mixtral",
        MIXTRAL,
        **BOTH,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 7},
    ),
    case("mixtral, names of transformers 4", CAUSAL, "mixtral", MIXTRAL, target_modules=["w1", "w2", "w3", "q_proj"]),
    case("mixtral, every linear", CAUSAL, "mixtral", MIXTRAL, target_modules="all-linear"),
    case("qwen2_moe", CAUSAL, "qwen2_moe", QWEN_MOE, **BOTH),
    case("qwen2_moe, shared expert", CAUSAL, "qwen2_moe", QWEN_MOE, **dora("gate_proj", "shared_expert_gate")),
    case("qwen3_moe", CAUSAL, "qwen3_moe", QWEN_MOE, **BOTH),
    case("gpt_oss, transposed", CAUSAL, "gpt_oss", {**MIXTRAL, "sliding_window": 8}, **BOTH),
    case("gpt_oss, square", CAUSAL, "gpt_oss", {**MIXTRAL, **SQUARE, "sliding_window": 8}, **BOTH),
    case("aria, transposed and square", CAUSAL, "aria_text", {**ARIA, **SQUARE}, **BOTH),
    case("llama4, square and not called transposed", CAUSAL, "llama4_text", {**LLAMA4, **SQUARE}, **BOTH),
    case("granitemoe, fused in the file", CAUSAL, "granitemoe", MIXTRAL, **BOTH),
    case("llama, plain parameters", CAUSAL, "llama", SIZES, **experts("k_proj.weight", "down_proj.weight")),
)


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_parameters_of_experts(case: Case, tmp_path: Path) -> None:
    check_merged_is_unmerged(case, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_adapter_of_transformers_4_with_a_layer_an_expert(family: str, tmp_path: Path) -> None:
    """Its names are the checkpoint's; PEFT stacks the experts as it loads it, gate and up into one of twice the rank.

    (For `qwen2_moe` itself PEFT 0.21.2 drops such tensors: its table names only the families that follow it.)
    """
    sizes, inside, leaves, width = {
        "mixtral": (MIXTRAL, "block_sparse_moe.experts", ("w1", "w3", "w2"), 24),
        "qwen3_moe": (QWEN_MOE, "mlp.experts", ("gate_proj", "up_proj", "down_proj"), 12),
    }[family]
    model = build(CAUSAL, family, **sizes)
    save(model, tmp_path / "base")
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for layer, expert, leaf in product((0, 1), (0, 1, 2), leaves):
        into, out = (width, 16) if leaf == leaves[2] else (16, width)
        for part, shape in (("lora_A", (4, into)), ("lora_B", (out, 4))):
            name = f"base_model.model.model.layers.{layer}.{inside}.{expert}.{leaf}.{part}.weight"
            tensors[name] = 0.3 * torch.randn(shape, generator=generator)
    LoraConfig(r=4, lora_alpha=6, target_modules=list(leaves)).save_pretrained(str(tmp_path / "adapter"))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    compare_with_unmerged(tmp_path, model, tokens(model))


def test_square_experts_of_an_unknown_architecture_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CAUSAL, "gpt_oss", **{**MIXTRAL, **SQUARE, "sliding_window": 8})
    save(model, tmp_path / "base")
    adapt(load(tmp_path / "base", model), tmp_path / "adapter", **experts("experts.down_proj"))
    monkeypatch.setattr("dora_serve.names.runtime_names", lambda *_: None)
    with pytest.raises(PlanError, match="which of its dimensions is the input"):
        plan(tmp_path / "base", tmp_path / "adapter")


# What does not fit


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("llama") / "base")


def trained_on(model: nn.Module, folder: Path, **config: Any) -> Path:
    adapt(model, folder, **config)
    return folder


def test_all_problems_come_at_once(llama_base: Path, tmp_path: Path) -> None:
    """Of another size, for modules of other names, for a bias that the base lacks: each with what was wanted."""
    wider = llama(hidden_size=24, head_dim=12, num_hidden_layers=3, attention_bias=True)
    adapter = trained_on(wider, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(PlanError) as caught:
        plan(llama_base, adapter)
    problems = {problem.subject: str(problem) for problem in caught.value.problems}
    assert len(problems) == 3
    assert (
        "lora_A [4, 24] and lora_B [24, 4] for a base weight of [16, 16]" in problems["model.layers.0.self_attn.q_proj"]
    )
    assert "lora_A [4, 16] and lora_B [16, 4]" in problems["model.layers.0.self_attn.q_proj"]
    assert "no tensor 'model.layers.2.self_attn.q_proj.weight'" in problems["model.layers.2.self_attn.q_proj"]
    assert "model.layers.1.self_attn.q_proj.weight" in problems["model.layers.2.self_attn.q_proj"]


def test_a_search_for_likely_names_has_an_end(
    llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter for another model may name thousands of modules; a person reads twenty."""
    deep = llama(num_hidden_layers=30, hidden_size=4, head_dim=2, intermediate_size=4)
    adapter = trained_on(deep, tmp_path / "adapter", target_modules=list(LINEARS), r=1)
    searched = []
    monkeypatch.setattr(ParameterNames, "nearest", lambda self, name: searched.append(name) or ("a", "b"))
    with pytest.raises(PlanError) as caught:
        plan(llama_base, adapter)
    assert len(caught.value.problems) == 30 * len(LINEARS)
    assert len(searched) <= HINTED_PROBLEMS
    assert str(caught.value).count("\n  - ") == HINTED_PROBLEMS + 1


def test_lora_bias_needs_a_bias_to_go_to(llama_base: Path, tmp_path: Path) -> None:
    adapter = trained_on(llama(attention_bias=True), tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(PlanError, match="a base layer without a bias"):
        plan(llama_base, adapter)


def test_rows_beyond_the_base_are_refused(llama_base: Path, tmp_path: Path) -> None:
    adapter = trained_on(llama(), tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 5])
    rewrite_json(adapter / "adapter_config.json", trainable_token_indices=[3, 10**18])
    with pytest.raises(PlanError, match=r"up to row 1000000000000000000, wanted rows within the base's \[40, 16\]"):
        plan(llama_base, adapter)


def test_one_table_of_a_resized_vocabulary_is_not_enough(llama_base: Path, tmp_path: Path) -> None:
    larger = llama(vocab_size=44)
    adapter = trained_on(larger, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(PlanError, match=r"lm_head.weight: got 40 rows in the base and none in the adapter, wanted 44"):
        plan(llama_base, adapter)


def test_a_quantized_base_is_refused(llama_base: Path, tmp_path: Path) -> None:
    adapter = trained_on(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    shutil.copytree(llama_base, tmp_path / "codes")
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite_tensors(
        tmp_path / "codes" / "model.safetensors", lambda held: held.update({name: held[name].to(torch.int8)})
    )
    with pytest.raises(PlanError, match="dtype int8, wanted float64, float32, bfloat16 or float16"):
        plan(tmp_path / "codes", adapter)
    rewrite_json(tmp_path / "codes" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match=r"quantized \(bitsandbytes\)"):
        plan(tmp_path / "codes", adapter)


def test_two_updates_of_one_tensor_are_refused(llama_base: Path, tmp_path: Path) -> None:
    """Run-time and stored spelling of one module in one file: whichever came second would win."""
    adapter = trained_on(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    rewrite_tensors(
        adapter / "adapter_model.safetensors",
        lambda held: held.update(
            {key.replace("model.model.layers", "model.layers"): value.clone() for key, value in list(held.items())}
        ),
    )
    with pytest.raises(PlanError, match="two updates of the same rows"):
        plan(llama_base, adapter)


# Asking transformers


def test_the_rules_say_what_transformers_says(tmp_path: Path) -> None:
    """Every parameter of every family here: the rules that ask nobody find what transformers does, or nothing."""
    kinds = set()
    for case in (*NAMES, *TIES, *EXPERTS):
        model = case.model()
        if type(model) in kinds:
            continue
        kinds.add(type(model))
        folder = save(model, tmp_path / type(model).__name__)
        known = ask_here(folder)
        assert known is not None
        alone = ParameterNames(open_checkpoint(folder), lambda: None)
        for name, _ in model.named_parameters():
            found, origin = alone.find(name), known.origins.get(name)
            if found:
                assert origin is not None, f"{name} of {type(model).__name__}"
                assert origin.operation == "rename"
                assert [place.tensor for place in found] == list(origin.groups[0])
    assert len(kinds) > 25


def test_the_process_that_is_asked_says_what_transformers_says(tmp_path: Path) -> None:
    """In a process of its own, and for the class that was trained rather than the one that config.json names."""
    save(build(MASKED, "bert", **BERT), tmp_path / "bert")
    told = runtime_names(tmp_path / "bert", "BertForSequenceClassification")
    assert told is not None
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(told.missing)
    assert told == ask_here(tmp_path / "bert", "BertForSequenceClassification")


def test_what_transformers_says_of_fused_experts(tmp_path: Path) -> None:
    save(build(CAUSAL, "mixtral", **MIXTRAL), tmp_path / "mixtral")
    told = ask_here(tmp_path / "mixtral")
    assert told is not None
    fused = told.origins["model.layers.0.mlp.experts.gate_up_proj"]
    assert fused.operation == "experts"
    assert [len(group) for group in fused.groups] == [3, 3]
    assert told.missing == ()
    assert ask_here(tmp_path / "mixtral", "NoSuchClass") is None
