"""What goes into the engine and what comes out: requests, and the events that answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dora_serve.engine.sampling import Sampling
from dora_serve.engine.sound import is_whole, require, token_ids
from dora_serve.errors import DoraServeError, EngineError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One text to be continued.

    prompt: a text or token ids (a list, or an array of one dimension); or else messages, as chat templates take them
    ({"role": ..., "content": ...}). adapter: a name in the pool, None for the base. max_tokens: None goes on to the end
    of the context. stop: strings that end the text, and are no part of it; a special token's name is one. top_logprobs:
    so many alternatives with every token.
    """

    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0

    def require_sound(self) -> None:
        """Raise EngineError for a field that means nothing, but for the prompt, which only a tokenizer can judge."""
        if (self.prompt is None) == (self.messages is None):
            raise EngineError("A request has a prompt or messages, and not both.", remedy="Give one of them.")
        plain = isinstance(self.prompt, str) or self.prompt is None
        require("prompt", self.prompt, plain or token_ids(self.prompt) is not None, "a text, or a list of token ids")
        require("adapter", self.adapter, self.adapter is None or isinstance(self.adapter, str), "a name, or none")
        counted = self.max_tokens is None or (is_whole(self.max_tokens) and self.max_tokens > 0)
        require("max_tokens", self.max_tokens, counted, "a whole number, 1 or more, or none")
        texts = isinstance(self.stop, (tuple, list)) and all(isinstance(text, str) for text in self.stop)
        require("stop", self.stop, texts, "a tuple of texts")
        sound = is_whole(self.top_logprobs) and self.top_logprobs >= 0
        require("top_logprobs", self.top_logprobs, sound, "a whole number, 0 or more")
        require("sampling", self.sampling, isinstance(self.sampling, Sampling), "a Sampling")
        self.sampling.require_sound()


@dataclass(frozen=True)
class Alternative:
    """A token that could have come: its log-probability under the model, before any sampling parameter."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Timings:
    """Seconds. waiting: until the request got a row; first_token: from then on; decoding: all later tokens."""

    waiting: float
    first_token: float
    decoding: float
    prompt_tokens: int
    tokens: int

    @property
    def tokens_per_second(self) -> float | None:
        """Of the later tokens; None where there is only one."""
        return (self.tokens - 1) / self.decoding if self.tokens > 1 and self.decoding > 0 else None


@dataclass(frozen=True)
class Event:
    """Something that happened to the request at place `index` of the list.

    Either a token (token_id, its logprob, alternatives, and the text that can be shown by now, which may be none or
    that of several tokens) or the end (finish_reason and timings, the text that was held back, and the error, if any).
    """

    index: int
    text: str = ""
    token_id: int | None = None
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    error: DoraServeError | None = None


@dataclass(frozen=True)
class Completion:
    """All events of one request, put together."""

    adapter: str | None
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[tuple[Alternative, ...], ...]
    finish_reason: FinishReason
    timings: Timings | None
    error: DoraServeError | None
