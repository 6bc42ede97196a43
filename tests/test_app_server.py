"""The same page over an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.backend import BASE
from app.desk import Settings, Turn
from app.run import Answer, Run
from app.server_backend import ServerBackend
from app.server_score import pieces_of
from dora_serve.errors import EngineError, UnavailableError
from dora_serve.progress import ignore_progress
from tests.app_cases import client, free_port, launched
from tests.fake_openai import FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def backend(server: FakeServer) -> ServerBackend:
    return ServerBackend(f"{server.url}/v1")


def _run(backend: ServerBackend, *columns: str, prompt: str = "hello there", **settings: Any) -> tuple[Answer, ...]:
    wanted = Settings(**settings)
    return list(Run(backend, [wanted.request(column, prompt) for column in columns]).looks())[-1]


@pytest.mark.parametrize("chat", [True, False])
def test_columns_are_the_server_s_models(server: FakeServer, backend: ServerBackend, chat: bool) -> None:
    base, style = _run(backend, BASE, "style", chat=chat, system="Be brief." if chat else "", seed=3)
    assert base.text == "big-base says <b> hello there"
    assert style.text == "style says <b> hello there"
    assert (style.finish, style.tokens) == ("stop", 5)
    assert style.rate is not None
    assert style.first_token is not None
    assert sorted(body["model"] for body in server.asked) == ["big-base", "style"]
    for body in server.asked:
        assert (body["seed"], body["temperature"], body["stream"]) == (3, 0.0, True)
        assert "top_k" not in body
        if chat:
            assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_sampling_reaches_the_server(server: FakeServer, backend: ServerBackend) -> None:
    (answer,) = _run(backend, BASE, max_tokens=2, temperature=0.5, top_p=0.9, top_k=5, repetition_penalty=1.2)
    assert (answer.text, answer.finish) == ("big-base says ", "length")
    (body,) = server.asked
    assert [body[key] for key in ("temperature", "top_p", "top_k", "repetition_penalty")] == [0.5, 0.9, 5, 1.2]


def test_adapters_are_listed_loaded_replaced_and_unloaded(server: FakeServer, backend: ServerBackend) -> None:
    assert [(row.name, row.source) for row in backend.adapters()] == [("style", "/adapters/style")]
    assert "loaded" in backend.load("dates", "/adapters/dates")
    with pytest.raises(EngineError, match="already"):
        backend.load("dates", "/adapters/other")
    backend.load("dates", "/adapters/other", replace=True)
    assert server.adapters["dates"] == "/adapters/other"
    backend.unload("dates")
    assert [row.name for row in backend.adapters()] == ["style"]
    with pytest.raises(EngineError, match="No adapter found"):
        backend.load("bad", "/elsewhere")
    for name in ("", BASE, "big-base"):
        with pytest.raises(EngineError, match="cannot be called"):
            backend.load(name, "/adapters/x")
    with pytest.raises(EngineError, match="No adapter found") as refused:
        backend.unload("nobody")  # which vLLM answers with 404, as it does where it cannot unload at all
    assert "enable-lora" not in str(refused.value)
    server.can_load = False
    with pytest.raises(UnavailableError, match="cannot change its adapters") as caught:
        backend.load("new", "/adapters/new")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(caught.value)


def test_a_server_that_dies_in_the_middle_ends_its_columns_with_a_sentence(
    server: FakeServer, backend: ServerBackend
) -> None:
    server.die_after = 2
    for answer in _run(backend, BASE, "style"):
        assert answer.finish == "error"
        assert answer.text.endswith("says ")
        assert server.url in (answer.error or "")
    server.die_after = None
    assert _run(backend, BASE)[0].finish == "stop"


def test_a_column_is_stopped_alone(server: FakeServer, backend: ServerBackend) -> None:
    server.pause = 0.05
    requests = [Settings().request(column, "word " * 20) for column in (BASE, "style")]
    run = Run(backend, requests)
    looks = run.looks()
    next(looks)
    run.cancel(0)
    assert [answer.finish for answer in list(looks)[-1]] == ["cancelled", "stop"]


def test_an_unknown_adapter_is_said_in_its_column(backend: ServerBackend) -> None:
    base, gone = _run(backend, BASE, "gone")
    assert base.finish == "stop"
    assert "does not exist" in (gone.error or "")


def test_the_base_s_log_probabilities_of_a_plain_answer(backend: ServerBackend) -> None:
    request = Settings(chat=False).request("style", "one two")
    scores = backend.score(request, " three four", ())
    assert [(score.text, score.logprob) for score in scores] == [(" three", -6.0), (" four", -5.0)]


def test_the_base_s_log_probabilities_of_a_chat_s_answer(server: FakeServer, backend: ServerBackend) -> None:
    turns = (Turn("one", {"style": "two"}),)
    request = Settings(system="Be brief.").request("style", "three", turns)
    scores = backend.score(request, "big four five", ())
    assert [(score.text, score.logprob) for score in scores] == [("big", -3.0), (" four", -5.0), (" five", -5.0)]
    server.can_tokenize = False
    with pytest.raises(UnavailableError, match="does not tell how it writes a chat as tokens"):
        backend.score(request, "x", ())
    server.can_tokenize, server.can_echo = True, False
    for asked in (request, Settings(chat=False).request("style", "one")):
        with pytest.raises(UnavailableError, match="echo is not supported"):
            backend.score(asked, "x", ())


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("a bc", ["a", " bc"], ["a", " bc"]),
        ("a \U0001f600 b", ["a", " \ufffd", "\ufffd", "\ufffd", " b"], ["a", "", "", " \U0001f600", " b"]),
        ("\U0001f600", ["\ufffd", "\ufffd"], ["", "\U0001f600"]),
        ("two words", ["two", "words"], ["two", " words"]),
        ("x", ["x", "<end>"], ["x", ""]),
        ("", [], []),
    ],
)
def test_a_text_is_cut_where_its_tokens_are(text: str, tokens: list[str], pieces: list[str]) -> None:
    assert pieces_of(text, tokens) == pieces


def test_what_a_server_does_not_show_is_said(backend: ServerBackend) -> None:
    with pytest.raises(UnavailableError, match="does not show the weights"):
        backend.decompose("style", ignore_progress)


def test_what_is_no_such_server_is_said() -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        ServerBackend(f"http://127.0.0.1:{free_port()}")


def test_the_page_does_not_know_the_difference(server: FakeServer, backend: ServerBackend, tmp_path: Path) -> None:
    with launched(backend, tmp_path) as url:
        one = client(url)
        answers = one.predict("hello", [BASE, "style"], api_name="/generate")
        assert [answer["text"] for answer in answers] == ["big-base says <b> hello", "style says <b> hello"]
        said = one.predict("/adapters/dates", None, "dates", False, [BASE], api_name="/add_adapter")[0]
        assert "Added dates" in said
        assert [row["name"] for row in one.predict(api_name="/adapters")] == ["dates", "style"]
        assert "does not show the weights" in one.predict(["style"], api_name="/inspect")[0]
        server.shutdown()
        server.server_close()
        answers = one.predict("hello", [BASE], api_name="/generate")
        assert "does not answer" in answers[0]["error"]
