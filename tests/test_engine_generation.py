"""Generations: the events of every request, how each ends, and that nothing that happens to one concerns another."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dora_serve.engine import Completion, Engine, Event, Request, Sampling, Timings
from dora_serve.errors import EngineError
from tests.cases import LINEARS, SIZES, adapt, llama, load, save
from tests.engine_oracle import greedy, peft_model
from tests.engine_tokenizers import BOS, EOS, byte_tokenizer

CONTEXT = 96
SIZE: Mapping[str, Any] = {
    **SIZES,
    "vocab_size": 259,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
"""The vocabulary of `byte_tokenizer`."""
COUNT = 20
PROMPT = "A first prompt"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    model = llama(**SIZE)
    save(model, root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for number, name in enumerate(("one", "two")):
        adapt(model, root / name, target_modules=list(LINEARS), lora_alpha=24, r=3 + number, use_dora=number == 0)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    engine = Engine.load(root / "base", device="cpu", max_rows=4)
    for name in ("one", "two"):
        engine.pool.load(name, root / name)
    return engine


@pytest.fixture(autouse=True)
def _all_is_given_back(engine: Engine) -> Any:
    """After every test of this file: no request holds an adapter."""
    yield
    gc.collect()
    assert [info.name for info in engine.pool.list() if info.in_use] == []


def ask(adapter: str | None = None, **fields: Any) -> Request:
    given = {"max_tokens": COUNT, "ignore_eos": True, **fields}
    if "messages" not in given:
        given = {"prompt": PROMPT, **given}
    return Request(adapter=adapter, **given)


def of(events: Sequence[Event], index: int) -> list[Event]:
    return [event for event in events if event.index == index]


def wanted(root: Path, adapter: str | None, prompt: str = PROMPT, count: int = COUNT) -> tuple[int, ...]:
    """transformers' own greedy tokens."""
    ids = byte_tokenizer().encode(prompt, add_special_tokens=False)
    return greedy(
        peft_model(root / "base", None if adapter is None else root / adapter, llama(**SIZE)), ids, count
    ).tokens


# Events


def test_the_events_of_each_request(engine: Engine, root: Path) -> None:
    """A token an event, then the end; numbers and texts are those of transformers.

    The log-probability of a token is float32 all along: 259 terms and a forward, of which each rounds by 6e-8.
    """
    names = (None, "one", "two")
    events = list(engine.generate([ask(name, top_logprobs=3) for name in names]))
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    for index, name in enumerate(names):
        mine = of(events, index)
        tokens = wanted(root, name)
        assert [event.token_id for event in mine] == [*tokens, None]
        assert "".join(event.text for event in mine) == tokenizer.decode(tokens, skip_special_tokens=True)
        model = peft_model(root / "base", None if name is None else root / name, llama(**SIZE))
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(dim=-1)
        for event, token, row in zip(mine[:-1], tokens, scores, strict=True):
            assert event.logprob == pytest.approx(float(row[token]), abs=1e-5)
            best = row.topk(3)
            assert [one.token_id for one in event.alternatives] == best.indices.tolist()
            assert [one.logprob for one in event.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)
            assert [one.text for one in event.alternatives] == [
                tokenizer.decode([one]) for one in best.indices.tolist()
            ]
            assert event.alternatives[0].token_id == token
            assert event.finish_reason is event.timings is event.error is None
        last = mine[-1]
        assert (last.finish_reason, last.error, last.logprob, last.alternatives) == ("length", None, None, ())
        assert last.timings is not None
        assert (last.timings.prompt_tokens, last.timings.tokens) == (len(ids), COUNT)
        assert min(last.timings.waiting, last.timings.first_token, last.timings.decoding) >= 0
    assert len({of(events, index)[0].alternatives for index in range(3)}) == 3


def test_events_stream(engine: Engine) -> None:
    """The first tokens of both requests come before either has ended, in turns."""
    events = list(engine.generate([ask("one", max_tokens=3), ask("two", max_tokens=3)]))
    assert [event.index for event in events if event.token_id is not None] == [0, 1, 0, 1, 0, 1]
    assert sum(event.finish_reason is not None for event in events) == 2


def test_nothing_runs_before_it_is_asked_for(engine: Engine) -> None:
    generation = engine.generate([ask("one")])
    assert all(info.in_use == 0 for info in engine.pool.list())
    next(generation)
    assert [info.in_use for info in engine.pool.list()] == [1, 0]
    generation.close()


def test_complete_puts_the_events_together(engine: Engine) -> None:
    requests = [ask("one", top_logprobs=2), ask(None), ask("nobody")]
    events, answers = list(engine.generate(requests)), engine.complete(requests)
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        mine = of(events, index)
        assert answer.adapter == request.adapter
        assert answer.text == "".join(event.text for event in mine)
        assert answer.token_ids == tuple(event.token_id for event in mine if event.token_id is not None)
        assert answer.logprobs == tuple(event.logprob for event in mine if event.token_id is not None)
        assert answer.alternatives == tuple(event.alternatives for event in mine if event.token_id is not None)
        assert answer.finish_reason == mine[-1].finish_reason
    assert engine.complete([]) == ()


def test_tokens_per_second() -> None:
    """Of all tokens but the first, since that one's time is the prompt's."""
    assert Timings(1.0, 2.0, 4.0, 7, 9).tokens_per_second == 2.0
    assert Timings(1.0, 2.0, 0.0, 7, 1).tokens_per_second is None


# Prompts


def test_token_ids_a_text_and_messages_are_the_same_prompt(engine: Engine, root: Path) -> None:
    ids = byte_tokenizer().encode(PROMPT, add_special_tokens=False)
    first, second = engine.complete([ask("one"), ask("one", prompt=ids)])
    assert first.token_ids == second.token_ids == wanted(root, "one")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    (chat,) = engine.complete([ask("two", messages=messages)])
    assert chat.timings is not None
    text = "user:hi\n" + "assistant:yes?\n" + "assistant:"
    assert chat.timings.prompt_tokens == len(text) + 2, "and a token at the head of each message"
    tokens = byte_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokens.count(BOS) == 2
    assert chat.token_ids == greedy(peft_model(root / "base", root / "two", llama(**SIZE)), tokens, COUNT).tokens


# How a text ends


def test_token_ids_may_be_any_integers(engine: Engine, root: Path) -> None:
    """Of numpy and torch as well, one by one or as an array; so may the other whole numbers of a request."""
    ids = byte_tokenizer().encode(PROMPT, add_special_tokens=False)
    numbers = np.array(ids)
    sampling = Sampling(top_k=np.int64(3), seed=np.int64(5))
    prompts: list[Any] = [ids, tuple(ids), list(numbers), numbers, torch.tensor(ids), list(torch.tensor(ids))]
    requests = [ask("one", prompt=prompt, max_tokens=np.int32(COUNT), sampling=sampling) for prompt in prompts]
    for answer in engine.complete(requests):
        assert answer.token_ids == wanted(root, "one")
    wrong: list[Any] = [numbers[None], numbers / 2, torch.tensor(0.5), [True, False], [1.0], np.array(["x"]), {3: 4}]
    for answer in engine.complete([ask("one", prompt=prompt) for prompt in wrong]):
        assert "a text, or a list of token ids" in str(answer.error)


def test_it_ends_with_the_end_token(engine: Engine, root: Path) -> None:
    """Which counts as a token, and is no text. The model's end token is set to one that it is known to write."""
    tokens = wanted(root, "one")
    end = tokens[7]
    first = tokens.index(end)
    other = Engine(load(root / "base", llama(**SIZE)), byte_tokenizer())
    other.end_tokens = frozenset([end, 258])
    other.pool.load("one", root / "one")
    stopped, ignoring = other.complete([ask("one", ignore_eos=False), ask("one")])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == tokens[: first + 1]
    assert stopped.text == byte_tokenizer().decode(tokens[:first], skip_special_tokens=True)
    assert (ignoring.finish_reason, ignoring.token_ids) == ("length", tokens)


def test_the_end_tokens_are_those_of_transformers(root: Path) -> None:
    """generation_config's before config's: the one that generate goes by."""
    model = load(root / "base", llama(**SIZE))
    assert Engine(model, byte_tokenizer()).end_tokens == {EOS}
    model = load(root / "base", llama(**SIZE))
    model.generation_config.eos_token_id = [5, 9]
    assert Engine(model, byte_tokenizer()).end_tokens == {5, 9}


def test_a_stop_string_over_several_tokens(engine: Engine) -> None:
    """Each byte is a token here, so that every stop string of two characters spans two."""
    (plain,) = engine.complete([ask("one")])
    assert len(plain.text) > 8
    stop = plain.text[4:7]
    place = plain.text.index(stop)
    events = list(engine.generate([ask("one", stop=("none of this", stop)), ask("two")]))
    mine = of(events, 0)
    assert "".join(event.text for event in mine) == plain.text[:place]
    assert mine[-1].finish_reason == "stop"
    tokens = tuple(event.token_id for event in mine if event.token_id is not None)
    assert tokens == plain.token_ids[: len(tokens)]
    assert stop in byte_tokenizer().decode(tokens)
    assert of(events, 1)[-1].finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [1, 2, COUNT])
def test_max_tokens(engine: Engine, root: Path, max_tokens: int) -> None:
    (answer,) = engine.complete([ask("one", max_tokens=max_tokens)])
    assert answer.finish_reason == "length"
    assert answer.token_ids == wanted(root, "one")[:max_tokens]


def test_the_context_ends_a_text(engine: Engine, root: Path) -> None:
    """Its last place is a token that was written; what transformers gives for max_length."""
    left = CONTEXT - len(PROMPT)
    tokens = wanted(root, "one", count=left)
    for max_tokens in (None, 1000, left):
        (answer,) = engine.complete([ask("one", max_tokens=max_tokens)])
        assert (answer.finish_reason, answer.token_ids) == ("length", tokens)
    (last,) = engine.complete([ask("one", prompt="x" * (CONTEXT - 1))])
    assert (last.finish_reason, len(last.token_ids)) == ("length", 1)


# Several requests


def test_more_requests_than_rows(engine: Engine, root: Path) -> None:
    """Rows fill up as others end, whatever their lengths, and every request gets its own tokens."""
    names = (None, "one", "two")
    lengths = [1, 17, 3, 9, 20, 2, 11, 5, 20, 1, 1, 14]
    requests = [ask(names[place % 3], max_tokens=length) for place, length in enumerate(lengths)]
    whole = {name: wanted(root, name) for name in names}
    for rows in (1, 2, 3, 50):
        events = list(engine.generate(requests, max_rows=rows))
        open_now: set[int] = set()
        for event in events:
            open_now.add(event.index)
            assert len(open_now) <= rows
            if event.finish_reason is not None:
                open_now.remove(event.index)
        for index, request in enumerate(requests):
            tokens = tuple(event.token_id for event in of(events, index) if event.token_id is not None)
            assert tokens == whole[request.adapter][: lengths[index]], (rows, index)


def test_cancelling_one_before_it_begins_and_one_that_runs(engine: Engine, root: Path) -> None:
    """The others go on unchanged, and the rows of the cancelled ones are taken by those that wait."""
    generation = engine.generate([ask("one"), ask("two"), ask(None), ask("one"), ask("two")], max_rows=2)
    generation.cancel(3)
    events: list[Event] = []
    for event in generation:
        events.append(event)
        if event.index == 0 and len(of(events, 0)) == 4:
            generation.cancel(0)
            generation.cancel(0)
    assert [of(events, index)[-1].finish_reason for index in range(5)] == [
        "cancelled",
        "length",
        "length",
        "cancelled",
        "length",
    ]
    assert len(of(events, 3)) == 1
    cancelled = [event.token_id for event in of(events, 0)]
    assert 4 <= len(cancelled) - 1 <= 5
    assert tuple(cancelled[:-1]) == wanted(root, "one")[: len(cancelled) - 1]
    for index, name in ((1, "two"), (2, None), (4, "two")):
        assert tuple(event.token_id for event in of(events, index)[:-1]) == wanted(root, name)
    generation.cancel(1)  # which has ended, and stays as it is
    assert list(generation) == []
    with pytest.raises(EngineError, match="no request 5"):
        generation.cancel(5)
    with pytest.raises(EngineError, match="no request -1"):
        generation.cancel(-1)


def test_closing_gives_the_adapters_back(engine: Engine) -> None:
    generation = engine.generate([ask("one"), ask("two"), ask("two"), ask("one"), ask("one")], max_rows=4)
    for _ in range(6):
        next(generation)
    assert [info.in_use for info in engine.pool.list()] == [2, 2]
    generation.close()
    assert [info.in_use for info in engine.pool.list()] == [0, 0]
    assert list(generation) == []
    generation.close()


def test_one_that_is_forgotten_gives_them_back_as_well(engine: Engine) -> None:
    """A loop that is left early, as by an exception in it."""
    for _ in engine.generate([ask("one"), ask("two")]):
        break
    gc.collect()
    assert [info.in_use for info in engine.pool.list()] == [0, 0]


def test_two_generations_take_turns(engine: Engine, root: Path) -> None:
    """Each with rows, caches and adapters of its own."""
    first, second = engine.generate([ask("one"), ask("two")]), engine.generate([ask("two"), ask(None)])
    events: tuple[list[Event], list[Event]] = ([], [])
    going = [True, True]
    while any(going):
        for place, generation in enumerate((first, second)):
            event = next(generation, None)
            going[place] = event is not None
            events[place].extend([] if event is None else [event])
    for place, names in enumerate((("one", "two"), ("two", None))):
        for index, name in enumerate(names):
            assert tuple(event.token_id for event in of(events[place], index)[:-1]) == wanted(root, name)


# Bad requests


BAD: Mapping[str, tuple[dict[str, Any], str]] = {
    "unknown adapter": ({"adapter": "nobody"}, "no adapter 'nobody'"),
    "no name": ({"adapter": ["one"]}, "adapter is ['one'], wanted a name"),
    "empty prompt": ({"prompt": ""}, "prompt is empty"),
    "no tokens": ({"prompt": []}, "no tokens"),
    "no prompt": ({"prompt": None}, "prompt or messages"),
    "both": ({"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}, "not both"),
    "no messages": ({"messages": []}, "no messages"),
    "odd messages": ({"messages": ["hi", 3]}, "chat template does not take"),
    "as long as the context": ({"prompt": "x" * CONTEXT}, f"has {CONTEXT} tokens"),
    "beyond the context": ({"prompt": "x" * 500}, "has 500 tokens"),
    "beyond the vocabulary": ({"prompt": [3, 259]}, "token id 259"),
    "below the vocabulary": ({"prompt": [3, -1]}, "token id -1"),
    "no token ids": ({"prompt": ["x"]}, "token id"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens is 0"),
    "max_tokens below 0": ({"max_tokens": -3}, "max_tokens is -3"),
    "temperature": ({"sampling": Sampling(temperature=-1)}, "temperature is -1"),
    "top_logprobs below 0": ({"top_logprobs": -1}, "top_logprobs"),
    "stop is none": ({"stop": None}, "stop"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_concerns_itself_alone(engine: Engine, root: Path, name: str) -> None:
    """It is told what is wrong, and the requests before and after it get their tokens."""
    fields, said = BAD[name]
    bad, good = ask(**{"adapter": "one", **fields}), ask("two")
    first, refused, second = engine.complete([good, bad, good])
    assert isinstance(refused.error, EngineError)
    assert said in str(refused.error)
    assert (refused.finish_reason, refused.token_ids, refused.text) == ("error", (), "")
    assert refused.timings is not None
    assert first.token_ids == second.token_ids == wanted(root, "two")
    assert (first.error, second.error) == (None, None)


def test_top_logprobs_beyond_the_vocabulary_gives_all(engine: Engine) -> None:
    (answer,) = engine.complete([ask("one", top_logprobs=1000, max_tokens=1)])
    assert len(answer.alternatives[0]) == 259


def test_a_base_without_chat_template_or_tokenizer(root: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "hi"}]
    chat, good = _bare(root, tokenizer).complete([ask(messages=messages), ask()])
    assert "no chat template" in str(chat.error)
    assert good.token_ids == wanted(root, None)
    bare = _bare(root, None)
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    chat, text, good = bare.complete([ask(messages=messages), ask(), ask(prompt=ids)])
    assert "no tokenizer" in str(chat.error)
    assert "no tokenizer" in str(text.error)
    assert (good.token_ids, good.text) == (wanted(root, None), "")


def _bare(root: Path, tokenizer: Any) -> Engine:
    return Engine(load(root / "base", llama(**SIZE)), tokenizer)


def test_one_request_needs_no_list(engine: Engine, root: Path) -> None:
    answers: tuple[Completion, ...] = engine.complete(ask("one"))  # type: ignore[arg-type]
    assert [answer.token_ids for answer in answers] == [wanted(root, "one")]
