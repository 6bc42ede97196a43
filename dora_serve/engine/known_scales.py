"""Norm scales that were computed before, in a file beside the adapter (`dora-export convert --to vllm`)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dora_serve.adapter import Adapter
from dora_serve.engine.factors import Base
from dora_serve.errors import CheckpointError
from dora_serve.norm_scale_file import FILE_NAME, fingerprint, read_norm_scales


def fingerprint_of(files: Path | None) -> str | None:
    """Of the files that a base was loaded from; None where it came from none that can be read here."""
    try:
        return None if files is None else fingerprint(files)
    except CheckpointError:
        return None


def known_scales(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """norm_scale (out,) in float32 by run-time name, where there is such a file and it was made for this base and this
    adapter; else nothing. Raises AdapterError where it is corrupt.
    """
    if adapter.method != "DoRA" or not (adapter.path / FILE_NAME).is_file():
        return {}
    stored = read_norm_scales(adapter.path)
    if stored is None or stored.base != base.fingerprint():
        return {}
    found = {}
    for module in adapter.modules:
        scale, name = stored.scales.get(module.module), base.names.find(module.module)
        if name is not None and scale is not None and scale.shape[0] == module.lora_B.shape[0]:
            found[name] = scale
    return found
