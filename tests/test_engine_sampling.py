"""Sampling is that of transformers: with the same seed the same tokens as its own generate, alone and in any batch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_serve.engine import Completion, Engine, Request, Sampling
from dora_serve.engine.sampling import choose
from dora_serve.errors import EngineError
from tests.cases import LINEARS, SIZES, adapt, llama, load, save
from tests.engine_oracle import Prompt, peft_model

COUNT = 24
PROMPTS: tuple[Prompt, ...] = ((1, 5, 9, 30), (7,), tuple(range(3, 30)))
SIZE: Mapping[str, Any] = {**SIZES, "max_position_embeddings": 64, "initializer_range": 0.3}
SETTINGS: Mapping[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.4},
    "hot": {"temperature": 1.7},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "narrow_top_p": {"temperature": 1.3, "top_p": 0.05},
    "top_k": {"temperature": 1.2, "top_k": 5},
    "top_1": {"temperature": 1.2, "top_k": 1},
    "top_k_of_all": {"temperature": 1.2, "top_k": 1000},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.6},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.7},
    "all": {"temperature": 0.8, "top_p": 0.85, "top_k": 20, "repetition_penalty": 1.3},
    "greedy_penalty": {"temperature": 0.0, "repetition_penalty": 1.8},
    "greedy": {"temperature": 0.0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sampling")
    model = llama(**SIZE)
    save(model, root / "base")
    adapt(model, root / "dora", target_modules=list(LINEARS), lora_alpha=24, use_dora=True)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    engine = Engine(load(root / "base", llama(**SIZE)))
    engine.pool.load("dora", root / "dora")
    return engine


def request(prompt: Prompt, adapter: str | None, **sampling: Any) -> Request:
    return Request(prompt, adapter=adapter, sampling=Sampling(**sampling), max_tokens=COUNT, ignore_eos=True)


def theirs(model: Any, prompt: Prompt, seed: int, **sampling: Any) -> tuple[int, ...]:
    """transformers' own: without top_k it takes 50, so it is told 0."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.tensor([prompt])
    given = {"top_k": 0, **sampling}
    if given["temperature"] == 0:
        given = {"repetition_penalty": given.get("repetition_penalty", 1.0)}
    torch.manual_seed(seed)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=sampling["temperature"] != 0,
        max_new_tokens=COUNT,
        **given,
    )
    return tuple(made[0, len(prompt) :].tolist())


def test_the_tokens_are_those_of_transformers_with_that_seed(engine: Engine, root: Path) -> None:
    """All settings, prompts and seeds at once in one batch, against generate by itself for each of them: torch draws
    one token of many as the winner of a race of exponential variates, and so does the engine.
    """
    cases = [
        (adapter, prompt, seed, name)
        for adapter in (None, "dora")
        for prompt in PROMPTS
        for seed in (1, 2)
        for name in SETTINGS
    ]
    answers = engine.complete(
        [request(prompt, adapter, seed=seed, **SETTINGS[name]) for adapter, prompt, seed, name in cases]
    )
    models = {
        adapter: peft_model(root / "base", None if adapter is None else root / adapter, llama(**SIZE))
        for adapter in (None, "dora")
    }
    for (adapter, prompt, seed, name), answer in zip(cases, answers, strict=True):
        wanted = theirs(models[adapter], prompt, seed, **SETTINGS[name])
        assert answer.token_ids == wanted, (adapter, prompt, seed, name)
    texts = {case: answer.token_ids for case, answer in zip(cases, answers, strict=True)}
    for name, setting in SETTINGS.items():
        if name not in ("greedy", "narrow_top_p", "top_1"):
            assert texts[None, PROMPTS[0], 1, name] != texts[None, PROMPTS[0], 1, "greedy"], name
        if setting["temperature"] and name not in ("narrow_top_p", "top_1"):
            assert texts[None, PROMPTS[0], 1, name] != texts[None, PROMPTS[0], 2, name], name


def test_a_seed_gives_one_text_whatever_is_beside_it(engine: Engine) -> None:
    """Alone, among many, in another place, behind others that wait: the same. Another seed: another text."""
    chosen = request(PROMPTS[0], "dora", seed=7, temperature=1.0, top_p=0.95)
    alone = engine.complete([chosen])[0]
    others = [request(prompt, adapter, temperature=1.5) for prompt in PROMPTS for adapter in (None, "dora")]
    batches = [[chosen, *others], [*others, chosen], [*others[:3], chosen, *others[3:], chosen], [chosen] * 5]
    for batch, rows in zip(batches, (16, 16, 3, 4), strict=True):
        for asked, answer in zip(batch, engine.complete(batch, max_rows=rows), strict=True):
            if asked is chosen:
                assert answer.token_ids == alone.token_ids
    seeds = [request(PROMPTS[0], "dora", seed=seed, temperature=1.0, top_p=0.95) for seed in range(20)]
    assert len({answer.token_ids for answer in engine.complete(seeds)}) == 20


def test_the_edge_of_top_k_is_settled_alone_only_where_it_is_close(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that top_k left out, and that would have won, changes nothing unless rounding could have let it in."""
    alone: list[int] = []
    settle = Engine.logits_alone
    monkeypatch.setattr(Engine, "logits_alone", lambda *given: alone.append(1) or settle(*given))
    for top_k in (1, 2):
        (answer,) = engine.complete([request(PROMPTS[0], "dora", seed=3, temperature=2.0, top_k=top_k)])
        assert len(answer.token_ids) == COUNT
    assert len(alone) <= 2
    logits = torch.tensor([0.0, 1.0, 1.0 + 1e-5, -3.0])
    noise = torch.tensor([0.0, -9.0, 0.0, 0.0])
    close = choose(logits, Sampling(temperature=2.0, top_k=1), [], noise)
    assert close.token == 2
    assert close.margin == pytest.approx(1e-5, rel=0.1)


def test_without_a_seed_two_runs_differ(engine: Engine) -> None:
    answers = engine.complete([request(PROMPTS[0], None, temperature=1.0)] * 6)
    assert len({answer.token_ids for answer in answers}) == 6


def test_the_global_seed_is_neither_read_nor_moved(engine: Engine) -> None:
    """Of torch, which other code in the process uses."""
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first = engine.complete([request(PROMPTS[0], None, seed=1, temperature=1.0)])[0]
    assert torch.equal(torch.rand(3), wanted)
    assert engine.complete([request(PROMPTS[0], None, seed=1, temperature=1.0)])[0].token_ids == first.token_ids


def test_tokens_come_as_often_as_they_should(engine: Engine, root: Path) -> None:
    """The first token of 4,000 seeds against the probabilities of transformers' logits. A count is binomial, and 5
    standard deviations on 40 tokens are exceeded once in 40,000 tries; the seeds are fixed.
    """
    count = 4000
    asked = [
        dataclasses.replace(request(PROMPTS[1], None, seed=seed, temperature=1.3, top_k=12), max_tokens=1)
        for seed in range(count)
    ]
    found = Counter(answer.token_ids[0] for answer in engine.complete(asked))
    with torch.no_grad():
        scores = load(root / "base", llama(**SIZE))(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double() / 1.3
    kept = scores.topk(12).indices
    shares = dict(zip(kept.tolist(), scores[kept].softmax(0).tolist(), strict=True))
    assert set(found) <= set(shares)
    for token, share in shares.items():
        assert abs(found[token] - count * share) <= 5 * (count * share * (1 - share)) ** 0.5, token


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_a_value_that_means_nothing_concerns_its_request_alone(engine: Engine, name: str, value: float) -> None:
    good = request(PROMPTS[0], "dora")
    bad, answer = engine.complete([request(PROMPTS[0], "dora", **{"temperature": 1.0, name: value}), good])
    assert isinstance(bad.error, EngineError)
    assert name in str(bad.error)
    assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", (), "")
    assert _sound(answer)
    assert all(info.in_use == 0 for info in engine.pool.list())


@pytest.mark.parametrize("sampling", [{"temperature": "warm"}, {"top_k": 2.5}, {"seed": 1.5}, {"top_p": None}])
def test_a_value_of_another_type_concerns_its_request_alone(engine: Engine, sampling: dict[str, Any]) -> None:
    """As they come out of somebody's JSON."""
    bad, answer = engine.complete(
        [request(PROMPTS[0], None, **{"temperature": 1.0, **sampling}), request(PROMPTS[0], None)]
    )
    assert isinstance(bad.error, EngineError)
    assert next(iter(sampling)) in str(bad.error)
    assert _sound(answer)


def _sound(answer: Completion) -> bool:
    return answer.error is None and len(answer.token_ids) == COUNT
