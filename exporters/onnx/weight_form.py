"""In which form a weight of a graph holds a parameter of the model. Its name says so, and so a file explains itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# A weight that is stored transposed, as a matrix product wants it, has its parameter's name with this at the end.
TRANSPOSED = ".T"
BLOCK_SIZE = 32

_NAME = re.compile(r"^(?P<parameter>.+?)(?P<turned>\.T)?(\.int(?P<bits>[48])(?P<scales>\.scales)?)?$")


@dataclass(frozen=True)
class WeightForm:
    """parameter: its run-time name. transposed: its last two axes are swapped. part: the whole, or in blocks of 32
    along the last axis the integers of `bits` bits (unsigned, with the middle for zero) or their scales.
    """

    parameter: str
    transposed: bool = False
    bits: int | None = None
    part: Literal["whole", "values", "scales"] = "whole"

    @property
    def name(self) -> str:
        turned = TRANSPOSED if self.transposed else ""
        if self.bits is None:
            return f"{self.parameter}{turned}"
        return f"{self.parameter}{turned}.int{self.bits}{'.scales' if self.part == 'scales' else ''}"


def form_of(name: str) -> WeightForm:
    """The form that the name of an initializer says it has."""
    match = _NAME.match(name)
    assert match is not None, name
    if match["bits"] is None:
        return WeightForm(match["parameter"], match["turned"] is not None)
    part: Literal["values", "scales"] = "scales" if match["scales"] else "values"
    return WeightForm(match["parameter"], match["turned"] is not None, int(match["bits"]), part)
