"""Adapters that come as files from a browser: confined, limited in size, and put into a folder of their own."""

from __future__ import annotations

import lzma
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dora_serve.errors import AdapterError

MOST_BYTES = 1 << 30
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_BROKEN: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    IndexError,
)
"""What zipfile raises, depending on where an archive is damaged; RuntimeError for a password, IndexError for a name
that begins with a null byte."""
_KEPT = (".safetensors", ".json", ".md", ".txt")


def unpack(files: Sequence[Path], into: Path, most_bytes: int = MOST_BYTES) -> Path:
    """Put an uploaded adapter into a new folder below `into`, and return that.

    files: one .zip, or the .safetensors with its adapter_config.json. Raises AdapterError for anything else, for a zip
    that climbs out of its folder, holds links, or is larger unpacked than `most_bytes`; then nothing is left.
    """
    into.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="upload-", dir=into))
    try:
        if len(files) == 1 and files[0].suffix.lower() == ".zip":
            return _unzip(files[0], folder, most_bytes)
        return _gather(files, folder, most_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _gather(files: Sequence[Path], folder: Path, most_bytes: int) -> Path:
    weights = [path for path in files if path.suffix.lower() == ".safetensors"]
    configs = [path for path in files if path.suffix.lower() == ".json"]
    if len(weights) != 1 or len(configs) != 1 or len(files) != 2:
        given = ", ".join(sorted(path.name for path in files)) or "nothing"
        raise AdapterError(
            f"The upload holds {given}: wanted a .safetensors with its {_CONFIG}, or one .zip.",
            remedy="Choose both files at once.",
        )
    if weights[0].stat().st_size + configs[0].stat().st_size > most_bytes:
        raise AdapterError(f"The upload is larger than {most_bytes:,} bytes.", remedy="Add it from a folder instead.")
    shutil.copyfile(weights[0], folder / _WEIGHTS)
    shutil.copyfile(configs[0], folder / _CONFIG)
    return folder


def _unzip(path: Path, folder: Path, most_bytes: int) -> Path:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                _require_confined(entry)
            if sum(entry.file_size for entry in entries) > most_bytes:
                raise AdapterError(
                    f"{path.name!r} is larger than {most_bytes:,} bytes unpacked.",
                    remedy="Add the adapter from a folder instead.",
                )
            kept = [entry for entry in entries if entry.filename.lower().endswith(_KEPT)]
            configs = [PurePosixPath(entry.filename) for entry in kept if entry.filename.endswith(_CONFIG)]
            if len(configs) != 1 or configs[0].name != _CONFIG:
                raise AdapterError(
                    f"{path.name!r} holds {len(configs) or 'no'} {_CONFIG}, wanted one.",
                    remedy="Zip the folder of one adapter.",
                )
            inside = configs[0].parent
            for entry in kept:
                where = PurePosixPath(entry.filename)
                if where.parent == inside:
                    _extract(archive, entry, folder / where.name)
    except _BROKEN as error:
        raise AdapterError(
            f"{path.name!r} cannot be unpacked: {error}.", remedy="Zip the adapter's folder again, without a password."
        ) from error
    return folder


def _require_confined(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    where = PurePosixPath(name.replace("\\", "/"))
    if not where.parts:
        raise AdapterError(
            f"The upload is refused: its entry {name!r} names no file.", remedy="Zip the adapter's plain files."
        )
    climbs = where.is_absolute() or ".." in where.parts or ":" in where.parts[0]
    if climbs or stat.S_ISLNK(entry.external_attr >> 16):
        what = "climbs out of its folder" if climbs else "is a link"
        raise AdapterError(
            f"The upload is refused: its entry {name!r} {what}.", remedy="Zip the adapter's plain files."
        )


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """No more bytes than the entry said, whatever it holds."""
    left = entry.file_size
    with archive.open(entry) as source, target.open("wb") as out:
        while left > 0 and (piece := source.read(min(left, 1 << 20))):
            out.write(piece)
            left -= len(piece)
