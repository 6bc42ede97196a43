"""Recorded decoding steps: what is replayed is what PEFT writes, whatever comes and goes between two steps."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from dora_serve.engine import Engine, Limits, Request
from tests.cases import LINEARS, adapt, build, load, save
from tests.engine_oracle import greedy, peft_model
from tests.step_recorder import record
from tests.test_engine_equals_peft import FAMILIES, LONG, PROMPTS

COUNT = 80
"""More than the places that a cache reserves at first: its memory moves once."""


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_tied", "mistral_window", "gemma3_window", "phi3", "mixtral"])
def test_recorded_steps_write_what_peft_writes(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    like = build("AutoModelForCausalLM", family.model_type, **family.sizes)
    base = save(like, tmp_path / "base")
    like = load(base, like)
    engine = Engine(load(base, like), max_rows=6, record_steps=record)
    names = (None, "lora", "dora", "mixed", "rslora")
    for adapter in names[1:]:
        adapt(like, tmp_path / adapter, **family.adapters[adapter])
        engine.pool.load(adapter, tmp_path / adapter)
    wanted = {}
    for adapter in names:
        model = peft_model(base, None if adapter is None else tmp_path / adapter, like)
        for prompt in PROMPTS[:4]:
            wanted[adapter, prompt] = greedy(model, prompt, COUNT).tokens
    assert len(set(wanted.values())) > 16
    requests = [
        Request(prompt, adapter=adapter, max_tokens=COUNT - 7 * number, ignore_eos=True)
        for number, prompt in enumerate(PROMPTS[:4])
        for adapter in names
    ]
    random.Random(3).shuffle(requests)
    for _ in range(2):  # the second time with what the first has left
        before = engine.replayed_steps
        for request, answer in zip(requests, engine.complete(requests), strict=True):
            assert answer.token_ids == wanted[request.adapter, request.prompt][: request.max_tokens]
        assert engine.why_not_recorded is None
        assert engine.replayed_steps > before + COUNT


@pytest.fixture
def world(tmp_path: Path) -> tuple[Any, Path]:
    model = build("AutoModelForCausalLM", "llama", **LONG)
    return model, save(model, tmp_path / "base")


def test_adapters_are_replaced_between_replays(world: tuple[Any, Path], tmp_path: Path) -> None:
    """One name, other files, other ranks; on one row and on several, evicted and brought back."""
    like, base = world
    engine = Engine(load(base, like), max_rows=4, record_steps=record, device_limits=Limits(count=2))
    texts = {}
    for rank in (2, 5, 40):
        adapt(like, tmp_path / str(rank), target_modules=LINEARS, lora_alpha=16, r=rank, use_dora=rank != 5)
        texts[rank] = greedy(peft_model(base, tmp_path / str(rank), like), PROMPTS[1], 12).tokens
    plain = greedy(peft_model(base, None, like), PROMPTS[1], 12).tokens
    assert len({*texts.values(), plain}) == 4
    for number in range(12):
        rank = (2, 5, 40)[number % 3]
        engine.pool.load("tuned", tmp_path / str(rank), replace=number > 0)
        names = ("tuned", None, None)[: 1 + number % 3]
        answers = engine.complete([Request(PROMPTS[1], adapter=name, max_tokens=12, ignore_eos=True) for name in names])
        assert [answer.token_ids for answer in answers] == [texts[rank] if name else plain for name in names]
    assert engine.replayed_steps > 60
    assert engine.why_not_recorded is None


def test_an_embedding_s_adapter_decodes_without(world: tuple[Any, Path], tmp_path: Path) -> None:
    like, base = world
    engine = Engine(load(base, like), record_steps=record)
    adapt(like, tmp_path / "embedding", target_modules=["embed_tokens", "q_proj"], lora_alpha=16)
    engine.pool.load("embedding", tmp_path / "embedding")
    (answer,) = engine.complete([Request(PROMPTS[1], adapter="embedding", max_tokens=12, ignore_eos=True)])
    assert answer.token_ids == greedy(peft_model(base, tmp_path / "embedding", like), PROMPTS[1], 12).tokens
    assert engine.replayed_steps == 0
    engine.complete([Request(PROMPTS[1], max_tokens=12, ignore_eos=True)])
    assert engine.replayed_steps > 6


def _refuses(step: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


def _loses_the_tokens(step: Any) -> Any:
    """The fault of a recording that reads what was there when it was made."""
    answer = step().clone()
    return lambda: answer.roll(1)


@pytest.mark.parametrize(
    ("recorder", "why"), [(_refuses, "cannot be recorded: .*capturing"), (_loses_the_tokens, "gives other logits")]
)
def test_what_cannot_be_recorded_decodes_without(
    world: tuple[Any, Path], recorder: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    like, base = world
    engine = Engine(load(base, like), record_steps=recorder)
    request = Request(PROMPTS[1], max_tokens=12, ignore_eos=True)
    for _ in range(2):
        (answer,) = engine.complete([request])
        assert answer.token_ids == greedy(peft_model(base, None, like), PROMPTS[1], 12).tokens
    assert engine.replayed_steps == 0
    assert re.search(why, engine.why_not_recorded or "")
    assert len(caplog.records) == 1


def test_steps_are_not_recorded_on_a_cpu(world: tuple[Any, Path]) -> None:
    like, base = world
    engine = Engine(load(base, like))
    engine.complete([Request(PROMPTS[1], max_tokens=12, ignore_eos=True)])
    assert (engine.replayed_steps, engine.why_not_recorded) == (0, "it was not wanted, or the device has no graphs")
