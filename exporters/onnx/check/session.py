"""An ONNX Runtime session that is fed with tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dora_serve.onnx_engine.adapters import Feeding

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]


class Refusal(Exception):
    """ONNX Runtime would not load or run the model; the message is its own."""


class _Nothing:
    def inputs(self, rows: int) -> Mapping[str, Array]:
        return {}

    def options(self) -> None:
        return None


NOTHING: Feeding = _Nothing()


class Session:
    """An inference session, fed with tokens. A cache maps input names to arrays, and is empty for a graph without."""

    def __init__(self, path: Path, device: str, feeding: Feeding = NOTHING) -> None:
        import onnxruntime

        self._feeding = feeding

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors are raised as well, and a library does not print
        # Threads that wait by spinning take the cores from whatever else runs here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        self._session = _or_refusal(lambda: onnxruntime.InferenceSession(path, options, providers=providers))
        self.provider: str = self._session.get_providers()[0]
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]

    def empty_cache(self, batch: int) -> dict[str, Array]:
        shapes = {name: self._inputs[name].shape for name in self._past}
        return {
            name: np.zeros((batch, heads, 0, width), dtype=np.float32) for name, (_, heads, _, width) in shapes.items()
        }

    def run(
        self, ids: Array, mask: Array, cache: Mapping[str, Array]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Array]]:
        """The outputs of the last ids.shape[1] of mask.shape[1] tokens, and the cache with these tokens in it."""
        import torch

        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        known["token_type_ids"] = np.zeros_like(ids)
        further = self._feeding.inputs(len(ids))
        known |= further
        unknown = sorted(set(self._inputs) - set(known))
        if unknown:
            raise Refusal(f"it asks for {', '.join(unknown)}, which nothing here gives")
        feed = {name: known[name] for name in (*self._inputs, *further)}
        values = _or_refusal(lambda: self._session.run(None, feed, self._feeding.options()))
        named = dict(zip(self.outputs, values, strict=True))
        presents = {name: f"present.{name.removeprefix('past_key_values.')}" for name in self._past}
        if not set(presents.values()) <= set(named):
            raise Refusal("it takes a cache and gives none back")
        grown = {name: named.pop(present) for name, present in presents.items()}
        return {name: torch.from_numpy(value) for name, value in named.items()}, grown


def _or_refusal(call: Callable[[], Any]) -> Any:
    """What `call` returns; ONNX Runtime's exceptions, which have no base of their own, as a Refusal."""
    try:
        return call()
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise Refusal(str(error).splitlines()[0]) from error
        raise
