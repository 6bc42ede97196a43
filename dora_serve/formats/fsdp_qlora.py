"""Answer.AI's fsdp_qlora (train.py, scripts/dora.py at 05ed9f2; formats.md 3): `model_state_dict.safetensors`, and no
configuration.

DoRA: `W' = m / ||V|| * V` over output rows, `V = W + B A` without any scale, and the bias is multiplied by m / ||V||
too, since the layer's own output is. W is the dequantized base that it was trained on. Its own LoRA is `lora_AB.0` and
`lora_AB.1`, scaled by alpha / r, which were said on the command line alone; so is that of PEFT, with an adapter's name
in the names and the base's packed tensors beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights, Norm
from dora_serve.formats.factors import Roles, group, of_each, pair
from dora_serve.formats.files import find_weights, open_finite, tensor_names
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft import strip_prefix
from dora_serve.formats.values import stated_scaling

WEIGHTS = ("model_state_dict.safetensors",)
_ROLES: Roles = (
    ("dora_A", re.compile(r"^(.+)\.dora_layer\.lora_A\.weight$")),
    ("dora_B", re.compile(r"^(.+)\.dora_layer\.lora_B\.weight$")),
    ("magnitude", re.compile(r"^(.+)\.magnitude_layer\.magnitude$")),
    ("lora_A", re.compile(r"^(.+)\.lora_AB\.0\.weight$")),
    ("lora_B", re.compile(r"^(.+)\.lora_AB\.1\.weight$")),
    ("lora_A", re.compile(r"^(.+)\.lora_A\.default\.weight$")),
    ("lora_B", re.compile(r"^(.+)\.lora_B\.default\.weight$")),
)
_BASE = re.compile(r"\.base_layer\.(weight|bias)(\.|$)")
"""The base as it was while it trained, packed or not; frozen."""

_WHY = "fsdp_qlora writes no configuration, and its lora_alpha and lora_rank were said on its command line"


def sniff(path: Path) -> bool:
    """Whether the file has its name and factors, or its own names."""
    file = find_weights(path, *WEIGHTS)
    own = file is not None and file.name == WEIGHTS[0]
    return any(
        ".dora_layer." in name or ".lora_AB." in name or (own and ".lora_A.default." in name)
        for name in tensor_names(file)
    )


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a folder with the file, or the file. Raises AdapterError, with every problem at once."""
    weights = open_finite(path, find_weights(path, *WEIGHTS), WEIGHTS, options.allow_pickle, unused=_BASE)
    trained = {name: lazy for name, lazy in weights.tensors.items() if not _BASE.search(name)}
    packed = len(weights.tensors) - len(trained)
    parts = group(trained, _ROLES, strip_prefix)
    modules = of_each(weights.file, parts, lambda module, found: _of_module(module, found, options))
    notes = []
    if any(module.magnitude is not None for module in modules):
        notes.append(
            "It was trained on a base that was quantized as it was loaded: on the original weights the merge is "
            "another model than the one that was trained, by as much as quantizing changed them."
        )
    if packed:
        notes.append(f"{packed} tensors of the frozen base beside the adapter are not used.")
    return Adapter(path=path, format="fsdp-qlora", modules=tuple(modules), files=(weights.file,), notes=tuple(notes))


def _of_module(module: str, found: Mapping[str, LazyTensor], options: ReadOptions) -> LoraWeights:
    if found.keys() == {"dora_A", "dora_B", "magnitude"}:
        both = pair(module, found["dora_A"], found["dora_B"], ("lora_A", "lora_B"))
        magnitude = found["magnitude"]
        if magnitude.shape != (both.lora_B.shape[0],):
            raise ValueError(f"{module}: magnitude {list(magnitude.shape)}, wanted [{both.lora_B.shape[0]}]")
        return LoraWeights(module, both.kind, both.lora_A, both.lora_B, 1.0, magnitude, norm=Norm(scales_bias=True))
    if found.keys() == {"lora_A", "lora_B"}:
        both = pair(module, found["lora_A"], found["lora_B"], ("lora_A", "lora_B"))
        scaling = stated_scaling(options, both.rank, _WHY)
        return LoraWeights(module, both.kind, both.lora_A, both.lora_B, scaling, scaling_is_stated=True)
    raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted two factors, and a magnitude for DoRA")
