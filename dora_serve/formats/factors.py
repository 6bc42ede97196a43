"""From the tensors of a file to the factors of its modules: what the readers of all formats but PEFT's share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TypeVar

from dora_serve.adapter import Kind, LazyTensor
from dora_serve.errors import AdapterError

Roles = Sequence[tuple[str, re.Pattern[str]]]
"""What a tensor is and the name that says so, whose first group is the module; the first that matches counts."""

_Made = TypeVar("_Made")
_EMBEDDING = re.compile(r"(^|[._])(\w*embed(ding|_tokens|_in|s)?|wte|wpe|tok_embeddings|word_embeddings)$")


@dataclass
class Parts:
    """The tensors of a file by module and role; what fits no role is in `rest`, by its own name."""

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=lambda: defaultdict(dict))
    rest: dict[str, LazyTensor] = field(default_factory=dict)


def group(
    tensors: Mapping[str, LazyTensor],
    roles: Roles,
    rename: Callable[[str], str] = lambda module: module,
    *,
    keeps_rest: bool = False,
) -> Parts:
    """Sort the tensors. rename: from a module's name in the file to that in the model that was trained.

    Raises AdapterError where one module has two tensors of a role, or one that is not of floating point, and for
    tensors without a role unless the caller `keeps_rest`.
    """
    parts = Parts()
    for key, tensor in tensors.items():
        role, match = next(((role, match) for role, name in roles if (match := name.match(key))), ("", None))
        if match is None:
            parts.rest[key] = tensor
            continue
        if not tensor.dtype.is_floating_point and role != "alpha":  # a scalar, which readers judge themselves
            kind = str(tensor.dtype).removeprefix("torch.")
            raise not_understood({f"{key} ({kind})": tensor})
        module = rename(match[1])
        if role in parts.modules[module]:
            raise AdapterError(
                f"The adapter holds {role} of {module!r} twice, once as {key!r}.",
                remedy="Two adapters were saved into one file; save one of them alone.",
            )
        parts.modules[module][role] = tensor
    if parts.rest and not keeps_rest:
        raise not_understood(parts.rest)
    return parts


def of_each(file: Path, parts: Parts, make: Callable[[str, Mapping[str, LazyTensor]], _Made]) -> list[_Made]:
    """What `make` gives for each module and its tensors. Raises AdapterError with all the ValueErrors of it at once."""
    made, problems = [], []
    for module, found in parts.modules.items():
        try:
            made.append(make(module, found))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise misfit(file, problems)
    return made


def not_understood(tensors: Mapping[str, LazyTensor]) -> AdapterError:
    """The error for tensors that no reader knows a use for."""
    unknown = [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()]
    return AdapterError(
        f"The adapter holds {len(unknown)} tensors that are not understood: {', '.join(unknown[:8])}"
        f"{', ...' if len(unknown) > 8 else ''}.",
        remedy="Nothing is dropped in silence: remove them if they do not belong, or report the format.",
        tensors=unknown,
    )


def misfit(path: Path, problems: Sequence[str]) -> AdapterError:
    """The error for a file whose tensors do not fit each other or the configuration; all of it at once."""
    shown = "".join(f"\n  - {problem}" for problem in problems[:20])
    more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
    return AdapterError(
        f"The adapter {str(path)!r} is not whole or not consistent:{shown}{more}\n",
        remedy="Save the adapter again from the trained model; do not edit one file without the other.",
        problems=list(problems),
    )


def is_embedding(module: str) -> bool:
    """Whether a module's name says that it is an embedding, where its tensors' names do not."""
    return _EMBEDDING.search(module) is not None


@dataclass(frozen=True)
class Pair:
    """The two factors of a module: lora_A (r, in), lora_B (out, r); kind as their shapes say."""

    lora_A: LazyTensor
    lora_B: LazyTensor
    kind: Kind

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


def pair(module: str, lora_a: LazyTensor, lora_b: LazyTensor, names: tuple[str, str], rank: int | None = None) -> Pair:
    """Factors as PEFT shapes them: lora_a (r, in, *kernel) and lora_b (out, r, 1, ..), flattened to matrices.

    Raises ValueError, with what is wrong as a clause, where they do not fit each other, or `rank`.
    """
    shapes = f"{names[0]} {list(lora_a.shape)} and {names[1]} {list(lora_b.shape)}"
    if min(len(lora_a.shape), len(lora_b.shape)) < 2 or 0 in (*lora_a.shape, *lora_b.shape):
        raise ValueError(f"{module}: {shapes} are shards or empty")
    if lora_a.shape[0] != lora_b.shape[1] or prod(lora_b.shape[2:]) != 1:
        raise ValueError(f"{module}: {shapes} have no rank in common")
    if rank is not None and lora_a.shape[0] != rank:
        raise ValueError(f"{module}: {shapes}, where the configuration says rank {rank}")
    out, rank = lora_b.shape[0], lora_b.shape[1]
    kind: Kind = "conv" if len(lora_a.shape) > 2 else "linear"
    return Pair(
        lora_a.map((rank, prod(lora_a.shape[1:])), lambda tensor: tensor.flatten(1)) if kind == "conv" else lora_a,
        lora_b.map((out, rank), lambda tensor: tensor.flatten(1)) if len(lora_b.shape) > 2 else lora_b,
        kind,
    )
