"""From an adapter and a base to a plan: which stored tensor each trained tensor changes, and everything that is wrong.

All problems are found before the first byte is written, and all of them are reported at once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.adapter import Adapter, ExpertLora, Kind, LazyTensor, LoraWeights, Replacement, TokenRows
from dora_serve.checkpoint import ShardedCheckpoint, side_files
from dora_serve.errors import PlanError, Problem
from dora_serve.magnitudes import require_norms
from dora_serve.names import ParameterNames, Place
from dora_serve.plan import LoraEdit, MergePlan, Region, RowEdit, TensorPlan, VectorEdit, VectorScale
from dora_serve.quantized.view import SETTINGS_BESIDE, dense_dtype, dense_view, quantization_paths
from dora_serve.replicate import replicate_layers
from dora_serve.row_order import in_base_order
from dora_serve.safetensors_file import TensorEntry
from dora_serve.ties import Untying, plan_untying

MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

HINTED_PROBLEMS = 20
"""So many problems are shown to a person, and so many are worth a search for the names that were meant."""

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LEAVES = ("c_attn", "q_attn", "c_proj", "c_fc")
"""transformers' Conv1D stores (in, out); a square one can be told from a Linear only by what it is."""

_TOKENIZER_FILES = re.compile(
    r"^(tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template.*|spiece\.model|.*\.tiktoken)$"
)


@dataclass
class _Draft:
    """A plan in the making: edits by stored (or added) tensor, and what is wrong."""

    base: ShardedCheckpoint
    names: ParameterNames
    loras: dict[str, list[LoraEdit]] = field(default_factory=lambda: defaultdict(list))
    rows: dict[str, list[RowEdit]] = field(default_factory=lambda: defaultdict(list))
    vectors: dict[str, list[VectorEdit]] = field(default_factory=lambda: defaultdict(list))
    scales: dict[str, list[tuple[str, LoraEdit]]] = field(default_factory=lambda: defaultdict(list))
    sources: dict[str, LazyTensor] = field(default_factory=dict)
    added: dict[str, TensorEntry | LazyTensor] = field(default_factory=dict)
    untying: Untying = field(default_factory=Untying)
    config_changes: dict[tuple[str, ...], object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, subject: str, got: str, wanted: str, hint: str | None = None) -> None:
        self.problems.append(Problem(subject, got, wanted, hint))

    def not_found(self, subject: str, parameter: str) -> None:
        # An adapter for another model has thousands of these, and likeness takes its time.
        nearest = self.names.nearest(parameter) if len(self.problems) < HINTED_PROBLEMS else ()
        hint = f"the nearest names there are {', '.join(nearest)}" if nearest else None
        self.problem(subject, f"no tensor {parameter!r} in the base", "a tensor that this module's weight is", hint)


def plan_merge(base: ShardedCheckpoint, adapter: Adapter, *, dtype: torch.dtype | None = None) -> MergePlan:
    """Plan the merge of `adapter` into `base`; every floating tensor is written in `dtype`, or in its own.

    Raises PlanError with every problem at once, CheckpointError for a base that cannot be merged into at all.
    """
    base = dense_view(base)
    adapter = in_base_order(adapter, base.config)
    trained = _trained_architecture(base.config, adapter)
    draft = _Draft(base, ParameterNames.of(base, trained))
    if adapter.config.get("layer_replication"):
        try:
            longer, draft.config_changes = replicate_layers(base, adapter.config["layer_replication"])
        except ValueError as error:
            draft.problems.append(error.args[0])
        else:
            draft.base, draft.names = longer, ParameterNames.of(longer, trained)
            draft.notes.append(f"The base's layers are repeated: {adapter.config['layer_replication']}.")
    _untie(draft, adapter)
    for replacement in adapter.replacements:
        _replace(draft, adapter, replacement)
    _require_whole(draft)
    for rows in adapter.token_rows:
        _replace_rows(draft, adapter, rows)
    for module in adapter.modules:
        _add_lora(draft, module)
    for module_name, experts in _by_module(adapter.experts).items():
        _add_experts(draft, module_name, experts)
    _require_disjoint(draft)
    if draft.problems:
        base_said = f" It says it was trained on {adapter.base!r}." if adapter.base else ""
        raise PlanError(
            f"The adapter {str(adapter.path)!r} does not fit the base {str(base.folder)!r}: {len(draft.problems)} "
            f"{'problem' if len(draft.problems) == 1 else 'problems'}.{base_said}",
            draft.problems,
            remedy="Give the base that the adapter was trained on with --base; "
            "`dora-export inspect ADAPTER --base BASE` shows both sides.",
        )
    plan = _finish(draft, adapter, dtype)
    if not adapter.magnitudes_are_norms:
        require_norms(plan.tensors.values())
    return plan


def _add_lora(draft: _Draft, module: LoraWeights) -> None:
    parameter = f"{module.module}.weight"
    own = _own_name(draft, parameter)
    places = (Place(own),) if own else draft.names.find(parameter)
    if not places:
        draft.not_found(module.module, parameter)
        return
    if _is_never_run(draft, module):
        draft.notes.append(f"{module.module} is left as it is: an nn.MultiheadAttention only reads its weight.")
        return
    magnitude, by_input = module.magnitude, module.norm.axis == "in"
    if by_input and (len(places) > 1 or places[0].tensor_parts > 1):
        draft.problem(
            module.module,
            "a magnitude for each input, whose norm runs over all outputs",
            "a weight that the base stores by itself, not fused with others or in parts",
        )
        return
    module = module.of_width(_width(_shape(draft, places[0].tensor), module.kind))
    out, width = module.lora_B.shape[0], module.lora_A.shape[1]
    for place, stop in zip(places, _stops(draft, places, out), strict=True):
        shape = _shape(draft, place.tensor)
        region = _region(draft, module, shape, place, whole=len(places) == 1)
        if region is None:
            return
        if by_input and magnitude is not None and magnitude.shape[0] != (channels := _channels(shape, region)):
            got = f"{magnitude.shape[0]} magnitudes, one for each input"
            draft.problem(module.module, got, f"{channels}, as the base weight of {list(shape)} has inputs")
            return
        if region.out_in != (stop - place.start, width):
            _mismatch(draft, module, shape)
            return
        if not _mergeable(draft, module.module, place.tensor):
            return
        draft.loras[place.tensor].append(
            LoraEdit(
                module=module.module,
                region=region,
                lora_A=module.lora_A,
                lora_B=_rows(module.lora_B, place.start, stop),
                scaling=module.scaling,
                magnitude=magnitude if by_input or magnitude is None else _rows(magnitude, place.start, stop),
                norm=module.norm,
            )
        )
    if module.norm.scales_bias and module.magnitude is not None:
        _scale_bias(draft, module, places)
    if module.lora_bias is not None:
        _add_bias(draft, module)


def _width(shape: tuple[int, ...], kind: Kind) -> int:
    """Inputs of a weight as it is stored, where nothing but its magnitude was trained."""
    if kind == "embedding":
        return shape[0] if shape else 0
    return prod(shape[1:])


def _channels(shape: tuple[int, ...], region: Region) -> int:
    """Inputs of a weight, those of a convolution being its channels."""
    return region.out_in[1] if len(shape) < 3 else shape[1]


def _scale_bias(draft: _Draft, module: LoraWeights, places: tuple[Place, ...]) -> None:
    """The trainer multiplied the bias by m / ||V|| as well; without a bias there is nothing to do."""
    biases = draft.names.find(f"{module.module}.bias")
    if not biases:
        return
    if [(place.start, place.tensor_parts) for place in biases] != [(place.start, 1) for place in places]:
        draft.problem(
            f"{module.module}.bias",
            "a bias that is cut otherwise than its weight",
            "one that is stored as the weight is, since this format scales it with the weight",
        )
        return
    for bias, weight in zip(biases, places, strict=True):
        draft.scales[bias.tensor].append((weight.tensor, draft.loras[weight.tensor][-1]))


def _is_never_run(draft: _Draft, module: LoraWeights) -> bool:
    """Whether this is the out_proj of an nn.MultiheadAttention, which "all-linear" of PEFT wraps: the attention takes
    the base's weight from there, so the update took no part in any forward, and has not been trained."""
    owner, _, leaf = module.module.rpartition(".")
    return leaf == "out_proj" and bool(draft.names.find(f"{owner}.in_proj_weight"))


def _stops(draft: _Draft, places: tuple[Place, ...], out: int) -> list[int]:
    return [*(place.start for place in places[1:]), out]


def _rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    if (start, stop) == (0, tensor.shape[0]):
        return tensor
    return tensor.map((stop - start, *tensor.shape[1:]), lambda whole: whole[start:stop])


def _region(draft: _Draft, module: LoraWeights, shape: tuple[int, ...], place: Place, *, whole: bool) -> Region | None:
    """The part of a stored tensor that a module's weight is, its orientation told by shapes and by the family."""
    out, width = module.lora_B.shape[0], module.lora_A.shape[1]
    if len(shape) < 2:
        draft.problem(module.module, f"a base tensor of shape {list(shape)}", "a weight of at least two dimensions")
        return None
    is_kernel = module.kind == "conv" or (len(shape) > 2 and prod(shape[2:]) == 1)  # a 1x1 one is saved as a Linear's
    columns = prod(shape[1:]) if is_kernel else shape[-1]
    part = shape[0] // place.tensor_parts
    start, stop = part * place.tensor_part, part * (place.tensor_part + 1)
    straight = Region(start, stop, columns, transposed=False)
    if module.kind == "embedding":
        return Region(start, stop, columns, transposed=True)
    if module.kind == "conv" or len(shape) != 2 or not whole:
        return straight
    flipped = replace(straight, transposed=True)
    families = set(_families(draft.base.config))
    # The tensor's own name tells it: the module's may have underscores for dots.
    may_be_conv1d = place.tensor.removesuffix(".weight").rpartition(".")[2] in _CONV1D_LEAVES
    if flipped.out_in != (out, width) or (families and not (may_be_conv1d and families & set(_CONV1D_MODELS))):
        return straight
    if not families and may_be_conv1d and straight.out_in == flipped.out_in:
        draft.problem(
            module.module,
            f"a square weight {list(shape)} in a base without a model_type",
            "a config.json that tells whether it is a Conv1D, which is stored as (in, out), or a Linear",
        )
        return None
    return flipped if families or straight.out_in != (out, width) else straight


def _families(config: Mapping[str, object]) -> Iterator[str]:
    """model_type of the model and of the models that it is made of."""
    for key, value in config.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _families(value)


def _mismatch(draft: _Draft, module: LoraWeights, shape: tuple[int, ...]) -> None:
    lora = f"lora_A {list(module.lora_A.shape)} and lora_B {list(module.lora_B.shape)}"
    hint = "this is a base of another size" if len(shape) == 2 else None
    draft.problem(module.module, f"{lora} for a base weight of {list(shape)}", _wanted_shapes(module, shape), hint)


def _wanted_shapes(module: LoraWeights, shape: tuple[int, ...]) -> str:
    rank = module.rank
    if module.kind == "embedding":
        return f"lora_embedding_A [{rank}, {shape[0]}] and lora_embedding_B [{shape[-1]}, {rank}]"
    width = prod(shape[1:])
    return f"lora_A [{rank}, {width}] and lora_B [{shape[0]}, {rank}]"


def _shape(draft: _Draft, tensor: str) -> tuple[int, ...]:
    if tensor in draft.sources:
        return draft.sources[tensor].shape
    if tensor in draft.added:
        return draft.added[tensor].shape
    return draft.base.tensors[tensor].shape


def _mergeable(draft: _Draft, subject: str, tensor: str) -> bool:
    source = draft.sources.get(tensor) or draft.added.get(tensor) or draft.base.tensors[tensor]
    if source.dtype in MERGEABLE_DTYPES:
        return True
    draft.problem(
        subject,
        f"a base tensor of dtype {str(source.dtype).removeprefix('torch.')}",
        "float64, float32, bfloat16 or float16",
        "the base is quantized: merge into the one that it was made from",
    )
    return False


def _add_bias(draft: _Draft, module: LoraWeights) -> None:
    assert module.lora_bias is not None
    parameter = f"{module.module}.bias"
    places = draft.names.find(parameter)
    if not places:
        draft.problem(
            module.module,
            "lora_B.bias and a base layer without a bias",
            "a base layer with one",
            "the merged layer would need a bias that its architecture does not have",
        )
        return
    out = module.lora_bias.shape[0]
    for place, stop in zip(places, _stops(draft, places, out), strict=True):
        size = prod(_shape(draft, place.tensor)) // place.tensor_parts
        if size != stop - place.start:
            draft.problem(f"{module.module}.bias", f"{size} elements in the base", f"{stop - place.start}")
            return
        vector = _rows(module.lora_bias, place.start, stop)
        draft.vectors[place.tensor].append(VectorEdit(module.module, size * place.tensor_part, module.scaling, vector))


def _by_module(experts: Iterable[ExpertLora]) -> dict[str, list[ExpertLora]]:
    grouped: dict[str, list[ExpertLora]] = defaultdict(list)
    for expert in experts:
        grouped[expert.module].append(expert)
    return {module: sorted(group, key=lambda expert: -expert.depth) for module, group in grouped.items()}


@dataclass(frozen=True)
class _Stack:
    """A fused parameter as the base stores it: (experts, dim 1, dim 2), in one tensor or in several an expert."""

    parameter: str
    shape: tuple[int, int, int]
    tensors: tuple[tuple[str, ...], ...]
    fused: bool


def _add_experts(draft: _Draft, module: str, wrappers: list[ExpertLora]) -> None:
    """LoRA on parameters. `wrappers` is innermost first, which is the order of the module's parameters."""
    stacks = [stack for name in wrappers[0].parameters if (stack := _find_stack(draft, module, name))]
    if not stacks:
        draft.not_found(module, f"{module}.{wrappers[0].parameters[0]}")
        return
    if len(wrappers) > len(stacks):
        found = ", ".join(stack.parameter for stack in stacks)
        draft.problem(module, f"LoRA on {len(wrappers)} parameters", f"no more than the base has there: {found}")
        return
    for wrapper in wrappers:
        fitting = [(stack, swapped) for stack in stacks for swapped in _orientations(draft, wrapper, stack)]
        names = {stack.parameter for stack, _ in fitting}
        if len(names) > 1:
            # Two parameters of one shape: the order of registration tells, and gate_up comes before down everywhere.
            order = sorted(names, key=lambda name: (name != "gate_up_proj", name))
            fitting = [pair for pair in fitting if pair[0].parameter == order[len(wrappers) - 1 - wrapper.depth]]
        if not fitting:
            shapes = ", ".join(f"{stack.parameter} {list(stack.shape)}" for stack in stacks)
            draft.problem(
                module,
                f"lora_A {list(wrapper.lora_A.shape)} and lora_B {list(wrapper.lora_B.shape)} of rank {wrapper.rank}",
                f"factors that fit one of the base's {shapes}",
            )
            continue
        if len(fitting) > 1:
            draft.problem(
                module,
                f"a square parameter {list(fitting[0][0].shape)}",
                "to know from transformers which of its dimensions is the input",
                "install dora-serve[verify], or a transformers that has this architecture",
            )
            continue
        _place_experts(draft, wrapper, *fitting[0])


def _find_stack(draft: _Draft, module: str, parameter: str) -> _Stack | None:
    whole = draft.names.find(f"{module}.{parameter}")
    if len(whole) == 1:
        shape = _shape(draft, whole[0].tensor)
        if len(shape) == 2:
            shape = (1, *shape)
        if len(shape) != 3:
            return None
        return _Stack(parameter, (shape[0], shape[1], shape[2]), ((whole[0].tensor,),), fused=True)
    tensors = draft.names.experts(module, parameter)
    if not tensors:
        return None
    shapes = [draft.base.tensors[name].shape for name in tensors[0]]
    return _Stack(parameter, (len(tensors), sum(shape[0] for shape in shapes), shapes[0][1]), tensors, fused=False)


def _orientations(draft: _Draft, wrapper: ExpertLora, stack: _Stack) -> list[bool]:
    """Whether A's input is dim 1 (True) or dim 2 (False) of the parameter; both fit a square one."""
    experts, first, second = stack.shape
    factors = (wrapper.lora_A.shape[1], wrapper.lora_B.shape[0])
    if wrapper.lora_A.shape[0] != experts * wrapper.rank:
        return []
    found = [in_first for in_first, shape in ((False, (second, first)), (True, (first, second))) if shape == factors]
    if len(found) < 2 or experts == 1:
        return found[:1]
    if wrapper.in_is_dim_1 is not None:
        return [wrapper.in_is_dim_1]
    if draft.names.known is None:
        return [False, True]
    named = draft.names.known.transposed
    return [any(name == wrapper.module or name.endswith(f".{wrapper.module}") for name in named)]


def _place_experts(draft: _Draft, wrapper: ExpertLora, stack: _Stack, in_is_dim_1: bool) -> None:
    experts, first, second = stack.shape
    rank = wrapper.rank
    for expert in range(experts):
        lora_a, lora_b = _expert_factors(wrapper, expert, experts)
        label = f"{wrapper.module}.{stack.parameter}[{expert}]"
        start = 0
        for tensor in stack.tensors[0 if stack.fused else expert]:
            if not _mergeable(draft, label, tensor):
                return
            rows = first if stack.fused else draft.base.tensors[tensor].shape[0]
            offset = expert * first if stack.fused else 0
            region = Region(offset, offset + rows, second, transposed=in_is_dim_1)
            part_a, part_b = lora_a, lora_b
            if not stack.fused and in_is_dim_1:
                part_a = _columns(lora_a, start, start + rows)
            elif not stack.fused:
                part_b = _rows(lora_b, start, start + rows)
            assert part_a.shape[0] == rank
            draft.loras[tensor].append(LoraEdit(label, region, part_a, part_b, wrapper.scaling, None))
            start += rows


def _columns(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    return tensor.map((tensor.shape[0], stop - start), lambda whole: whole[:, start:stop])


def _expert_factors(wrapper: ExpertLora, expert: int, experts: int) -> tuple[LazyTensor, LazyTensor]:
    """A (r, in) and B (out, r) of one expert: peft ParamWrapper.get_delta_weight packs A expert-slowest, B fastest."""
    rank, out, width = wrapper.rank, wrapper.lora_B.shape[0], wrapper.lora_A.shape[1]

    def view_a(packed: Tensor) -> Tensor:
        return packed[expert * rank : (expert + 1) * rank]

    def view_b(packed: Tensor) -> Tensor:
        if wrapper.expert_slowest:
            return packed[:, expert * rank : (expert + 1) * rank]
        return packed.reshape(out, rank, experts)[:, :, expert]

    return wrapper.lora_A.map((rank, width), view_a), wrapper.lora_B.map((out, rank), view_b)


def _untie(draft: _Draft, adapter: Adapter) -> None:
    """Give every tied parameter a tensor of its own where the adapter changes only some of them."""
    draft.untying = untying = plan_untying(draft.names, adapter)
    draft.problems.extend(untying.problems)
    draft.added.update(untying.added)
    draft.config_changes.update(untying.config_changes)
    if untying.config_changes:
        apart = ", ".join(sorted(untying.added))
        written = f": {apart} {'is' if len(untying.added) == 1 else 'are'} written apart" if apart else ""
        draft.notes.append(f"The embeddings were tied, and the adapter parts them{written}; config.json says so.")


def _own_name(draft: _Draft, parameter: str) -> str | None:
    """The added tensor of an untied parameter, or None where the base's own names apply."""
    return parameter if parameter in draft.added else None


def _replace(draft: _Draft, adapter: Adapter, change: Replacement) -> None:
    own = _own_name(draft, change.name)
    places = (Place(own),) if own else draft.names.find(change.name)
    if not places:
        places = _tied_places(draft, change.name)
    if not places:
        if change.role in ("modules_to_save", "beside"):
            draft.added[change.name] = change.tensor
            _describe_head(draft, change)
            return
        draft.not_found(change.name, change.name)
        return
    if len(places) > 1 or places[0].tensor_parts > 1:
        draft.problem(change.name, "a trained tensor for a part of a fused base tensor", "one stored tensor")
        return
    for tensor in dict.fromkeys((places[0].tensor, *_kept_ties(draft, adapter, change))):
        _put(draft, change, tensor)


def _put(draft: _Draft, change: Replacement, tensor: str) -> None:
    """Let a trained tensor take the place of a stored (or added) one."""
    shape, new = _shape(draft, tensor), change.tensor.shape
    axis = _vocabulary_axis(draft.base.config, shape, new) if shape != new else None
    if shape != new and axis is None:
        draft.problem(change.name, f"a trained tensor of {list(new)}", f"the base's {list(shape)}")
        return
    if axis is not None:
        for path in _vocabulary_paths(draft.base.config):
            draft.config_changes[path] = new[axis]
        draft.notes.append(f"{tensor} has {new[axis]} rows in the adapter and {shape[axis]} in the base.")
    if tensor in draft.added:
        draft.added[tensor] = change.tensor
    else:
        draft.sources[tensor] = change.tensor


def _vocabulary_axis(config: Mapping[str, object], shape: tuple[int, ...], new: tuple[int, ...]) -> int | None:
    """The axis along which both are a table or a row (1, tokens) over a vocabulary, of two sizes; else None."""
    for axis in (0, 1) if shape[:1] == (1,) else (0,):
        others = [(*one[:axis], *one[axis + 1 :]) for one in (shape, new)]
        if len(shape) == len(new) > axis and others[0] == others[1] and _is_vocabulary(config, shape[axis]):
            return axis
    return None


def _kept_ties(draft: _Draft, adapter: Adapter, change: Replacement) -> tuple[str, ...]:
    """The other tensors of a tie that PEFT kept, where a file holds them all."""
    group = draft.untying.group_of(change.name)
    kept = adapter.config.get("ensure_weight_tying") and change.role == "modules_to_save"
    if not kept or group is None or change.name != group.source or draft.untying.config_changes:
        return ()
    return tuple(stored for member in sorted(group.members) if (stored := draft.names.stored(member)))


def _is_vocabulary(config: Mapping[str, object], size: int) -> bool:
    return any(_get(config, path) == size for path in _vocabulary_paths(config))


def _vocabulary_paths(config: Mapping[str, object]) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = [("vocab_size",), ("text_config", "vocab_size")]
    return [path for path in paths if _get(config, path) is not None]


def _get(config: Mapping[str, object], path: tuple[str, ...]) -> object:
    value: object = config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _require_whole(draft: _Draft) -> None:
    """Every table of a resized vocabulary has to follow, and a head that the base lacks has to come as a whole."""
    sizes = {
        _get(draft.base.config, path): value for path, value in draft.config_changes.items() if "vocab_size" in path
    }
    for name, entry in draft.base.tensors.items():
        is_table = entry.shape and not any(part.isdigit() for part in name.split("."))
        if is_table and entry.shape[0] in sizes and name not in draft.sources:
            draft.problem(
                name,
                f"{entry.shape[0]} rows in the base and none in the adapter",
                f"{sizes[entry.shape[0]]} rows, as the adapter's other table has",
                "save the adapter with save_embedding_layers=True, or with both in modules_to_save",
            )
    if draft.names.architecture is None:
        return
    if draft.names.known is None:
        draft.notes.append(f"transformers was not asked whether {draft.names.architecture} is whole.")
        return
    lacking = [name for name in draft.names.known.missing if name not in draft.added]
    if ("architectures",) not in draft.config_changes:
        if lacking:
            draft.notes.append(
                f"It was trained in a {draft.names.architecture}, whose {', '.join(lacking[:4])} it lacks."
            )
        return
    for name in lacking:
        draft.problem(
            name,
            "no value in the base and none in the adapter",
            f"one, since the adapter was trained in a {draft.names.architecture}",
            "it was drawn at random for the training and never saved: add its module to modules_to_save",
        )


_TASK_HEADS: Mapping[str, str] = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def _trained_architecture(config: Mapping[str, object], adapter: Adapter) -> str | None:
    """The class with a head that was trained, None where that is the base's own or there is no telling."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return None
    own, suffix = str(architectures[0]), _TASK_HEADS.get(adapter.task_type or "")
    named = _get(adapter.config, ("auto_mapping", "base_model_class"))  # PEFT names the class where it knows no task
    if suffix is not None:
        named = own if own.endswith(suffix) else re.sub(r"(For[A-Z]\w*|(LMHead|DoubleHeads)?Model)$", "", own) + suffix
    return named if isinstance(named, str) and re.fullmatch(r"\w+For[A-Z]\w+", named) and named != own else None


def _describe_head(draft: _Draft, change: Replacement) -> None:
    """A trained head that the base does not have: the output needs the architecture that has one, and its labels."""
    draft.notes.append(f"{change.name} {list(change.tensor.shape)} is new: the base has no such tensor.")
    if draft.names.architecture is not None:
        draft.config_changes[("architectures",)] = [draft.names.architecture]
    is_output = re.search(
        r"(^|\.)(score|classifier|classifier\.out_proj|classification_head\.out_proj)\.weight$", change.name
    )
    labels = draft.base.config.get("id2label")
    count = change.tensor.shape[0] if change.tensor.shape else 0
    if is_output and (not isinstance(labels, dict) or len(labels) != count):
        draft.config_changes[("id2label",)] = {str(index): f"LABEL_{index}" for index in range(count)}
        draft.config_changes[("label2id",)] = {f"LABEL_{index}": index for index in range(count)}


def _tied_places(draft: _Draft, parameter: str) -> tuple[Place, ...]:
    """Where the tensor lies that a parameter without one of its own shares."""
    group = draft.untying.group_of(parameter)
    members = sorted(group.members) if group else []
    return next(((Place(stored),) for member in members if (stored := draft.names.stored(member))), ())


def _replace_rows(draft: _Draft, adapter: Adapter, change: TokenRows) -> None:
    parameter = f"{change.module}.weight"
    tables = _row_tables(draft, adapter, parameter)
    if not tables:
        draft.not_found(change.module, parameter)
    for name in tables:
        bias = f"{name.removesuffix('weight')}bias"
        if draft.names.stored(bias) or draft.untying.group_of(bias):
            draft.problem(
                change.module,
                f"trained rows of {name}, which has a bias",
                "a head without one",
                "PEFT leaves that bias out while the rows are active and puts it back when it merges, so there is no "
                "telling which was meant",
            )
    last = max(change.indices, default=0)
    for tensor in sorted(set(tables.values())):
        shape = _shape(draft, tensor)
        if len(shape) != 2 or shape[1] != change.rows.shape[1] or last >= shape[0]:
            got = f"{len(change.indices)} trained rows of width {change.rows.shape[1]} up to row {last}"
            draft.problem(change.module, got, f"rows within the base's {list(shape)}")
            return
        draft.rows[tensor].append(RowEdit(change.module, change.indices, change.rows))


def _row_tables(draft: _Draft, adapter: Adapter, parameter: str) -> dict[str, str]:
    """The parameters whose rows are trained, and their tensors: those of an input embedding are also what is tied to it
    (peft.utils.other.set_additional_trainable_modules), unless that has rows of its own."""
    group = draft.untying.group_of(parameter)
    trained = {f"{rows.module}.weight" for rows in adapter.token_rows}
    shared = group is not None and parameter == group.source and not group.members & (trained - {parameter})
    tables = {}
    for name in sorted(group.members) if group and shared else [parameter]:
        own = _own_name(draft, name)
        places = (Place(own),) if own else draft.names.find(name) or _tied_places(draft, name)
        if len(places) == 1:
            tables[name] = places[0].tensor
    return tables


def _require_disjoint(draft: _Draft) -> None:
    for tensor, edits in draft.loras.items():
        ordered = sorted(edits, key=lambda edit: edit.region.start)
        for first, second in pairwise(ordered):
            if second.region.start < first.region.stop:
                draft.problem(
                    tensor, f"two updates of the same rows, by {first.module} and {second.module}", "one update"
                )


def _finish(draft: _Draft, adapter: Adapter, dtype: torch.dtype | None) -> MergePlan:
    base = draft.base
    files: dict[str, list[str]] = {name: list(file.tensors) for name, file in base.files.items()}
    last = next(reversed(files))
    for name, source in draft.added.items():
        home = base.file_of(source.name) if isinstance(source, TensorEntry) else last
        files[home].append(name)
    tensors: dict[str, TensorPlan] = {}
    for file, names in files.items():
        for name in names:
            tensors[name] = _tensor_plan(draft, name, file, dtype)
    draft.config_changes.update(dict.fromkeys(quantization_paths(base.config)))
    if dtype is not None:
        label = str(dtype).removeprefix("torch.")
        # diffusers keeps no dtype in a configuration, and warns of keys that it does not know.
        for path in _dtype_paths(base.config) or ([] if "_class_name" in base.config else [("dtype",)]):
            draft.config_changes[path] = label
    return MergePlan(
        base=base,
        adapter=adapter,
        tensors=tensors,
        files={file: tuple(names) for file, names in files.items()},
        config_changes=draft.config_changes,
        side_files=_side_files(draft, adapter),
        untied=tuple(sorted(draft.untying.added)),
        notes=(*adapter.notes, *draft.notes),
    )


def _dtype_paths(config: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Where config.json names a dtype, for the model or for one that it is made of."""
    found: list[tuple[str, ...]] = []
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            found.append((key,))
        elif isinstance(value, dict):
            found += [(key, *path) for path in _dtype_paths(value)]
    return found


def _tensor_plan(draft: _Draft, name: str, file: str, dtype: torch.dtype | None) -> TensorPlan:
    stored = draft.base.tensors.get(name)
    added = draft.added.get(name)
    source: TensorEntry | LazyTensor | None = draft.sources.get(name) or added or stored
    assert source is not None
    if stored is not None:
        own = dense_dtype(draft.base.config, stored)
    else:
        own = source.dtype if isinstance(source, TensorEntry) else _floating_dtype(draft.base, source.dtype)
    floating = own.is_floating_point and own in MERGEABLE_DTYPES
    return TensorPlan(
        name=name,
        file=file,
        dtype=dtype if dtype is not None and floating else own,
        shape=source.shape,
        source=source,
        loras=tuple(sorted(draft.loras.get(name, ()), key=lambda edit: edit.region.start)),
        rows=tuple(draft.rows.get(name, ())),
        vectors=tuple(draft.vectors.get(name, ())),
        scales=tuple(
            VectorScale(0, edit, _tensor_plan(draft, weight, file, dtype))
            for weight, edit in draft.scales.get(name, ())
        ),
    )


def _floating_dtype(base: ShardedCheckpoint, dtype: torch.dtype) -> torch.dtype:
    """The dtype of most of the base's elements, for a floating tensor that the base does not have."""
    if not dtype.is_floating_point:
        return dtype
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for entry in base.tensors.values():
        if entry.dtype in MERGEABLE_DTYPES:
            sizes[entry.dtype] += entry.nbytes
    return max(sizes, key=lambda key: sizes[key]) if sizes else dtype


def _side_files(draft: _Draft, adapter: Adapter) -> tuple[tuple[Path, Path], ...]:
    """The base's side files; its tokenizer gives way to the adapter's where the vocabulary was changed."""
    chosen = {relative: draft.base.folder / relative for relative in side_files(draft.base.folder)}
    if draft.base.quantization is not None:
        chosen = {relative: path for relative, path in chosen.items() if str(relative) not in SETTINGS_BESIDE}
    resized = any(path[-1] == "vocab_size" for path in draft.config_changes)
    beside = sorted(adapter.path.iterdir()) if adapter.path.is_dir() else []
    own = [path for path in beside if path.is_file() and _TOKENIZER_FILES.match(path.name)]
    if (resized or adapter.token_rows) and own:
        chosen = {relative: path for relative, path in chosen.items() if not _TOKENIZER_FILES.match(str(relative))}
        chosen |= {Path(path.name): path for path in own}
        draft.notes.append("The tokenizer is the adapter's: the vocabulary was changed with it.")
    elif resized:
        draft.notes.append(
            "The vocabulary was resized, and the adapter folder brings no tokenizer: the base's is kept."
        )
    return tuple((path, relative) for relative, path in chosen.items())
