"""From the name of a parameter in the running model to the tensors that hold it on disk.

An adapter carries run-time names; a checkpoint may have others: without the `model.` or `transformer.` in front
(gpt2, bert), with the language model one level elsewhere (llava), with one tensor an expert (mixtral). Names are
never matched by likeness: a rule gives exactly one tensor or none, and shapes are checked by the caller.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.runtime_names import Origin, RuntimeNames, runtime_names

# Run-time name (transformers 5) to checkpoint name, tried in order; facts of transformers/conversion_mapping.py.
_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^model\.language_model\.(?!lm_head)(.*)$"), r"language_model.model.\1"),
    (re.compile(r"^model\.language_model\.(.*)$"), r"model.\1"),
    (re.compile(r"^language_model\.model\.(.*)$"), r"model.language_model.\1"),
    (re.compile(r"^(.*)\.mlp\.(experts|gate)\.(.*)$"), r"\1.block_sparse_moe.\2.\3"),
)

# Per-expert names of (gate, up, down) under `experts.<e>.`, as checkpoints of the two styles store them.
_EXPERT_LEAVES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings|embeddings)\.weight$")
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Place:
    """A stored tensor and the part of the run-time parameter that it holds, in units of the parameter's dim 0.

    start: where in the parameter the tensor's rows begin. tensor_start, tensor_parts: of which of how many equal
    parts of the tensor they are, where one tensor holds several parameters.
    """

    tensor: str
    start: int = 0
    tensor_part: int = 0
    tensor_parts: int = 1


@dataclass(frozen=True)
class ParameterNames:
    """The names of one checkpoint. `ask` gives what transformers knows; it is called only where the rules fail."""

    base: ShardedCheckpoint
    ask: Callable[[], RuntimeNames | None]

    @staticmethod
    def of(base: ShardedCheckpoint) -> ParameterNames:
        return ParameterNames(base, lambda: runtime_names(base.folder))

    def find(self, parameter: str) -> tuple[Place, ...]:
        """Where a parameter lies, empty where it does not."""
        name = self._rename(parameter)
        if name is not None:
            return (Place(name),)
        origin = self._origin(parameter)
        if origin is None or not origin.groups:
            return ()
        if origin.operation in ("rename", "chunk") and len(origin.groups) == 1 and len(origin.groups[0]) == 1:
            return (Place(origin.groups[0][0], 0, origin.part, origin.parts),)
        if origin.operation == "concat" and all(len(group) == 1 for group in origin.groups):
            places, start = [], 0
            for (name,) in origin.groups:
                places.append(Place(name, start))
                start += self.base.tensors[name].shape[0]
            return tuple(places)
        return ()

    def experts(self, module: str, parameter: str) -> tuple[tuple[str, ...], ...]:
        """Stored per-expert tensors of a fused parameter: one tuple an expert, to be concatenated along dim 0."""
        for leaves in _EXPERT_LEAVES.get(parameter, ()):
            found: list[tuple[str, ...]] = []
            while True:
                names = [self._rename(f"{module}.{len(found)}.{leaf}.weight") for leaf in leaves]
                if None in names:
                    break
                found.append(tuple(name for name in names if name is not None))
            if found:
                return tuple(found)
        origin = self._origin(f"{module}.{parameter}")
        if origin is not None and origin.operation == "experts" and origin.groups:
            return tuple(zip(*origin.groups, strict=True))
        return ()

    def shared_with(self, parameter: str) -> tuple[str, ...]:
        """Run-time names of all parameters that are one tensor with this one, itself included; () if it is alone.

        Only for a model whose configuration ties its embeddings and whose checkpoint stores them once.
        """
        config = self.base.config
        text_config = config.get("text_config")
        tied = config.get("tie_word_embeddings")
        if tied is None and isinstance(text_config, dict):
            tied = text_config.get("tie_word_embeddings")
        if tied is False and config.get("model_type") not in _ALWAYS_TIED:
            return ()
        architecture = self._architecture
        if architecture.endswith(_CAUSAL) and config.get("model_type") not in _OTHER_HEADS:
            return self._shared_causal(parameter)
        if not (_EMBEDDING.search(parameter) or "shared" in parameter or "lm_head" in parameter or tied is not None):
            return ()
        facts = self._facts
        if facts is None:
            return ()
        own = facts.tied.get(parameter, parameter)
        group = [own, *(target for target, source in facts.tied.items() if source == own)]
        return tuple(group) if len(group) > 1 and parameter in group else ()

    def is_stored_apart(self, parameter: str) -> bool:
        """Whether this is an embedding or `lm_head` of which the file holds both, though the configuration ties them."""
        embeddings = [name for name in self.base.tensors if _EMBEDDING.search(name)]
        heads = [name for name in self.base.tensors if name.endswith("lm_head.weight")]
        place = self._rename(parameter)
        return bool(
            self.base.config.get("tie_word_embeddings") and embeddings and place in heads + embeddings and heads
        )

    def nearest(self, parameter: str) -> tuple[str, ...]:
        """The stored names most like this one, for a message."""
        leaf = parameter.split(".")[-2:]
        same_leaf = [name for name in self.base.tensors if name.split(".")[-2:] == leaf]
        pool = same_leaf or list(self.base.tensors)
        return tuple(difflib.get_close_matches(parameter, pool[:5000], n=3, cutoff=0.3))

    def missing(self, parameters: Iterable[str]) -> list[str]:
        return [parameter for parameter in parameters if not self.find(parameter)]

    def _shared_causal(self, parameter: str) -> tuple[str, ...]:
        head = "lm_head.weight"
        if self._rename_exact(head) is not None:
            return ()
        if parameter == head:
            stored = [name for name in self.base.tensors if _EMBEDDING.search(name)]
            tokens = [name for name in stored if not re.search(r"(position|type|wpe)", name)]
            return (head, tokens[0]) if len(tokens) == 1 else ()
        if _EMBEDDING.search(parameter) and not re.search(r"(position|type)", parameter):
            return (head, parameter)
        return ()

    def _rename_exact(self, parameter: str) -> str | None:
        return parameter if parameter in self.base.tensors else None

    def _rename(self, parameter: str) -> str | None:
        """The one stored tensor of this name, through the rules that need no knowledge of the model's class."""
        if parameter in self.base.tensors:
            return parameter
        for pattern, replacement in _RENAMES:
            renamed = pattern.sub(replacement, parameter)
            if renamed != parameter and renamed in self.base.tensors:
                return renamed
        ending = self._by_suffix.get(parameter, ())
        if len(ending) == 1 and not ending[0].startswith("."):
            return ending[0]
        shorter = parameter
        while "." in shorter:
            shorter = shorter.partition(".")[2]
            if "." not in shorter:
                break
            if shorter in self.base.tensors:
                return shorter
        return None

    def _origin(self, parameter: str) -> Origin | None:
        return self._facts.origins.get(parameter) if self._facts else None

    @cached_property
    def _facts(self) -> RuntimeNames | None:
        return self.ask() if self.base.config.get("architectures") or self.base.config.get("model_type") else None

    @cached_property
    def _by_suffix(self) -> Mapping[str, tuple[str, ...]]:
        index: dict[str, list[str]] = defaultdict(list)
        for name in self.base.tensors:
            rest = name
            while "." in rest:
                rest = rest.partition(".")[2]
                index[rest].append(name)
        return {suffix: tuple(names) for suffix, names in index.items()}

    @property
    def _architecture(self) -> str:
        architectures = self.base.config.get("architectures")
        return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


_ALWAYS_TIED = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
"""Families whose encoder and decoder embeddings are one tensor whatever the configuration says."""

_OTHER_HEADS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "xlm",
    "bart",
    "mbart",
    "opus",
    "marian",
    "pegasus",
    "blenderbot",
)
"""Families whose causal models have another head than `lm_head`, or more than two names for the one tensor."""
