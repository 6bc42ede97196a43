"""LyCORIS (modules/locon.py and functional/general.py of 4.1.3; formats.md 6.1), and plain LoRA of sd-scripts.

`W' = dora_scale / (||V|| + eps) * V`, `V = W + s B A`, the norm over each output (wd_on_output, the default since
3.2.0) or each input channel, which the shape of dora_scale says, and eps that of dora_scale's dtype. A dora_scale of
one dimension is what diffusers and others write for a PEFT magnitude: of the outputs, without eps. A file of ours says
its eps in the metadata.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from dora_serve.adapter import Adapter, LazyTensor, Norm
from dora_serve.errors import AdapterError
from dora_serve.formats.files import Weights
from dora_serve.formats.kohya_names import ToNorm, by_shape, holds_other_method, peek, read_kohya
from dora_serve.formats.options import ReadOptions

EPS_KEY = "dora_norm_eps"


def sniff(path: Path) -> bool:
    """Whether the names are kohya's, whoever wrote them."""
    leaves, _ = peek(path)
    return bool(leaves & {"lora_down", "dora_scale", "diffusion_model"}) or holds_other_method(path)


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a file or a folder with one."""

    def norms(weights: Weights) -> ToNorm:
        said = options.norm_eps if options.norm_eps is not None else _said_eps(weights)

        def to_norm(module: str, stored: LazyTensor) -> tuple[LazyTensor, Norm]:
            if len(stored.shape) == 1 and stored.shape[0]:
                return stored, Norm(eps=said or 0.0)
            return by_shape(module, stored, torch.finfo(stored.dtype).eps if said is None else said)

        return to_norm

    adapter = read_kohya(path, options, "kohya", norms)
    large = {module.norm.eps for module in adapter.modules} - {0.0, torch.finfo(torch.float32).eps}
    if not large or options.norm_eps is not None:
        return adapter
    note = (
        f"dora_scale is of 16 bits, whose epsilon of {max(large):.3g} was added to the norms as LyCORIS does when it "
        f"trains in them; if only the file was saved so, say --norm-eps {torch.finfo(torch.float32).eps}."
    )
    return replace(adapter, notes=(*adapter.notes, note))


def _said_eps(weights: Weights) -> float | None:
    text = weights.metadata.get(EPS_KEY)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise AdapterError(
            f"{str(weights.file)!r} says {EPS_KEY} = {text!r}, wanted a number.", remedy="Convert it again."
        )
    return value
