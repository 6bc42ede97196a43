"""The fingerprint of the weights that a graph serves."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.linears import is_parameter
from exporters.onnx.weight_blocks import array_of

if TYPE_CHECKING:
    import onnx_ir

SLOT_CONSTANTS = "slots."
"""Begins the names of what the slots of a graph bring with them, which is no weight of the base."""


def fingerprint(model: onnx_ir.Model) -> str:
    """sha256 (hexadecimal) over name, dtype, shape and bytes of every parameter of the graph, in order of name; the
    same with slots and without.

    Two exports have the same where they serve the same base in the same way, so that an adapter's norms fit both.
    """
    digest = hashlib.sha256()
    for name in sorted(model.graph.initializers):
        value = model.graph.initializers[name]
        if not is_parameter(value) or value.const_value is None or name.startswith(SLOT_CONSTANTS):
            continue
        tensor = value.const_value
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        values = np.ascontiguousarray(array_of(value))
        if values.size:
            digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
