"""An ONNX Runtime session that is fed by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dora_serve.onnx_engine.adapters import Feeding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_DTYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Refusal(Exception):
    """ONNX Runtime would not load or run the model; the message is its own."""


class _Nothing:
    def inputs(self, rows: int) -> Mapping[str, Array]:
        return {}

    def options(self) -> None:
        return None


NOTHING: Feeding = _Nothing()


@dataclass(frozen=True)
class Opening:
    """How graphs are opened and fed. device: "cuda" takes ONNX Runtime's CUDA provider where it has one.

    exact: products with codes round no activations, as their fast kernels do. What a graph computes then differs from
    torch's, on the numbers that the codes stand for, by the order of its sums alone.
    """

    device: str
    feeding: Feeding = NOTHING
    exact: bool = False


class Session:
    """One graph. A cache maps input names to arrays, and is empty for a graph without."""

    def __init__(self, path: Path, opening: Opening) -> None:
        import onnxruntime

        self._feeding = opening.feeding
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors are raised as well, and a library does not print
        # Threads that wait by spinning take the cores from whatever else runs here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if opening.device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        graph: Path | bytes = path
        if opening.exact:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            graph = _with_exact_products(path)
        self._session = _or_refusal(lambda: onnxruntime.InferenceSession(graph, options, providers=providers))
        self.provider: str = self._session.get_providers()[0]
        self.outputs = [output.name for output in self._session.get_outputs()]
        self.inputs = {each.name: each for each in self._session.get_inputs()}
        self.head_size = 0  # where the graph does not say it
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]

    def empty_cache(self, batch: int) -> dict[str, Array]:
        shapes = {name: self.inputs[name].shape for name in self.past}
        return {
            name: np.zeros((batch, heads, 0, width if isinstance(width, int) else self.head_size), np.float32)
            for name, (_, heads, _, width) in shapes.items()
        }

    def run(self, known: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """The outputs, and the cache with what was given in it. known: of these the graph takes what it has inputs
        for, in its own dtypes."""
        further = self._feeding.inputs(len(next(iter(known.values()))))
        unknown = sorted(set(self.inputs) - set(known) - set(further))
        if unknown:
            raise Refusal(f"it asks for {', '.join(unknown)}, which nothing here gives")
        own = [(name, each.type) for name, each in self.inputs.items() if name not in further]
        feed = {name: known[name].astype(_DTYPES.get(kind), copy=False) for name, kind in own}
        values = _or_refusal(lambda: self._session.run(None, {**feed, **further}, self._feeding.options()))
        named = dict(zip(self.outputs, values, strict=True))
        presents = {name: f"present.{name.removeprefix('past_key_values.')}" for name in self.past}
        if not set(presents.values()) <= set(named):
            raise Refusal("it takes a cache and gives none back")
        grown = {name: named.pop(present) for name, present in presents.items()}
        return named, grown


def _with_exact_products(path: Path) -> bytes:
    """The graph, its MatMulNBits at an accuracy level of the dtype of their inputs."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise Refusal(str(error)) from error
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
    contents: bytes = model.SerializeToString()
    return contents


def _or_refusal(call: Callable[[], Any]) -> Any:
    """What `call` returns; ONNX Runtime's exceptions, which have no base of their own, as a Refusal."""
    try:
        return call()
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise Refusal(str(error).splitlines()[0]) from error
        raise
