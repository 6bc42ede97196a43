"""Recorded decoding steps: what is replayed is what PEFT writes, whatever comes and goes between two steps."""

from __future__ import annotations

import gc
import random
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_serve.engine import Engine, Limits, Request, step_graphs
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


def test_a_recording_that_leaves_other_keys_behind_changes_no_later_token(world: tuple[Any, Path]) -> None:
    """The fault of a recording that computes something else: its logits tell, and its keys are in the cache by then."""
    like, base = world
    model = load(base, like)

    def disturbed(step: Any) -> Any:
        weight = model.model.layers[0].self_attn.k_proj.weight
        with torch.no_grad():
            weight.mul_(3)
            answer = record(step)().clone()
            weight.div_(3)
        return lambda: answer

    engine = Engine(model, record_steps=disturbed)
    (answer,) = engine.complete([Request(PROMPTS[1], max_tokens=COUNT, ignore_eos=True)])
    assert answer.token_ids == greedy(peft_model(base, None, like), PROMPTS[1], COUNT).tokens
    assert "gives other logits" in str(engine.why_not_recorded)


def test_an_interrupt_while_factors_are_put_leaves_no_mixture(
    world: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook, and then the next cell: the row is neither the old adapter's nor the new one's."""
    like, base = world
    engine = Engine(load(base, like), record_steps=record)
    for rank in (2, 5):
        adapt(like, tmp_path / str(rank), target_modules=LINEARS, lora_alpha=16, r=rank)
        engine.pool.load(str(rank), tmp_path / str(rank))
    old, new = (Request(PROMPTS[1], adapter=name, max_tokens=12, ignore_eos=True) for name in ("2", "5"))
    (wanted,) = engine.complete([old])
    put, calls = step_graphs._put_row, []

    def interrupted(*given: Any) -> None:
        put(*given)
        calls.append(given)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(step_graphs, "_put_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.complete([new])
    before = engine.replayed_steps
    assert engine.complete([old])[0].token_ids == wanted.token_ids
    assert engine.replayed_steps == before + 11


def test_recordings_may_begin_in_inference_mode_and_go_on_without(world: tuple[Any, Path]) -> None:
    like, base = world
    engine = Engine(load(base, like), record_steps=record)
    request = Request(PROMPTS[1], max_tokens=12, ignore_eos=True)
    wanted = greedy(peft_model(base, None, like), PROMPTS[1], 12).tokens
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert engine.complete([request])[0].token_ids == wanted
    assert engine.why_not_recorded is None
    assert engine.replayed_steps > 24


def test_a_small_generation_takes_the_recordings_of_a_large_one(world: tuple[Any, Path]) -> None:
    """And leaves them to the next large one. More rows than the engine has decode, and are not kept."""
    like, base = world
    recorded: list[Any] = []
    engine = Engine(load(base, like), max_rows=4, record_steps=lambda step: recorded.append(step) or record(step))
    wanted = greedy(peft_model(base, None, like), PROMPTS[1], 12).tokens
    request = Request(PROMPTS[1], max_tokens=12, ignore_eos=True)

    def ask(rows: int) -> int:
        assert {answer.token_ids for answer in engine.complete([request] * rows, max_rows=rows)} == {wanted}
        return len(recorded)

    assert ask(4) < ask(1)
    known = ask(4)
    assert (ask(1), ask(4), ask(3), ask(1)) == (known,) * 4
    assert ask(9) > known
    known = ask(4)
    assert (ask(1), ask(4)) == (known,) * 2


def test_an_adapter_that_is_gone_is_not_kept_by_recordings(world: tuple[Any, Path], tmp_path: Path) -> None:
    like, base = world
    engine = Engine(load(base, like), record_steps=record)
    adapt(like, tmp_path / "lora", target_modules=LINEARS, lora_alpha=16)
    engine.pool.load("lora", tmp_path / "lora")
    with engine.pool.lease("lora") as prepared:
        held = weakref.ref(prepared)
    del prepared
    generation = engine.generate([Request(PROMPTS[1], adapter="lora", max_tokens=12, ignore_eos=True)])
    assert len(list(generation)) == 13
    assert engine.replayed_steps > 6
    engine.pool.unload("lora")
    gc.collect()
    assert held() is None, "and the generation, which is still here, has ended"


@pytest.mark.parametrize("recorder", [False, record])
def test_the_memory_of_a_cache_is_free_at_once(world: tuple[Any, Path], recorder: Any) -> None:
    """Not when Python next looks for circles, which a hundred generations later it may not have done."""
    like, base = world
    engine = Engine(load(base, like), record_steps=recorder)
    caches, new_cache = [], engine.new_cache

    def watched(rows: int) -> Any:
        cache = new_cache(rows)
        caches.append(weakref.ref(cache))
        return cache

    engine.new_cache = watched  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        for rows in (2, 4):
            requests = [Request(PROMPTS[1], max_tokens=6, ignore_eos=True)] * rows
            engine.complete(requests)
            for event in engine.generate(requests):
                if event.token_id is not None:
                    break
    finally:
        gc.enable()
    kept = [cache for cache in caches if cache() is not None]
    assert len(caches) == 4
    assert len(set(kept)) == (recorder is record)
