"""An exported causal language model in ONNX Runtime: tokens and a cache in, logits and a longer cache out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dora_serve.errors import CheckpointError, EngineError, UnavailableError, no_such_path
from dora_serve.onnx_engine.adapters import Feeding
from dora_serve.onnx_engine.slots import METADATA_KEY, SlotTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

MODEL_FILE = "model.onnx"
_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_GENAI = "onnxruntime-genai"
_REMEDY = "Export a causal language model: dora-export merge ADAPTER --to onnx-adapters (or --to onnx)."


class Graph:
    """table: what the graph says of its adapter slots, None where it has none. provider: what runs it. vocabulary: the
    width of its logits.
    """

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """device: "cpu" or "cuda". threads: None leaves it to ONNX Runtime.

        Raises CheckpointError for what is no graph of a causal language model with a cache, UnavailableError without
        onnxruntime or the provider.
        """
        if not path.is_file():
            raise CheckpointError(no_such_path("The ONNX model", path), remedy=_REMEDY, path=str(path))
        self._session = _open(path, device, threads)
        if self._session.get_modelmeta().producer_name == _GENAI:
            raise CheckpointError(
                f"{str(path)!r} was made by ONNX Runtime GenAI's builder, and counts positions in a way of its own: "
                "genai_config.json is missing beside it.",
                remedy="Copy it from the export, or export again with --runtime genai.",
                path=str(path),
            )
        self.provider = str(self._session.get_providers()[0])
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._outputs = [each.name for each in self._session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        presents = {f"{_PRESENT}{name.removeprefix(_PAST)}" for name in self._past}
        if not self._past or not {"logits", *presents} <= set(self._outputs) or "input_ids" not in self._inputs:
            raise CheckpointError(
                f"{str(path)!r} is no graph of a causal language model with a cache: its inputs are "
                f"{', '.join(list(self._inputs)[:4])}, and its outputs {', '.join(self._outputs[:4])}.",
                remedy=_REMEDY,
                path=str(path),
            )
        self.table = slot_table(self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), path)
        self.vocabulary = int(self._session.get_outputs()[self._outputs.index("logits")].shape[-1])

    def empty_cache(self, rows: int) -> dict[str, Array]:
        """Of no tokens: (rows, heads, 0, width) by the name of the input."""
        found = {}
        for name in self._past:
            _, heads, _, width = self._inputs[name].shape
            found[name] = np.zeros((rows, heads, 0, width), dtype=_DTYPES[self._inputs[name].type])
        return found

    def run(
        self, ids: Array, mask: Array, cache: Mapping[str, Array], feeding: Feeding
    ) -> tuple[Array, dict[str, Array]]:
        """Logits (rows, tokens, vocabulary) of ids (rows, tokens), the last of mask (rows, past + tokens), which is 0
        for padding on the left; and the cache with these tokens in it.

        Raises EngineError where ONNX Runtime does not run it.
        """
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        feed = {name: value for name, value in known.items() if name in self._inputs} | dict(feeding.inputs(len(ids)))
        # Not run_with_iobinding, which ignores active adapters with no more than a warning.
        try:
            values = self._session.run(self._outputs, feed, feeding.options())
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise EngineError(f"ONNX Runtime cannot run the graph: {str(error).splitlines()[0]}") from error
        named = dict(zip(self._outputs, values, strict=True))
        return named["logits"], {name: named[f"{_PRESENT}{name.removeprefix(_PAST)}"] for name in self._past}


def slot_table(said: str | None, path: Path) -> SlotTable | None:
    """What the metadata of a graph says of its slots, None where it has none. Raises CheckpointError where that is not
    understood."""
    try:
        return SlotTable.from_json(said) if said is not None else None
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be served: {error}.", remedy="Export it again.", path=str(path)
        ) from error


def _open(path: Path, device: str, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            "Serving a graph needs onnxruntime, which is not installed.", remedy="pip install 'dora-serve[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well, and a library does not print
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads that wait by spinning take the cores from whatever else runs here.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number, "use_tf32": "0"}))
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UnavailableError(
                "This onnxruntime has no CUDA provider.",
                remedy="Install onnxruntime-gpu in the place of onnxruntime, or say --device cpu.",
            )
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}",
            remedy="Export it again; the data file has to lie beside the graph.",
            path=str(path),
        ) from error
    if device.startswith("cuda") and session.get_providers()[0] != "CUDAExecutionProvider":
        raise UnavailableError(
            "ONNX Runtime's CUDA provider could not start.",
            remedy="Check the driver and the CUDA libraries, or say --device cpu.",
        )
    return session
