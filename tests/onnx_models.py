"""Tiny seeded models that transformers saved, each exported to ONNX once, for the tests of the export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from exporters.onnx.check.answers import Inputs, token_inputs
from exporters.onnx.check.check import check_onnx
from exporters.onnx.check.report import OnnxCheck
from exporters.onnx.export import OnnxExport, export_onnx
from exporters.onnx.skeleton import GraphFacts

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2}
BOTH: dict[str, Any] = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SIZES_OF_ONE = {**SIZES, "num_hidden_layers": 1}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ONE = {**GROUPED, "num_hidden_layers": 1}
# Longer than the sliding windows, and one token alone.
PROMPTS = [np.random.default_rng(length).integers(3, VOCABULARY, length).tolist() for length in (1, 6, 17)]

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**ONE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**ONE, head_dim=8)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**ONE)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**ONE, head_dim=8, sliding_window=4)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **GROUPED,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**ONE, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **ONE,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES_OF_ONE)),
    "bert_classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES_OF_ONE, num_labels=3)
    ),
    "bert_tagger": lambda: transformers.BertForTokenClassification(
        transformers.BertConfig(**SIZES_OF_ONE, num_labels=3)
    ),
    "bert_answers": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES_OF_ONE)),
    "roberta_masked": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SIZES_OF_ONE, type_vocab_size=1)
    ),
    "llama_classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**ONE, num_labels=3)
    ),
}
MODELS |= {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES_OF_ONE)),
    # Its positions come from the attention mask, and its attention is not translated as one operator.
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=False
        )
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SEQ2SEQ, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SEQ2SEQ, **BOTH, max_position_embeddings=64, bos_token_id=1)
    ),
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**SEQ2SEQ, **BOTH, max_position_embeddings=64, bos_token_id=1)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **SEQ2SEQ,
            **BOTH,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            bos_token_id=1,
            decoder_start_token_id=2,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**VISION, "num_hidden_layers": 1}, num_labels=3)
    ),
    "beit": lambda: transformers.BeitForImageClassification(
        transformers.BeitConfig(**{**VISION, "num_hidden_layers": 1}, num_labels=3, use_relative_position_bias=True)
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], image_size=16)
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**ONE),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_id=5,
        )
    ),
}
CAUSAL = (
    "llama",
    "gpt2",
    "qwen2",
    "qwen3",
    "phi3",
    "mistral",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "opt",
    "phi",
    "falcon",
    "bloom",
)
OUTPUTS = {
    "bert": ("last_hidden_state", "pooler_output"),
    "bert_classifier": ("logits",),
    "bert_tagger": ("logits",),
    "bert_answers": ("start_logits", "end_logits"),
    "roberta_masked": ("logits",),
    "llama_classifier": ("logits",),
    "vit": ("logits",),
    "beit": ("logits",),
    "resnet": ("logits",),
}
OF_PICTURES = ("vit", "beit", "resnet")
SEVERAL = {
    "t5": ("encoder_model.onnx", "decoder_model_merged.onnx"),
    "bart": ("encoder_model.onnx", "decoder_model_merged.onnx"),
    "marian": ("encoder_model.onnx", "decoder_model_merged.onnx"),
    "whisper": ("encoder_model.onnx", "decoder_model_merged.onnx"),
    "llava": ("vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"),
}


@dataclass(frozen=True)
class Case:
    model: Path
    onnx: Path
    export: OnnxExport

    @property
    def graph(self) -> GraphFacts:
        """Of a model that is one graph."""
        (graph,) = self.export.graphs
        return graph


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model as a folder. Weights are drawn wide enough for attention, gates and windows to matter to the logits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.25 * drawn if parameter.ndim > 1 else 1 + 0.1 * drawn)
    model.to(dtype).eval().save_pretrained(folder)
    return folder


def cases(root: Path) -> Callable[[str], Case]:
    """Each model of MODELS saved and exported when it is first asked for. Read only."""

    @cache
    def make(name: str) -> Case:
        model = save(MODELS[name](), root / name / "model")
        out = root / name / "onnx"
        out.mkdir()
        made = Case(model, out, export_onnx(model, out, metadata={"base_model": "tests/base"}))
        if name == "llava":
            shutil.copy(model / "config.json", out)  # it names the image token
        return made

    return make


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def samples(name: str) -> list[Inputs]:
    """Inputs for a model of MODELS, of different lengths where they may be."""
    targets = [torch.tensor([[2, 5, 7, 9, 4][: 2 + number]]) for number in range(3)]
    if name in OF_PICTURES:
        return [{"pixel_values": noise(1, 3, 16, 16) * scale} for scale in (0.5, 1, 2, 3)]
    if name in ("t5", "bart", "marian"):
        return [
            {**each, "decoder_input_ids": target} for each, target in zip(token_inputs(PROMPTS), targets, strict=True)
        ]
    if name == "whisper":
        return [{"input_features": noise(1, 8, 32) * (1 + len(one)), "decoder_input_ids": one} for one in targets]
    if name == "llava":
        picture = noise(1, 3, 16, 16)
        return [
            {"input_ids": torch.tensor([[1, 5, 5, 5, 5, *range(7, 9 + number)]]), "pixel_values": picture * number}
            for number in range(1, 4)
        ]
    return token_inputs(PROMPTS)


def check(case: Case, **options: Any) -> OnnxCheck:
    return check_onnx(case.onnx, case.model, token_inputs(PROMPTS), **options)
