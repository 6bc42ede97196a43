"""A browser's desk on a real engine: columns, conversations, stopping, blind votes, and the base's surprise."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from app import render
from app.backend import BASE
from app.desk import Desk, Desks, Settings
from app.engine_backend import EngineBackend
from app.run import Run
from dora_serve.engine import Engine, Request
from dora_serve.errors import DoraServeError, EngineError
from tests.app_cases import PROMPT, make_folders

COLUMNS = [BASE, "lora", "dora"]
VIEWS: tuple[render.View, ...] = ("plain", "differences", "surprise")
SHORT = Settings(chat=False, max_tokens=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def backend(folders: Path) -> EngineBackend:
    engine = Engine.load(folders / "base")
    for name in ("lora", "dora"):
        engine.pool.load(name, folders / "adapters" / name)
    return EngineBackend(engine, str(folders / "base"))


def _asked(
    backend: EngineBackend, desk: Desk, prompt: str = PROMPT, settings: Settings = SHORT, **kwargs: bool
) -> Desk:
    for _ in desk.ask(backend, prompt, COLUMNS, settings, **kwargs):
        pass
    return desk


def test_columns_grow_together_and_end_as_the_engine_answers(backend: EngineBackend) -> None:
    desk = Desk()
    seen = [tuple(answer.tokens for answer in desk.answers) for _ in desk.ask(backend, PROMPT, COLUMNS, SHORT)]
    alone = backend.engine.complete(list(desk.requests))
    assert [answer.text for answer in desk.answers] == [completion.text for completion in alone]
    assert len({answer.text for answer in desk.answers}) == 3
    assert [answer.token_ids for answer in desk.answers] == [completion.token_ids for completion in alone]
    assert seen[-1] == tuple(len(completion.token_ids) for completion in alone)
    for answer in desk.answers:
        assert answer.finish in ("stop", "length")
        assert answer.first_token is not None
        assert answer.first_token > 0


def test_each_column_of_a_chat_has_its_own_past(backend: EngineBackend) -> None:
    chat = Settings(chat=True, system="calm", max_tokens=5)
    desk = _asked(backend, Desk(), settings=chat)
    first = [answer.text for answer in desk.answers]
    _asked(backend, desk, "north wind", chat)
    for text, request in zip(first, desk.requests, strict=True):
        assert request.messages is not None
        roles = [message["role"] for message in request.messages]
        if text:
            assert roles == ["system", "user", "assistant", "user"]
            assert request.messages[2]["content"] == text
    desk.clear()
    assert desk.turns == ()
    assert desk.answers == ()
    _asked(backend, desk, settings=SHORT)
    assert desk.turns == ()


def test_again_answers_in_one_column_with_another_seed(backend: EngineBackend) -> None:
    lively = Settings(chat=False, max_tokens=20, temperature=1.5, seed=3)
    desk = _asked(backend, Desk(), settings=lively)
    before = desk.answers
    for _ in desk.ask_again(backend, 1):
        pass
    assert desk.answers[0] is before[0]
    assert desk.answers[2] is before[2]
    assert desk.answers[1].text != before[1].text
    assert desk.requests[1].sampling.seed == 4
    with pytest.raises(DoraServeError, match="no answer in that column"):
        next(Desk().ask_again(backend, 0))


def test_stopping_a_column_leaves_the_others(backend: EngineBackend) -> None:
    desk = Desk()
    long = Settings(chat=False, max_tokens=200, temperature=1.0)
    looks = desk.ask(backend, PROMPT, COLUMNS, long)
    next(looks)
    desk.cancel(1)
    for _ in looks:
        pass
    assert desk.answers[1].finish == "cancelled"
    assert {desk.answers[0].finish, desk.answers[2].finish} <= {"stop", "length"}
    assert not desk.runs


def test_leaving_ends_what_runs_and_lets_go_of_the_adapters(backend: EngineBackend) -> None:
    desks = Desks()
    desk = desks.of("a")
    looks = desk.ask(backend, PROMPT, COLUMNS, Settings(chat=False, max_tokens=200, temperature=1.0))
    next(looks)
    desks.leave("a")
    for _ in looks:
        pass
    assert "cancelled" in {answer.finish for answer in desk.answers}
    assert desks.of("a") is not desk
    looks = desk.ask(backend, PROMPT, COLUMNS, Settings(chat=False, max_tokens=200, temperature=1.0))
    next(looks)
    looks.close()  # type: ignore[attr-defined]
    for thread in [thread for thread in threading.enumerate() if thread.name == "run"]:
        thread.join(30)
    assert not any(row.in_use for row in backend.adapters())


def test_a_new_prompt_takes_the_place_of_the_one_that_runs(backend: EngineBackend) -> None:
    desk = Desk()
    old = desk.ask(backend, PROMPT, COLUMNS, Settings(chat=False, max_tokens=200, temperature=1.0))
    next(old)
    _asked(backend, desk)
    for _ in old:
        pass
    assert all(answer.tokens <= 12 for answer in desk.answers)
    assert all(answer.finish in ("stop", "length") for answer in desk.answers)


def test_a_blind_vote_is_for_the_column_that_was_seen(backend: EngineBackend) -> None:
    orders = set()
    for _ in range(12):
        desk = _asked(backend, Desk(), settings=Settings(chat=False, max_tokens=2), blind=True)
        orders.add(desk.columns)
        assert [desk.name(place) for place in range(3)] == ["Column A", "Column B", "Column C"]
        shown = render.column(desk, 1, "plain", backend.adapters())
        assert not [name for name in (*COLUMNS, "LoRA", "DoRA", "rank") if f">{name}" in shown]
        vote = desk.vote(1)
        assert (vote.winner, vote.blind) == (desk.columns[1], True)
        assert desk.name(1) == desk.columns[1]
    assert len(orders) > 1


def test_a_blind_column_tells_by_nothing_whose_it_is(backend: EngineBackend) -> None:
    """Not by what it said before, when its name was seen, not by its colours, and not by an error."""
    desk = _asked(backend, Desk(), settings=Settings(chat=True, max_tokens=5))
    before = [answer.text for answer in desk.answers]
    assert len(set(before)) == 3
    for _ in desk.ask(backend, PROMPT, [*COLUMNS, "gone"], Settings(chat=True, max_tokens=5), blind=True):
        pass
    desk.score(backend)

    def shown(view: render.View) -> str:
        return "".join(render.column(desk, place, view, backend.adapters()) for place in range(4))

    past = [f'ds-past">{text}<' for text in before]
    for view in VIEWS:
        assert not [text for text in (*past, "gone", "<mark", "ds-token") if text in shown(view)]
    assert shown("plain").count("1 earlier turn, shown again after the vote") == 3
    desk.vote(0)
    assert all(text in shown("plain") for text in (*past, "gone"))
    assert "<mark" in shown("differences")
    assert "ds-token" in shown("surprise")
    assert [vote.blind for vote in desk.votes] == [True]
    desk.vote(None)  # by somebody who has seen the names
    assert [vote.blind for vote in desk.votes] == [False]


def test_one_vote_for_each_prompt(backend: EngineBackend) -> None:
    desk = Desk()
    with pytest.raises(DoraServeError, match="nothing to vote on"):
        desk.vote(0)
    _asked(backend, desk)
    desk.vote(0)
    desk.vote(None)
    assert [vote.winner for vote in desk.votes] == ["tie"]
    _asked(backend, desk)
    desk.vote(None, all_bad=True)
    assert [vote.winner for vote in desk.votes] == ["tie", "all bad"]
    assert desk.votes[0].answers == tuple(answer.text for answer in desk.answers)


def test_surprise_is_the_base_s_own_log_probability(backend: EngineBackend, folders: Path) -> None:
    import transformers

    desk = _asked(backend, Desk())
    desk.score(backend)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float64)
    prompt = backend.engine.tokenize(Request(PROMPT))
    for column, answer in zip(desk.columns, desk.answers, strict=True):
        tokens = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0].log_softmax(-1)
        wanted = [float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer.token_ids)]
        scores = desk.scores[column]
        assert [score.logprob for score in scores] == pytest.approx(wanted, abs=1e-4)
        assert "".join(score.text for score in scores) == answer.text


@pytest.mark.parametrize(
    ("prompt", "columns", "said"),
    [
        ("  ", COLUMNS, "prompt is empty"),
        ("x" * 10**6, COLUMNS, "1,000,000 characters"),
        ("half of one: \ud800", COLUMNS, "no Unicode text"),
        ("x", [], "0 columns"),
        ("x", ["base", "base"], "each another one"),
        ("x", [str(number) for number in range(7)], "7 columns"),
    ],
)
def test_what_cannot_be_asked_is_said(backend: EngineBackend, prompt: str, columns: list[str], said: str) -> None:
    with pytest.raises(DoraServeError, match=said):
        Desk().ask(backend, prompt, columns, SHORT)


def test_an_unknown_adapter_is_an_error_in_its_column_alone(backend: EngineBackend) -> None:
    desk = Desk()
    for _ in desk.ask(backend, PROMPT, [BASE, "gone"], SHORT):
        pass
    assert desk.answers[0].finish in ("stop", "length")
    assert "There is no adapter 'gone'" in (desk.answers[1].error or "")
    assert "ds-error" in render.column(desk, 1, "plain", backend.adapters())


def test_a_backend_that_dies_ends_every_column_with_a_sentence() -> None:
    class Dying:
        def stream(self, requests: object) -> object:
            def events() -> object:
                raise EngineError("The lights went out.", remedy="Ask again.")
                yield

            class Stream:
                def __iter__(self) -> object:
                    return events()

                def cancel(self, index: int) -> None: ...

            return Stream()

    run = Run(Dying(), [Request(PROMPT), Request(PROMPT)])  # type: ignore[arg-type]
    answers = list(run.looks())[-1]
    assert [answer.error for answer in answers] == ["The lights went out. Ask again."] * 2


def test_markup_in_prompts_and_answers_stays_text(backend: EngineBackend) -> None:
    desk = Desk()
    for _ in desk.ask(backend, "<script>alert(1)</script>", ["<b>"], Settings(chat=True, max_tokens=2)):
        pass
    shown = render.column(desk, 0, "differences", backend.adapters())
    assert "<script" not in shown
    assert "<b>" not in shown.replace("<b>1</b>", "")
    assert "&lt;script&gt;" in shown
