"""The names of adapters in a pool: which may be given, and what is said of one that is not there or in use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from dora_serve.errors import EngineError

BASE_NAME = "base"


def require_name(name: object, taken: Mapping[str, Path], replace: bool) -> None:
    """Raise EngineError for what is no name, the base's, or one of `taken` (with its files) unless `replace`."""
    if not isinstance(name, str) or not name or name == BASE_NAME:
        raise EngineError(
            f"An adapter cannot be called {name!r}" + (": that is the base's name." if name == BASE_NAME else "."),
            remedy="Give it another name.",
        )
    if name in taken and not replace:
        raise EngineError(
            f"There is an adapter {name!r} already, from {str(taken[name])!r}.",
            remedy="Give this one another name, or replace that one.",
            adapter=name,
        )


def not_loaded(name: str, loaded: Collection[str]) -> EngineError:
    """The error of a name that no adapter has."""
    known = ", ".join(sorted(loaded)) or "none"
    remedy = "Give None as the adapter for the base." if name == BASE_NAME else "Load it first."
    return EngineError(f"There is no adapter {name!r} (loaded: {known}).", remedy=remedy, adapter=name)


def require_unused(name: str, users: int) -> None:
    """Raise EngineError where so many requests hold an adapter that is to be unloaded."""
    if users:
        count = "1 request is" if users == 1 else f"{users} requests are"
        raise EngineError(
            f"The adapter {name!r} is not unloaded: {count} using it.",
            remedy="Wait until they end, or cancel them. An adapter can be replaced while it is in use.",
            adapter=name,
            in_use=users,
        )
