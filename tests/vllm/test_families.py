"""Bases other than Llama: modules that a checkpoint has merged already, and vLLM's Transformers backend, which takes a
model's own code, merges layers that it finds in it and leaves embeddings that scale what they look up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.cases import VOCABULARY, Ask, assert_same, peft_answers, run_job, serve, tiny_adapter, token_prompts

TOKENS = 8
TOLERANCE = 5e-5  # float32, as in test_tiny.py
PROMPTS = token_prompts(2)
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
PHI3 = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
GEMMA3 = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens")


@pytest.mark.parametrize(
    ("family", "more", "engine", "targets", "few"),
    [
        ("Phi3", {}, {}, (*PHI3, "embed_tokens", "lm_head"), ("qkv_proj",)),
        # Of what is merged into one layer the second adapter changes some parts.
        ("Gemma3Text", {"head_dim": 32}, {"model_impl": "transformers"}, GEMMA3, ("k_proj", "up_proj", "embed_tokens")),
    ],
    ids=["merged in the checkpoint", "Transformers backend"],
)
def test_a_family_gives_what_peft_gives(
    family: str,
    more: dict[str, Any],
    engine: dict[str, Any],
    targets: Sequence[str],
    few: Sequence[str],
    tmp_path: Path,
) -> None:
    base = tiny(family, more, tmp_path / "base")
    adapters = {
        "dora": tiny_adapter(base, tmp_path / "dora", targets=targets),
        "lora": tiny_adapter(base, tmp_path / "lora", targets=targets, dora=False, seed=2),
        "few": tiny_adapter(base, tmp_path / "few", targets=few, seed=3),
    }
    names = (None, *adapters)
    wanted = {name: peft_answers(base, adapters.get(name or ""), PROMPTS, TOKENS) for name in names}
    likelihoods = [round(answer.logprobs[0], 3) for answers in wanted.values() for answer in answers]
    assert len(set(likelihoods)) == len(likelihoods)  # each adapter says something of its own
    batch = [Ask(prompt, name, TOKENS) for prompt in PROMPTS for name in names]
    (answers,) = serve(base, adapters, [batch], skip_tokenizer_init=True, max_loras=3, **engine)
    for position, name in enumerate(names):
        assert_same(answers[position :: len(names)], wanted[name], TOLERANCE)


def test_a_dora_is_refused_where_attention_takes_the_weights_themselves(tmp_path: Path) -> None:
    """vLLM serves a LoRA there as if it were none."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}  # as vLLM has MLA
    dense = {"num_key_value_heads": 4, "first_k_dense_replace": 2, "n_shared_experts": 1, "n_routed_experts": 4}
    base = tiny("DeepseekV2", {**sizes, **dense, "q_lora_rank": None}, tmp_path / "base")
    dora = tiny_adapter(base, tmp_path / "dora", targets=("kv_b_proj", "o_proj"))
    others = tiny_adapter(base, tmp_path / "others", targets=("kv_a_proj_with_mqa", "o_proj"))
    job = {
        "model": str(base),
        "engine": {"skip_tokenizer_init": True, "dtype": "bfloat16"},
        "adapters": {"others": str(others), "dora": str(dora)},
        "batches": [[{"prompt": PROMPTS[0], "adapter": name, "tokens": 1}] for name in ("others", "dora")],
    }
    served, refused = run_job(job, {})
    assert len(served) == 1
    assert "2 problems" in refused["error"]
    assert "layers.1.self_attn.kv_b_proj: got DoRA on what vLLM's MLA folds into its attention" in refused["error"]


def tiny(family: str, more: dict[str, Any], folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **more})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
