"""The unmerged forward, straight from the paper: y = m / ||W + s B A|| * (W x + s B (A x)) + bias.

Written for the verifier, as the opposite of a merge: a live model keeps its own weights and computes every adapted
module by the formula (DoRA, arXiv 2402.09353, equation 5 and section 4.3; LoRA, arXiv 2106.09685, is norm_scale = 1).
It shares no arithmetic with the code that merges, and its oracle in the tests is PEFT's own unmerged forward.

What is not a layer with a forward of its own has no such form: experts (PEFT's ParamWrapper) and subclasses of layers
that compute something else than their parent. There the parameter holds the formula's weight while its owner's forward
runs, as PEFT does for experts. With `rounded_to`, all parameters do, rounded once to that dtype: what a merge without
fault would be, and so the measure of what storing it in that dtype costs.

Precision: the norm is computed in float64, a block of rows at a time. In a bfloat16 or float16 model the base's part
runs in the model's dtype and everything of the adapter in float32, with one rounding at the end: what a user of PEFT
gets, whose default keeps the adapter in float32 (autocast_adapter_dtype). In a float32 or float64 model all is that.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_serve.adapter import Adapter, Axis, ExpertLora, LazyTensor, LoraWeights, Replacement, TokenRows
from dora_serve.errors import PlanError, Problem
from dora_serve.module_names import ModuleNames, is_conv1d

_BLOCK_ELEMENTS = 1 << 22
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Attached:
    """A model that computes with an adapter.

    modules: the adapter's modules, by their run-time names. called: those whose forward has run since.
    """

    modules: tuple[str, ...] = ()
    called: set[str] = field(default_factory=set)

    @property
    def uncalled(self) -> tuple[str, ...]:
        """Modules that no forward has reached: the adapter does nothing there, or not for these inputs."""
        return tuple(name for name in self.modules if name not in self.called)


@contextmanager
def attach_adapter(model: nn.Module, adapter: Adapter, *, rounded_to: torch.dtype | None = None) -> Iterator[Attached]:
    """Make `model` compute with `adapter`, unmerged, for as long as the context lasts; then it is exactly as before.

    model: any torch model, on any device, in any floating dtype. Its parameters are not written to. Modules are found
    by the adapter's names: as they stand, as the only ending, without the base model's prefix, or as transformers
    renames and fuses them when it loads a checkpoint of theirs (per-expert adapters of transformers 4).
    rounded_to: compute with the formula's weights, rounded once to this dtype, in place of the formula; parameters that
    the adapter leaves alone are rounded too.
    Memory: the adapter; one layer's weights at a time where they are swapped; all that rounding changes in the rest.

    Raises PlanError, with every problem, where a name or a shape does not fit the model; it is then unchanged.
    """
    with ExitStack() as undo:
        replication = adapter.config.get("layer_replication")
        problem = _replicate_layers(undo, model, replication) if replication else None
        attachment = _Attachment(model, rounded_to)
        if problem is not None:
            attachment.problems.append(problem)
        for replacement in adapter.replacements:
            attachment.replace(undo, replacement, tied=_keeps_tie(adapter, replacement))
        for rows in adapter.token_rows:
            attachment.replace_rows(undo, rows, {other.module for other in adapter.token_rows})
        for module in adapter.modules:
            attachment.adapt(undo, module)
            if adapter.keeps_ties and module.kind == "embedding":
                attachment.adapt_tied(undo, module)
        for name, wrappers in _by_module(adapter.experts).items():
            attachment.adapt_experts(name, wrappers)
        if attachment.problems:
            count = len(attachment.problems)
            raise PlanError(
                f"The adapter {str(adapter.path)!r} cannot be attached to {type(model).__name__}: "
                f"{count} {'problem' if count == 1 else 'problems'}.",
                attachment.problems,
                remedy="Give the base that the adapter was trained on.",
            )
        attachment.swap_parameters(undo)
        attachment.round_others(undo)
        yield attachment.attached


def _replicate_layers(undo: ExitStack, model: Any, spec: Any) -> Problem | None:
    """Repeat the model's layers, with the same parameters, as peft does (tuners_utils.replicate_layers).

    spec: [start, end) pairs. Returns what is wrong with it or with the model.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    stacks = [
        (owner, name, layers)
        for owner in model.modules()
        for name, layers in owner._modules.items()
        if name in ("layers", "layer", "h") and isinstance(layers, nn.ModuleList) and len(layers) == count
    ]
    if len(stacks) != 1:
        return Problem("layer_replication", f"{len(stacks)} stacks of {count} layers in the model", "exactly one")
    owner, name, layers = stacks[0]
    order = [index for start, end in spec for index in range(start, end)]
    if not order or max(order) >= len(layers):
        return Problem("layer_replication", repr(spec), f"pairs [start, end) within {len(layers)} layers")
    copies = nn.ModuleList(_sharing_copy(layers[index], model.config) for index in order)
    for position, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 - which module has it no type says
    _put(undo, owner._modules, name, copies)
    _put(undo, vars(model.config), "num_hidden_layers", len(order))
    for key in ("layer_types", "mlp_layer_types"):
        kinds = vars(model.config).get(key)
        if isinstance(kinds, list) and len(kinds) == count:
            _put(undo, vars(model.config), key, [kinds[index] for index in order])
    return None


def _sharing_copy(layer: nn.Module, config: Any) -> nn.Module:
    """A module tree of its own over the same parameters, buffers and configuration."""
    shared: list[Any] = [config, *layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(one): one for one in shared})


def _keeps_tie(adapter: Adapter, replacement: Replacement) -> bool:
    """Whether a replaced tensor reaches the modules that share it.

    PEFT loads what stood below a LoRA layer into the shared parameter, and trains modules_to_save as a copy of its own
    unless ensure_weight_tying says otherwise.
    """
    return replacement.role == "base_layer" or (
        replacement.role == "modules_to_save" and bool(adapter.config.get("ensure_weight_tying"))
    )


def _by_module(experts: tuple[ExpertLora, ...]) -> dict[str, list[ExpertLora]]:
    """Wrappers of each module, innermost first, which is the order of the module's parameters."""
    grouped: dict[str, list[ExpertLora]] = defaultdict(list)
    for expert in experts:
        grouped[expert.module].append(expert)
    return {module: sorted(group, key=lambda expert: -expert.depth) for module, group in grouped.items()}


@dataclass(frozen=True)
class _Factors:
    """lora_A (r, in), lora_B (out, r), norm_scale and lora_bias (out,) or None: on the device, in one dtype.

    input_scale: (in,) or None, m / ||V|| where the norms run along the outputs (adapter.Norm). scales_bias: whether
    norm_scale multiplies the bias of the base too.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    norm_scale: Tensor | None
    lora_bias: Tensor | None
    input_scale: Tensor | None = None
    scales_bias: bool = False

    @staticmethod
    def of(module: LoraWeights, matrix: Tensor) -> _Factors:
        """matrix: the base weight as (out, in)."""
        dtype = torch.promote_types(matrix.dtype, torch.float32)

        def load(lazy: LazyTensor | None) -> Tensor | None:
            return None if lazy is None else lazy.load().to(device=matrix.device, dtype=dtype)

        lora_a, lora_b = module.lora_A.load().to(matrix.device), module.lora_B.load().to(matrix.device)
        scale = None
        if module.magnitude is not None:
            magnitude = module.magnitude.load().to(device=matrix.device, dtype=torch.float64)
            if module.norm.axis == "out":
                magnitude = magnitude / (row_norms(matrix, lora_a, lora_b, module.scaling) + module.norm.eps)
            elif module.norm.axis == "in":
                norm = channel_norms(matrix, lora_a, lora_b, module.scaling, len(magnitude))
                kernel = matrix.shape[1] // len(magnitude)
                magnitude = (magnitude / (norm + module.norm.eps)).repeat_interleave(kernel)
            scale = magnitude.to(dtype)
        by_input = module.norm.axis == "in"
        return _Factors(
            lora_a.to(dtype),
            lora_b.to(dtype),
            module.scaling,
            norm_scale=None if by_input else scale,
            lora_bias=load(module.lora_bias),
            input_scale=scale if by_input else None,
            scales_bias=module.norm.scales_bias,
        )

    def bias(self, bias: Tensor) -> Tensor:
        """The base's bias, as it is added to what `adapted` gives."""
        return bias * self.norm_scale if self.scales_bias and self.norm_scale is not None else bias

    def adapted(self, base: Tensor, low_rank: Tensor) -> Tensor:
        """norm_scale * (base + s low_rank), features last; base (..., out) is W x, low_rank (..., out) is B (A x)."""
        if self.lora_bias is not None:
            low_rank = low_rank + self.lora_bias
        result = base + self.scaling * low_rank
        return result if self.norm_scale is None else self.norm_scale * result

    def weight(self, matrix: Tensor) -> Tensor:
        """The formula's weight, (out, in), for a parameter that has no forward of its own."""
        result = matrix.to(self.lora_A.dtype) + self.scaling * (self.lora_B @ self.lora_A)
        if self.input_scale is not None:
            return result * self.input_scale
        return result if self.norm_scale is None else self.norm_scale[:, None] * result


def row_norms(matrix: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W + s B A|| over each output row: (out,) in float64. matrix is W as (out, in). No epsilon, as in the paper."""
    out, width = matrix.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    norms = torch.empty(out, dtype=torch.float64, device=matrix.device)
    lora_a = lora_A.double()
    for start in range(0, out, step):
        rows = slice(start, start + step)
        norms[rows] = (matrix[rows].double() + scaling * (lora_B[rows].double() @ lora_a)).norm(dim=1)
    return norms


def channel_norms(matrix: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, channels: int) -> Tensor:
    """||W + s B A|| of each input channel over all outputs and the kernel: (channels,) in float64.

    matrix is W as (out, channels * kernel), the kernel fastest.
    """
    step = max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    squares = torch.zeros(channels, dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        direction = matrix[rows].double() + scaling * (lora_B[rows].double() @ lora_A.double())
        squares += direction.reshape(len(direction), channels, -1).square().sum(dim=(0, 2))
    return squares.sqrt()


@dataclass
class _Update:
    """What becomes of one parameter while its owner runs: functions of the stored tensor, each giving the next."""

    owner: nn.Module
    leaf: str
    names: list[str] = field(default_factory=list)
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)


class _Attachment:
    """The work of one attach_adapter: what was found, what is wrong, and how to undo it."""

    def __init__(self, model: nn.Module, rounded_to: torch.dtype | None) -> None:
        self.names = ModuleNames(model)
        self.rounded_to = rounded_to
        self.attached = Attached()
        self.problems: list[Problem] = []
        self.updates: dict[tuple[int, str], _Update] = {}
        self.taken: dict[str, str] = {}
        self.sharing: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
        for name, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self.sharing[id(parameter)].append((name, module, leaf))

    def problem(self, subject: str, got: str, wanted: str, hint: str | None = None) -> None:
        self.problems.append(Problem(subject, got, wanted, hint))

    def find(self, subject: str) -> tuple[str, nn.Module] | None:
        name = self.names.find(subject)
        return (name, self.names.modules[name]) if name is not None else None

    def replace(self, undo: ExitStack, change: Replacement, *, tied: bool) -> None:
        path, _, leaf = change.name.rpartition(".")
        found = self.find(path)
        table: dict[str, Any] = {}
        if found is not None:
            table = found[1]._parameters if leaf in found[1]._parameters else found[1]._buffers
        old = table.get(leaf)
        if change.role == "beside" and old is None:
            return  # no forward of this class reads it
        if found is None or old is None:
            self.problem(change.name, f"no such tensor in {type(self.names.model).__name__}", "one to replace")
            return
        fits = change.tensor.shape[1:] == old.shape[1:] or change.role == "beside"
        if not fits or len(change.tensor.shape) != old.ndim:
            # The first dimension may be another: a resized vocabulary, a head with its own number of labels.
            self.problem(change.name, f"a trained tensor of {list(change.tensor.shape)}", f"{list(old.shape)}")
            return
        new = change.tensor.load().to(device=old.device, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        _put(undo, table, leaf, new)
        for _, module, name in self.sharing.get(id(old), ()) if tied else ():
            if module is not found[1]:
                _put(undo, module._parameters, name, new)

    def replace_rows(self, undo: ExitStack, change: TokenRows, all_modules: set[str]) -> None:
        found = self.find(change.module)
        weight = found[1]._parameters.get("weight") if found else None
        if found is None or weight is None:
            self.problem(change.module, "no such module", "an embedding")
            return
        width = change.rows.shape[1]
        if weight.ndim != 2 or weight.shape[1] != width or max(change.indices, default=0) >= weight.shape[0]:
            rows = f"{len(change.indices)} rows of width {width} up to row {max(change.indices, default=0)}"
            self.problem(change.module, rows, f"rows within {list(weight.shape)}")
            return
        index = torch.tensor(change.indices, dtype=torch.long, device=weight.device)
        changed = weight.detach().index_copy(0, index, change.rows.load().to(weight))
        new = nn.Parameter(changed, requires_grad=False)
        own = {name for module in all_modules if (name := self.names.find(module)) is not None}
        for name, module, leaf in self.sharing.get(id(weight), [(found[0], found[1], "weight")]):
            if name == found[0] or name not in own:
                _put(undo, module._parameters, leaf, new)

    def adapt(self, undo: ExitStack, weights: LoraWeights) -> None:
        found = self.find(weights.module)
        if found is None:
            self._adapt_fused(weights)
            return
        name, module = found
        if name in self.taken:
            self.problem(weights.module, f"the module {name}, which {self.taken[name]} adapts", "a module of its own")
            return
        self.taken[name] = weights.module
        parent = self.names.modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            # It reads the weight of its out_proj and never runs it, so what wraps that has no part in the forward.
            self.attached.modules += (name,)
            return
        if isinstance(module, nn.MultiheadAttention):
            self.problem(
                weights.module,
                "an adapter on nn.MultiheadAttention",
                "any other layer",
                "peft 0.21.2 adds the update of its out_proj twice while it trains, which no formula says",
            )
            return
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim < 2:
            self.problem(weights.module, f"a {type(module).__name__}", "a layer with a weight")
            return
        if getattr(module, "groups", 1) != 1:
            self.problem(weights.module, "a grouped convolution", "groups = 1: no trainer defines the grouped formula")
            return
        matrix = _as_matrix(module, weight.detach())
        weights = weights.of_width(matrix.shape[1])
        if not self._fits(weights, matrix):
            return
        factors = _Factors.of(weights, matrix)
        by_weight = self.rounded_to is not None or factors.input_scale is not None
        forward = None if by_weight else _unmerged_forward(module, factors)
        if forward is None:
            self._step(module, "weight", name, lambda wide: _formula_weight(module, factors, wide))
            if factors.lora_bias is not None and module._parameters.get("bias") is not None:
                added = factors.scaling * factors.lora_bias
                self._step(module, "bias", name, lambda wide: wide + added)
            if factors.scales_bias and module._parameters.get("bias") is not None:
                self._step(module, "bias", name, factors.bias)
            return
        self.attached.modules += (name,)
        _patch(undo, module, forward, name, self.attached.called)

    def adapt_tied(self, undo: ExitStack, weights: LoraWeights) -> None:
        """Adapt what shares an embedding's table in the same way: of a head, the outputs are the embedding's inputs."""
        found = self.find(weights.module)
        if found is None:
            return
        for name, module, leaf in self.sharing.get(id(found[1]._parameters.get("weight")), ()):
            if leaf == "weight" and module is not found[1]:
                self.adapt(undo, _as_head(weights, name))

    def _fits(self, weights: LoraWeights, matrix: Tensor) -> bool:
        wanted = (weights.lora_B.shape[0], weights.lora_A.shape[1])
        by_input = weights.magnitude is not None and weights.norm.axis == "in"
        whole = weights.magnitude is None or not by_input or matrix.shape[1] % weights.magnitude.shape[0] == 0
        if weights.row_order != "base":
            self.problem(weights.module, f"outputs in the order of {weights.row_order}", "those of the base")
            return False
        if tuple(matrix.shape) == wanted and whole:
            return True
        factors = f"lora_A {list(weights.lora_A.shape)} and lora_B {list(weights.lora_B.shape)}"
        out, width = matrix.shape
        self.problem(weights.module, factors, f"[r, {width}] and [{out}, r]", "this is a base of another size")
        return False

    def _step(self, owner: nn.Module, leaf: str, name: str, step: Callable[[Tensor], Tensor]) -> None:
        update = self.updates.setdefault((id(owner), leaf), _Update(owner, leaf))
        update.names.append(name)
        update.steps.append(step)
        self.attached.modules += (name,)

    def _adapt_fused(self, weights: LoraWeights) -> None:
        """A module of its own in transformers 4 that is a part of a fused parameter in transformers 5."""
        place = self.names.fused(weights.module)
        if place is None:
            nearest = self.names.nearest(weights.module)
            hint = f"the nearest names there are {', '.join(nearest)}" if nearest else None
            self.problem(weights.module, f"no such module in {type(self.names.model).__name__}", "one to adapt", hint)
            return
        owner = self.names.modules[place.owner]
        part = place.part_of(owner._parameters[place.leaf])
        weights = weights.of_width(part.shape[1])
        if not self._fits(weights, part):
            return
        factors = _Factors.of(weights, part.detach())

        def step(wide: Tensor) -> Tensor:
            region = place.part_of(wide)
            region.copy_(factors.weight(region))
            return wide

        self._step(owner, place.leaf, weights.module, step)

    def adapt_experts(self, module_name: str, wrappers: list[ExpertLora]) -> None:
        found = self.find(module_name)
        if found is None:
            self.problem(module_name, f"no such module in {type(self.names.model).__name__}", "one with parameters")
            return
        name, owner = found
        leaves = [
            leaf
            for leaf, parameter in owner._parameters.items()
            if parameter is not None and leaf in wrappers[0].parameters
        ]
        if len(leaves) != len(wrappers):
            self.problem(
                module_name, f"LoRA on {len(wrappers)} parameters", f"{len(leaves)}: {', '.join(leaves) or 'none'}"
            )
            return
        # Wrappers nest in the order in which the module registers its parameters, the first innermost.
        for leaf, wrapper in zip(leaves, wrappers, strict=True):
            parameter = owner._parameters[leaf]
            assert parameter is not None
            delta = _expert_delta(wrapper, parameter, bool(getattr(owner, "is_transposed", False)))
            if delta is None:
                factors = f"lora_A {list(wrapper.lora_A.shape)} and lora_B {list(wrapper.lora_B.shape)}"
                self.problem(f"{name}.{leaf}", factors, f"rank {wrapper.rank} factors of {list(parameter.shape)}")
                continue
            self._step(owner, leaf, f"{name}.{leaf}", delta)

    def swap_parameters(self, undo: ExitStack) -> None:
        for update in self.updates.values():
            _swap_while_running(undo, update, self.attached.called, self.rounded_to)

    def round_others(self, undo: ExitStack) -> None:
        if self.rounded_to is None:
            return
        rounded: dict[int, nn.Parameter] = {}
        for module in self.names.model.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None or not parameter.is_floating_point() or (id(module), leaf) in self.updates:
                    continue
                if id(parameter) not in rounded:
                    values = parameter.detach().to(self.rounded_to).to(parameter.dtype)
                    same = torch.equal(values, parameter)
                    rounded[id(parameter)] = parameter if same else nn.Parameter(values, requires_grad=False)
                if rounded[id(parameter)] is not parameter:
                    _put(undo, module._parameters, leaf, rounded[id(parameter)])


def _as_head(weights: LoraWeights, name: str) -> LoraWeights:
    """The update of an embedding's table as that of the linear layer `name` that shares it."""
    rank, count, dim = weights.rank, weights.lora_A.shape[1], weights.lora_B.shape[0]
    axis: Axis | None = {"in": "out", "out": "in"}.get(weights.norm.axis or "")  # type: ignore[assignment]
    return replace(
        weights,
        module=name,
        kind="linear",
        lora_A=weights.lora_B.map((rank, dim), lambda tensor: tensor.T),
        lora_B=weights.lora_A.map((count, rank), lambda tensor: tensor.T),
        norm=replace(weights.norm, axis=axis),
    )


def _is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in, out)."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def _as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as (out, in), a view of it."""
    return weight.T if _is_transposed(module) else weight.flatten(1)


def _formula_weight(module: nn.Module, factors: _Factors, weight: Tensor) -> Tensor:
    """The formula's weight, in the shape in which the module stores it."""
    result = factors.weight(_as_matrix(module, weight))
    return result.T if _is_transposed(module) else result.reshape(weight.shape)


def _unmerged_forward(module: Any, factors: _Factors) -> Callable[..., Tensor] | None:
    """The module's forward by the formula, or None for a class whose forward is not known here."""
    if isinstance(module, nn.Embedding):
        return _embedding(module, factors)
    if type(module).forward is nn.Linear.forward or is_conv1d(module):
        return _linear(module, factors)
    if isinstance(module, _CONVOLUTIONS) and any(type(module).forward is kind.forward for kind in _CONVOLUTIONS):
        return _convolution(module, factors)
    return None


def _linear(module: Any, factors: _Factors) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        base = F.linear(x, _as_matrix(module, module.weight))
        wide = x.to(factors.lora_A.dtype)
        result = factors.adapted(base, F.linear(F.linear(wide, factors.lora_A), factors.lora_B))
        if module.bias is not None:
            result = result + factors.bias(module.bias)
        return result.to(base.dtype)

    return forward


def _convolution(module: Any, factors: _Factors) -> Callable[[Tensor], Tensor]:
    kernel = factors.lora_A.reshape(-1, *module.weight.shape[1:])
    channels = -1 - len(module.kernel_size)

    def forward(x: Tensor) -> Tensor:
        # _conv_forward is the module's own convolution: its stride, padding and dilation. The formula wants channels
        # last.
        base = module._conv_forward(x, module.weight, None).movedim(channels, -1)
        low_rank = module._conv_forward(x.to(kernel.dtype), kernel, None).movedim(channels, -1)
        result = factors.adapted(base, F.linear(low_rank, factors.lora_B))
        if module.bias is not None:
            result = result + factors.bias(module.bias)
        return result.to(base.dtype).movedim(-1, channels)

    return forward


def _embedding(module: nn.Embedding, factors: _Factors) -> Callable[..., Tensor]:
    own_forward = type(module).forward
    table = nn.Parameter(factors.lora_A.T.contiguous(), requires_grad=False)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        # An embedding is linear in its table, in subclasses that scale their output or shift their positions too: so A
        # is looked up by the class's own forward, with A for a table.
        base: Tensor = own_forward(module, *args, **kwargs)
        with ExitStack() as undo:
            _put(undo, module._parameters, "weight", table)
            low_rank = own_forward(module, *args, **kwargs)
        return factors.adapted(base, F.linear(low_rank, factors.lora_B)).to(base.dtype)

    return forward


def _expert_delta(wrapper: ExpertLora, parameter: Tensor, is_transposed: bool) -> Callable[[Tensor], Tensor] | None:
    """W_e + s B_e A_e for each expert e (peft ParamWrapper.get_delta_weight), or None where the shapes do not fit.

    lora_A (experts * r, in) is expert-slowest, lora_B (out, r * experts) expert-fastest; the parameter is
    (experts, out, in), or (experts, in, out) where its module is_transposed or its trainer read it so.
    """
    experts, first, second = parameter.shape if parameter.ndim == 3 else (1, *parameter.shape)
    rank, factors = wrapper.rank, (wrapper.lora_B.shape[0], wrapper.lora_A.shape[1])
    if wrapper.lora_A.shape[0] != experts * rank or sorted(factors) != sorted((first, second)):
        return None
    if parameter.ndim == 2:
        if factors != (first, second):
            return None
        in_is_first = False
    elif first != second:
        in_is_first = factors == (second, first)
    else:
        in_is_first = is_transposed if wrapper.in_is_dim_1 is None else wrapper.in_is_dim_1
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    lora_a = wrapper.lora_A.load().to(parameter.device, dtype).reshape(experts, rank, -1)
    lora_b = wrapper.lora_B.load().to(parameter.device, dtype)
    if wrapper.expert_slowest:
        lora_b = lora_b.reshape(-1, experts, rank).permute(1, 0, 2)
    else:
        lora_b = lora_b.reshape(-1, rank, experts).permute(2, 0, 1)

    def step(wide: Tensor) -> Tensor:
        delta = wrapper.scaling * (lora_b @ lora_a)
        if in_is_first:
            delta = delta.transpose(1, 2)
        return wide + delta.reshape(wide.shape)

    return step


def _put(undo: ExitStack, table: dict[str, Any], key: str, value: Any) -> None:
    """Set an entry that exists, and have it set back."""
    undo.callback(table.__setitem__, key, table[key])
    table[key] = value


def _patch(undo: ExitStack, module: nn.Module, forward: Callable[..., Tensor], name: str, called: set[str]) -> None:
    """Let an instance compute `forward`. Its hooks still run, as they are no part of forward."""

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        called.add(name)
        return forward(*args, **kwargs)

    if "forward" in module.__dict__:
        _put(undo, module.__dict__, "forward", recorded)
    else:
        module.__dict__["forward"] = recorded
        undo.callback(module.__dict__.pop, "forward")


def _swap_while_running(undo: ExitStack, update: _Update, called: set[str], rounded_to: torch.dtype | None) -> None:
    """Compute the parameter anew before each forward of its owner and put the old one back after it."""
    kept: list[nn.Parameter | None] = []

    def before(module: nn.Module, args: Any) -> None:
        called.update(update.names)
        old = update.owner._parameters[update.leaf]
        assert old is not None
        kept.append(old)
        wide = old.detach().to(torch.promote_types(old.dtype, torch.float32), copy=True)
        for step in update.steps:
            wide = step(wide)
        rounded = wide.to(rounded_to or old.dtype).to(old.dtype)
        update.owner._parameters[update.leaf] = nn.Parameter(rounded, requires_grad=False)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        update.owner._parameters[update.leaf] = kept.pop()

    undo.callback(update.owner.register_forward_pre_hook(before).remove)
    undo.callback(update.owner.register_forward_hook(after, always_call=True).remove)
