"""Modules that lack what others of their kind have: a magnitude or an alpha that was lost would change the model
without a word, where a file of names alone does not say what was trained.

Trainers decide by kind (LyCORIS' algo of a layer's class, kohya's conv_alpha), so what all layers of a kind lack was
not trained; what one of them lacks was lost.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_serve.adapter import LoraWeights
from dora_serve.errors import AdapterError
from dora_serve.formats.factors import misfit
from dora_serve.formats.options import ReadOptions

ALLOW = "--allow-missing-magnitudes"


def layer_kind(module: str) -> str:
    """What the layers of a kind have in common: `unet.up_blocks_0_attentions_1_proj_in` -> `proj_in`."""
    return re.sub(r"\d+", "#", module.replace(".", "_")).rpartition("_#_")[2]


def lacking(has: Mapping[str, bool], part: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Of modules, those that lost something, and those that as a kind never had it.

    has: whether a module has it. part: the part of the model that a module is in, where all are trained alike; in one
    in which no module has it, none is lacking. A kind with a single layer tells nothing by itself: that counts as lost.
    """
    by_part: dict[str, list[str]] = defaultdict(list)
    for module in has:
        by_part[part[module]].append(module)
    lost: list[str] = []
    never: list[str] = []
    for members in by_part.values():
        if not any(has[module] for module in members):
            continue
        by_kind: dict[str, list[str]] = defaultdict(list)
        for module in members:
            by_kind[layer_kind(module)].append(module)
        for kind in by_kind.values():
            without = [module for module in kind if not has[module]]
            (never if 1 < len(without) == len(kind) else lost).extend(without)
    return lost, never


def part_of(module: str, *, is_conv: bool) -> str:
    """The component of a pipeline that a module is in, its convolutions apart."""
    component = module.partition(".")[0] if "." in module else ""
    return f"{component}, convolutions" if is_conv else component


def named(modules: Sequence[str]) -> str:
    return f"{', '.join(modules[:4])}{', ...' if len(modules) > 4 else ''}"


def require_magnitudes(file: Path, modules: Sequence[LoraWeights], options: ReadOptions) -> list[str]:
    """Notes on modules of which no layer of their kind has a magnitude.

    Raises AdapterError, naming the modules, where one has none and others of its kind do.
    """
    has = {module.module: module.magnitude is not None for module in modules}
    lost, never = lacking(has, {one.module: part_of(one.module, is_conv=one.kind == "conv") for one in modules})
    if lost and not options.allow_missing_magnitudes:
        raise AdapterError(
            f"{len(lost)} of {len(has)} modules in {str(file)!r} have no magnitude (dora_scale), and others of their "
            f"kind do: {named(lost)}. A magnitude that was lost leaves another model.",
            remedy=f"Save the adapter again; or, if these were trained as plain LoRA, say {ALLOW}.",
            option=ALLOW,
            modules=lost,
        )
    plain = [*never, *lost]
    return [f"{len(plain)} modules beside those of DoRA are plain LoRA: {named(plain)}."] if plain else []


def require_all_or_none(file: Path, modules: Sequence[LoraWeights]) -> None:
    """Raises AdapterError where some modules have magnitudes and some do not, for trainers that give all or none."""
    without = [module.module for module in modules if module.magnitude is None]
    if 0 < len(without) < len(modules):
        raise misfit(file, [f"{module}: has no magnitude, and others have" for module in without])
