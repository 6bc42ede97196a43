"""TensorRT-LLM (examples/dora/normalize_weights.py; formats.md 7): PEFT's or NVlabs' folder in which every magnitude m
was replaced by m / ||V||, under the same name. `W' = g V`, no norm.

Nothing in the files says so: this reader is used where it is named, and magnitudes near 1 on a base whose rows are of
another length make the merge ask. The engine's own arrays, `model.lora_weights.npy`, hold no shapes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dora_serve.adapter import Adapter, Norm
from dora_serve.errors import AdapterError
from dora_serve.formats import nvlabs, peft
from dora_serve.formats.options import ReadOptions

ARRAYS = "model.lora_weights.npy"


def sniff(path: Path) -> bool:
    """Whether the engine's own arrays lie there; nothing tells a folder with m / ||V|| from one with m."""
    return (path / ARRAYS).is_file()


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a folder that normalize_weights.py wrote."""
    if (path / ARRAYS).is_file():
        raise AdapterError(
            f"{str(path)!r} holds TensorRT-LLM's own arrays, in which the factors of a module lie one after the other "
            "without their shapes.",
            remedy="Give the adapter that they were converted from.",
            path=str(path),
        )
    adapter = nvlabs.read(path, options) if nvlabs.sniff(path) else peft.read(path, options)
    modules = tuple(
        replace(module, norm=Norm(axis=None)) if module.magnitude is not None else module for module in adapter.modules
    )
    return replace(adapter, format="tensorrt-llm", modules=modules)
