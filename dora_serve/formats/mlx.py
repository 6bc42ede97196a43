"""mlx-lm (tuner/lora.py, tuner/dora.py, tuner/utils.py of 0.32; formats.md 5).

Factors are transposed against PEFT: lora_a (in, r), lora_b (r, out); `V = W + scale * (lora_a @ lora_b)^T`, DoRA with
`m` (out,) over output rows. An embedding has lora_a (num, r), lora_b (r, dim), and its `m` (num,) is set against the
norm of each token's row, where PEFT takes that of each dimension over the vocabulary. What is tied to an embedding
shares its update (`as_linear`). Switch layers have a factor an expert.

Four generations of configurations: `fine_tune_type` and `num_layers`; before 2024-09-30 `use_dora` and `lora_layers`;
before 2024-06-02 with an `alpha`, the scale being scale * alpha / rank; before 2024-04-02 an .npz without any.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dora_serve.adapter import PAPER_NORM, Adapter, LazyTensor, LoraWeights, Norm, Replacement
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import Roles, group, is_embedding, of_each
from dora_serve.formats.files import (
    CONFIG_NAME,
    Weights,
    find_weights,
    no_weights,
    open_weights,
    peek_config,
    read_config,
    require_finite,
    tensor_names,
)
from dora_serve.formats.mixed import require_magnitudes
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.values import boolean, number, rank_of, stated_scaling, wrong

WEIGHTS = ("adapters.safetensors", "adapters.npz")
_ROLES: Roles = (
    ("lora_a", re.compile(r"^(.+)\.lora_a$")),
    ("lora_b", re.compile(r"^(.+)\.lora_b$")),
    ("m", re.compile(r"^(.+)\.m$")),
)
_KNOWN_PARAMETERS = {"rank", "scale", "alpha", "dropout", "keys"}
_IN_LAYER = re.compile(r"^(?:.+\.)?(?:layers|h|blocks)\.(\d+)\.(.+)$")
_EXPERT_NAMES: Mapping[str, str] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""mlx-lm renames Mixtral's experts while it loads them (mlx_lm/models/mixtral.py, sanitize)."""


def sniff(path: Path) -> bool:
    """Whether the configuration is mlx-lm's, or the names and their file are."""
    config = peek_config(path)
    if config:
        return any(key in config for key in ("fine_tune_type", "lora_parameters", "lora_layers"))
    if path.name.endswith("adapters.npz") or (path / "adapters.npz").is_file():
        return True
    return any(name.endswith(".lora_a") for name in tensor_names(find_weights(path, *WEIGHTS)))


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read an adapter folder, or a checkpoint file of one beside its configuration.

    Raises AdapterError, with every problem of the tensors at once.
    """
    folder = path if path.is_dir() else path.parent
    file = find_weights(path, *WEIGHTS)
    if file is None:
        raise no_weights(path, WEIGHTS)
    config = read_config(folder) if (folder / CONFIG_NAME).is_file() else {}
    weights = _open_npz(file) if file.suffix == ".npz" else open_weights(file, options.allow_pickle)
    require_finite(weights)
    kind = config.get("fine_tune_type") or ("dora" if boolean(config, "use_dora") else "lora")
    if kind not in ("lora", "dora", "full"):
        raise wrong(config, "fine_tune_type", "lora, dora or full")
    if kind == "full":
        if factors := [name for name in weights.tensors if any(role.match(name) for _, role in _ROLES)]:
            raise AdapterError(
                f"{CONFIG_NAME} says fine_tune_type = 'full', and {file.name} holds LoRA tensors ("
                f"{', '.join(factors[:2])}{', ...' if len(factors) > 2 else ''}): one of them is another training's.",
                remedy="Restore the configuration of this training (fine_tune_type lora or dora, its scale and rank).",
                key="fine_tune_type",
            )
        changes = tuple(Replacement(name, tensor, "base_layer") for name, tensor in weights.tensors.items())
        return _adapter(path, folder, file, config, (), changes, ())
    parts = group(weights.tensors, _ROLES)

    def make(module: str, found: Mapping[str, LazyTensor]) -> list[LoraWeights]:
        return list(_of_module(module, found, config, options, is_dora=kind == "dora" or not config))

    modules = tuple(one for several in of_each(file, parts, make) for one in several)
    notes = _left_out(parts.modules, config) if config else require_magnitudes(file, modules, options)
    if boolean(config, "use_dora"):
        notes.append(
            "It was written before 2024-09-30; until 2024-08-16 mlx-lm started magnitudes from random weights "
            "(mlx-examples #832): it is merged as it was trained, which may not be well."
        )
    return _adapter(path, folder, file, config, modules, (), tuple(notes))


def _left_out(modules: Collection[str], config: Mapping[str, object]) -> list[str]:
    """A note on modules that the configuration leaves out: mlx-lm adapts the last num_layers layers, and in them what
    `keys` names, from the layer on or whole (mlx_lm.tuner.utils.linear_to_lora_layers). It ignored other weights, and
    refuses them since 0.32.
    """
    parameters = config.get("lora_parameters")
    keys = parameters.get("keys") if isinstance(parameters, dict) else None
    count = config.get("num_layers", config.get("lora_layers"))
    in_layers = {module: match for module in modules if (match := _IN_LAYER.match(module))}
    last = max((int(match[1]) for match in in_layers.values()), default=-1)
    first = last + 1 - count if type(count) is int and count > 0 else 0  # 0 and less are all layers
    named = set(keys) if isinstance(keys, list) else None
    left_out = []
    for module in modules:
        match = in_layers.get(module)
        if named is not None and module in named:
            continue
        if match is None or int(match[1]) < first or (named is not None and match[2] not in named):
            left_out.append(module)
    if not left_out:
        return []
    return [
        f"{len(left_out)} modules have weights here that num_layers and keys in {CONFIG_NAME} leave out "
        f"({', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}): they are merged, and mlx-lm would not "
        "adapt them."
    ]


def _adapter(
    path: Path,
    folder: Path,
    file: Path,
    config: Mapping[str, object],
    modules: tuple[LoraWeights, ...],
    replacements: tuple[Replacement, ...],
    notes: tuple[str, ...],
) -> Adapter:
    files = (folder / CONFIG_NAME, file) if config else (file,)
    base = config.get("model")
    return Adapter(
        path=path,
        format="mlx",
        modules=modules,
        replacements=replacements,
        base=str(base) if base else None,
        files=files,
        config=config,
        notes=notes,
        keeps_ties=True,
    )


def _of_module(
    module: str, found: Mapping[str, LazyTensor], config: Mapping[str, object], options: ReadOptions, *, is_dora: bool
) -> Iterator[LoraWeights]:
    lora_a, lora_b, magnitude = found.get("lora_a"), found.get("lora_b"), found.get("m")
    if lora_a is None or lora_b is None:
        raise ValueError(f"{module}: has {', '.join(sorted(found))}, wanted lora_a and lora_b")
    if config and (magnitude is not None) != is_dora:
        has = "no m" if magnitude is None else "an m"
        raise ValueError(f"{module}: has {has}, where the configuration says {'dora' if is_dora else 'lora'}")
    shapes = f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)}"
    if 0 in (*lora_a.shape, *lora_b.shape):
        raise ValueError(f"{module}: {shapes} are empty")
    if len(lora_b.shape) == 3:
        if magnitude is not None:
            raise ValueError(f"{module}: an m for experts, for which mlx-lm has no DoRA")
        yield from _of_experts(module, lora_a, lora_b, config, options)
        return
    if len(lora_a.shape) != 2 or len(lora_b.shape) != 2 or lora_a.shape[1] != lora_b.shape[0]:
        raise ValueError(f"{module}: {shapes}, wanted [in, r] and [r, out]")
    width, rank, out = lora_a.shape[0], lora_a.shape[1], lora_b.shape[1]
    embedding = is_embedding(module)
    if magnitude is not None and magnitude.shape != ((width,) if embedding else (out,)):
        raise ValueError(f"{module}: m {list(magnitude.shape)}, wanted [{width if embedding else out}]")
    yield LoraWeights(
        module=module,
        kind="embedding" if embedding else "linear",
        lora_A=lora_a.map((rank, width), lambda tensor: tensor.T),
        lora_B=lora_b.map((out, rank), lambda tensor: tensor.T),
        scaling=_scaling(module, config, rank, options),
        magnitude=magnitude,
        norm=Norm(axis="in") if embedding else PAPER_NORM,
        scaling_is_stated=not config,
    )


def _of_experts(
    module: str, lora_a: LazyTensor, lora_b: LazyTensor, config: Mapping[str, object], options: ReadOptions
) -> Iterator[LoraWeights]:
    """One module an expert: lora_a (experts, r, in), or (experts * r, in) as it was; lora_b (experts, out, r)."""
    experts, out, rank = lora_b.shape
    width = lora_a.shape[-1]
    if prod(lora_a.shape) != experts * rank * width or lora_a.shape[:-1] not in ((experts, rank), (experts * rank,)):
        raise ValueError(f"{module}: lora_a {list(lora_a.shape)} for lora_b {list(lora_b.shape)}")
    scaling = _scaling(module, config, rank, options)
    owner, _, leaf = module.rpartition(".")
    owner = owner.removesuffix(".switch_mlp")
    leaf = _EXPERT_NAMES.get(leaf, leaf) if owner.endswith(".block_sparse_moe") else leaf
    for expert in range(experts):
        rows = slice(expert * rank, (expert + 1) * rank)

        def of_a(tensor: Tensor, rows: slice = rows) -> Tensor:
            return tensor.reshape(-1, width)[rows]

        def of_b(tensor: Tensor, expert: int = expert) -> Tensor:
            return tensor[expert]

        yield LoraWeights(
            module=f"{owner}.experts.{expert}.{leaf}",
            kind="linear",
            lora_A=lora_a.map((rank, width), of_a),
            lora_B=lora_b.map((out, rank), of_b),
            scaling=scaling,
            scaling_is_stated=not config,
        )


def _scaling(module: str, config: Mapping[str, object], rank: int, options: ReadOptions) -> float:
    if not config:
        why = "mlx-lm wrote no configuration before 2024-04-02, and its scale is that of the training script"
        return stated_scaling(options, rank, why)
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise wrong(config, "lora_parameters", "an object with rank and scale")
    unknown = sorted(set(parameters) - _KNOWN_PARAMETERS - options.ignore_config)
    if unknown:
        raise AdapterError(
            f"lora_parameters has keys that are not known here and may change the weights: {', '.join(unknown)}.",
            remedy="If one of them changes nothing, say --ignore-config KEY for it.",
            keys=unknown,
        )
    if rank_of(parameters, "rank") != rank:
        raise ValueError(f"{module}: rank {rank}, where the configuration says {parameters['rank']}")
    scale = number(parameters, "scale")
    return scale * (number(parameters, "alpha") / rank) if "alpha" in parameters else scale


_UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, SyntaxError, OverflowError, RuntimeError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error),
)
"""What zipfile and numpy raise for archives that are damaged, encrypted or hostile."""

_ROOM = 100 << 20


def _require_no_bomb(file: Path) -> None:
    """Raises AdapterError for an archive that would take far more memory than its size."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > file.stat().st_size + _ROOM:
        raise AdapterError(
            f"{str(file)!r} unpacks to {unpacked:,} bytes, from {file.stat().st_size:,}.",
            remedy="mlx-lm does not compress its arrays: save them as safetensors where they were made.",
            path=str(file),
        )


def _open_npz(file: Path) -> Weights:
    """Arrays of a .npz; none of them is a pickle, which numpy is not allowed to read."""
    try:
        _require_no_bomb(file)
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except _UNREADABLE as error:
        raise AdapterError(
            f"{str(file)!r} cannot be read: {str(error).partition(chr(10))[0]}.",
            remedy="Copy it again, or save it as safetensors.",
            path=str(file),
        ) from error
    if not tensors:
        raise AdapterError(f"{str(file)!r} holds no tensors.", remedy="Save the adapter again.", path=str(file))
    return Weights(file, {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})
