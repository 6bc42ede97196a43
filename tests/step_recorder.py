"""A CUDA graph for a CPU: the operators of a step with their tensors, run again on the same memory.

What a capture forbids is refused: a number that Python reads off a tensor, and data that Python hands in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default: "reads a number off a tensor",
    torch.ops.aten.lift_fresh.default: "makes a tensor of Python's numbers",
    torch.ops.aten.nonzero.default: "has a shape that depends on its data",
}


_ONE_AT_A_TIME = threading.Lock()


class CannotBeRecorded(RuntimeError):
    pass


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FORBIDDEN:
            raise CannotBeRecorded(f"{func} {_FORBIDDEN[func]}")
        answer = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, answer))
        return answer


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    step()
    # These read a tensor of the CPU without an operator; of a GPU they copy it first, which a capture forbids.
    with _ONE_AT_A_TIME, _Log() as log, pytest.MonkeyPatch.context() as forbidden:
        for name in ("tolist", "numpy"):
            forbidden.setattr(Tensor, name, _refused_here(getattr(Tensor, name)))
        answer = step()

    @torch.inference_mode()
    def replay() -> Tensor:
        for func, args, kwargs, before in log.calls:
            inputs = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if _is_tensor(one)}
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(before), strict=True):
                # A view, or what was written in place, is where it was.
                if _is_tensor(old) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)
        return answer

    return replay


def _refused_here(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method for other threads, which go on meanwhile."""
    recording = threading.get_ident()

    def refused(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == recording:
            raise CannotBeRecorded("Python reads numbers off a tensor")
        return method(*args, **kwargs)

    return refused


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
