"""The engine on a real model: SmolLM2-135M with the four shipped adapters in one batch, against PEFT in float32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.helpers import DoraCaching
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_serve.engine import Completion, Engine, Request
from tests.cases import quiet
from tests.engine_oracle import greedy, rms
from tests.test_readme import ROOT

COUNT = 64
ADAPTERS = ("dates-lora", "dates-dora", "style-lora", "style-dora")
PROMPTS = (
    "Lunch with Ada on 3 May at noon.",
    "Dentist next Tuesday the 14th of October 2025, half past nine in the morning, bring the papers.",
    "Why is the sky blue?",
    "Hi",
    "Call Grace on New Year's Eve.",
    "Who was Isaac Newton, and what is he known for? Two sentences, please, that a child of six can follow.",
    "Tell me about apples.",
    "Write one line about the sea 🌊.",
)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    engine = Engine.load(smollm2, dtype=torch.float32, device="cpu", max_rows=20)
    for name in ADAPTERS:
        engine.pool.load(name, ROOT / "examples" / "adapters" / name)
    return engine


@pytest.fixture(scope="module")
def answers(engine: Engine) -> Mapping[tuple[str | None, str], Completion]:
    """By adapter and prompt; two batches of 20 rows, in each of them all adapters and the base."""
    requests = [
        Request(messages=[{"role": "user", "content": prompt}], adapter=name, max_tokens=COUNT, ignore_eos=True)
        for prompt in PROMPTS
        for name in (None, *ADAPTERS)
    ]
    keys = [(name, prompt) for prompt in PROMPTS for name in (None, *ADAPTERS)]
    return dict(zip(keys, engine.complete(requests), strict=True))


def peft(smollm2: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, ROOT / "examples" / "adapters" / name)
    return model.to(dtype).eval()


@cache
def chat(smollm2: Path, prompt: str) -> tuple[int, ...]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    message = [{"role": "user", "content": prompt}]
    return tuple(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))


def scores(model: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """(tokens, vocabulary) log-probabilities at the places of `tokens`, in the model's dtype."""
    with torch.inference_mode(), DoraCaching():  # without which PEFT forms B A anew in every forward
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_token_is_the_likeliest_of_peft(
    smollm2: Path, answers: Mapping[tuple[str | None, str], Completion], name: str
) -> None:
    """64 tokens on 8 prompts: by induction PEFT's greedy text, in one forward a text (its DoRA generate takes 30 s).

    Log-probabilities: the truth is PEFT's model in float64, on two of the prompts. The float32 models round as often as
    each other, in different orders, hence the factor 4 for the root of the mean square. (Most of that is the float32
    log_softmax over 49152 tokens, on both sides.)
    """
    model, exact = peft(smollm2, name), peft(smollm2, name, torch.float64)
    errors, others = [], 0
    for prompt in PROMPTS:
        answer, tokens = answers[name, prompt], chat(smollm2, prompt)
        assert answer.error is None
        assert answer.timings is not None
        assert answer.timings.prompt_tokens == len(tokens)
        theirs = scores(model, tokens, answer.token_ids)
        assert theirs.argmax(dim=1).tolist() == list(answer.token_ids), prompt
        others += answer.token_ids != answers[None, prompt].token_ids
        if prompt in PROMPTS[:2]:
            ids = torch.tensor(answer.token_ids)[:, None]
            truth = scores(exact, tokens, answer.token_ids).gather(1, ids)[:, 0]
            ours = torch.tensor(answer.logprobs, dtype=torch.float64)
            errors.append((ours - truth, theirs.gather(1, ids)[:, 0] - truth))
    ours, own = (torch.cat(parts) for parts in zip(*errors, strict=True))
    assert others >= 6
    assert rms(ours) <= 4 * rms(own)


def test_it_is_the_text_that_generate_of_transformers_gives(
    smollm2: Path, answers: Mapping[tuple[str | None, str], Completion]
) -> None:
    """The base, and one adapter: what the induction above stands for."""
    tokens = chat(smollm2, PROMPTS[0])
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert answers[None, PROMPTS[0]].token_ids == greedy(base, tokens, COUNT).tokens
    with DoraCaching():
        adapted = greedy(peft(smollm2, "style-dora"), tokens, COUNT).tokens
    assert answers["style-dora", PROMPTS[0]].token_ids == adapted


def test_the_text_is_that_of_the_tokens(smollm2: Path, answers: Mapping[tuple[str | None, str], Completion]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for answer in answers.values():
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_what_dora_costs_is_far_below_one_percent(engine: Engine, smollm2: Path) -> None:
    """PEFT's cache of the same takes 79 %."""
    base = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(smollm2).float().parameters())
    for task in ("dates", "style"):
        with engine.pool.lease(f"{task}-lora") as lora, engine.pool.lease(f"{task}-dora") as dora:
            assert lora.norm_scale_nbytes == 0
            assert 0 < dora.norm_scale_nbytes < base / 500
