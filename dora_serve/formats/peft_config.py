"""`adapter_config.json` of PEFT: what in it changes the merged weights, and what cannot be merged at all.

Mirrors peft 0.21.2, tuners/lora/config.py; formats.md 1.3 and 1.7.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from dora_serve.errors import AdapterError, UnmergeableError
from dora_serve.formats.files import CONFIG_NAME, read_config

_CHANGES_NOTHING = frozenset(
    """
    auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode init_lora_weights layer_replication layers_pattern
    layers_to_transform loftq_config lora_alpha
    lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save monteclora_config peft_type
    peft_version qalora_group_size r rank_pattern alpha_pattern revision runtime_config target_modules
    target_parameters task_type trainable_token_indices use_bdlora use_dora use_rslora velora_config lora_B_layout
    """.split()
)
"""Keys that this reader acts on, or that only say how the adapter was trained."""

_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA) is applied only after its invocation tokens",
    "arrow_config": "Arrow routes each token to its own mixture of adapters",
    "use_qalora": "QALoRA pools its input, and its delta belongs to a group-quantized base",
    "kasa_config": "KaSA first removes the smallest singular components of the base's own weights",
}
"""Keys whose truth makes a merge impossible, with the reason."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that train on a residual of the base; once converted to plain LoRA the key is set to true."""


_NESTED = re.compile(r"[*+}][^()]*\)[*+{]")
"""A repeated group that ends in something repeated: matching may take longer than the sun lasts."""

_LONGEST = 2000


@dataclass(frozen=True)
class PeftConfig:
    """The part of the configuration that decides what is merged. `raw` is all of it."""

    raw: Mapping[str, object]
    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    ensure_weight_tying: bool
    expert_slowest: bool
    block_diagonal: Mapping[str, object] | None

    def rank(self, name: str) -> int:
        """The rank of the module or parameter `name`, by PEFT's own matching."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, name), self.r)

    def names(self, module: str) -> bool:
        """Whether PEFT would adapt a module of this name (peft.tuners.tuners_utils.check_target_module_exists)."""
        targets, layers = self.raw.get("target_modules"), self.raw.get("layers_to_transform")
        excluded = self.raw.get("exclude_modules")
        if isinstance(excluded, str) and matches(excluded, module, otherwise=False):
            return False
        if isinstance(excluded, list) and any(module == one or module.endswith(f".{one}") for one in excluded):
            return False
        if isinstance(targets, str):
            return targets == "all-linear" or matches(targets, module)
        if not isinstance(targets, list) or not targets:
            return True  # PEFT chooses by the architecture
        if module in targets:
            return True
        if not any(module.endswith(f".{target}") for target in targets):
            return False
        if layers is None or layers == []:
            return True
        patterns = self.raw.get("layers_pattern") or [r"[^.]*"]
        wanted = layers if isinstance(layers, list) else [layers]
        return any(
            matches(rf".*\.{pattern}\.{index}\..*", module)
            for pattern in (patterns if isinstance(patterns, list) else [patterns])
            for index in wanted
        )

    def scaling(self, name: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732)."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, name), self.lora_alpha)
        rank = self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def matches(pattern: str, name: str, *, otherwise: bool = True) -> bool:
    """Whether a pattern of the file's matches all of `name`; `otherwise` for one that is none, or may never end."""
    if _NESTED.search(pattern) or len(pattern) > _LONGEST:
        return otherwise
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return otherwise


def _pattern_key(patterns: Mapping[str, object], name: str) -> str:
    """The first key that matches the end of `name`, as peft.utils.other.get_pattern_key decides it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), name)


def read_peft_config(folder: Path, ignore: frozenset[str]) -> PeftConfig:
    """Read and judge adapter_config.json.

    Raises AdapterError for a configuration that is corrupt or has keys that are not understood, UnmergeableError for
    one that is understood and has no dense equal.
    """
    path = folder / CONFIG_NAME
    raw = read_config(folder)
    peft_type = raw.get("peft_type")
    if peft_type == "XLORA":
        raise UnmergeableError(
            f"The adapter cannot be merged: {str(path)!r} says peft_type 'XLORA', and X-LoRA mixes its adapters anew "
            "for every token.",
            remedy="Serve it unmerged with the library that trained it, or merge one of its adapters alone.",
            peft_type=peft_type,
        )
    if peft_type != "LORA":
        raise AdapterError(
            f"{str(path)!r} says peft_type {peft_type!r}, wanted 'LORA'.",
            remedy="Of PEFT's adapters, LoRA, DoRA and AdaLoRA are read.",
            peft_type=peft_type,
        )
    require_mergeable(raw, ignore, str(path))
    return checked_config(raw, path)


def require_mergeable(raw: Mapping[str, object], ignore: frozenset[str], where: str) -> None:
    """Judge a configuration of PEFT that stands in `where`.

    Raises UnmergeableError for what has no dense equal, AdapterError for keys that are not understood.
    """
    for key, reason in _REFUSED.items():
        if raw.get(key) and key not in ignore:
            raise UnmergeableError(
                f"The adapter cannot be merged: {key} is {raw[key]!r}, and {reason}.",
                remedy="Serve it unmerged with the library that trained it.",
                key=key,
            )
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS) and "init_lora_weights" not in ignore:
        raise UnmergeableError(
            f"The adapter cannot be merged into the original base: init_lora_weights is "
            f"{raw['init_lora_weights']!r}, so it was trained on what was left of the base after its start was "
            "subtracted, and it was not converted when it was saved.",
            remedy="Save it again with path_initial_model_for_weight_conversion; or, if --base is that residual model "
            "itself, say --ignore-config init_lora_weights.",
            key="init_lora_weights",
        )
    unknown = sorted(
        key for key, value in raw.items() if value and key not in _CHANGES_NOTHING | _REFUSED.keys() | ignore
    )
    if unknown:
        raise AdapterError(
            f"{where!r} has keys that are not known here and may change the weights: "
            f"{', '.join(f'{key}={raw[key]!r}' for key in unknown)}.",
            remedy="If one of them changes nothing, say --ignore-config KEY for it.",
            keys=unknown,
        )


def _is_number(value: object) -> TypeGuard[float]:
    """Finite, and no larger than float64 holds, as JSON's integers may be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def checked_config(raw: Mapping[str, object], path: Path) -> PeftConfig:
    """The values of a configuration that stands in `path`. Raises AdapterError for one that is none."""

    def wrong(key: str, wanted: str) -> AdapterError:
        return AdapterError(
            f"{str(path)!r} says {key} = {raw.get(key)!r}, wanted {wanted}.",
            remedy="Restore the file from the trainer's output.",
            key=key,
        )

    def number(key: str, default: float) -> float:
        value = raw.get(key, default)
        if not _is_number(value):
            raise wrong(key, "a number")
        return value

    def numbers(key: str) -> dict[str, float]:
        table = raw.get(key) or {}
        if not isinstance(table, dict):
            raise wrong(key, "an object of numbers")
        for pattern, value in table.items():
            if not _is_number(value):
                raise wrong(key, "an object of numbers")
            if _NESTED.search(pattern) or len(pattern) > _LONGEST:
                raise wrong(key, f"patterns that end: {pattern[:80]!r} repeats what repeats, or is too long")
            try:
                re.compile(pattern)
            except re.error as error:
                raise wrong(key, f"regular expressions as keys ({pattern!r}: {error})") from error
        return table

    def names(key: str) -> tuple[str, ...]:
        value = raw.get(key) or []
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise wrong(key, "a list of names")
        return tuple(value)

    rank = number("r", 8)
    ranks = numbers("rank_pattern")
    if any(value != int(value) or value < 1 for value in (rank, *ranks.values())):
        raise wrong("r", "a positive whole number, here and in rank_pattern")
    block_diagonal = raw.get("use_bdlora") or None
    if block_diagonal is not None and not isinstance(block_diagonal, dict):
        raise wrong("use_bdlora", "an object")
    return PeftConfig(
        raw=raw,
        r=int(rank),
        lora_alpha=number("lora_alpha", 8),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        rank_pattern={key: int(value) for key, value in ranks.items()},
        alpha_pattern=numbers("alpha_pattern"),
        lora_bias=bool(raw.get("lora_bias")),
        bias=str(raw.get("bias") or "none"),
        modules_to_save=names("modules_to_save"),
        target_parameters=names("target_parameters"),
        ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
        expert_slowest=_expert_slowest(raw, path),
        block_diagonal=block_diagonal,
    )


def _expert_slowest(raw: Mapping[str, object], path: Path) -> bool:
    """Unsloth says since 2026-09 how it packed the experts of lora_B (unsloth-zoo #1232); PEFT packs rank-major."""
    layout = raw.get("lora_B_layout") or "rank_major"
    if layout not in ("rank_major", "grouped_by_expert"):
        raise AdapterError(
            f"{str(path)!r} says lora_B_layout = {layout!r}, wanted 'rank_major' or 'grouped_by_expert'.",
            remedy="Save the adapter again with a version of its trainer that uses one of these.",
            layout=layout,
        )
    return layout == "grouped_by_expert"
