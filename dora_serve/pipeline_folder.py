"""A diffusers pipeline on disk: model_index.json, and a folder for each component, some of them checkpoints.

Peak memory: the headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint, read_json, side_files
from dora_serve.errors import CheckpointError

INDEX_NAME = "model_index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class PipelineFolder:
    """index: model_index.json. components: those with safetensors, by folder. pickled: folders whose weights are
    pickles, which are never read. side_files: all that is no component's, pickles included, relative to the folder.
    """

    folder: Path
    index: Mapping[str, object]
    components: Mapping[str, ShardedCheckpoint]
    pickled: tuple[str, ...]
    side_files: tuple[Path, ...]

    @property
    def denoiser(self) -> str | None:
        """The component that adapters without a component's name were trained on."""
        return next((name for name in ("unet", "transformer", "prior") if name in self.components), None)


def is_pipeline(folder: Path) -> bool:
    """Whether the folder is a pipeline rather than one model."""
    return (folder / INDEX_NAME).is_file()


def open_pipeline(folder: Path) -> PipelineFolder:
    """Open every component that has weights. Raises CheckpointError for one that cannot be read, or where none has."""
    index = read_json(folder, INDEX_NAME)
    components: dict[str, ShardedCheckpoint] = {}
    pickled = []
    for name in _component_names(index):
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
    beside = [path for path in side_files(folder) if path.parts[0] not in components]
    beside += [
        path.relative_to(folder)
        for name in pickled
        for path in sorted((folder / name).iterdir())
        if path.is_file() and path.name.endswith((*_PICKLES, ".index.json"))
    ]
    return PipelineFolder(folder, index, components, tuple(pickled), tuple(beside))


def _component_names(index: Mapping[str, object]) -> list[str]:
    """Names of model_index.json that stand for a class: [library, class]. One that would leave the folder is none."""
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if Path(name).name == name and name not in ("", ".", "..") and "\\" not in name
    ]
