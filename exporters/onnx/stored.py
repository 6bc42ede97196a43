"""The weights of a checkpoint under the names that the model has at run time, read one at a time.

transformers renames, stacks and splits tensors while it loads them; `dora_serve.runtime_names` says how. No model is
ever whole in memory here: at most one parameter is, in the dtype that it is stored in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.errors import CheckpointError, UnavailableError
from dora_serve.runtime_names import Origin, describe, parse
from dora_serve.safetensors_file import read_tensor


@dataclass(frozen=True)
class StoredWeights:
    """Parameters and buffers by run-time name.

    origins: how each is made of stored tensors. tied: run-time name to the name of the parameter that it shares.
    """

    checkpoint: ShardedCheckpoint
    origins: Mapping[str, Origin]
    tied: Mapping[str, str]

    def owner(self, name: str) -> str | None:
        """The run-time name under which the checkpoint has the tensor `name`, None where it has none."""
        if name in self.origins:
            return name
        source = self.tied.get(name, name)
        if source in self.origins:
            return source
        sharing = [other for other, shared in self.tied.items() if shared == source]
        return next((other for other in sharing if other in self.origins), None)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors that the run-time tensor is made of."""
        return tuple(stored for group in self.origins[self._owned(name)].groups for stored in group)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the run-time tensor, from the headers alone. Raises UnavailableError as `read` does."""
        owner = self._owned(name)
        origin = self.origins[owner]
        shapes = [[self.checkpoint.tensors[stored].shape for stored in group] for group in origin.groups]
        first = shapes[0][0]
        match origin.operation:
            case "rename":
                return first
            case "concat":
                return (sum(group[0][0] for group in shapes), *first[1:])
            case "chunk":
                return (first[0] // origin.parts, *first[1:])
            case "experts":
                return (len(shapes[0]), sum(group[0][0] for group in shapes), *first[1:])
            case other:
                raise _not_understood(owner, other)

    def read(self, name: str) -> Tensor:
        """The run-time tensor in its stored dtype. Raises UnavailableError where transformers makes it otherwise."""
        owner = self._owned(name)
        origin = self.origins[owner]

        def stored(group: Sequence[str]) -> list[Tensor]:
            return [read_tensor(self.checkpoint.tensors[one]) for one in group]

        match origin.operation:
            case "rename":
                return stored(origin.groups[0])[0]
            case "concat":
                return torch.cat([stored(group)[0] for group in origin.groups])
            case "chunk":
                return stored(origin.groups[0])[0].chunk(origin.parts)[origin.part]
            case "experts":
                return torch.cat([torch.stack(stored(group)) for group in origin.groups], dim=1)
            case other:
                raise _not_understood(owner, other)

    def require_whole(self, wanted: Mapping[str, Sequence[int]], architecture: str) -> None:
        """Raise CheckpointError unless every tensor of `wanted`, by run-time name, is there in its shape."""
        wrong = sorted(
            name for name, shape in wanted.items() if self.owner(name) is None or self.shape(name) != tuple(shape)
        )
        if wrong:
            raise incomplete(self.checkpoint.folder, architecture, wrong)

    def _owned(self, name: str) -> str:
        owner = self.owner(name)
        if owner is None:
            raise CheckpointError(f"{str(self.checkpoint.folder)!r} holds no {name}.", tensors=[name])
        return owner


def stored_weights(folder: Path, architecture: str) -> StoredWeights:
    """Of a transformers checkpoint. Raises CheckpointError for files that cannot be read."""
    checkpoint = open_checkpoint(folder)
    known = parse(describe(folder, architecture))
    return StoredWeights(checkpoint, known.origins, known.tied)


def plainly_stored(folder: Path) -> StoredWeights:
    """Of a checkpoint whose tensors have their run-time names, as diffusers saves them."""
    checkpoint = open_checkpoint(folder)
    return StoredWeights(checkpoint, {name: Origin("rename", ((name,),)) for name in checkpoint.tensors}, {})


def incomplete(folder: Path, architecture: str, wrong: Iterable[str]) -> CheckpointError:
    names = list(wrong)
    return CheckpointError(
        f"{str(folder)!r} does not hold the whole of {architecture}: {len(names)} tensors are missing or of another "
        f"shape, such as {', '.join(names[:3])}.",
        remedy="Merge again, or mend config.json.",
        tensors=names,
    )


def _not_understood(name: str, operation: str) -> UnavailableError:
    return UnavailableError(
        f"transformers makes {name} of stored tensors by {operation}, which this exporter does not understand.",
        remedy="Export safetensors instead (--to safetensors).",
        tensor=name,
    )
