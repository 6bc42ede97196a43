"""Whether a value that somebody gave means something."""

from __future__ import annotations

import operator
from typing import TypeGuard

from dora_serve.errors import EngineError


def require(name: str, value: object, sound: bool, wanted: str) -> None:
    """Raise EngineError unless a field of a request is sound."""
    if not sound:
        raise EngineError(f"{name} is {value!r}, wanted {wanted}.", remedy="Correct the request.", name=name)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer, numpy's among them; a truth value is none."""
    try:
        return not isinstance(value, bool) and operator.index(value) == value  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a tensor of many
        return False


def token_ids(prompt: object) -> list[int] | None:
    """A prompt that is given as token ids: of a list, a tuple, or an array of one dimension; None for anything else."""
    listed = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(listed, (list, tuple)) or not all(is_whole(token) for token in listed):
        return None
    return [operator.index(token) for token in listed]
