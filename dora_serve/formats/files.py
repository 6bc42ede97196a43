"""The files of an adapter, before anything is made of them: what all readers share.

Peak memory: a small file whole, else the headers; of a pickle all of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.adapter import LazyTensor
from dora_serve.errors import AdapterError, CheckpointError
from dora_serve.safetensors_file import WholeFile, open_safetensors, peek, read_tensor

CONFIG_NAME = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AT_ONCE_BYTES = 1 << 25
"""An adapter has hundreds of tensors of a few kilobytes, which take longer to read one by one than all at once."""


@dataclass(frozen=True)
class Weights:
    """file: where the tensors are. metadata: of a safetensors header. are_finite: whether it is known that all are."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    are_finite: bool = False


def find_weights(path: Path, *names: str, single: bool = False) -> Path | None:
    """`path` itself if it is a file, else the first of `names` that the folder has; with `single`, else its only
    safetensors file.
    """
    if path.is_file():
        return path
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None and single:
        files = sorted(path.glob("*.safetensors"))
        return files[0] if len(files) == 1 else None
    return found


def tensor_names(file: Path | None) -> Collection[str]:
    """The names in a safetensors file; none for a pickle, or where there is no header."""
    return header(file)[0]


def header(file: Path | None) -> tuple[Collection[str], Mapping[str, str]]:
    """The names and the metadata of a safetensors file; nothing for a pickle, or where there is no header."""
    if file is None or file.suffix != ".safetensors" or not file.is_file():
        return (), {}
    try:
        return peek(file)
    except CheckpointError:
        return (), {}


def peek_config(path: Path, name: str = CONFIG_NAME) -> Mapping[str, object]:
    """The folder's configuration, empty where there is none that can be read."""
    try:
        value = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_config(path: Path, name: str = CONFIG_NAME) -> dict[str, object]:
    """The folder's configuration. Raises AdapterError where it is not a JSON object."""
    file = path / name
    remedy = "Copy the adapter again, or restore the file from the trainer's output."
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{str(path)!r} has no {name}.", remedy=remedy, path=str(file)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{str(file)!r} cannot be read as JSON: {error}.", remedy=remedy, path=str(file)) from error
    if not isinstance(raw, dict):
        raise AdapterError(
            f"{str(file)!r} holds a {type(raw).__name__}, wanted a JSON object.", remedy=remedy, path=str(file)
        )
    return raw


def open_weights(file: Path, allow_pickle: bool) -> Weights:
    """The tensors of a safetensors file or, where that is allowed, of a pickle.

    Raises AdapterError for a file that is not sound, a pickle that is not allowed, and one without tensors.
    """
    weights = _open_pickle(file, allow_pickle) if file.suffix in PICKLES else _open_safetensors(file)
    if not weights.tensors:
        raise AdapterError(f"{str(file)!r} holds no tensors.", remedy="Save the adapter again.", path=str(file))
    return weights


def open_finite(
    path: Path, file: Path | None, wanted: Sequence[str], allow_pickle: bool, unused: re.Pattern[str] | None = None
) -> Weights:
    """The tensors of `file`, which was looked for in `path` under the names `wanted`.

    Raises AdapterError where there is none, where it is not sound, or where a value is NaN or infinite, but for those
    of tensors whose names `unused` finds.
    """
    if file is None:
        raise no_weights(path, wanted)
    weights = open_weights(file, allow_pickle)
    require_finite(weights, {name for name in weights.tensors if unused is not None and unused.search(name)})
    return weights


def _open_safetensors(file: Path) -> Weights:
    try:
        opened = open_safetensors(file)
    except CheckpointError as error:
        raise AdapterError(error.message, remedy=error.remedy, path=str(file)) from error
    whole = WholeFile(opened) if opened.nbytes <= _AT_ONCE_BYTES else None
    read = read_tensor if whole is None else whole.read
    lazy = {
        name: LazyTensor(entry.shape, entry.dtype, lambda entry=entry: read(entry))  # type: ignore[misc]
        for name, entry in opened.tensors.items()
    }
    return Weights(file, lazy, opened.metadata, whole is not None and whole.is_finite())


def _open_pickle(file: Path, allow_pickle: bool) -> Weights:
    state = load_pickle(file, allow_pickle)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AdapterError(
            f"{str(file)!r} holds a {type(state).__name__}, wanted a dictionary of tensors.",
            remedy="Save the adapter's state_dict, or better, save it as safetensors.",
            path=str(file),
        )
    return Weights(file, {str(name): LazyTensor.of(value.detach().contiguous()) for name, value in state.items()})


def load_pickle(file: Path, allow_pickle: bool) -> object:
    """What a pickle holds, read as weights only. Raises AdapterError where that is not allowed or cannot be done."""
    if not allow_pickle:
        raise AdapterError(
            f"{str(file.parent)!r} holds its weights only as {file.name}, a pickle, which can run code when it is "
            "read.",
            remedy="If you trust where it comes from, say --allow-pickle: it is then read with weights_only=True.",
            path=str(file),
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds on hostile or truncated input
        raise AdapterError(
            f"{str(file)!r} cannot be read as weights only: {str(error).partition(chr(10))[0]}",
            remedy="Convert it to safetensors where it was made.",
            path=str(file),
        ) from error


def require_finite(weights: Weights, unused: Collection[str] = ()) -> None:
    """Raises AdapterError that names every tensor with a value that is NaN or infinite, `unused` ones apart."""
    if weights.are_finite:
        return
    bad = []
    for key, lazy in weights.tensors.items():
        if key in unused or not lazy.dtype.is_floating_point:
            continue
        tensor = lazy.load()
        if tensor.dtype.itemsize == 1:  # no isfinite kernel for float8
            tensor = tensor.float()
        if math.isfinite(tensor.sum(dtype=torch.float64).item()):  # one pass, where counting takes several
            continue
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            bad.append(f"{key} ({wrong} of {tensor.numel()})")
    if bad:
        raise AdapterError(
            f"The adapter holds values that are NaN or infinite: {', '.join(bad[:8])}"
            f"{', ...' if len(bad) > 8 else ''}.",
            remedy="The training diverged, or the file is damaged: use an earlier checkpoint.",
            tensors=bad,
        )


def no_weights(path: Path, wanted: Sequence[str]) -> AdapterError:
    """The error for a folder that has none of the files that its format keeps weights in."""
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    return AdapterError(
        f"{str(path)!r} has {'a configuration and ' if CONFIG_NAME in found else ''}no weights: got "
        f"{', '.join(found[:12])}{', ...' if len(found) > 12 else ''}, wanted "
        f"{' or '.join(wanted)}.",
        remedy="Copy the weights from the trainer's output folder.",
        path=str(path),
    )
