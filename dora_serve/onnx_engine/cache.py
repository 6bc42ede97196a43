"""Keys and values of a batch whose rows begin and end at different times, for graphs that take and give whole caches.

Rows that run together share arrays, padded on the left, so that the newest tokens of all stand in one column. The
arrays are put together anew only when rows come and go; between that a step's output is the next step's input.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]


@dataclass(eq=False)
class Member:
    """A row, wherever it is. key: rows of one key may run together."""

    key: Hashable


@dataclass
class Group:
    """Rows that run together. past: by input name, (members, heads, places, width). mask (members, places)."""

    members: list[Member]
    past: Mapping[str, Array]
    mask: Array


class GroupedCache:
    """`dora_serve.engine.generation.Cache`: rows by place, and the groups that they run in."""

    def __init__(self, rows: int) -> None:
        self._places: list[Member | None] = [None] * rows
        self._groups: list[Group] = []
        self._filling: int | None = None
        self.count = 0

    @property
    def filling(self) -> bool:
        return self._filling is not None

    def begin_fill(self, row: int, most: int = 0) -> None:
        self._filling = row

    def begin_step(self, count: int, device: torch.device) -> None:
        self._filling, self.count = None, count

    def end(self, tokens: int) -> None:
        """Nothing: `filled` and the groups' own arrays say it all."""

    def move(self, source: int, target: int) -> None:
        self._places[target] = self._places[source]

    def clear(self, row: int) -> None:
        """Nothing: a row that has ended is left out of the arrays."""

    def filled(self, key: Hashable, past: Mapping[str, Array], tokens: int) -> None:
        """The row that is being filled has this cache, of so many tokens."""
        assert self._filling is not None
        member = Member(key)
        self._places[self._filling] = member
        self._groups.append(Group([member], past, np.ones((1, tokens), dtype=np.int64)))

    def groups(self) -> list[Group]:
        """Those of the rows of the step, one for each key."""
        alive = self._places[: self.count]
        kept = [_only(group, alive) for group in self._groups]
        by_key: dict[Hashable, list[Group]] = {}
        for group in kept:
            if group.members:
                by_key.setdefault(group.members[0].key, []).append(group)
        self._groups = [groups[0] if len(groups) == 1 else _joined(groups) for groups in by_key.values()]
        return self._groups

    def place_of(self, member: Member) -> int:
        return self._places[: self.count].index(member)


def _only(group: Group, alive: Sequence[Member | None]) -> Group:
    """The group without the rows that have ended, and without the padding that only they made needful."""
    kept = [number for number, member in enumerate(group.members) if member in alive]
    if len(kept) == len(group.members):
        return group
    mask = group.mask[kept]
    start = int(mask.argmax(axis=1).min()) if kept else 0
    past = {name: np.ascontiguousarray(value[kept, :, start:]) for name, value in group.past.items()}
    return Group([group.members[number] for number in kept], past, mask[:, start:])


def _joined(groups: Sequence[Group]) -> Group:
    places = max(group.mask.shape[1] for group in groups)
    past = {name: np.concatenate([_padded(group.past[name], 2, places) for group in groups]) for name in groups[0].past}
    mask = np.concatenate([_padded(group.mask, 1, places) for group in groups])
    return Group([member for group in groups for member in group.members], past, mask)


def _padded(array: Array, axis: int, places: int) -> Array:
    """With zeros on the left, so that `axis` has so many places."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (places - array.shape[axis], 0)
    return np.pad(array, widths)
