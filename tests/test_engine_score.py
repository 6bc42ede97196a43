"""Scoring: one text under several adapters, against the logits of PEFT's own models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import dora_serve.engine.score  # noqa: F401, the package has a function of that name
from dora_serve.engine import Engine, score
from dora_serve.errors import EngineError
from tests.cases import LINEARS, SIZES, adapt, llama, load, save
from tests.engine_oracle import peft_model
from tests.engine_tokenizers import byte_tokenizer

CONTEXT = 64
score_module = sys.modules["dora_serve.engine.score"]
SIZE: Mapping[str, Any] = {**SIZES, "vocab_size": 259, "max_position_embeddings": CONTEXT, "initializer_range": 0.3}
NAMES = ("lora", "dora")
TEXT = (1, 5, 9, 3, 77, 207, 12, 2, 258, 3)
ROUNDING = 1e-5
"""Of float32 logits up to about 10 and a sum of 259 terms: some ten roundings by 6e-8 of that."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("score")
    model = llama(**SIZE)
    save(model, root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    adapt(model, root / "lora", target_modules=list(LINEARS), lora_alpha=12)
    adapt(model, root / "dora", target_modules=["q_proj", "down_proj"], lora_alpha=12, r=2, use_dora=True)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    engine = Engine.load(root / "base", device="cpu")
    for name in NAMES:
        engine.pool.load(name, root / name)
    return engine


def distributions(root: Path, name: str | None, tokens: tuple[int, ...]) -> Tensor:
    """(places, vocabulary): what PEFT's model makes of each place after the first, in float64."""
    model = peft_model(root / "base", None if name is None else root / name, llama(**SIZE), torch.float64)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(dim=-1)


@pytest.mark.parametrize("prompt", [(), (8,), (30, 31, 32, 33)])
@pytest.mark.parametrize("order", [(None, "lora", "dora"), ("dora", None, "lora", "dora")])
def test_scores_are_those_of_peft(
    engine: Engine, root: Path, order: tuple[str | None, ...], prompt: tuple[int, ...]
) -> None:
    """Log-probabilities, and KL(first || this) as torch has it; the prompt's own places are left out."""
    rows = score(engine, TEXT, order, prompt=prompt)
    assert [row.adapter for row in rows] == list(order)
    scored = TEXT if prompt else TEXT[1:]
    skipped = len(prompt) - 1 if prompt else 0
    first = distributions(root, order[0], (*prompt, *TEXT))[skipped:]
    for row in rows:
        assert row.token_ids == scored
        theirs = distributions(root, row.adapter, (*prompt, *TEXT))[skipped:]
        own = theirs.gather(1, torch.tensor([scored]).T)[:, 0]
        kl = functional.kl_div(theirs, first, reduction="none", log_target=True).sum(dim=1)
        torch.testing.assert_close(torch.tensor(row.logprobs).double(), own, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(torch.tensor(row.kl).double(), kl, rtol=0, atol=ROUNDING)
        assert min(row.kl) >= 0
        if row.adapter == order[0]:
            assert max(row.kl) <= ROUNDING
        else:
            assert min(row.kl) > 100 * ROUNDING, "every place tells them apart"
    assert rows[0].kl == (0.0,) * len(scored)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_text_in_pieces_is_scored_as_in_one(
    engine: Engine, root: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """So many places at a time, whatever the length of the text: what is held of logits does not grow with it."""
    prompt, order = (30, 31, 32, 33), (None, "lora", "dora")
    whole = score(engine, TEXT, order, prompt=prompt)
    held: list[int] = []
    run = Engine.forward_in_pieces

    def watched(*given: Any) -> Any:
        for logits in run(*given):
            held.append(logits.shape[1])
            yield logits

    monkeypatch.setattr(Engine, "forward_in_pieces", watched)
    monkeypatch.setattr(score_module, "_MOST_LOGITS", size * len(order) * engine.vocabulary)
    pieces = score(engine, TEXT, order, prompt=prompt)
    assert (max(held), sum(held)) == (min(size, 14), 14)
    for one, other in zip(whole, pieces, strict=True):
        assert (one.adapter, one.token_ids) == (other.adapter, other.token_ids)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=ROUNDING)
        torch.testing.assert_close(torch.tensor(one.kl), torch.tensor(other.kl), rtol=0, atol=ROUNDING)


def test_text_and_prompt_may_be_strings(engine: Engine) -> None:
    tokenizer = byte_tokenizer()
    before, after = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("Once ", "upon 🌊"))
    assert score(engine, "upon 🌊", (None, "dora"), prompt="Once ") == score(
        engine, after, (None, "dora"), prompt=before
    )


def test_a_text_that_fills_the_context(engine: Engine) -> None:
    (row,) = score(engine, (5,) * CONTEXT, (None,))
    assert len(row.logprobs) == CONTEXT - 1


@pytest.mark.parametrize(
    ("text", "adapters", "prompt", "said"),
    [
        ((5, 6), (), (), "No list of adapters"),
        ((5, 6), ("lora", "nobody"), (), "no adapter 'nobody'"),
        ((5,), ("lora",), (), "nothing to score"),
        ("", ("lora",), "x", "empty"),
        ((5, 259), ("lora",), (), "token id 259"),
        ((5,) * (CONTEXT + 1), ("lora",), (), f"text has {CONTEXT + 1} tokens.*context has room for {CONTEXT}"),
        ((5,) * CONTEXT, ("lora",), (5,), f"text has {CONTEXT + 1} tokens.*context has room for {CONTEXT}"),
    ],
)
def test_what_cannot_be_scored(engine: Engine, text: Any, adapters: tuple[str, ...], prompt: Any, said: str) -> None:
    """Nothing is left in use, of those that were there either."""
    with pytest.raises(EngineError, match=said):
        score(engine, text, adapters, prompt=prompt)
    assert all(info.in_use == 0 for info in engine.pool.list())


def test_a_beginning_token_comes_once(root: Path) -> None:
    """Where the tokenizer puts one before every text, as Llama's does: before the prompt, and not after it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("x")["input_ids"][0] == 1
    engine = Engine(load(root / "base", llama(**SIZE)), tokenizer)
    (row,) = score(engine, "upon", (None,), prompt="Once ")
    assert row.token_ids == tuple(tokenizer.encode("upon", add_special_tokens=False))
    whole = distributions(root, None, tuple(tokenizer("Once upon")["input_ids"]))[-4:]
    own = whole.gather(1, torch.tensor([row.token_ids]).T)[:, 0]
    torch.testing.assert_close(torch.tensor(row.logprobs).double(), own, rtol=0, atol=ROUNDING)
