"""OneTrainer's DoRA (modules/module/LoRAModule.py; formats.md 6.4): kohya's names.

`W' = dora_scale / (||V|| + eps) * V`, the norm over each input channel, or each output with decompose_output_axis,
which the shape of dora_scale says. eps is that of float32 with lora_decompose_norm_epsilon, else 0: the training's
configuration stands in the file's metadata where the user let it be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from dora_serve.adapter import Adapter, LazyTensor, Norm
from dora_serve.errors import AdapterError
from dora_serve.formats.files import Weights
from dora_serve.formats.kohya_names import ToNorm, by_shape, peek, read_kohya
from dora_serve.formats.options import ReadOptions

_EPS = torch.finfo(torch.float32).eps


def sniff(path: Path) -> bool:
    """Whether the names are kohya's and the metadata are OneTrainer's."""
    leaves, metadata = peek(path)
    return bool(leaves) and any(key.startswith("ot_") for key in metadata)


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a file or a folder with one. Raises AdapterError where nothing says whether an eps was added."""

    def norms(weights: Weights) -> ToNorm:
        said = options.norm_eps if options.norm_eps is not None else _eps_of(weights.metadata)

        def to_norm(module: str, stored: LazyTensor) -> tuple[LazyTensor, Norm]:
            if said is None:
                raise AdapterError(
                    "Whether OneTrainer added an epsilon to the norm (lora_decompose_norm_epsilon) is not in the "
                    "file's metadata.",
                    remedy=f"Say --norm-eps 0, or --norm-eps {_EPS} where the setting was on.",
                    option="--norm-eps",
                )
            return by_shape(module, stored, said)

        return to_norm

    return read_kohya(path, options, "onetrainer", norms)


def _eps_of(metadata: Mapping[str, str]) -> float | None:
    try:
        config = json.loads(metadata.get("ot_config", ""))
    except (ValueError, RecursionError):
        return None
    said = config.get("lora_decompose_norm_epsilon") if isinstance(config, dict) else None
    return None if not isinstance(said, bool) else (_EPS if said else 0.0)
