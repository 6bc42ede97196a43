"""Greedy texts of the engine, all adapters of a family and its base in one batch, against PEFT's own unmerged model of
each adapter alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dora_serve.engine import Completion, Engine, Request
from tests.cases import ATTENTION, LINEARS, SIZES, adapt, build, load, save
from tests.engine_oracle import Greedy, Prompt, forced, greedy, peft_model, rms

COUNT = 64
PROMPTS: tuple[Prompt, ...] = (
    (8,),
    (1, 5, 9),
    (3,) * 20,
    (4, 7, 7, 7, 3, 30, 21, 5, 2, 11),
    (39, 38),
    tuple(range(1, 40)),
    (12, 2, 12, 2, 12),
    (1, 17, 33, 6, 25, 14, 9),
)
LIVELY: Mapping[str, Any] = {"initializer_range": 0.3}
"""Weights so large that a text does not repeat one token for ever, which would hide most faults."""
LONG: Mapping[str, Any] = {**SIZES, **LIVELY, "max_position_embeddings": 128, "tie_word_embeddings": False}
TIED: Mapping[str, Any] = {**LONG, "tie_word_embeddings": True}
GPT2: Mapping[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 40, **LIVELY}
ENDS: Mapping[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT: Mapping[str, Any] = {
    **LONG,
    "init_std": 0.3,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "tie_word_embeddings": True,
}


LATENT: Mapping[str, Any] = {
    **{key: value for key, value in LONG.items() if key != "head_dim"},
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


@dataclass(frozen=True)
class Family:
    """A kind of model. linears: what its adapters touch. more: LoraConfig's keys of adapters besides those of every
    family.
    """

    name: str
    model_type: str
    sizes: Mapping[str, Any]
    linears: tuple[str, ...]
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def adapters(self) -> dict[str, Mapping[str, Any]]:
        """LoraConfig's keys by name of the adapter. The scaling is large enough that the texts are other ones."""
        all_of = {"target_modules": list(self.linears), "lora_alpha": 16}
        some = list(self.linears[:2])
        mixed = {"r": 2, "rank_pattern": {some[0]: 6}, "alpha_pattern": {some[1]: 9}}
        return {
            "lora": all_of,
            "rslora": {**all_of, "use_rslora": True, "r": 8},
            "dora": {**all_of, "use_dora": True},
            "mixed": {**all_of, **mixed, "use_dora": True},
            **self.more,
        }


def _on(*names: str, **config: Any) -> dict[str, Any]:
    return {"target_modules": list(names), "lora_alpha": 16, **config}


FAMILIES = (
    Family(
        "gpt2",
        "gpt2",
        {**GPT2, **ENDS},
        ("c_attn", "c_proj", "c_fc"),
        {
            "embedding": _on("wte", "c_attn"),
            "embedding_dora": _on("wte", use_dora=True),
            "head": _on("lm_head", use_dora=True),
            "bias": _on("c_attn", "c_fc", lora_bias=True),
        },
    ),
    Family(
        "llama",
        "llama",
        LONG,
        LINEARS,
        {"embedding": _on("embed_tokens", use_dora=True), "head": _on("lm_head", "q_proj", use_dora=True)},
    ),
    Family(
        "qwen2_tied",
        "qwen2",
        TIED,
        LINEARS,
        {
            "embedding": _on("embed_tokens", "v_proj", use_dora=True),
            "head": _on("lm_head", "q_proj"),
            "bias": _on(*ATTENTION[:3], lora_bias=True),
        },
    ),
    # The windows of 8 are shorter than every text here, and one prompt.
    Family("mistral_window", "mistral", {**LONG, "sliding_window": 8}, LINEARS),
    Family(
        "gemma3_window",
        "gemma3_text",
        {**LONG, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        LINEARS,
        {"embedding": _on("embed_tokens", "q_proj")},  # which scales what it looks up
    ),
    Family("opt", "opt", OPT, ("q_proj", "v_proj", "fc1", "fc2"), {"embedding": _on("embed_tokens", "fc1")}),
    Family(
        "bloom",
        "bloom",
        {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, **ENDS, **LIVELY},
        ("query_key_value", "dense"),
        {"embedding": _on("word_embeddings", use_dora=True)},
    ),
    Family("gpt_neox", "gpt_neox", LONG, ("query_key_value", "dense"), {"head": _on("lm_head", use_dora=True)}),
    Family(  # whose linear layers have a forward of their own
        "falcon",
        "falcon",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40, **ENDS, **LIVELY},
        ("query_key_value", "dense", "dense_h_to_4h"),
    ),
    Family("phi3", "phi3", LONG, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    Family("mixtral", "mixtral", {**LONG, "num_local_experts": 3, "num_experts_per_tok": 2}, ATTENTION),
    # which keeps latents in its cache, and makes keys and values of all of them at every step
    Family("minicpm3", "minicpm3", LATENT, ("q_b_proj", "kv_b_proj", "o_proj", "down_proj")),
    # whose router is a Linear that gives several tensors
    Family("phimoe", "phimoe", {**LONG, "num_local_experts": 3, "num_experts_per_tok": 2}, ATTENTION),
)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_all_adapters_of_a_family_in_one_batch(family: Family, tmp_path: Path) -> None:
    """Tokens equal one by one, log-probabilities to float32 rounding, and the base's own texts are others."""
    like, base = _base(family, tmp_path)
    for name, config in family.adapters.items():
        adapt(like, tmp_path / name, **config)
    engine = Engine(load(base, like), max_rows=16)
    for name in family.adapters:
        report = engine.pool.load(name, tmp_path / name)
        assert report.changes_output, name
    names = (None, *family.adapters)
    requests = [
        Request(prompt, adapter=name, max_tokens=COUNT, ignore_eos=True) for prompt in PROMPTS for name in names
    ]
    random.Random(5).shuffle(requests)
    answers = engine.complete(requests)
    by_name: dict[str | None, dict[Any, Completion]] = {name: {} for name in names}
    for request, answer in zip(requests, answers, strict=True):
        by_name[request.adapter][request.prompt] = answer
    plain = by_name[None]
    for name in names:
        wanted = _compare(by_name[name], like, base, None if name is None else tmp_path / name)
        if name is not None:
            others = [prompt for prompt in PROMPTS if wanted[prompt].tokens != plain[prompt].token_ids]
            assert len(others) >= len(PROMPTS) // 2, f"{name} writes as the base does"


def test_sixteen_adapters_in_one_batch(tmp_path: Path) -> None:
    """Methods, ranks from 1 to 16 and modules differ; order and size of the batch change nothing."""
    family = next(family for family in FAMILIES if family.name == "llama")
    like, base = _base(family, tmp_path)
    engine = Engine(load(base, like), max_rows=17)
    names: list[str | None] = [None, *(f"adapter {rank}" for rank in range(1, 17))]
    for rank, name in enumerate(names):
        if name is not None:
            modules = [module for place, module in enumerate(LINEARS) if place % 4 != rank % 4]
            adapt(like, tmp_path / name, **_on(*modules, r=rank, use_dora=rank % 2 == 0, use_rslora=rank % 3 == 0))
            engine.pool.load(name, tmp_path / name)
    prompt = PROMPTS[3]
    wanted = {}
    for name in names:
        model = peft_model(base, None if name is None else tmp_path / name, like)
        wanted[name] = greedy(model, prompt, COUNT).tokens
    assert len(set(wanted.values())) == 17
    for seed, rows in ((1, 17), (2, 17), (3, 5), (4, 1)):
        random.Random(seed).shuffle(names)
        requests = [Request(prompt, adapter=name, max_tokens=COUNT, ignore_eos=True) for name in names]
        for answer in engine.complete(requests, max_rows=rows):
            assert answer.token_ids == wanted[answer.adapter], (answer.adapter, rows)


def test_a_longrope_ends_where_its_frequencies_change(tmp_path: Path) -> None:
    """There transformers turns all positions of a batch, and begins a text's cache anew."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {**LONG, "original_max_position_embeddings": 16}
    sizes["rope_parameters"] = {**rope, "original_max_position_embeddings": 16}
    like, base = _base(Family("phi3_longrope", "phi3", sizes, ()), tmp_path)
    engine = Engine(load(base, like))
    assert engine.context == 16
    long = Request(PROMPTS[1], max_tokens=None, ignore_eos=True)
    short = Request(PROMPTS[0], max_tokens=COUNT, ignore_eos=True)
    asked = [long, Request(PROMPTS[5]), short]
    first, refused, second = engine.complete(asked)
    assert "has 39 tokens, and the context has room for 16" in str(refused.error)
    for request, answer in ((long, first), (short, second)):
        assert len(answer.token_ids) == 16 - len(request.prompt or ())
        assert answer.token_ids == greedy(load(base, like), request.prompt or (), len(answer.token_ids)).tokens


def _base(family: Family, root: Path) -> tuple[nn.Module, Path]:
    model = build("AutoModelForCausalLM", family.model_type, **family.sizes)
    base = save(model, root / "base")
    return load(base, model), base


def _compare(
    answers: Mapping[Any, Completion], like: nn.Module, base: Path, adapter: Path | None
) -> dict[Prompt, Greedy]:
    """Compare one adapter's answers, by prompt, with PEFT's. Returns these.

    The truth of the log-probabilities is PEFT's model in float64. Its float32 model rounds as often as the engine's
    does, in another order, so the two are random numbers of one size, hence the factor 4 for the root of the mean
    square over all the tokens.
    """
    model = peft_model(base, adapter, like)
    exact = peft_model(base, adapter, like, torch.float64)
    wanted = {prompt: greedy(model, prompt, COUNT) for prompt in PROMPTS}
    got = {prompt: answers[prompt] for prompt in PROMPTS}
    for prompt in PROMPTS:
        assert got[prompt].error is None
        assert got[prompt].token_ids == wanted[prompt].tokens, (adapter, prompt)
        assert got[prompt].finish_reason == "length"
    truth = torch.cat([forced(exact, prompt, wanted[prompt].tokens) for prompt in PROMPTS])
    own_error = rms(torch.cat([wanted[prompt].logprobs for prompt in PROMPTS]) - truth)
    ours = torch.cat([torch.tensor(got[prompt].logprobs, dtype=torch.float64) for prompt in PROMPTS])
    assert 0 < rms(ours - truth) <= 4 * own_error
    return wanted
