"""What the tests of formats share: a merge of ours against logits or weights that somebody else's code made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.ops import round_once
from dora_serve.reference import attach_adapter
from dora_serve.row_order import in_base_order
from tests.cases import distance, llama, load, logits, merge_to, read_tensors, tokens


def check_weights(
    base: Path, adapter: Path, out: Path, wanted: Mapping[str, Tensor], read: ReadOptions | None = None
) -> dict[str, Tensor]:
    """Merge, and compare with float64 weights by name, rounded once: bit for bit. All else is the base's.

    Returns the merged tensors. A value within 1e-12 of the middle of two numbers of the dtype may go either way: the
    tests' seeds have none.
    """
    planned = merge_to(base, adapter, out, read=read)
    merged, own = read_tensors(out), read_tensors(base)
    assert merged.keys() == own.keys()
    for name, tensor in merged.items():
        if name not in wanted:
            assert torch.equal(tensor, own[name]), name
            continue
        exact = wanted[name].double()
        expected = round_once(exact.reshape(len(exact), -1), tensor.dtype).view(tensor.shape)
        assert torch.equal(tensor, expected), f"{name}: {(tensor != expected).sum()} of {tensor.numel()} differ"
        assert not torch.equal(tensor, own[name]), f"{name} is the base's"
    assert {tensor.name for tensor in planned.edited} == set(wanted)
    return merged


def check_forward(
    root: Path,
    like: Any,
    inputs: Mapping[str, Tensor],
    theirs: Tensor,
    tolerance: float,
    read: ReadOptions | None = None,
) -> None:
    """`base`, `adapter` of root: merged by us, and by our unmerged reference, the logits of their library's forward.

    theirs: flattened, computed in float32. tolerance: of the root of the mean square, what two float32 forwards of one
    model in two libraries may differ by; a fault moves the logits by thousands of it, which is asserted of the adapter.
    """
    merge_to(root / "base", root / "adapter", root / "merged", read=read)
    assert distance(logits(load(root / "merged", like), inputs), theirs.double().flatten()) <= tolerance
    start = load(root / "base", like)
    adapter = in_base_order(read_adapter(root / "adapter", read), start.config.to_dict())
    with attach_adapter(start, adapter):
        assert distance(logits(start, inputs), theirs.double().flatten()) <= tolerance
    assert distance(logits(start, inputs), theirs.double().flatten()) > 100 * tolerance


def check_reference(
    base: Path, adapter: Path, wanted: Mapping[str, Tensor], read: ReadOptions | None = None, *, like: Any = None
) -> None:
    """Our unmerged reference, on the base, gives the logits of the base with `wanted` (float64) as its weights.

    In float64 the two differ by rounding alone: 1e-9 is some millions of it.
    """
    start = load(base, like or llama(), torch.float64)
    inputs = tokens(start)
    adapter_read = in_base_order(read_adapter(adapter, read), start.config.to_dict())
    with attach_adapter(start, adapter_read):
        unmerged = logits(start, inputs)
    own = logits(start, inputs)
    names = dict(start.named_parameters())
    with torch.no_grad():
        for name, weight in wanted.items():
            names[name].copy_(weight)
    assert distance(unmerged, logits(start, inputs)) < 1e-9 < 1e-3 < distance(own, logits(start, inputs))
