"""Answers as HTML: what differs between two columns, and how surprised the base is at each token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape

from app.backend import TokenScore

LARGEST_SURPRISE = 8.0
"""Nats, e^-8 = 1 in 3000: whatever surprises more has the full colour."""

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MOST_WORDS = 3000
"""Comparing takes time that grows with the square; longer answers are shown as they are."""


def plain(text: str) -> str:
    return escape(text)


def differences(text: str, control: str) -> str:
    """`text`, with the words marked that `control` does not have at their place."""
    words, others = _WORDS.findall(text), _WORDS.findall(control)
    if max(len(words), len(others)) > _MOST_WORDS:
        return escape(text)
    matcher = SequenceMatcher(None, others, words, autojunk=False)
    parts = []
    for operation, _, _, start, stop in matcher.get_opcodes():
        piece = escape("".join(words[start:stop]))
        parts.append(piece if operation == "equal" or not piece.strip() else f'<mark class="ds-diff">{piece}</mark>')
    return "".join(parts)


def surprise(tokens: Sequence[TokenScore]) -> str:
    """The tokens, the redder the less likely the base finds them; the pointer shows the probability.

    A character that is several tokens is shown as one, with the probability of all of them.
    """
    parts, logprob = [], 0.0
    for token in tokens:
        logprob += token.logprob
        if token.text:
            parts.append(
                f'<span class="ds-token" style="--heat:{_heat(logprob):.3f}" '
                f'title="the base: {_probability(logprob)}">{escape(token.text)}</span>'
            )
            logprob = 0.0
    return "".join(parts)


def _heat(logprob: float) -> float:
    return min(1.0, max(0.0, -logprob / LARGEST_SURPRISE))


def _probability(logprob: float) -> str:
    chance = math.exp(min(0.0, logprob))
    return f"{chance:.1%}" if chance >= 0.001 else f"1 in {1 / chance:,.0f}" if chance > 1e-9 else "next to never"
