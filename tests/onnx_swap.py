"""Slotted exports of tiny models, adapters that PEFT made for them, and runs by onnxruntime alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from peft import PeftModel

from dora_serve.formats import read_adapter
from exporters.onnx.export import export_onnx
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx_adapters.adapter_file import SlottedBase, WrittenAdapter, open_slotted, write_adapter
from exporters.onnx_adapters.export import put_slots
from exporters.onnx_adapters.options import SlotOptions
from tests.cases import adapt, quiet


@dataclass(frozen=True)
class Swap:
    """model: a Hugging Face folder. dense: its export without slots, base: with them. adapters: by name, folders that
    PEFT saved.
    """

    model: Path
    dense: Path
    base: SlottedBase
    kind: type
    adapters: dict[str, Path]

    def write(self, name: str, out: Path | None = None) -> WrittenAdapter:
        return write_adapter(read_adapter(self.adapters[name]), self.base, out or self.file(name))

    def file(self, name: str) -> Path:
        return self.base.path.parent / f"{name}.onnx_adapter"


def slotted(dense: Path, out: Path, options: SlotOptions | None = None) -> SlottedBase:
    """A copy of an export, with slots."""
    shutil.copytree(dense, out)
    put_slots(out / MODEL_FILE, None, options or SlotOptions())
    return open_slotted(out)


def make(model: Any, folder: Path, adapters: dict[str, dict[str, Any]], options: SlotOptions | None = None) -> Swap:
    """A model of transformers saved, exported with slots, and given adapters of these LoraConfigs."""
    model.save_pretrained(folder / "model")
    start = type(model).from_pretrained(folder / "model", dtype=torch.float32).eval()
    for name, config in adapters.items():
        adapt(start, folder / name, **config)
    (folder / "dense").mkdir()
    export_onnx(folder / "model", folder / "dense")
    base = slotted(folder / "dense", folder / "onnx", options)
    made = Swap(folder / "model", folder / "dense", base, type(model), {name: folder / name for name in adapters})
    for name in adapters:
        made.write(name)
    return made


def peft_logits(swap: Swap, name: str | None, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """PEFT's unmerged answers, (tokens, vocabulary) a prompt; of the base where name is None."""
    with quiet(), torch.no_grad():
        model: Any = swap.kind.from_pretrained(swap.model, dtype=torch.float32)  # type: ignore[attr-defined]
        if name is not None:
            model = PeftModel.from_pretrained(model, swap.adapters[name])
        model.eval()
        return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]


def read_arrays(file: Path) -> dict[str, Any]:
    """What onnxruntime reads of an adapter file. Arrays of the caller's own."""
    values = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    return {name: value.numpy().copy() for name, value in values.items()}


def write_arrays(arrays: dict[str, Any], file: Path) -> Path:
    """An adapter file as onnxruntime writes it."""
    # Held until it is written: what set_parameters takes points into the arrays and does not own them.
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(values)
    made.export_adapter(str(file))
    return file


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def activate(file: Path | None) -> onnxruntime.RunOptions:
    """ONNX Runtime's own switch."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    if file is not None:
        options.add_active_adapter(_loaded(file))
    return options


@cache
def _loaded(file: Path) -> onnxruntime.LoraAdapter:
    """Kept, since RunOptions do not keep the adapters that they name: a run would read memory that is gone."""
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    return adapter


def run(
    session: onnxruntime.InferenceSession,
    prompts: Sequence[Sequence[int]],
    options: onnxruntime.RunOptions | None = None,
    further: dict[str, Any] | None = None,
) -> list[np.ndarray[Any, Any]]:
    """The logits of left-padded prompts, each without its padding: all but the last token at once, then that."""
    width, names = max(map(len, prompts)), [each.name for each in session.get_inputs()]
    ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    past = {
        each.name: np.zeros((len(prompts), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    outputs = [each.name for each in session.get_outputs()]
    parts = []
    steps = [slice(0, width - 1), slice(width - 1, width)] if past and width > 1 else [slice(0, width)]
    for step in steps:
        given = {"input_ids": ids[:, step], "attention_mask": mask[:, : step.stop], "position_ids": positions[:, step]}
        given["token_type_ids"] = np.zeros_like(given["input_ids"])
        feed = {name: value for name, value in {**given, **past}.items() if name in names} | (further or {})
        got = dict(zip(outputs, session.run(outputs, feed, options), strict=True))
        past = {name: got[name.replace("past_key_values.", "present.")] for name in past}
        parts.append(got["logits"])
    if parts[0].ndim == 2:  # one answer for the whole of a text
        return list(parts[0])
    logits = np.concatenate(parts, axis=1)
    return [logits[row, width - len(prompt) :] for row, prompt in enumerate(prompts)]
