"""A model folder on disk: which tensor lies where, its configuration and its side files. Nothing is decoded here.

Peak memory: the headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_serve.errors import CheckpointError, no_such_path
from dora_serve.safetensors_file import SafetensorsFile, TensorEntry, open_safetensors

CONFIG_NAME = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
_PREFERRED = ("model", "diffusion_pytorch_model", "pytorch_model")
_OTHER_FORMATS = frozenset({"onnx", "openvino", "original", "gguf", "coreml", "runs", "__pycache__"})
"""Subfolders that hold the model in another form, or a trainer's log."""

_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx.data",
)


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A checkpoint of one or many safetensors files.

    files: by name, in the order of the index. index: the name of the index file, None for a single file.
    index_metadata: its "metadata". config: config.json, empty where there is none. quantization: what tensors are made
    of where some are not stored as they are seen (dora_serve.quantized), None where all are.
    """

    folder: Path
    files: Mapping[str, SafetensorsFile]
    tensors: Mapping[str, TensorEntry]
    index: str | None
    index_metadata: Mapping[str, object]
    config: Mapping[str, object]
    quantization: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def file_of(self, tensor: str) -> str:
        """The name of the file that holds the tensor."""
        return self.tensors[tensor].path.name


def open_checkpoint(folder: Path) -> ShardedCheckpoint:
    """Open a folder with `*.safetensors`, with or without an index, or a single file.

    Raises CheckpointError: no such folder, no safetensors, pickles only, an index that is corrupt, names files
    outside the folder, misses one, or disagrees with the files' headers (all disagreements at once).
    """
    if folder.is_file() and folder.suffix == ".safetensors":
        file = open_safetensors(folder)
        return ShardedCheckpoint(folder.parent, {folder.name: file}, file.tensors, None, {}, read_json(folder.parent))
    if folder.is_file():
        raise CheckpointError(
            f"{str(folder)!r} is a file, wanted a folder or a .safetensors file.",
            remedy="Give the model's folder.",
            path=str(folder),
        )
    if not folder.is_dir():
        raise CheckpointError(no_such_path("The checkpoint", folder), remedy="Check the path.", path=str(folder))
    index = _find_index(folder)
    if index is None:
        single = _find_single(folder)
        file = open_safetensors(single)
        return ShardedCheckpoint(folder, {single.name: file}, file.tensors, None, {}, read_json(folder))
    weight_map, metadata = _read_index(index)
    files = {name: open_safetensors(folder / name) for name in dict.fromkeys(weight_map.values())}
    _require_agreement(index, weight_map, files)
    tensors = {name: entry for file in files.values() for name, entry in file.tensors.items()}
    return ShardedCheckpoint(folder, files, tensors, index.name, metadata, read_json(folder))


def read_json(folder: Path, name: str = CONFIG_NAME) -> dict[str, object]:
    """A JSON object of the folder, empty where the file is not there. Raises CheckpointError where it is corrupt."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as JSON: {error}.", remedy="Fetch or save it again.", path=str(path)
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(value).__name__}, wanted an object.",
            remedy="Fetch or save it again.",
            path=str(path),
        )
    return value


def side_files(folder: Path) -> tuple[Path, ...]:
    """Everything that belongs to the model and is not weights, as paths relative to the folder, in order.

    Hidden files and caches are left out, and so are links that lead to nothing.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith((".", "checkpoint-")) or part in _OTHER_FORMATS for part in relative.parts):
            continue
        if not path.is_file():
            continue
        if relative.name.endswith(_WEIGHT_SUFFIXES) or relative.name.endswith(".index.json"):
            continue
        if relative.name != "dora_export.json":
            found.append(relative)
    return tuple(found)


def _find_index(folder: Path) -> Path | None:
    # An index left behind beside a newer single file is common; transformers takes the single file as well.
    found = [
        path
        for path in sorted(folder.glob(f"*{INDEX_SUFFIX}"))
        if not (folder / path.name.removesuffix(".index.json")).is_file()
    ]
    for stem in _PREFERRED:
        if folder / f"{stem}{INDEX_SUFFIX}" in found:
            return folder / f"{stem}{INDEX_SUFFIX}"
        if (folder / f"{stem}.safetensors").is_file():
            return None
    if len(found) > 1:
        raise CheckpointError(
            f"{str(folder)!r} has {len(found)} indexes ({', '.join(path.name for path in found)}), wanted one.",
            remedy="Move the others away.",
            path=str(folder),
        )
    return found[0] if found else None


def _find_single(folder: Path) -> Path:
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    for stem in _PREFERRED:
        if (folder / f"{stem}.safetensors") in found:
            return folder / f"{stem}.safetensors"
    if len(found) == 1 and not found[0].name.startswith("adapter_"):
        return found[0]
    listing = sorted(path.name for path in folder.iterdir())
    got = ", ".join(listing[:12]) + (", ..." if len(listing) > 12 else "") if listing else "an empty folder"
    if any(name.startswith("adapter_") for name in listing):
        remedy = "This is an adapter, not a base model: give the model that it was trained on."
    elif any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in listing):
        remedy = "Pickles are not read. Convert them with transformers' save_pretrained(..., safe_serialization=True)."
    else:
        remedy = "Give a folder that holds model.safetensors, or its shards and their index."
    raise CheckpointError(
        f"{str(folder)!r} holds no checkpoint that can be read: got {got}, wanted model.safetensors or "
        "model.safetensors.index.json.",
        remedy=remedy,
        path=str(folder),
    )


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, object]]:
    table = read_json(path.parent, path.name)
    weight_map, metadata = table.get("weight_map"), table.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise CheckpointError(f"{str(path)!r} has no weight_map.", remedy="Fetch it again.", path=str(path))
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name and Path(name).name == name != ".." and not {"\\", "\0"} & set(name)
        if not plain:
            raise CheckpointError(
                f"{str(path)!r} places {tensor!r} in {name!r}: wanted the plain name of a file beside the index.",
                remedy="A name that leaves the folder is either an attack or a mistake; nothing was read.",
                path=str(path),
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{str(path)!r} places {tensor!r} in {name!r}: wanted a .safetensors file.",
                remedy="Pickles are not read. Convert them with transformers' save_pretrained.",
                path=str(path),
            )
    return weight_map, metadata


def _require_agreement(index: Path, weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile]) -> None:
    wrong = []
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            wrong.append(f"{tensor} is not in {name}, where the index puts it")
    for name, file in files.items():
        wrong += [
            f"{tensor} lies in {name} and is not in the index" for tensor in file.tensors if tensor not in weight_map
        ]
        wrong += [
            f"{tensor} lies in {name} and the index puts it in {weight_map[tensor]}"
            for tensor in file.tensors
            if weight_map.get(tensor, name) != name
        ]
    if wrong:
        raise CheckpointError(
            f"{str(index)!r} disagrees with its files: {'; '.join(wrong[:8])}{'; ...' if len(wrong) > 8 else ''}.",
            remedy="The index is stale or a file is from another save: fetch or save all of them again.",
            path=str(index),
            problems=wrong,
        )
