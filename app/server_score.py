"""What a server's base thinks of an answer, by the prompt's log-probabilities that OpenAI's `echo` asks for.

A chat's prompt is known to the server alone, which renders it: vLLM tells its tokens (`/tokenize`), many others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.backend import TokenScore
from dora_serve.engine.requests import Request
from dora_serve.errors import EngineError, UnavailableError

Post = Callable[[str, Mapping[str, object]], Any]
"""A path and a body, to what the server answers. Raises EngineError where it refuses."""

_UNFINISHED = "\ufffd"


def score_answer(post: Post, model: str, request: Request, text: str) -> tuple[TokenScore, ...]:
    """The tokens of `text`, the answer to `request`, with the log-probability that `model` gives each.

    Raises UnavailableError where the server does not tell enough.
    """
    if isinstance(request.prompt, str):
        prompt = request.prompt
        tokens, values, offsets = _echoed(post, model, prompt + text)
        kept = [place for place, offset in enumerate(offsets) if len(prompt) <= offset < len(prompt + text)]
    else:
        messages = list(request.messages or ())
        before = _tokens(post, {"model": model, "messages": messages, "add_generation_prompt": True})
        after = _tokens(post, {"model": model, "prompt": text, "add_special_tokens": False})
        tokens, values, _ = _echoed(post, model, [*before, *after])
        kept = list(range(len(before), len(before) + len(after)))
        if len(tokens) < len(before) + len(after):
            raise _no_echo("it answers with other tokens than it was asked about")
    pieces = pieces_of(text, [tokens[place] for place in kept])
    return tuple(TokenScore(piece, values[place]) for piece, place in zip(pieces, kept, strict=True))


def pieces_of(text: str, tokens: Sequence[str]) -> list[str]:
    """`text` in pieces, one for each of its tokens, which came decoded one by one.

    A token that is only a part of a character has no text of its own: the character goes with the last of its tokens. A
    space that a tokenizer writes only between tokens goes with the one after it.
    """
    pieces: list[str] = []
    shown = 0
    for token in tokens:
        found = text.find(token, shown) if token and _UNFINISHED not in token else -1
        if found < 0:
            pieces.append("")
            continue
        if pieces and not pieces[-1] and text[shown:found].strip():
            pieces[-1], shown = text[shown:found], found
        pieces.append(text[shown : found + len(token)])
        shown = found + len(token)
    if pieces:
        pieces[-1] += text[shown:]
    return pieces


def _tokens(post: Post, body: Mapping[str, object]) -> list[int]:
    try:
        found = post("/tokenize", body)
        tokens = [int(token) for token in found["tokens"]]
    except (EngineError, KeyError, TypeError, ValueError) as error:
        raise _no_chat(str(error)) from error
    if not tokens:
        raise _no_chat("no tokens came back")
    return tokens


def _echoed(post: Post, model: str, prompt: str | list[int]) -> tuple[list[str], list[float], list[int]]:
    """Of every token of a prompt, and of one that follows: its text, its log-probability (0 for the first, which has
    none), and where it begins in the text."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
    try:
        found = post("/v1/completions", body)["choices"][0]["logprobs"]
        values = [float(value or 0.0) for value in found["token_logprobs"]]
        rows = list(zip(map(str, found["tokens"]), values, map(int, found["text_offset"]), strict=True))
    except (EngineError, KeyError, IndexError, TypeError, ValueError) as error:
        raise _no_echo(str(error)) from error
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _no_chat(why: str) -> UnavailableError:
    return UnavailableError(
        f"The server does not tell how it writes a chat as tokens (`/tokenize`), so what the base thinks of an answer "
        f"cannot be asked: {why}",
        remedy="Use Completion, vLLM, or the engine in this process.",
    )


def _no_echo(why: str) -> UnavailableError:
    return UnavailableError(
        f"The server does not tell log-probabilities of a prompt (`echo`): {why}", remedy="Use vLLM, or the engine."
    )
