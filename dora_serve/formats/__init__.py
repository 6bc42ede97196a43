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
)
from dora_serve.formats.files import CONFIG_NAME, open_weights
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
    "lycoris": Format("LyCORIS and kohya's sd-scripts", lycoris.sniff, lycoris.read),
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
    read = _format_of(path, options).read
    adapter = read(path, options)
    _require_of_use(read, path, options, adapter)
    if options.magnitudes is None:
        return adapter
    if options.magnitudes == "norm":
        return replace(adapter, magnitudes_are_norms=True)
    quotients = (
        replace(module, norm=replace(module.norm, axis=None)) if module.norm == PAPER_NORM else module
        for module in adapter.modules
    )
    return replace(adapter, modules=tuple(quotients))


def _require_of_use(
    read: Callable[[Path, ReadOptions], Adapter], path: Path, options: ReadOptions, adapter: Adapter
) -> None:
    """Raises AdapterError where something was said that changes nothing: the record would say that it did."""

    def refuse(option: str, why: str) -> AdapterError:
        return AdapterError(
            f"{option} was said, and {why}.", remedy=f"Leave {option} away.", option=option, path=str(path)
        )

    if options.lora_alpha is not None:
        try:
            without = read(path, replace(options, lora_alpha=None))
        except AdapterError as error:
            if error.facts.get("option") != "--lora-alpha":
                raise
        else:
            if [one.scaling for one in without.modules] == [one.scaling for one in adapter.modules]:
                raise refuse("--lora-alpha", "the adapter's own files hold its scale")
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
    labels = ", ".join(adapter_format.label for name, adapter_format in FORMATS.items() if name != "peft")
    return AdapterError(
        f"{str(path)!r} holds no adapter that is known here: got {got}, wanted a folder with adapter_config.json "
        f"and its weights (PEFT), or what one of these writes: {labels}.",
        remedy="Give the folder or file that the trainer wrote; if you know its format, name it with --format.",
        path=str(path),
    )
