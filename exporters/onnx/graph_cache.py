"""Traced graphs without their weights, kept from one export to the next: tracing takes minutes, weights take seconds.

An entry is one file named by a digest of everything that shapes the graph, and begins with a digest of its own
contents. It is written beside its place and renamed into it, so that processes at work at a time cannot disturb each
other; one that does not match its digest is thrown away. The least recently used go once all of them take too much.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dora_serve.cache_folder import cache_folder

MAX_BYTES = 256 << 20
_SUFFIX = ".graph"
_DIGEST = 64


def default_cache() -> Path:
    """In this project's cache (dora_serve.cache_folder)."""
    return cache_folder() / "onnx"


def digest_of(facts: Mapping[str, object]) -> str:
    """The name of an entry: facts are plain values, and any other value of any of them is another entry."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def fetch(folder: Path, key: str) -> bytes | None:
    """The entry's contents, None where there is none that is whole."""
    path = folder / (key + _SUFFIX)
    try:
        contents = path.read_bytes()
    except OSError:
        return None
    digest, payload = contents[:_DIGEST], contents[_DIGEST:]
    if digest != _digest(payload):
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # when it was last of use
    return payload


def holds(folder: Path, key: str) -> bool:
    """Whether there is an entry; only reading it shows whether it is whole."""
    return (folder / (key + _SUFFIX)).is_file()


def keep(folder: Path, key: str, payload: bytes, *, max_bytes: int = MAX_BYTES) -> None:
    """Write an entry. A cache that cannot be written costs time, and is no error."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_digest(payload) + payload)
            os.replace(name, folder / (key + _SUFFIX))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        _bound(folder, max_bytes)


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()


def _bound(folder: Path, max_bytes: int) -> None:
    entries = [(path, path.stat()) for path in folder.glob(f"*{_SUFFIX}")]
    total = sum(facts.st_size for _, facts in entries)
    for path, facts in sorted(entries, key=lambda entry: entry[1].st_mtime):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= facts.st_size
