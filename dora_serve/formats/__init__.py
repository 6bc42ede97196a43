"""On-disk adapter formats, one file each with two functions: `sniff(path)` and `read(path, options)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dora_serve.adapter import PAPER_NORM, Adapter
from dora_serve.errors import AdapterError, no_such_path
from dora_serve.formats import (
    adalora,
    ai_toolkit,
    bayesian,
    diffusers,
    dynamic,
    fsdp_qlora,
    lycoris,
    megatron,
    mlx,
    nvlabs,
    onetrainer,
    peft,
    tensorrt_llm,
    torchtune,
    vl_bart,
)
from dora_serve.formats.files import CONFIG_NAME, PICKLES, header, open_weights, peek_config
from dora_serve.formats.kohya_names import weights_file
from dora_serve.formats.options import ReadOptions

__all__ = ["FORMATS", "Format", "ReadOptions", "read_adapter"]


@dataclass(frozen=True)
class Format:
    """sniff: whether a folder or file looks like this format, from its configuration and its tensors' names alone.
    read: the whole reader. label: its name for a person.
    """

    label: str
    sniff: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], Adapter]


FORMATS: Mapping[str, Format] = {
    "torchtune": Format("torchtune", torchtune.sniff, torchtune.read),
    "peft": Format("PEFT", peft.sniff, peft.read),
    "nvlabs": Format("NVlabs DoRA", nvlabs.sniff, nvlabs.read),
    "vl-bart": Format("NVlabs DoRA of VL-BART", vl_bart.sniff, vl_bart.read),
    "mlx": Format("mlx-lm", mlx.sniff, mlx.read),
    "adalora": Format("AdaLoRA", adalora.sniff, adalora.read),
    "dynamic": Format("Dynamic Low-Rank Adaptation", dynamic.sniff, dynamic.read),
    "tensorrt-llm": Format("TensorRT-LLM", tensorrt_llm.sniff, tensorrt_llm.read),
    "bayesian": Format("Bayesian-LoRA", bayesian.sniff, bayesian.read),
    "fsdp-qlora": Format("fsdp_qlora", fsdp_qlora.sniff, fsdp_qlora.read),
    "megatron": Format("Megatron-Bridge", megatron.sniff, megatron.read),
    "ai-toolkit": Format("ai-toolkit", ai_toolkit.sniff, ai_toolkit.read),
    "diffusers": Format("diffusers", diffusers.sniff, diffusers.read),
    "onetrainer": Format("OneTrainer", onetrainer.sniff, onetrainer.read),
    "kohya": Format("LyCORIS and kohya's sd-scripts", lycoris.sniff, lycoris.read),
}
"""In the order in which they are tried."""


def read_adapter(path: Path, options: ReadOptions | None = None) -> Adapter:
    """Read an adapter of any known format, from a folder or a single file.

    Raises AdapterError where nothing here reads it or its files are unsound, UnmergeableError where they are sound and
    mean something that no dense weights equal.
    """
    options = options or ReadOptions()
    if not path.exists():
        raise AdapterError(no_such_path("The adapter", path), remedy="Check the path.", path=str(path))
    if options.format is not None:
        _require_no_contradiction(path, options.format)
    adapter = _format_of(path, options).read(path, options)
    _require_of_use(path, options, adapter)
    if options.magnitudes is None:
        return adapter
    if options.magnitudes == "norm":
        return replace(adapter, magnitudes_are_norms=True)
    quotients = (
        replace(module, norm=replace(module.norm, axis=None)) if module.norm == PAPER_NORM else module
        for module in adapter.modules
    )
    return replace(adapter, modules=tuple(quotients))


_READ_AS: Mapping[str, tuple[str, ...]] = {
    "peft": ("peft", "torchtune", "tensorrt-llm"),
    "nvlabs": ("nvlabs", "tensorrt-llm"),
}
"""Formats that share a configuration, by that of the trainer whose it is."""


def _require_no_contradiction(path: Path, named: str) -> None:
    """Raises AdapterError where a format was named, and a configuration beside the weights is another's: that holds the
    scale, which the reader that was named would take from elsewhere or for 1.
    """
    folder = path if path.is_dir() else path.parent
    own = next((name for name in ("peft", "nvlabs", "mlx", "adalora") if FORMATS[name].sniff(folder)), None)
    if own == "mlx" and not peek_config(folder):
        return
    where = f"{CONFIG_NAME} in {str(folder)!r}"
    if own is None and diffusers.METADATA_KEY in header(weights_file(path))[1]:
        own, where = "diffusers", f"the metadata of {str(weights_file(path))!r}"
    if own is None or named in _READ_AS.get(own, (own,)):
        return
    raise AdapterError(
        f"--format {named} was said, and {where} is {FORMATS[own].label}'s, which holds the scale of the update.",
        remedy=f"Leave --format away, or say --format {own}; if the weights are another training's, move them away "
        "from there.",
        option="--format",
        path=str(path),
    )


def _require_of_use(path: Path, options: ReadOptions, adapter: Adapter) -> None:
    """Raises AdapterError where something was said that changes nothing: the record would say that it did."""

    def refuse(option: str, why: str) -> AdapterError:
        return AdapterError(
            f"{option} was said, and {why}.", remedy=f"Leave {option} away.", option=option, path=str(path)
        )

    if options.lora_alpha is not None and not any(module.scaling_is_stated for module in adapter.modules):
        raise refuse("--lora-alpha", "the adapter's own files hold its scale")
    if options.allow_missing_magnitudes and len({module.magnitude is None for module in adapter.modules}) < 2:
        raise refuse("--allow-missing-magnitudes", "no module lacks a magnitude beside others that have one")
    if options.norm_eps is not None and all(
        module.magnitude is None or module.norm.eps != options.norm_eps for module in adapter.modules
    ):
        raise refuse("--norm-eps", "no norm of this adapter has an epsilon that is unsaid")
    if options.magnitudes == "norm-scale" and all(
        module.magnitude is None or module.norm not in (PAPER_NORM, replace(PAPER_NORM, axis=None))
        for module in adapter.modules
    ):
        raise refuse("--magnitudes", "this adapter has none that it could be true of")


def _format_of(path: Path, options: ReadOptions) -> Format:
    if options.format is not None:
        return FORMATS[options.format]
    for adapter_format in FORMATS.values():
        if adapter_format.sniff(path):
            return adapter_format
    if path.is_dir() and any((path / name).is_file() for name in (CONFIG_NAME, *peft.WEIGHTS)):
        return FORMATS["peft"]
    raise _unknown(path, options)


def _unknown(path: Path, options: ReadOptions) -> AdapterError:
    if path.suffix == ".safetensors" and path.is_file():
        names = list(open_weights(path, options.allow_pickle).tensors)  # whose error is the better one
        got = f"a file with {len(names)} tensors ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
    else:
        found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
        got = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "") if found else "nothing"
    remedy = "Give the folder or file that the trainer wrote; if you know its format, name it with --format."
    if path.is_file() and (path.parent / CONFIG_NAME).is_file():
        remedy = f"Give the folder, whose {CONFIG_NAME} says how to read it: {str(path.parent)!r}."
    elif nested := sorted(str(file.parent) for file in path.glob(f"*/{CONFIG_NAME}")):  # a trainer's checkpoints
        shown = ", ".join(map(repr, nested[:4])) + (", ..." if len(nested) > 4 else "")
        remedy = f"Give one of the folders in it that hold an adapter: {shown}."
    elif pickles := [file.name for file in (path.iterdir() if path.is_dir() else [path]) if file.suffix in PICKLES]:
        remedy = (
            f"The names in {pickles[0]} are not read before you allow it: say --allow-pickle and the format, for "
            "example --format torchtune (which then also needs its adapter_config.json or --lora-alpha)."
        )
    labels = ", ".join(adapter_format.label for name, adapter_format in FORMATS.items() if name != "peft")
    return AdapterError(
        f"{str(path)!r} holds no adapter that is known here: got {got}, wanted a folder with adapter_config.json "
        f"and its weights (PEFT), or what one of these writes: {labels}.",
        remedy=remedy,
        path=str(path),
    )
