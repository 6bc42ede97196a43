"""PEFT's on-disk LoRA and DoRA (peft 0.21.2: utils/save_and_load.py, tuners/lora/model.py; formats.md section 1).

Every tensor of the file ends up in the Adapter or in an error. A reader knows nothing of the base: whether a module
exists there, which parameter of an expert is meant and what has to be untied is decided in `resolve`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.adapter import Adapter, ExpertLora, Kind, LazyTensor, LoraWeights, Replacement, TokenRows
from dora_serve.errors import AdapterError, UnmergeableError
from dora_serve.formats.files import CONFIG_NAME, find_weights, no_weights, open_weights, peek_config, require_finite
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft_config import PeftConfig, read_peft_config

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
WEIGHTS = (SAFETENSORS_NAME, PICKLE_NAME)

# The adapter's name stands in raw state dicts (FSDP, DeepSpeed) and is stripped by save_pretrained.
_NAMED = r"(?:\.[^.]+)?"
_SUFFIXES: Mapping[str, re.Pattern[str]] = {
    "A": re.compile(rf"^(.+)\.lora_A{_NAMED}\.weight$"),
    "B": re.compile(rf"^(.+)\.lora_B{_NAMED}\.weight$"),
    "B_bias": re.compile(rf"^(.+)\.lora_B{_NAMED}\.bias$"),
    "embedding_A": re.compile(rf"^(.+)\.lora_embedding_A{_NAMED}$"),
    "embedding_B": re.compile(rf"^(.+)\.lora_embedding_B{_NAMED}$"),
    "magnitude": re.compile(r"^(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$"),
    "token_rows": re.compile(rf"^(.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAMED}$"),
}
# With the name of the adapter, or of an embedding without it (save_embedding_layers).
_MODULES_TO_SAVE = re.compile(r"^(.+)\.modules_to_save\.(?:[^.]+\.(.+)|(weight|bias))$")
# Of a wrapped module, raw state dicts also hold what is not used while the adapter is active, and training state.
_UNUSED = re.compile(
    r"\.(original_module|token_adapter\.trainable_tokens_original|lora_monteclora_sampler|lora_velora_\w+)\b"
)
_ATTENTION = re.compile(r"^(.+)\.base_layer\.out_proj$")
_FOREIGN = re.compile(r"(^|[._])(lora|adapter|magnitude|dora|hada|lokr|ia3|oft|delta)([._]|$)", re.IGNORECASE)
"""Parts of an adapter that this reader does not know, by the words that all of them have in their names."""


def sniff(path: Path) -> bool:
    """Whether the folder says that it holds a LoRA of PEFT."""
    return peek_config(path).get("peft_type") == "LORA"


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a PEFT adapter folder. Peak memory: one of its tensors (all of them for a pickle).

    Raises AdapterError (every problem of the files at once where they are independent) and UnmergeableError.
    """
    if not (path / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{str(path)!r} has no {CONFIG_NAME}: got weights alone, wanted the configuration that says their rank, "
            "alpha and method.",
            remedy="Copy it from the trainer's output folder; without it the scale of the update is unknown.",
            path=str(path),
        )
    config = read_peft_config(path, options.ignore_config)
    file = find_weights(path, *WEIGHTS)
    if file is None:
        raise no_weights(path, (SAFETENSORS_NAME,))
    weights = open_weights(file, options.allow_pickle)
    grouped = _group(weights.tensors, config)
    require_finite(weights, grouped.unused)
    modules = tuple(_modules(grouped, config))
    notes = list(grouped.notes)
    if grouped.unused:
        notes.append(f"{len(grouped.unused)} tensors of training state are not used by the adapted model: ignored.")
    if unnamed := [module.module for module in modules if not config.names(module.module)]:
        notes.append(
            f"{len(unnamed)} modules have weights here that target_modules, exclude_modules and layers_to_transform in "
            f"{CONFIG_NAME} leave out ({', '.join(unnamed[:3])}{', ...' if len(unnamed) > 3 else ''}): they are "
            "merged, and PEFT would leave them out."
        )
    base = config.raw.get("base_model_name_or_path")
    revision = config.raw.get("revision")
    task_type = config.raw.get("task_type")
    return Adapter(
        path=path,
        format="peft",
        modules=modules,
        experts=tuple(_experts(grouped, config)),
        replacements=tuple(grouped.replacements.values()),
        token_rows=tuple(_token_rows(grouped, config)),
        base=str(base) if base else None,
        base_revision=str(revision) if revision else None,
        task_type=str(task_type) if task_type else None,
        files=(path / CONFIG_NAME, weights.file),
        config=config.raw,
        notes=tuple(notes),
    )


@dataclass
class _Grouped:
    """The file's tensors by module and role, before they are judged."""

    parts: dict[str, dict[str, LazyTensor]] = field(default_factory=lambda: defaultdict(dict))
    replacements: dict[str, Replacement] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def _group(tensors: Mapping[str, LazyTensor], config: PeftConfig) -> _Grouped:
    grouped, unknown = _Grouped(), []
    for key, tensor in tensors.items():
        name = strip_prefix(key)
        if _UNUSED.search(name):
            grouped.unused.add(key)
            continue
        role, module = _role(name)
        if role is not None and not tensor.dtype.is_floating_point:
            unknown.append(f"{key} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        elif role is not None:
            if match := _ATTENTION.match(module):
                raise UnmergeableError(
                    f"The adapter cannot be merged: {match[1]} is an nn.MultiheadAttention, and PEFT (0.21.2) adds the "
                    "update of its out_proj twice, in the forward as in its merge.",
                    remedy="Merge it with the version of PEFT that trained it.",
                    module=match[1],
                )
            if role in grouped.parts[module]:
                raise AdapterError(
                    f"The adapter holds {role} of {module!r} twice, once as {key!r}.",
                    remedy="Two adapters were saved into one file; save one of them alone.",
                )
            grouped.parts[module][role] = tensor
        elif (replacement := saved_tensor(name, tensor, config)) is not None:
            first = grouped.replacements.setdefault(replacement.name, replacement)
            if first is not replacement and not _are_equal(first.tensor, tensor):
                raise AdapterError(
                    f"The adapter holds {replacement.name!r} twice, with different values, once as {key!r}.",
                    remedy="Two adapters were saved into one file; save one of them alone.",
                )
        else:
            unknown.append(f"{key} {list(tensor.shape)}")
    if unknown:
        raise AdapterError(
            f"The adapter holds {len(unknown)} tensors that are not understood: {', '.join(unknown[:8])}"
            f"{', ...' if len(unknown) > 8 else ''}.",
            remedy="Nothing is dropped in silence: remove them if they do not belong, or report the format.",
            tensors=unknown,
        )
    return grouped


def _are_equal(first: LazyTensor, second: LazyTensor) -> bool:
    same = first.shape == second.shape and first.dtype == second.dtype
    return same and torch.equal(first.load(), second.load())


def strip_prefix(key: str) -> str:
    """A tensor's name without what peft and distributed training put before and into it."""
    name = key.removeprefix("base_model.model.").replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
    return name.removeprefix("module.base_model.model.")


def _role(name: str) -> tuple[str | None, str]:
    for role, pattern in _SUFFIXES.items():
        if match := pattern.match(name):
            return role, match[1]
    return None, name


def saved_tensor(name: str, tensor: LazyTensor, config: PeftConfig) -> Replacement | None:
    """A whole tensor that was saved with the adapter, None for what is a part of an adapter."""
    if match := _MODULES_TO_SAVE.match(name):
        return Replacement(f"{match[1]}.{match[2] or match[3]}", tensor, "modules_to_save")
    if ".base_layer." in name:
        plain = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
        is_bias = plain.endswith(".bias") and config.bias in ("all", "lora_only")
        return Replacement(plain, tensor, "bias" if is_bias else "base_layer")
    # PEFT compares the end of a module's path, so that "norm" means "input_layernorm" too (_set_trainable).
    if any(re.search(rf"{re.escape(saved)}(\.|$)", name.rpartition(".")[0]) for saved in config.modules_to_save):
        return Replacement(name, tensor, "modules_to_save")
    if name.endswith(".bias") and config.bias in ("all", "lora_only"):
        return Replacement(name, tensor, "bias")
    # Saved embeddings have the plain names of parameters, and PEFT loads whatever has one.
    return None if _FOREIGN.search(name) else Replacement(name, tensor, "base_layer")


def _modules(grouped: _Grouped, config: PeftConfig) -> list[LoraWeights]:
    problems: list[str] = []
    modules = []
    for module, parts in grouped.parts.items():
        if ("token_rows" in parts and len(parts) == 1) or _is_expert(module, config, grouped):
            continue
        kind: Kind = "embedding" if "embedding_A" in parts or "embedding_B" in parts else "linear"
        name_a, name_b = ("embedding_A", "embedding_B") if kind == "embedding" else ("A", "B")
        missing = [name for name in (name_a, name_b) if name not in parts]
        if missing:
            problems.append(f"{module}: has {', '.join(sorted(parts))}, lora_{' and lora_'.join(missing)} is missing")
            continue
        lora_a, lora_b = parts[name_a], parts[name_b]
        if problem := _shape_problem(module, kind, lora_a, lora_b, parts, config):
            problems.append(problem)
            continue
        if len(lora_a.shape) > 2:
            kind = "conv"
        lora_a, lora_b = _block_diagonal(module, lora_a, lora_b, config)
        rank, out = lora_b.shape[1], lora_b.shape[0]
        magnitude = parts.get("magnitude")
        modules.append(
            LoraWeights(
                module=module,
                kind=kind,
                lora_A=lora_a.map((rank, prod(lora_a.shape[1:])), lambda tensor: tensor.flatten(1)),
                lora_B=lora_b.map((out, rank), lambda tensor: tensor.flatten(1)),
                scaling=config.scaling(module),
                magnitude=magnitude.map((out,), torch.flatten) if magnitude else None,
                lora_bias=parts.get("B_bias"),
            )
        )
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:20])
        more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise AdapterError(
            f"The adapter in {SAFETENSORS_NAME} does not fit its {CONFIG_NAME}:{shown}{more}",
            remedy="Save the adapter again from the trained model; do not edit one file without the other.",
            problems=problems,
        )
    return modules


def _shape_problem(
    module: str,
    kind: Kind,
    lora_a: LazyTensor,
    lora_b: LazyTensor,
    parts: Mapping[str, LazyTensor],
    config: PeftConfig,
) -> str | None:
    """What is wrong with the tensors of one module, or None. Raises UnmergeableError for a grouped convolution."""
    shapes = f"lora_A {list(lora_a.shape)} and lora_B {list(lora_b.shape)}"
    if min(len(lora_a.shape), len(lora_b.shape)) < 2 or 0 in (*lora_a.shape, *lora_b.shape):
        return f"{module}: {shapes} are shards or empty; a ZeRO-3 or FSDP run saved them without gathering them"
    rank = config.rank(module)
    if len(lora_a.shape) > 2 and lora_a.shape[0] == rank and lora_b.shape[1] != rank:
        raise UnmergeableError(
            f"The adapter cannot be merged: {module} is a grouped convolution ({shapes}), for which no trainer defines "
            "a merged weight.",
            remedy="Leave grouped convolutions out of target_modules.",
            module=module,
        )
    block_diagonal = _is_block_diagonal(module, config)
    if lora_a.shape[0] != rank or (lora_b.shape[1] != rank and not block_diagonal):
        return f"{module}: {shapes}, where {CONFIG_NAME} says rank {rank}"
    if prod(lora_b.shape[2:]) != 1:
        return f"{module}: lora_B {list(lora_b.shape)}, wanted a 1x1 kernel"
    magnitude = parts.get("magnitude")
    if config.use_dora and magnitude is None:
        return (
            f"{module}: {CONFIG_NAME} says use_dora and lora_magnitude_vector is missing; its writer lost the "
            "magnitudes, and merging the rest would give another model"
        )
    if magnitude is not None and not config.use_dora:
        said = "says use_dora is false"
        if "use_dora" not in config.raw:
            said = "does not say use_dora (nor do exports of torchtune, which --format torchtune reads)"
        return f"{module}: has a lora_magnitude_vector, and {CONFIG_NAME} {said}"
    if magnitude is not None and prod(magnitude.shape) != lora_b.shape[0]:
        return f"{module}: lora_magnitude_vector {list(magnitude.shape)}, wanted {lora_b.shape[0]} values"
    bias = parts.get("B_bias")
    if bias is not None and (not config.lora_bias or bias.shape != lora_b.shape[:1]):
        return f"{module}: lora_B.bias {list(bias.shape)} with lora_bias = {config.lora_bias}"
    if config.lora_bias and bias is None and kind == "linear":
        return f"{module}: {CONFIG_NAME} says lora_bias and lora_B.bias is missing"
    return None


def _is_block_diagonal(module: str, config: PeftConfig) -> str | None:
    """ "A" or "B" where BD-LoRA stores that factor as blocks (peft variants.py, BdLoraLinearVariant.init)."""
    if config.block_diagonal is None:
        return None
    leaf = module.rpartition(".")[2]
    for factor, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b")):
        patterns = config.block_diagonal.get(key) or []
        if isinstance(patterns, list) and any(str(pattern) in leaf for pattern in patterns):
            return factor
    return None


def _block_diagonal(
    module: str, lora_a: LazyTensor, lora_b: LazyTensor, config: PeftConfig
) -> tuple[LazyTensor, LazyTensor]:
    factor = _is_block_diagonal(module, config)
    if factor is None or config.block_diagonal is None:
        return lora_a, lora_b
    blocks = config.block_diagonal.get("nblocks")
    stored = lora_a if factor == "A" else lora_b
    if not isinstance(blocks, int) or blocks < 1 or stored.shape[0] % blocks:
        raise AdapterError(
            f"{module}: {list(stored.shape)} cannot be cut into nblocks = {blocks!r} blocks.",
            remedy=f"Restore the {CONFIG_NAME} of this training.",
        )

    def assemble(tensor: Tensor) -> Tensor:
        assembled: Tensor = torch.block_diag(*tensor.chunk(blocks, dim=0))
        return assembled

    whole = stored.map((stored.shape[0], stored.shape[1] * blocks), assemble)
    return (whole, lora_b) if factor == "A" else (lora_a, whole)


def _is_expert(name: str, config: PeftConfig, grouped: _Grouped) -> bool:
    """Whether this module's LoRA sits on parameters of its own name rather than on a layer's weight.

    A target without an owner ("gate_up_proj") may mean any module: then the experts, packed into lora_A, tell.
    """
    module, _ = _unwrapped(name)
    owned, free = _targets(module, config)
    lora_a = grouped.parts[name].get("A")
    return bool(owned) or (bool(free) and lora_a is not None and lora_a.shape[:1] != (config.rank(module),))


def _unwrapped(name: str) -> tuple[str, int]:
    """The module, and how many wrappers stand around this one."""
    module = name
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module, (len(name) - len(module)) // len(".base_layer")


def _targets(module: str, config: PeftConfig) -> tuple[set[str], set[str]]:
    """Parameters that `target_parameters` names for `module`, and those that it names for whatever module has them."""
    split = [target.rpartition(".") for target in config.target_parameters]
    owned = {leaf for owner, _, leaf in split if owner and (module == owner or module.endswith(f".{owner}"))}
    return owned, {leaf for owner, _, leaf in split if not owner}


def _candidates(module: str, config: PeftConfig, grouped: _Grouped) -> tuple[str, ...]:
    """Names of the parameters of `module` that are adapted (peft tuners_utils._inject_parameters)."""
    owned, free = _targets(module, config)
    wrappers = sum(_unwrapped(name)[0] == module for name in grouped.parts)
    return tuple(sorted(owned if len(owned) >= wrappers else owned | free))


def _experts(grouped: _Grouped, config: PeftConfig) -> list[ExpertLora]:
    experts = []
    for name, parts in grouped.parts.items():
        if not _is_expert(name, config, grouped):
            continue
        module, depth = _unwrapped(name)
        if parts.keys() != {"A", "B"} or config.use_dora:
            raise AdapterError(
                f"{module}: LoRA on parameters has {', '.join(sorted(parts))}, wanted lora_A and lora_B, without DoRA.",
                remedy="Save the adapter again from the trained model.",
            )
        parameters = _candidates(module, config, grouped)
        meant = _parameter_of(module, depth, parameters, grouped)
        ranks = {config.rank(f"{module}.{parameter}") for parameter in meant}
        scalings = {config.scaling(f"{module}.{parameter}") for parameter in meant}
        if len(ranks) > 1 or len(scalings) > 1:
            raise UnmergeableError(
                f"{module}: its parameters {', '.join(parameters)} have different ranks or alphas, and the file does "
                "not say which tensor belongs to which.",
                remedy="Train them with one rank and alpha.",
            )
        rank = ranks.pop()
        lora_a, lora_b = parts["A"], parts["B"]
        fits = len(lora_a.shape) == 2 and len(lora_b.shape) == 2 and lora_a.shape[0] == lora_b.shape[1]
        if not fits or lora_a.shape[0] % rank:
            raise AdapterError(
                f"{module}: lora_A {list(lora_a.shape)} and lora_B {list(lora_b.shape)}, wanted [experts * {rank}, in] "
                f"and [out, {rank} * experts].",
                remedy="Save the adapter again from the trained model.",
            )
        if lora_a.shape[1] == lora_b.shape[0] and str(config.raw.get("peft_version")) == "0.19.0":
            raise UnmergeableError(
                f"{module}: a square parameter, and PEFT 0.19.0, which had input and output of parameters exchanged.",
                remedy="Load the adapter with PEFT 0.19.0, and train it on with a later one.",
            )
        experts.append(
            ExpertLora(
                module=module,
                depth=depth,
                lora_A=lora_a,
                lora_B=lora_b,
                rank=rank,
                scaling=scalings.pop(),
                expert_slowest=config.expert_slowest,
                parameters=parameters,
                in_is_dim_1=_in_is_dim_1(config),
            )
        )
    return experts


def _parameter_of(module: str, depth: int, parameters: tuple[str, ...], grouped: _Grouped) -> tuple[str, ...]:
    """Those of `parameters` that the wrapper at `depth` may be meant for.

    Wrappers nest in the order in which the module registers its parameters, the first innermost, and every family of
    transformers registers gate_up_proj before down_proj.
    """
    if parameters == ("down_proj", "gate_up_proj") and f"{module}.base_layer" in grouped.parts:
        return (parameters[depth],)
    return parameters


def _in_is_dim_1(config: PeftConfig) -> bool | None:
    """Whether a square (experts, n, n) parameter was read as (experts, in, out) by the PEFT that trained it.

    None where the base decides (0.19.1 and later, #3165). Up to 0.18 it always was.
    """
    match = re.match(r"(\d+)\.(\d+)", str(config.raw.get("peft_version") or ""))
    if match is None:
        return True  # the key itself came with 0.18
    return True if (int(match[1]), int(match[2])) < (0, 19) else None


def _token_rows(grouped: _Grouped, config: PeftConfig) -> list[TokenRows]:
    spec = config.raw.get("trainable_token_indices")
    found = []
    for module, parts in grouped.parts.items():
        rows = parts.get("token_rows")
        if rows is None:
            continue
        indices = _indices_for(module, spec)
        if indices is None or len(rows.shape) != 2 or len(indices) != rows.shape[0]:
            raise AdapterError(
                f"{module}: has {rows.shape[0] if rows.shape else 0} trained token rows, and trainable_token_indices "
                f"is {spec!r}, wanted as many indices.",
                remedy="The indices are only in the configuration: restore the adapter_config.json of this training.",
            )
        found.append(TokenRows(module, indices, rows))
    if spec and not found:
        raise AdapterError(
            f"{CONFIG_NAME} says trainable_token_indices = {spec!r}, and the file holds no trained token rows.",
            remedy="Save the adapter again from the trained model.",
        )
    return found


def _indices_for(module: str, spec: object) -> tuple[int, ...] | None:
    if isinstance(spec, dict):
        spec = next((value for key, value in spec.items() if module == key or module.endswith(f".{key}")), None)
    if not isinstance(spec, list) or not all(type(index) is int and index >= 0 for index in spec):
        return None
    return tuple(spec)
