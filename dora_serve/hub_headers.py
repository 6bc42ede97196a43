"""A base or an adapter of the Hub without its weights: the headers, by HTTP range, and what lies beside them.

What a plan needs to know of a tensor stands in its file's header. So do not the few values that say how it is meant, a
kohya file's `alpha` in each module; they are fetched by their own ranges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dora_serve.hub import HubSpec, Located, fetch, hub_repository, locate, split_file, split_spec
from dora_serve.hub_errors import translate
from dora_serve.hub_files import PIPELINE_INDEX, What, choose_files, is_weights
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.safetensors_file import MAX_HEADER_BYTES

_FIRST = 1 << 16
_SCALAR_BYTES = 8
_MOST_SCALARS = 2000
"""More ranges than that are slower than the file."""

_AT_A_TIME = 8


@dataclass(frozen=True)
class Outline:
    """located: where the files seem to be. fetched, nbytes: of the weights, in bytes; equal where all is here."""

    located: Located
    fetched: int
    nbytes: int


class _NoRanges(Exception):
    """The server does not give parts of files."""


@contextmanager
def locate_headers(spec: str, *, what: What, on_progress: OnProgress = ignore_progress) -> Iterator[Outline]:
    """As `locate`, for a look at what is there: of weights that would have to be fetched, only the headers are.

    Within the block the files of weights have their size and their header, and zeros where the values are: they may be
    opened and planned with, and nothing that depends on a value may be done. What lies on this machine, the Hub's cache
    included, is given as it is. Raises what `locate` raises.
    """
    if hub_repository(spec) is None:
        yield whole(locate(spec, what=what, on_progress=on_progress))
        return
    repository = split_spec(spec)
    assert repository is not None
    around, file = split_file(repository)
    weights: list[str] = []
    beside: list[str] = []

    def choose(names: Any, read: Any) -> list[str]:
        chosen = choose_files(names, read, what, around.repo_id, file=file)
        weights.extend(name for name in chosen if is_weights(name))
        beside.extend(name for name in chosen if not is_weights(name))
        return beside

    found = fetch(spec, around, choose, on_progress)
    if _all_cached(around, found, weights):
        yield whole(locate(spec, what=what, on_progress=on_progress))
        return
    with TemporaryDirectory(prefix="dora-export-headers-") as scratch:
        outline = Path(scratch, *around.repo_id.split("/"))
        outline.mkdir(parents=True)
        for name in beside:
            (outline / name).parent.mkdir(parents=True, exist_ok=True)
            (outline / name).symlink_to((found.path / name).resolve())
        try:
            for name in weights:
                (outline / name).parent.mkdir(parents=True, exist_ok=True)
            sizes = [_write_outline(_url(around, found, name), outline / name) for name in weights]
        except _NoRanges:
            sizes = []
        except Exception as problem:
            translated = translate(problem, repo_id=around.repo_id, revision=around.revision)
            if translated is None:
                raise
            raise translated from problem
        if not sizes:
            yield whole(locate(spec, what=what, on_progress=on_progress))
            return
        located = replace(found, path=outline / file if file else outline)
        yield Outline(located, sum(fetched for fetched, _ in sizes), sum(size for _, size in sizes))


def whole(located: Located) -> Outline:
    """Of files that are here."""
    where = "*/*.safetensors" if (located.path / PIPELINE_INDEX).is_file() else "*.safetensors"
    files = [located.path] if located.path.is_file() else list(located.path.glob(where))
    size = sum(path.stat().st_size for path in files)
    return Outline(located, size, size)


def _all_cached(repository: HubSpec, found: Located, weights: list[str]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    prefix = f"{repository.subfolder}/" if repository.subfolder else ""
    return all(
        isinstance(try_to_load_from_cache(repository.repo_id, prefix + name, revision=found.revision), str)
        for name in weights
    )


def _url(repository: HubSpec, found: Located, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository.repo_id, name, subfolder=repository.subfolder, revision=found.revision)


def _write_outline(url: str, path: Path) -> tuple[int, int]:
    """Write the header and the scalars of a safetensors file of the Hub; returns the bytes fetched and its size."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # The rest is asked of where the first answer came from, which wants no token.
    data, size, storage = _get(url, 0, _FIRST, build_hf_headers())
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        data_start = len(data)  # no header: the reader says so
    else:
        data_start = 8 + length
        if len(data) < data_start:
            data += _get(storage, len(data), data_start, {})[0]
    ranges = _scalars(data[8:data_start], data_start)
    with path.open("wb") as target:
        target.write(data[:data_start])
        target.truncate(size)
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            parts = pool.map(lambda span: data[slice(*span)] if span[1] <= len(data) else _part(storage, span), ranges)
            for (start, _), part in zip(ranges, parts, strict=True):
                target.seek(start)
                target.write(part)
    return len(data) + sum(stop - start for start, stop in ranges if stop > len(data)), size


def _part(url: str, span: tuple[int, int]) -> bytes:
    return _get(url, *span, {})[0]


def _get(url: str, start: int, stop: int, headers: Mapping[str, str]) -> tuple[bytes, int, str]:
    """Bytes [start, stop) of a file, fewer where it ends; its size; and the address that they came from."""
    from huggingface_hub import get_session, hf_raise_for_status

    asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=asked) as answer:
        if answer.status_code >= 400:
            answer.read()
        hf_raise_for_status(answer)
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status_code != 206 or not total.isdigit():
            raise _NoRanges
        return answer.read(), int(total), str(answer.url)


def _scalars(header: bytes, data_start: int) -> list[tuple[int, int]]:
    """Where the scalars lie, from the start of the file. None of a header that the reader will refuse."""
    try:
        table = json.loads(header)
        spans = [facts["data_offsets"] for name, facts in table.items() if name != "__metadata__"]
        found = [(data_start + start, data_start + stop) for start, stop in spans if 0 < stop - start <= _SCALAR_BYTES]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    if len(found) > _MOST_SCALARS:
        raise _NoRanges
    return sorted(found)
