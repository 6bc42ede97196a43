"""The norm scales of DoRAs that this machine has computed before, in files: such an adapter then loads as a LoRA does.

A norm scale is a constant of a base and an adapter, and computing it reads all of the base's adapted weights. What is
kept is known by all that it was computed from: the base's files, with their sizes and times; how the base is held in
memory; and every tensor and scaling of the adapter. A file that is damaged says nothing, and is made anew.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from dora_serve.cache_folder import cache_folder

MOST_BYTES = 256 << 20
"""Of all files together; those that were used longest ago go first."""

_FORMAT = "dora-serve norm scales 3"


def default_folder() -> Path:
    """In this project's cache (dora_serve.cache_folder)."""
    return cache_folder() / "norm_scales"


@dataclass(frozen=True)
class ScaleCache:
    """folder: made when it is first written to. base: its `identity`, None where it has none; then nothing is kept.
    Nothing here fails: what cannot be read or written is not kept either.
    """

    folder: Path
    base: Callable[[], str | None]
    most_bytes: int = MOST_BYTES

    def key(self, modules: Iterable[tuple[object, Iterable[Tensor]]]) -> str | None:
        """What scales are known by. modules: facts of each module of an adapter, and its tensors."""
        base = self.base()
        if base is None:
            return None
        # As strong as SHA-256, and four times as fast: most of the time that a known DoRA takes over a LoRA.
        content, said = blake3(), [_FORMAT, base]
        for facts, tensors in modules:
            said.append(repr(facts))
            for tensor in tensors:
                # The same bytes are other numbers in another dtype.
                said.append(f"{tensor.dtype} {tuple(tensor.shape)}")
                content.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return blake3("\n".join([*said, content.hexdigest()]).encode()).hexdigest()

    def get(self, key: str, like: Mapping[str, tuple[torch.dtype, int]]) -> dict[str, Tensor]:
        """The scales (out,) by name, of these dtypes and sizes; none where they are not all there."""
        path = self.folder / key
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return {}
        whole = sum(dtype.itemsize * size for dtype, size in like.values())
        values = bytearray(data[_DIGEST:])
        if len(values) != whole or blake3(values).digest() != data[:_DIGEST]:
            return {}
        found, place = {}, 0
        for name, (dtype, size) in sorted(like.items()):
            found[name] = torch.frombuffer(values, dtype=dtype, count=size, offset=place)
            place += dtype.itemsize * size
        return found

    def put(self, key: str, scales: Mapping[str, Tensor]) -> None:
        """Keep the scales, in one step."""
        values = b"".join(scales[name].cpu().contiguous().numpy().tobytes() for name in sorted(scales))
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
                try:
                    file.write(blake3(values).digest() + values)
                    file.close()
                    os.replace(file.name, self.folder / key)
                except BaseException:
                    os.unlink(file.name)
                    raise
            self._trim()

    def _trim(self) -> None:
        files = [(path.stat(), path) for path in self.folder.iterdir() if not path.name.startswith(".")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


_DIGEST = blake3().digest_size


def identity(
    files: object, fingerprint: Callable[[], str | None], layers: Mapping[str, Any], device: torch.device
) -> str | None:
    """What tells a base in memory from another: its files as `stamps` found them when it was loaded, samples of its
    tensors, and how its layers hold them. None for a base without a fingerprint."""
    samples = fingerprint()
    held = sorted({(type(layer).__name__, str(layer.weight.dtype), _coding(layer.weight)) for layer in layers.values()})
    return None if samples is None else repr((files, samples, held, device.type))


def _coding(weight: Any) -> str:
    """How bitsandbytes has coded four bits."""
    state = getattr(weight, "quant_state", None)
    return "" if state is None else f"{state.quant_type} {state.blocksize} {state.nested}"


def stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Of the weights in a folder: where they lie, their size, and when they were written, in nanoseconds."""
    files = sorted(folder.glob("*.safetensors"))
    return tuple((os.path.realpath(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()])
