"""The names that kohya's sd-scripts gave to LoRA files, which LyCORIS, OneTrainer and ai-toolkit share.

A module is `lora_unet_` or the like and its path with underscores for dots, or ComfyUI's `diffusion_model.` and its
path as it is; its tensors are `lora_up.weight` (out, r, 1..), `lora_down.weight` (r, in, *kernel), with Tucker's
decomposition `lora_mid.weight` (r, r, *kernel), and `alpha`, a scalar: s = alpha / r, and 1 where alpha is 0 or
missing. What a magnitude means is each trainer's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.adapter import Adapter, Axis, LazyTensor, LoraWeights, Norm
from dora_serve.errors import AdapterError, UnmergeableError
from dora_serve.formats.factors import Roles, group, of_each, pair
from dora_serve.formats.files import Weights, find_weights, header, open_finite
from dora_serve.formats.mixed import lacking, named, part_of, require_magnitudes
from dora_serve.formats.options import ReadOptions

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
_ROLES: Roles = (
    ("lora_down", re.compile(r"^(.+)\.lora_(?:down|A)(?:\.default)?\.weight$")),
    ("lora_up", re.compile(r"^(.+)\.lora_(?:up|B)(?:\.default)?\.weight$")),
    ("lora_mid", re.compile(r"^(.+)\.lora_mid\.weight$")),
    ("alpha", re.compile(r"^(.+)\.alpha$")),
    ("dora_scale", re.compile(r"^(.+)\.dora_scale$")),
    ("magnitude", re.compile(r"^(.+)\.magnitude$")),
)
_COMPONENTS: Mapping[str, str] = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_prior_unet_": "prior",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te4_": "text_encoder_4",
}
"""What begins a module's name, and the folder of the pipeline that the module is in."""

_PREFIXES = ("lycoris_", "lora_")
_DENOISER = re.compile(r"^(?:model\.)?diffusion_model\.")
"""ComfyUI's name for a denoiser, whatever it is, which ai-toolkit, musubi-tuner and diffusion-pipe save for it."""

_OTHER_METHODS: Mapping[str, re.Pattern[str]] = {
    "LoHa": re.compile(r"\.hada_(w[12]|t[12])"),
    "LoKr": re.compile(r"\.lokr_(w[12]|t2)"),
    "OFT or BOFT": re.compile(r"\.(oft_blocks|oft_diag|rescale)$"),
    "GLoRA": re.compile(r"\.([ab][12])\.weight$"),
    "(IA)^3": re.compile(r"\.on_input$"),
    "a full difference": re.compile(r"\.(diff|diff_b|set_weight)$"),
    "a trained norm": re.compile(r"\.(w_norm|b_norm)$"),
    "a textual inversion": re.compile(r"(^|\.)(bundle_emb|emb_params|string_to_param)\b"),
}

ToNorm = Callable[[str, LazyTensor], tuple[LazyTensor, Norm]]
"""From a module's name and its magnitude as stored to (out,) or (in,) values, and what they are set against."""


def weights_file(path: Path) -> Path | None:
    """The file that a folder or path of this kind holds its LoRA in."""
    return find_weights(path, single=True) if not (path / DIFFUSERS_NAME).is_file() else path / DIFFUSERS_NAME


def holds_other_method(path: Path) -> bool:
    """Whether a file with kohya's prefixes holds another method than LoRA, which the reader refuses by its name."""
    names, _ = header(weights_file(path))
    return any(
        name.startswith((*_COMPONENTS, *_PREFIXES)) and any(pattern.search(name) for pattern in _OTHER_METHODS.values())
        for name in names
    )


def peek(path: Path) -> tuple[frozenset[str], Mapping[str, str]]:
    """The last parts of the tensors' names, and the metadata, where the names are kohya's; else nothing. Of names that
    begin with ComfyUI's diffusion_model that is a part as well.
    """
    names, metadata = header(weights_file(path))
    if not any(name.endswith((".lora_down.weight", ".lora_A.weight", *_MARKS)) for name in names):
        return frozenset(), {}
    leaves = {name.rpartition(".")[2] for name in names}
    leaves |= {"lora_down" for name in names if name.endswith(".lora_down.weight")}
    return frozenset(leaves | {"diffusion_model" for name in names if _DENOISER.match(name)}), metadata


_MARKS = (".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".oft_blocks", ".on_input", ".diff")


def read_kohya(path: Path, options: ReadOptions, name: str, to_norm: Callable[[Weights], ToNorm]) -> Adapter:
    """Read a file with these names for the trainer `name`; of the alpha that it does not hold, options' may say it.

    Raises AdapterError, with every problem of the tensors at once, and UnmergeableError for other methods than LoRA.
    """
    weights = open_finite(path, weights_file(path), ("one .safetensors file",), options.allow_pickle)
    _require_lora(weights.tensors)
    parts = group(weights.tensors, _ROLES, module_name)
    norms = to_norm(weights)
    modules = of_each(weights.file, parts, lambda module, found: _of_module(module, found, options, norms))
    notes = _require_scales(weights.file, parts.modules, options)
    notes += require_magnitudes(weights.file, modules, options)
    notes += [note for found in parts.modules.values() for note in _notes(found)]
    return Adapter(
        path=path,
        format=name,
        modules=tuple(modules),
        base=weights.metadata.get("ss_base_model_version"),
        files=(weights.file,),
        config=dict(weights.metadata),
        notes=tuple(dict.fromkeys(notes)),
    )


def module_name(name: str) -> str:
    """`lora_unet_down_blocks_0_...` -> `unet.down_blocks_0_...`; what lies where is for the base to say."""
    for prefix, component in _COMPONENTS.items():
        if name.startswith(prefix):
            return f"{component}.{name.removeprefix(prefix)}"
    if _DENOISER.match(name):
        return _DENOISER.sub("diffusion_model.", name)
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def by_shape(module: str, magnitude: LazyTensor, eps: float) -> tuple[LazyTensor, Norm]:
    """A magnitude whose shape says whose it is: (n, 1, ..) the outputs', (1, n, ..) the inputs'.

    Raises ValueError where it says neither.
    """
    shape, count = magnitude.shape, prod(magnitude.shape)
    ones = sum(size == 1 for size in shape)
    axis: Axis
    if len(shape) >= 2 and count and (shape[0] == count):
        axis = "out"
    elif len(shape) >= 2 and count and shape[1] == count and ones == len(shape) - 1:
        axis = "in"
    else:
        raise ValueError(f"{module}: dora_scale {list(shape)}, wanted [out, 1, ..] or [1, in, ..]")
    return magnitude.map((count,), torch.flatten), Norm(axis=axis, eps=eps)


def _require_lora(tensors: Mapping[str, LazyTensor]) -> None:
    for method, pattern in _OTHER_METHODS.items():
        found = [name for name in tensors if pattern.search(name)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UnmergeableError(
                f"The adapter holds {method} ({found[0]}{more}), and of the methods with these names only LoRA and "
                "DoRA are merged here.",
                remedy="Merge it with the library that trained it.",
                tensors=found,
            )


def _of_module(module: str, found: Mapping[str, LazyTensor], options: ReadOptions, to_norm: ToNorm) -> LoraWeights:
    if "lora_down" not in found or "lora_up" not in found:
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted lora_down and lora_up")
    down, up, mid = found["lora_down"], found["lora_up"], found.get("lora_mid")
    if mid is not None:
        down = _tucker(module, mid, down)
    both = pair(module, down, up, ("lora_down", "lora_up"))
    scaling = _scaling(module, found, both.rank, options)
    stated = "alpha" not in found and options.lora_alpha is not None
    weights = LoraWeights(module, both.kind, both.lora_A, both.lora_B, scaling, scaling_is_stated=stated)
    stored = found.get("dora_scale") or found.get("magnitude")
    if stored is None:
        return weights
    magnitude, norm = to_norm(module, stored)
    channels = both.lora_B.shape[0] if norm.axis != "in" else down.shape[1]
    if magnitude.shape[0] != channels:
        sides = f"{both.lora_B.shape[0]} outputs and {down.shape[1]} inputs"
        raise ValueError(f"{module}: magnitudes {list(stored.shape)} for {sides}")
    return replace(weights, magnitude=magnitude, norm=norm)


def _tucker(module: str, mid: LazyTensor, down: LazyTensor) -> LazyTensor:
    """lora_A (r, in, *kernel) of a LoRA whose lora_down has a kernel of 1 and whose lora_mid has the layer's."""
    rank, inner, *kernel = mid.shape if len(mid.shape) > 2 else (0, 0)
    if not rank or down.shape[0] != inner or len(down.shape) < 2 or prod(down.shape[2:]) != 1:
        raise ValueError(f"{module}: lora_mid {list(mid.shape)} and lora_down {list(down.shape)} do not fit")
    width = down.shape[1]

    def product() -> Tensor:
        core, columns = mid.load().double(), down.load().double().flatten(1)
        return torch.einsum("pq...,qi->pi...", core, columns)

    return LazyTensor((rank, width, *kernel), torch.float64, product)


def _scaling(module: str, found: Mapping[str, LazyTensor], rank: int, options: ReadOptions) -> float:
    alpha = found.get("alpha")
    if alpha is None:
        said = options.lora_alpha
        return 1.0 if said is None or said == "rank" else said / rank
    if prod(alpha.shape) != 1:
        raise ValueError(f"{module}: alpha {list(alpha.shape)}, wanted a scalar")
    if not alpha.dtype.is_floating_point:
        raise UnmergeableError(
            f"{module}: its alpha is a whole number, as LyCORIS' DyLoRA alone stores it, which was trained with alpha "
            "over its number of blocks as the scale, and the file does not hold that.",
            remedy="Store each alpha as a float, so that alpha / rank is the scale that it was trained with: "
            "alpha * block_size.",
            module=module,
        )
    value = float(alpha.load())
    return value / rank if value else 1.0


def _require_scales(file: Path, modules: Mapping[str, Mapping[str, LazyTensor]], options: ReadOptions) -> list[str]:
    """Notes on modules that are scaled by 1 for want of an alpha.

    Raises AdapterError, naming the modules, where one has none and others of its kind do.
    """
    if options.lora_alpha is not None:
        return []
    has = {module: "alpha" in found for module, found in modules.items()}
    parts = {module: part_of(module, is_conv=_is_conv(found)) for module, found in modules.items()}
    lost, _ = lacking(has, parts)
    if lost:
        raise AdapterError(
            f"{len(lost)} of {len(has)} modules in {str(file)!r} have no alpha, and others of their kind do: "
            f"{named(lost)}. The scale of their update was lost.",
            remedy="Save the adapter again; or say with --lora-alpha ALPHA what theirs was (--lora-alpha rank scales "
            "them by 1, as other readers of such files do).",
            option="--lora-alpha",
            modules=lost,
        )
    without = [module for module in has if not has[module]]
    if not without:
        return []
    count = f"{len(without)} of {len(has)} modules have no alpha"
    return [f"{count} and are scaled by 1, as every reader of these files has it."]


def _is_conv(found: Mapping[str, LazyTensor]) -> bool:
    return any(len(found[role].shape) > 2 for role in ("lora_down", "lora_up", "lora_mid") if role in found)


def _notes(found: Mapping[str, LazyTensor]) -> Iterator[str]:
    scale = found.get("dora_scale")
    if scale is not None and len(scale.shape) == 1:
        yield "A dora_scale of one dimension is a magnitude of PEFT under another name: it is taken for the outputs'."
