"""From token ids to text as it grows: whole characters only, and nothing that may be the beginning of a stop string."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to, before its last ones have come."""

_LONGEST = 8
"""Tokens of one character at most; more that do not make one are no text."""


class TextStream:
    """The text of one request. `push` takes a token and returns what can be shown; `stopped` once a stop string came.

    Tokens are decoded together with a few before them, since many tokenizers write a space only between tokens.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        self._special = _special_ids(tokenizer, self._stop)
        self._ids: list[int] = []
        self._start = self._shown = 0  # of the tokens: where decoding begins, and up to where it has been given out
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        if token_id in self._special:
            text, self.stopped = self.close(), True
            return text
        self._ids.append(token_id)
        before = self._decode(self._start, self._shown)
        now = self._decode(self._start, len(self._ids))
        waits = now.endswith(_UNFINISHED) and len(self._ids) - self._shown < _LONGEST
        if len(now) <= len(before) or waits:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._release(now[len(before) :])

    def close(self) -> str:
        """What is still held back when the text ends by itself."""
        if self.stopped or self._tokenizer is None:
            return ""
        rest = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._shown)) :]
        self._shown = len(self._ids)
        text = self._release(rest)
        text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        # A clean-up of spaces (" 's" to "'s") would take back what was shown.
        text: str = self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _special_ids(tokenizer: Any, stop: tuple[str, ...]) -> frozenset[int]:
    """Of the stop strings that are special tokens: these are never shown as text, so they are known by their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return frozenset(place for place, token in added.items() if token.special and token.content in stop)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
