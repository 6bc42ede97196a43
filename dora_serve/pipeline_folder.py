"""A diffusers pipeline on disk: model_index.json, and a folder for each component, some of them checkpoints.

Peak memory: the headers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_serve.checkpoint import CONFIG_NAME, ShardedCheckpoint, open_checkpoint, read_json, side_files
from dora_serve.errors import CheckpointError

INDEX_NAME = "model_index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LIBRARIES = ("diffusers", "transformers")
_NO_MODEL = re.compile("Scheduler|Tokenizer|Processor|Extractor|Guidance|Guider")
"""In the names of classes of these libraries that have no weights."""


@dataclass(frozen=True)
class PipelineFolder:
    """index: model_index.json. components: those with safetensors, by folder. pickled: folders whose weights are
    pickles, which are never read. absent: what the index gives a class of another library, and has no folder.
    side_files: all that is no component's, pickles included, relative to the folder.
    """

    folder: Path
    index: Mapping[str, object]
    components: Mapping[str, ShardedCheckpoint]
    pickled: tuple[str, ...]
    absent: tuple[str, ...]
    side_files: tuple[Path, ...]

    @property
    def denoiser(self) -> str | None:
        """The component that adapters without a component's name were trained on."""
        return next((name for name in ("unet", "transformer", "prior") if name in self.components), None)


def is_pipeline(folder: Path) -> bool:
    """Whether the folder is a pipeline rather than one model."""
    return (folder / INDEX_NAME).is_file()


def open_pipeline(folder: Path) -> PipelineFolder:
    """Open every component that has weights. Raises CheckpointError for one that cannot be read, for models that
    model_index.json names and the folder lacks (all of them at once), or where there are no weights at all.
    """
    index = read_json(folder, INDEX_NAME)
    components: dict[str, ShardedCheckpoint] = {}
    pickled = []
    named = _components_of(index)
    for name in named:
        files = [path.name for path in (folder / name).iterdir()] if (folder / name).is_dir() else []
        if any(file.endswith(".safetensors") for file in files):
            components[name] = open_checkpoint(folder / name)
        elif any(file.endswith(_PICKLES) for file in files):
            pickled.append(name)
    if not components:
        got = f" ({', '.join(pickled)} hold pickles)" if pickled else ""
        raise CheckpointError(
            f"The pipeline {str(folder)!r} has no component with safetensors weights{got}.",
            remedy="Save it again with diffusers' save_pretrained, which writes safetensors.",
            path=str(folder),
        )
    _require_models(folder, named, {*components, *pickled})
    beside = [path for path in side_files(folder) if path.parts[0] not in components]
    beside += [
        path.relative_to(folder)
        for name in pickled
        for path in sorted((folder / name).iterdir())
        if path.is_file() and path.name.endswith((*_PICKLES, ".index.json"))
    ]
    absent = tuple(name for name in named if not (folder / name).is_dir() and not _is_no_model(*named[name]))
    return PipelineFolder(folder, index, components, tuple(pickled), absent, tuple(beside))


def _components_of(index: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """What model_index.json gives as [library, class]. A name that would leave the folder is none."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if Path(name).name == name and name not in ("", ".", "..") and "\\" not in name
    }


def _is_no_model(library: str, kind: str) -> bool:
    return library in _LIBRARIES and bool(_NO_MODEL.search(kind))


def _require_models(folder: Path, named: Mapping[str, tuple[str, str]], found: Collection[str]) -> None:
    """Raise CheckpointError for models of diffusers and transformers without weights or configuration. What the index
    gives as [null, null] is none, and of other libraries' classes nobody knows here what they are made of.
    """
    lacking: dict[str, list[str]] = {}
    for name, (library, kind) in named.items():
        if library not in _LIBRARIES or _is_no_model(library, kind):
            continue
        lacks = [] if name in found else ["weights"]
        lacks += [] if (folder / name / CONFIG_NAME).is_file() else [CONFIG_NAME]
        if lacks:
            lacking[name] = lacks
    if not lacking:
        return
    said = "; ".join(f"{name}/ ({named[name][1]}) lacks {' and '.join(lacks)}" for name, lacks in lacking.items())
    words = ["hf", "download", "USER/NAME", "--local-dir", str(folder)]
    words += [word for name in lacking for word in ("--include", f"{name}/*")]
    raise CheckpointError(
        f"The pipeline {str(folder)!r} is not whole: {INDEX_NAME} names models of which files are missing. {said}.",
        remedy=f"Fetch the rest ({shlex.join(words)}), or give the whole folder. Where the pipeline is meant to be "
        f"without it, {INDEX_NAME} says [null, null].",
        path=str(folder),
        lacking=lacking,
    )
