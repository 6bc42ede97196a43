"""On-disk adapter formats, one file each with two functions: `sniff(path)` and `read(path, ...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_serve.adapter import Adapter
from dora_serve.errors import AdapterError, no_such_path
from dora_serve.formats import peft


@dataclass(frozen=True)
class ReadOptions:
    """What a user allows a reader to do.

    allow_pickle: read a `.bin` with `torch.load(weights_only=True)`. ignore_config: keys of the adapter's
    configuration that are known to the user not to change the weights.
    """

    allow_pickle: bool = False
    ignore_config: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Format:
    """sniff: whether a folder looks like this format, from names and configuration alone. read: the whole reader."""

    sniff: Callable[[Path], bool]
    read: Callable[[Path, bool, frozenset[str]], Adapter]


FORMATS: Mapping[str, Format] = {"peft": Format(peft.sniff, peft.read)}


def read_adapter(path: Path, options: ReadOptions | None = None) -> Adapter:
    """Read an adapter of any known format.

    Raises AdapterError where nothing here reads it or its files are unsound, UnmergeableError where they are sound and
    mean something that no dense weights equal.
    """
    options = options or ReadOptions()
    if not path.exists():
        raise AdapterError(no_such_path("The adapter", path), remedy="Check the path.", path=str(path))
    for adapter_format in FORMATS.values():
        if adapter_format.sniff(path):
            return adapter_format.read(path, options.allow_pickle, options.ignore_config)
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    listing = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "") if found else "nothing"
    raise AdapterError(
        f"{str(path)!r} holds no adapter that is known here: got {listing}, wanted a folder with adapter_config.json "
        "and adapter_model.safetensors (PEFT).",
        remedy="Give the folder that the trainer's save_pretrained wrote.",
        path=str(path),
    )
