"""A tiny seeded model of each family's real architecture class, and what an adapter on it trains. None of our code.

docs/families.md is this list; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.cases import SIZES, build, noise, token_pairs, tokens, vary

CAUSAL, SEQ2SEQ, VLM = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText"
DORA = {"target_modules": "all-linear", "use_dora": True}
LORA = {"target_modules": "all-linear"}
LONGER = {**SIZES, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
BERT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"max_position_embeddings": 64, "pad_token_id": 0}
FALCON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {**LONGER, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
EXPERTS |= {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 1}
FUSED = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64}
WHISPER = {**BART, "max_source_positions": 16, "max_target_positions": 24, "num_mel_bins": 4}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
TEXT = {**LONGER, "pad_token_id": None, "tie_word_embeddings": False}
QWEN_MARKS = {"image_token_id": 38, "video_token_id": 37, "vision_start_token_id": 36, "vision_end_token_id": 35}
QWEN_VISION = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
QWEN_VISION |= {"temporal_patch_size": 2, "in_channels": 3}
CLIP = {**LONGER, "projection_dim": 8, "num_hidden_layers": 2}
BOTH = {"text_config": CLIP, "vision_config": VISION, "projection_dim": 8}
DEEPSEEK = {name: size for name, size in LONGER.items() if name != "head_dim"}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
DEEPSEEK |= {"moe_intermediate_size": 12, "first_k_dense_replace": 1, "num_key_value_heads": 2}
DEBERTA = {**BERT, "num_labels": 3, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MODERNBERT = {**BERT, "num_labels": 3, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DISTILBERT = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "num_labels": 3}
DISTILBERT |= {"max_position_embeddings": 64}
WAV2VEC2 = {**BERT, "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
WAV2VEC2 |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
QWEN3_NEXT = {**EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
QWEN3_NEXT |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
FALCON_H1 = {**LONGER, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8}
FALCON_H1 |= {"mamba_n_groups": 1, "mamba_chunk_size": 8}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
SEGFORMER = {"num_labels": 3, "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    name: of the family; trained: what the adapter trains, in words; config: that as LoraConfig takes it. inputs: for
    the oracle's forward. unreached: adapted modules that no forward of the class runs.
    """

    name: str
    trained: str
    model: Callable[[], Any]
    config: Mapping[str, Any]
    inputs: Callable[[nn.Module], dict[str, Tensor]] = tokens
    unreached: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}, {self.trained}"


def pixels(_: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 16, 16)}


def speech(model: nn.Module) -> dict[str, Tensor]:
    return {"input_features": noise(2, 4, 32), "decoder_input_ids": token_pairs(model)["decoder_input_ids"]}


def picture_and_words(_: nn.Module) -> dict[str, Tensor]:
    """38 is the picture's token; one of 16 pixels has four patches."""
    return {"input_ids": torch.tensor([[1, 38, 38, 38, 38, 5, 9, 3, 2]]), "pixel_values": noise(1, 3, 16, 16)}


def patches_and_words(_: nn.Module) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 36, 38, 38, 38, 38, 35, 5, 9, 3, 2]])
    patches = {"pixel_values": noise(16, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": ids, "mm_token_type_ids": (ids == 38).int(), **patches}


def llava() -> Any:
    vision = {**VISION, "model_type": "clip_vision_model"}
    config = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": vision, "image_token_id": 38}
    return build(VLM, "llava", **config, tie_word_embeddings=False)


def qwen_vl(model_type: str, rope: Mapping[str, Any], **vision: Any) -> Any:
    text = {**TEXT, "rope_scaling": {**rope, "mrope_section": [1, 1, 2]}}
    config = {"text_config": text, "vision_config": {**QWEN_VISION, **vision}, **QWEN_MARKS}
    return build(VLM, model_type, **config, tie_word_embeddings=False)


def qwen2_vl() -> Any:
    return qwen_vl("qwen2_vl", {"type": "mrope"}, embed_dim=16, mlp_ratio=2)


def qwen2_5_vl() -> Any:
    windows = {"window_size": 8, "fullatt_block_indexes": [1]}
    return qwen_vl("qwen2_5_vl", {"type": "mrope"}, out_hidden_size=16, intermediate_size=24, **windows)


def qwen3_vl() -> Any:
    extra = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return qwen_vl("qwen3_vl", {"rope_type": "default"}, out_hidden_size=16, intermediate_size=24, **extra)


def llava_next() -> Any:
    config = {"text_config": {**TEXT, "model_type": "llama"}, "image_grid_pinpoints": [[16, 16], [16, 32]]}
    config |= {"vision_config": {**VISION, "model_type": "clip_vision_model"}, "image_token_index": 38}
    return build(VLM, "llava_next", **config, tie_word_embeddings=False)


def tiles_and_words(_: nn.Module) -> dict[str, Tensor]:
    """The picture as a whole and as one tile: 4 patches each, and a newline behind each of the tile's two rows."""
    ids = torch.tensor([[1, *[38] * (4 + 2 * 3), 5, 9, 3, 2]])
    return {"input_ids": ids, "pixel_values": noise(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}


def smolvlm() -> Any:
    config = {"text_config": {**TEXT, "model_type": "llama"}, "image_token_id": 38, "scale_factor": 2}
    return build(VLM, "smolvlm", **config, vision_config=VISION, tie_word_embeddings=False)


def one_token_and_words(_: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 38, 5, 9, 3, 2]]), "pixel_values": noise(1, 1, 3, 16, 16)}


def mllama() -> Any:
    text = {**TEXT, "cross_attention_layers": [1], "pad_token_id": 0, "rope_scaling": {"rope_type": "default"}}
    vision = {**VISION, "num_global_layers": 1, "attention_heads": 2, "max_num_tiles": 2, "vision_output_dim": 48}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0, 1]}
    return build(VLM, "mllama", text_config=text, vision_config=vision, image_token_index=38)


def attended_and_words(_: nn.Module) -> dict[str, Tensor]:
    tiles = torch.tensor([[[1, 0]]])
    ids = {"input_ids": torch.tensor([[1, 38, 5, 9, 3, 2]]), "aspect_ratio_ids": torch.tensor([[1]])}
    masks = {"aspect_ratio_mask": tiles, "cross_attention_mask": tiles.expand(1, 6, 1, 2)}
    return {**ids, **masks, "pixel_values": noise(1, 1, 2, 3, 16, 16)}


def waves(_: nn.Module) -> dict[str, Tensor]:
    return {"input_values": noise(1, 200)}


def pictures_and_words(model: nn.Module) -> dict[str, Tensor]:
    return {**tokens(model), "pixel_values": noise(2, 3, 16, 16)}


def gemma3() -> Any:
    text = {**TEXT, "sliding_window": 8, "tie_word_embeddings": True}
    marks = {"mm_tokens_per_image": 4, "image_token_index": 38, "boi_token_index": 36, "eoi_token_index": 37}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    return build(VLM, "gemma3", text_config=text, vision_config=vision, **marks)


def clip_text(kind: str) -> Any:
    torch.manual_seed(7)
    return vary(getattr(transformers, kind)(transformers.CLIPTextConfig(**CLIP)))


def family(name: str, trained: str, auto: str, model_type: str, sizes: Mapping[str, Any], **rest: Any) -> Family:
    config = rest.pop("config", DORA)
    return Family(name, trained, lambda: build(auto, model_type, **sizes), config, **rest)


LINEARS = "DoRA on all linear layers"
CLASSIFIER = "DoRA on all linear layers, with the classifier"
SCORES, PICTURES = "AutoModelForSequenceClassification", "AutoModelForImageClassification"
MPT = {"vocab_size": 40, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}
DECODERS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("OLMo 2", "olmo2", LONGER),
    ("StableLM", "stablelm", LONGER),
    ("Granite", "granite", LONGER),
    ("Cohere", "cohere", LONGER),
    ("GLM", "glm", {**LONGER, "head_dim": 8}),
    ("Gemma 2", "gemma2", {**LONGER, "sliding_window": 8}),
    ("StarCoder2", "starcoder2", {**LONGER, "sliding_window": 8}),
    ("Nemotron", "nemotron", LONGER),
    ("Phi", "phi", LONGER),
    ("GPT-J", "gptj", {**GPT2, "rotary_dim": 4}),
    ("MPT", "mpt", MPT),
    ("BLOOM", "bloom", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    ("OPT", "opt", {**BERT, "ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": True}),
)
FAMILIES: tuple[Family, ...] = (
    family("Llama", LINEARS, CAUSAL, "llama", {**LONGER, "tie_word_embeddings": False}),
    family("Mistral", LINEARS, CAUSAL, "mistral", {**LONGER, "sliding_window": 8}),
    family("Qwen2 (biases)", LINEARS, CAUSAL, "qwen2", LONGER),
    family("Qwen3 (norms of q and k)", LINEARS, CAUSAL, "qwen3", LONGER),
    family(
        "Gemma 3 (tied, large vocabulary)",
        "DoRA on all linear layers and the embedding",
        CAUSAL,
        "gemma3_text",
        {**LONGER, "vocab_size": 4000, "sliding_window": 8},
        config={"target_modules": ["q_proj", "o_proj", "down_proj", "embed_tokens"], "use_dora": True},
    ),
    family("Phi-3 (fused qkv and gate_up)", LINEARS, CAUSAL, "phi3", LONGER),
    family("GPT-2 (Conv1D)", LINEARS, CAUSAL, "gpt2", GPT2),
    family("GPT-NeoX", LINEARS, CAUSAL, "gpt_neox", BERT),
    family("Falcon", LINEARS, CAUSAL, "falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 1}),
    family("Mixtral", "LoRA on all linear layers and experts", CAUSAL, "mixtral", EXPERTS, config=LORA),
    family("Mixtral", "LoRA on fused experts alone", CAUSAL, "mixtral", EXPERTS, config=FUSED),
    family("Qwen2-MoE", LINEARS, CAUSAL, "qwen2_moe", EXPERTS),
    family("Qwen2-MoE", "LoRA on fused experts alone", CAUSAL, "qwen2_moe", EXPERTS, config=FUSED),
    family("Qwen3-MoE", "LoRA on all linear layers and experts", CAUSAL, "qwen3_moe", EXPERTS, config=LORA),
    family("DeepSeek-V3", "LoRA on all linear layers and experts", CAUSAL, "deepseek_v3", DEEPSEEK, config=LORA),
    family("Qwen3-Next", "LoRA on all linear layers and experts", CAUSAL, "qwen3_next", QWEN3_NEXT, config=LORA),
    family(
        "Falcon-H1",
        "DoRA on attention, feed-forward layers and the mixer's input",
        CAUSAL,
        "falcon_h1",
        FALCON_H1,
        config={"target_modules": ["in_proj", "q_proj", "o_proj", "down_proj"], "use_dora": True},
    ),
    *(family(name, LINEARS, CAUSAL, kind, sizes) for name, kind, sizes in DECODERS),
    family("T5", LINEARS, SEQ2SEQ, "t5", T5, inputs=token_pairs),
    family("BART (VL-BART's language side)", LINEARS, SEQ2SEQ, "bart", BART, inputs=token_pairs),
    family("mT5", LINEARS, SEQ2SEQ, "mt5", T5, inputs=token_pairs),
    family("M2M100 (NLLB)", LINEARS, SEQ2SEQ, "m2m_100", BART, inputs=token_pairs),
    family(
        "Switch Transformers", LINEARS, SEQ2SEQ, "switch_transformers", {**T5, "num_experts": 3}, inputs=token_pairs
    ),
    family("Pegasus", LINEARS, SEQ2SEQ, "pegasus", BART, inputs=token_pairs),
    family(
        "BERT",
        "DoRA on all linear layers, with the classifier",
        "AutoModelForSequenceClassification",
        "bert",
        {**BERT, "num_labels": 3},
        config={**DORA, "task_type": "SEQ_CLS"},
    ),
    family("DeBERTa-v2", CLASSIFIER, SCORES, "deberta-v2", DEBERTA, config={**DORA, "task_type": "SEQ_CLS"}),
    family("ModernBERT", CLASSIFIER, SCORES, "modernbert", MODERNBERT, config={**DORA, "task_type": "SEQ_CLS"}),
    family(
        "RoBERTa",
        "DoRA on attention and feed-forward layers, with the classes of tokens",
        "AutoModelForTokenClassification",
        "roberta",
        {**BERT, "num_labels": 3, "bos_token_id": 1},
        config={"target_modules": ["query", "value", "dense"], "use_dora": True, "task_type": "TOKEN_CLS"},
    ),
    family(
        "DistilBERT",
        "DoRA on attention and feed-forward layers, with the classifier",
        SCORES,
        "distilbert",
        DISTILBERT,
        config={"target_modules": ["q_lin", "v_lin", "lin1"], "use_dora": True, "task_type": "SEQ_CLS"},
    ),
    family(
        "ViT",
        "DoRA on linear layers and the patches' convolution, with the classifier",
        "AutoModelForImageClassification",
        "vit",
        {**VISION, "num_labels": 3},
        config={"target_modules": ["q_proj", "v_proj", "fc1", "projection"], "use_dora": True}
        | {"modules_to_save": ["classifier"]},
        inputs=pixels,
    ),
    family("Swin", LINEARS, PICTURES, "swin", {**SWIN, "num_labels": 3}, inputs=pixels),
    family("DINOv2", LINEARS, PICTURES, "dinov2", {**VISION, "num_labels": 3}, inputs=pixels),
    family(
        "SegFormer", LINEARS, PICTURES, "segformer", SEGFORMER, inputs=lambda _: {"pixel_values": noise(1, 3, 32, 32)}
    ),
    family(
        "wav2vec 2",
        "DoRA on attention and feed-forward layers",
        "AutoModelForCTC",
        "wav2vec2",
        WAV2VEC2,
        config={"target_modules": ["q_proj", "v_proj", "intermediate_dense"], "use_dora": True},
        inputs=waves,
    ),
    family("CLIP", LINEARS, "AutoModel", "clip", BOTH, inputs=pictures_and_words),
    family("Whisper", LINEARS, "AutoModelForSpeechSeq2Seq", "whisper", WHISPER, inputs=speech),
    Family("LLaVA", "DoRA on all linear layers of all three parts", llava, DORA, picture_and_words),
    Family("LLaVA-NeXT", "DoRA on all linear layers of all three parts", llava_next, DORA, tiles_and_words),
    Family("SmolVLM", "DoRA on all linear layers of all three parts", smolvlm, DORA, one_token_and_words),
    Family("Mllama (Llama 3.2 Vision)", "DoRA on all linear layers of both parts", mllama, DORA, attended_and_words),
    Family("Qwen2-VL", "DoRA on all linear layers of both parts", qwen2_vl, DORA, patches_and_words),
    Family("Qwen2.5-VL", "DoRA on all linear layers of both parts", qwen2_5_vl, DORA, patches_and_words),
    Family("Qwen3-VL", "DoRA on all linear layers of both parts", qwen3_vl, DORA, patches_and_words),
    Family(
        "Gemma 3, seeing",
        "DoRA on all linear layers of all three parts",
        gemma3,
        DORA,
        picture_and_words,
        unreached=("model.vision_tower.head.attention.out_proj",),
    ),
    Family("CLIP text encoder", LINEARS, lambda: clip_text("CLIPTextModel"), DORA),
    Family("CLIP text encoder with projection", LINEARS, lambda: clip_text("CLIPTextModelWithProjection"), DORA),
)
