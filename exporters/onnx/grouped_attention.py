"""Keys and values that the heads of a group share, handed to Attention as they are (grouped-query attention).

transformers repeats them for each head of the group before the attention. ONNX's Attention (opset 23) does that by
itself, head h of the query taking key h // (query heads / key heads), as transformers' `repeat_kv` lays them out. A
graph that repeats them copies the whole cache, several times over, for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

_QUERY, _KEY, _VALUE = 0, 1, 2


def share_keys_and_values(model: onnx_ir.Model) -> None:
    """Take out the repetition before each Attention of (batch, heads, sequence, width). What it leaves unread stays."""
    for node in model.graph:
        if node.op_type == "Attention" and node.domain == "":
            shared = [_shared(node.inputs[place]) for place in (_KEY, _VALUE)]
            sizes = [_sizes(value) for value in (node.inputs[_QUERY], *shared)]
            if all(len(size) == 4 for size in sizes) and sizes[_KEY][1] == sizes[_VALUE][1]:
                for place, value in zip((_KEY, _VALUE), shared, strict=True):
                    node.replace_input_with(place, value)


def _shared(repeated: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """x (batch, groups, sequence, width), where a value is x with each group repeated; None where it is not."""
    expanded = _input_of("Reshape", repeated)
    unsqueezed = _input_of("Expand", expanded)
    x = _input_of("Unsqueeze", unsqueezed)
    whole, apart, shared = (_sizes(value) for value in (repeated, expanded, x))
    if len(shared) != 4 or len(apart) != 5 or None in apart or _sizes(unsqueezed)[2:3] != [1]:
        return None
    groups, each = apart[1], apart[2]
    if not isinstance(groups, int) or not isinstance(each, int) or apart != [*shared[:2], each, *shared[2:]]:
        return None
    return x if whole == [shared[0], groups * each, *shared[2:]] else None


def _input_of(op_type: str, value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """What a value was made of by an operator of that kind, None where another made it."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == op_type and node.domain == "" else None


def _sizes(value: onnx_ir.Value | None) -> Sequence[int | str | None]:
    """The sizes of a value, names for those that vary; none where they are not known."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else size.value for size in value.shape]
