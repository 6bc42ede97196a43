"""A base whose layers are repeated, as an adapter trained with `layer_replication` sees it.

PEFT builds the longer model from shared copies (tuners_utils.replicate_layers) and numbers the adapter's layers by
it; a checkpoint that stands by itself holds a copy of each. No byte is moved here: the copies are names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.errors import Problem
from dora_serve.safetensors_file import SafetensorsFile, TensorEntry

_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?(?:layers|encoder\.layer|h)\.)(?P<index>\d+)(?P<rest>\..+)$")


def replicate_layers(base: ShardedCheckpoint, spec: object) -> tuple[ShardedCheckpoint, dict[tuple[str, ...], object]]:
    """The base under the names of the longer model, and what its config.json has to say.

    spec: PEFT's list of [start, end). Raises ValueError, with a Problem, for a list or a base that does not fit.
    """
    count = base.config.get("num_hidden_layers")
    stacks = _stacks(base.tensors)
    fitting = [
        stack for stack, indices in stacks.items() if indices == set(range(len(indices))) and len(indices) == count
    ]
    if len(fitting) != 1 or not isinstance(count, int):
        raise ValueError(
            Problem("layer_replication", f"{len(fitting)} stacks of {count} layers in the base", "exactly one")
        )
    order = _order(spec, count)
    copies: dict[int, list[int]] = defaultdict(list)
    for position, source in enumerate(order):
        copies[source].append(position)
    files = {name: _renamed(file, fitting[0], copies) for name, file in base.files.items()}
    tensors = {name: entry for file in files.values() for name, entry in file.tensors.items()}
    changes: dict[tuple[str, ...], object] = {("num_hidden_layers",): len(order)}
    for key, value in base.config.items():
        if isinstance(value, list) and len(value) == count and key in ("layer_types", "mlp_layer_types"):
            changes[(key,)] = [value[source] for source in order]
    return replace(base, files=files, tensors=tensors), changes


def _stacks(tensors: Mapping[str, TensorEntry]) -> dict[str, set[int]]:
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        if match := _LAYER.match(name):
            stacks[match["stack"]].add(int(match["index"]))
    return stacks


def _order(spec: object, count: int) -> Sequence[int]:
    """The source layer of each layer of the longer model."""
    order: list[int] = []
    for piece in spec if isinstance(spec, list) else [spec]:
        ends = piece if isinstance(piece, list) and all(isinstance(end, int) for end in piece) else []
        if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= count:
            raise ValueError(Problem("layer_replication", repr(spec), f"a list of [start, end) within {count} layers"))
        order.extend(range(ends[0], ends[1]))
    return order


def _renamed(file: SafetensorsFile, stack: str, copies: Mapping[int, Sequence[int]]) -> SafetensorsFile:
    tensors: dict[str, TensorEntry] = {}
    for name, entry in file.tensors.items():
        match = _LAYER.match(name)
        if match is None or match["stack"] != stack:
            tensors[name] = entry
            continue
        for position in copies.get(int(match["index"]), ()):
            new = f"{stack}{position}{match['rest']}"
            tensors[new] = replace(entry, name=new)
    return replace(file, tensors=tensors)
