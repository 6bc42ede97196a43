"""Values of a trainer's configuration, checked: the errors name the key."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeGuard

from dora_serve.errors import AdapterError
from dora_serve.formats.files import CONFIG_NAME
from dora_serve.formats.options import ReadOptions


def is_number(value: object) -> TypeGuard[float]:
    """Finite, and no larger than float64 holds, as JSON's integers may be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def wrong(config: Mapping[str, object], key: str, wanted: str) -> AdapterError:
    """The error for a key whose value cannot be used."""
    return AdapterError(
        f"{CONFIG_NAME} says {key} = {config.get(key)!r}, wanted {wanted}.",
        remedy="Restore the file from the trainer's output.",
        key=key,
    )


def number(config: Mapping[str, object], key: str, default: float | None = None) -> float:
    """A finite number. Raises AdapterError for another value, and for none where there is no default."""
    value = config.get(key, default)
    if not is_number(value):
        raise wrong(config, key, "a number")
    return value


def rank_of(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    """A whole number above zero."""
    value = number(config, key, default)
    if value != int(value) or value < 1:
        raise wrong(config, key, "a positive whole number")
    return int(value)


def names(config: Mapping[str, object], key: str) -> tuple[str, ...]:
    """A list of strings, or one; empty where there is none."""
    value = config.get(key) or []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise wrong(config, key, "a list of names")
    return tuple(value)


def boolean(config: Mapping[str, object], key: str) -> bool:
    """Whether the key is there and true."""
    return bool(config.get(key))


def require_known(path: Path, config: Mapping[str, object], known: Collection[str], options: ReadOptions) -> None:
    """Raises AdapterError for keys that are set and not understood."""
    unknown = sorted(
        key for key, value in config.items() if value and key not in known and key not in options.ignore_config
    )
    if unknown:
        raise AdapterError(
            f"{str(path / CONFIG_NAME)!r} has keys that are not known here and may change the weights: "
            f"{', '.join(f'{key}={config[key]!r}' for key in unknown)}.",
            remedy="If one of them changes nothing, say --ignore-config KEY for it.",
            keys=unknown,
        )


def stated_scaling(options: ReadOptions, rank: int, why: str) -> float:
    """alpha / rank, of the alpha that the user says. Raises AdapterError that asks for it where there is none."""
    if options.lora_alpha is None:
        raise AdapterError(
            f"The scale of the update is not in the adapter's files: {why}.",
            remedy="Say with --lora-alpha ALPHA what it was trained with: the update is scaled by alpha / rank "
            "(--lora-alpha rank scales it by 1).",
            option="--lora-alpha",
        )
    return 1.0 if options.lora_alpha == "rank" else options.lora_alpha / rank
