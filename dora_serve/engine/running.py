"""Which generations of an engine are under way, and which thread reads each, so that none waits for its own thread."""

from __future__ import annotations

import threading
from typing import Protocol
from weakref import WeakSet


class Decoding(Protocol):
    """reader: the thread that asked for an event last."""

    reader: int

    def holds_adapters(self) -> bool: ...


class Running:
    """The generations of one engine. Safe to use from several threads."""

    def __init__(self) -> None:
        self._all: WeakSet[Decoding] = WeakSet()
        self._lock = threading.Lock()

    def add(self, decoding: Decoding) -> None:
        with self._lock:
            self._all.add(decoding)

    def only_own_thread_holds(self, waiting: Decoding) -> bool:
        """Whether adapters are held by others than `waiting`, and all of these are read by the same thread: while that
        one waits, none of them goes on."""
        with self._lock:
            holding = [one for one in self._all if one is not waiting and one.holds_adapters()]
        return bool(holding) and all(one.reader == waiting.reader for one in holding)
