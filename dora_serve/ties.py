"""Parameters that are one tensor, and what has to be stored apart once an adapter changes only some of them.

PEFT wraps one module at a time, so an adapter on `embed_tokens` leaves a tied `lm_head` as it was, and the merged model
needs both (formats.md 1.8). transformers ties by `_tied_weights_keys` where config.json says `tie_word_embeddings`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dora_serve.adapter import Adapter
from dora_serve.errors import Problem
from dora_serve.names import ParameterNames
from dora_serve.safetensors_file import TensorEntry

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_HEAD = "lm_head.weight"
_PLAIN_CAUSAL: Mapping[str, str] = {
    "CohereForCausalLM": "model.embed_tokens.weight",
    "Gemma2ForCausalLM": "model.embed_tokens.weight",
    "Gemma3ForCausalLM": "model.embed_tokens.weight",
    "GemmaForCausalLM": "model.embed_tokens.weight",
    "GPT2LMHeadModel": "transformer.wte.weight",
    "GptOssForCausalLM": "model.embed_tokens.weight",
    "GraniteForCausalLM": "model.embed_tokens.weight",
    "LlamaForCausalLM": "model.embed_tokens.weight",
    "MistralForCausalLM": "model.embed_tokens.weight",
    "MixtralForCausalLM": "model.embed_tokens.weight",
    "Olmo2ForCausalLM": "model.embed_tokens.weight",
    "Phi3ForCausalLM": "model.embed_tokens.weight",
    "Qwen2ForCausalLM": "model.embed_tokens.weight",
    "Qwen2MoeForCausalLM": "model.embed_tokens.weight",
    "Qwen3ForCausalLM": "model.embed_tokens.weight",
    "Qwen3MoeForCausalLM": "model.embed_tokens.weight",
    "SmolLM3ForCausalLM": "model.embed_tokens.weight",
    "StableLmForCausalLM": "model.embed_tokens.weight",
    "Starcoder2ForCausalLM": "model.embed_tokens.weight",
}
"""Architectures that tie `lm_head.weight` to this one parameter and nothing else: transformers need not be asked."""

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings|embeddings)\.weight$")
_TIED_REGARDLESS = ("t5", "mt5", "umt5", "longt5", "pop2piano", "udop")
"""Families that transformers ties whatever config.json says, unless the stored tensors differ."""

_SCALED_UNLESS_UNTIED = ("t5", "longt5", "pop2piano")
"""Families that read from `tie_word_embeddings` whether the decoder's output is scaled, unless `scale_decoder_outputs`
says so itself."""

_SCALED_WHERE_TIED = ("switch_transformers",)
"""Families in which nothing but `tie_word_embeddings` says that: untied, they would compute something else."""

_TIES_MORE = re.compile(r"(Detection|Segmentation)$")
"""Architectures that tie other parts than tables of the vocabulary."""


@dataclass(frozen=True)
class TiedGroup:
    """Run-time parameters that are one tensor. source: the input embedding, or whatever the others take theirs from."""

    source: str
    members: frozenset[str]


@dataclass(frozen=True)
class Untying:
    """What the output has to hold besides.

    added: run-time names of parameters that get a tensor of their own, and the one that they were until now.
    config_changes: what config.json has to say, by path. groups: all that is tied in the base, as far as it matters.
    """

    added: Mapping[str, TensorEntry] = field(default_factory=dict)
    config_changes: Mapping[tuple[str, ...], object] = field(default_factory=dict)
    groups: tuple[TiedGroup, ...] = ()
    problems: tuple[Problem, ...] = ()

    def group_of(self, parameter: str) -> TiedGroup | None:
        return next((group for group in self.groups if parameter in group.members), None)


def plan_untying(names: ParameterNames, adapter: Adapter) -> Untying:
    """Which tied parameters of the base the adapter changes in different ways."""
    loras = {f"{module.module}.weight" for module in adapter.modules}
    saved = {change.name for change in adapter.replacements if change.role == "modules_to_save"}
    rows = {f"{change.module}.weight" for change in adapter.token_rows}
    named = loras | rows | {change.name for change in adapter.replacements}
    doubtful = sorted(name for name in named if _may_be_tied(names, name))
    groups = _groups(names) if doubtful else ()
    if groups is None:
        problems = [_unknown_ties(names, name) for name in doubtful if names.stored(name)]
        return Untying(problems=tuple(problems))
    loras, saved, rows = ({_member(names, groups, name) for name in role} for role in (loras, saved, rows))
    if adapter.keeps_ties:  # an update of the source is one of all that share it
        loras -= {group.source for group in groups if group.members & loras == {group.source}}
    keeps_ties = bool(adapter.config.get("ensure_weight_tying"))
    apart = [group for group in groups if _are_parted(group, loras, saved, rows, keeps_ties=keeps_ties)]
    if not apart:
        return Untying(groups=groups)
    family, touched = names.base.config.get("model_type"), loras | saved | rows
    if family in _SCALED_WHERE_TIED:
        problem = Problem(
            ", ".join(sorted(apart[0].members & touched)),
            f"an adapter on one side of the tied embeddings of {family}, which scales its outputs only where they are",
            "one that leaves the embeddings and the head as they are",
        )
        return Untying(groups=groups, problems=(problem,))
    added: dict[str, TensorEntry] = {}
    for group in apart if family in _TIED_REGARDLESS else groups:
        # Where the tie outlives config.json's word, what stays as its source is may go on sharing it.
        sharing = group.members - touched if family in _TIED_REGARDLESS and group.source not in touched else set()
        stored = _stored(names, group)
        for member in sorted(group.members - sharing):
            if stored is not None and names.stored(member) is None:
                added[member] = names.base.tensors[stored]
    return Untying(added, _config_changes(names.base.config), groups)


def _unknown_ties(names: ParameterNames, parameter: str) -> Problem:
    architecture = names.architecture or _architecture(names.base.config)
    return Problem(
        parameter,
        f"a table of the vocabulary, which {architecture} may share with others",
        "to know from transformers which those are",
        "install dora-serve[verify], or a transformers that has this architecture",
    )


def _are_parted(group: TiedGroup, loras: set[str], saved: set[str], rows: set[str], *, keeps_ties: bool) -> bool:
    """Whether the adapter makes different tensors of the members of a group."""
    if group.members & loras:
        return True
    if group.members & saved:
        # With ensure_weight_tying, PEFT trains and saves the source for all (LoraModel._add_modules_to_save_to_tie).
        return not (keeps_ties and group.members & saved == {group.source})
    # Rows of the input embedding are those of everything tied to it; others stand for themselves
    # (peft.utils.other.set_additional_trainable_modules).
    return bool(group.members & rows - {group.source})


def _member(names: ParameterNames, groups: tuple[TiedGroup, ...], name: str) -> str:
    """The member that an adapter means by `name`, which may be that of a model without the head."""
    members = [member for group in groups for member in sorted(group.members)]
    if name in members or (stored := names.stored(name)) is None:
        return name
    return next((member for member in members if names.stored(member) == stored), name)


def _stored(names: ParameterNames, group: TiedGroup) -> str | None:
    members = [group.source, *sorted(group.members)]
    return next((stored for member in members if (stored := names.stored(member))), None)


def _may_be_tied(names: ParameterNames, parameter: str) -> bool:
    """Whether it is worth asking: a table of the vocabulary, or what is not stored under a name of its own."""
    config = names.base.config
    if config.get("model_type") is None:
        return False
    if _says_tied(config) is False and config.get("model_type") not in _TIED_REGARDLESS:
        return False
    stored = names.stored(parameter)
    if stored is None:
        return True
    shape = names.base.tensors[stored].shape
    is_table = len(shape) == 2 and bool(set(_vocabulary_sizes(config)) & set(shape))
    return is_table or bool(_TIES_MORE.search(_architecture(config)))


def _says_tied(config: Mapping[str, object]) -> object:
    """config.json's word, None where it says nothing and the class decides."""
    said = config.get("tie_word_embeddings")
    text_config = config.get("text_config")
    nested = text_config.get("tie_word_embeddings") if isinstance(text_config, dict) else None
    return nested if said is None else said or nested or False


def _vocabulary_sizes(config: Mapping[str, object]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _vocabulary_sizes(value)
        elif key.endswith("vocab_size") and isinstance(value, int):
            yield value


def _architecture(config: Mapping[str, object]) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "this model"


def _groups(names: ParameterNames) -> tuple[TiedGroup, ...] | None:
    """All that is tied, None where nothing here knows the architecture."""
    architecture = names.architecture or _architecture(names.base.config)
    if architecture in _PLAIN_CAUSAL:
        source = _PLAIN_CAUSAL[architecture]
        return (TiedGroup(source, frozenset({source, _HEAD})),)
    if names.known is not None:
        members: dict[str, set[str]] = defaultdict(set)
        for target, source in names.known.tied.items():
            members[source] |= {source, target}
        return tuple(TiedGroup(source, frozenset(group)) for source, group in members.items())
    tables = [name for name in names.base.tensors if _EMBEDDING.search(name)]
    tables = [name for name in tables if not re.search(r"(position|type|wpe)", name)]
    if architecture.endswith(_CAUSAL) and len(tables) == 1:
        return (TiedGroup(tables[0], frozenset({tables[0], _HEAD})),)
    return None


def _config_changes(config: Mapping[str, object]) -> dict[tuple[str, ...], object]:
    changes: dict[tuple[str, ...], object] = {("tie_word_embeddings",): False}
    text_config = config.get("text_config")
    if isinstance(text_config, dict) and "tie_word_embeddings" in text_config:
        changes["text_config", "tie_word_embeddings"] = False
    if config.get("model_type") in _SCALED_UNLESS_UNTIED:
        scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
        changes["scale_decoder_outputs",] = scaled
    return changes
