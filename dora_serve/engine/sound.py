"""Whether a value that somebody gave means something."""

from __future__ import annotations

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
    return isinstance(value, int) and not isinstance(value, bool)
