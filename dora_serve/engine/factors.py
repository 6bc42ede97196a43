"""An adapter made ready for one base: of each module the three tensors that a forward needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dora_serve.adapter import PAPER_NORM, Adapter, LoraWeights, Replacement
from dora_serve.engine.base_layers import compute_dtype, dense_matrix
from dora_serve.engine.scale_cache import ScaleCache
from dora_serve.errors import PlanError, Problem
from dora_serve.magnitudes import SAMPLED, RowLengths, require_plausible
from dora_serve.module_names import ModuleNames, is_conv1d
from dora_serve.ops import factored_row_norms, norm_scale
from dora_serve.row_order import in_base_order


@dataclass(frozen=True)
class Factors:
    """Of one module: lora_A (r, in), lora_B (r, out) with the scaling folded in, norm_scale and bias (out,) or None.

    For an embedding `in` is the vocabulary. The dtype is the layer's own, and float32 at least.
    """

    lora_A: Tensor
    lora_B: Tensor
    norm_scale: Tensor | None
    bias: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        found = (self.lora_A, self.lora_B, self.norm_scale, self.bias)
        return tuple(tensor for tensor in found if tensor is not None)

    def to(self, device: torch.device) -> Factors:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Factors(self.lora_A.to(device), self.lora_B.to(device), move(self.norm_scale), move(self.bias))


@dataclass(frozen=True)
class PreparedAdapter:
    """modules: by run-time name. rank: the largest. Two are the same adapter only if they are the same object."""

    name: str
    modules: Mapping[str, Factors]
    method: str
    rank: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for factors in self.modules.values() for tensor in factors.tensors)

    @property
    def norm_scale_nbytes(self) -> int:
        """What DoRA costs over LoRA."""
        scales = (factors.norm_scale for factors in self.modules.values())
        return sum(scale.nbytes for scale in scales if scale is not None)

    def to(self, device: torch.device) -> PreparedAdapter:
        return replace(self, modules={name: factors.to(device) for name, factors in self.modules.items()})

    # Compared by identity, and so usable as a key: a replaced adapter keeps its name and is another one.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class Base:
    """What preparing needs of the model. layers: the layers that can be adapted, by run-time name. squared_norms:
    `||w_i||^2` of a layer by name, computed when first asked for and shared by all adapters. fingerprint: of the files
    that the base was loaded from, None where it came from none. kept: the norm scales of adapters that were loaded
    before, None to compute them each time.
    """

    label: str
    names: ModuleNames
    layers: Mapping[str, nn.Module]
    squared_norms: Callable[[str], Tensor]
    fingerprint: Callable[[], str | None] = lambda: None
    kept: ScaleCache | None = None


@torch.inference_mode()
def prepare(
    name: str, adapter: Adapter, base: Base, max_rank: int, norm_scales: Mapping[str, Tensor] | None = None
) -> PreparedAdapter:
    """Factors for every module of the adapter, on the devices of their layers.

    norm_scales: by run-time name, of modules whose scales are known from before.

    Raises PlanError with everything that does not fit the base, is beyond `max_rank`, or cannot be served unmerged.
    """
    adapter = in_base_order(adapter, _config(base))
    problems = list(_unservable(adapter, base))
    fitting: dict[str, LoraWeights] = {}
    for weights in adapter.modules:
        if weights.rank == 0:
            problems.append(Problem(weights.module, "a magnitude alone", "factors as well", "merge it and serve that"))
            continue
        found = _find(weights, base, max_rank)
        if isinstance(found, Problem):
            problems.append(found)
        elif fitting.setdefault(found, weights) is not weights:
            problems.append(Problem(weights.module, f"the module {found} twice", "one update of each"))
    modules: dict[str, Factors] = {}
    if not problems:
        loaded = {path: _load(weights, base.layers[path]) for path, weights in fitting.items()}
        scales = dict(norm_scales) if norm_scales else _kept_or_computed(loaded, base)
        scales |= _norm_scales(loaded, base, scales)
        if not adapter.magnitudes_are_norms:
            _require_norms(loaded, scales, base)
        modules = {path: _factors(one, scales.get(path)) for path, one in loaded.items()}
        zero = "a row of W + s B A that is zero, which no magnitude can scale"
        problems += [Problem(path, zero, "none") for path, scale in scales.items() if not _is_finite(scale)]
    if problems:
        said = f" It says it was trained on {adapter.base!r}." if adapter.base else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise PlanError(
            f"The adapter {str(adapter.path)!r} cannot be served on {base.label}: {count}.{said}",
            problems,
            remedy="Serve it on the base that it was trained on; what an engine cannot do unmerged, "
            "`dora-export merge` may.",
        )
    return PreparedAdapter(name, modules, adapter.method, max((w.rank for w in adapter.modules), default=0))


def _require_norms(loaded: Mapping[str, _Loaded], scales: Mapping[str, Tensor], base: Base) -> None:
    """Ask about magnitudes that look like m / ||V||, of which there are some in each adapter of TensorRT-LLM."""
    paths = [path for path, one in loaded.items() if path in scales and one.weights.norm == PAPER_NORM]
    sampled: list[tuple[float, Callable[[], RowLengths]]] = []
    for path in paths[:: max(1, len(paths) // SAMPLED)]:
        magnitude = _magnitude(loaded[path]).double().abs()
        norms = magnitude / scales[path].to(magnitude).abs()
        own = base.squared_norms(path).sqrt()
        sampled.append((float(magnitude.median()), partial(RowLengths, float(norms.median()), float(own.median()))))
    require_plausible(sampled)


def _config(base: Base) -> Mapping[str, object]:
    config = getattr(base.names.model, "config", None)
    return config.to_dict() if config is not None and hasattr(config, "to_dict") else {}


def _find(weights: LoraWeights, base: Base, max_rank: int) -> str | Problem:
    """The run-time name of a module that fits, or what is wrong with it."""
    name = base.names.find(weights.module)
    if name is None:
        nearest = base.names.nearest(weights.module)
        hint = f"the nearest names there are {', '.join(nearest)}" if nearest else None
        return Problem(weights.module, "no such module in the base", "a layer to adapt", hint)
    layer = base.layers.get(name)
    if layer is None:
        kind = type(base.names.modules[name]).__name__
        return Problem(weights.module, f"a {kind}", "a Linear, Conv1D or Embedding layer, or one of bitsandbytes")
    if weights.rank > max_rank:
        return Problem(weights.module, f"rank {weights.rank}", f"at most {max_rank}", "raise the engine's max_rank")
    wanted, got = (weights.lora_B.shape[0], weights.lora_A.shape[1]), _out_in(layer)
    if wanted != got:
        factors = f"lora_A {list(weights.lora_A.shape)} and lora_B {list(weights.lora_B.shape)}"
        return Problem(weights.module, factors, f"[r, {got[1]}] and [{got[0]}, r]", "this is a base of another size")
    return name


def _out_in(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    shape = layer.weight.shape
    assert isinstance(layer, nn.Embedding) or is_conv1d(layer)
    return int(shape[1]), int(shape[0])  # type: ignore[index]


@dataclass(frozen=True)
class _Loaded:
    """A module's tensors on the device of its layer: lora_A (r, in), lora_B (out, r), in the file's dtype. dtype: that
    of the factors to be."""

    weights: LoraWeights
    lora_A: Tensor
    lora_B: Tensor
    dtype: torch.dtype


def _load(weights: LoraWeights, layer: nn.Module) -> _Loaded:
    device = layer.weight.device
    dtype = torch.promote_types(compute_dtype(layer), torch.float32)
    return _Loaded(weights, weights.lora_A.load().to(device), weights.lora_B.load().to(device), dtype)  # type: ignore[arg-type]


def _kept_or_computed(loaded: Mapping[str, _Loaded], base: Base) -> dict[str, Tensor]:
    """`norm_scale` (out,) of each module with a magnitude: from those that are kept, or computed and kept."""
    scaled = {path: one for path, one in sorted(loaded.items()) if one.weights.magnitude is not None}
    key = None
    if base.kept is not None and scaled:
        key = base.kept.key(
            ((path, one.weights.scaling, one.weights.norm, one.dtype), (one.lora_A, one.lora_B, _magnitude(one)))
            for path, one in scaled.items()
        )
    if base.kept is None or key is None:
        return _norm_scales(loaded, base, {})
    found = base.kept.get(key, {path: (one.dtype, len(one.lora_B)) for path, one in scaled.items()})
    if found:
        return found
    scales = _norm_scales(loaded, base, {})
    if all(map(_is_finite, scales.values())):
        base.kept.put(key, scales)
    return scales


def _norm_scales(loaded: Mapping[str, _Loaded], base: Base, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`norm_scale` (out,) of each module with a magnitude that is not known, those of one shape together: of a layer by
    itself the arithmetic is less than the calls."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for path, one in loaded.items():
        if one.weights.magnitude is not None and path not in known:
            kinds = (one.dtype, one.lora_A.dtype, one.lora_B.dtype, one.lora_A.device)
            alike.setdefault((one.lora_A.shape, one.lora_B.shape, one.weights.norm, *kinds), []).append(path)
    scales: dict[str, Tensor] = {}
    for paths in alike.values():
        size = loaded[paths[0]].lora_A.numel() + loaded[paths[0]].lora_B.numel()
        step = max(1, _GROUP_ELEMENTS // size)
        for start in range(0, len(paths), step):
            scales |= _norm_scales_of_one_shape({path: loaded[path] for path in paths[start : start + step]}, base)
    return scales


_GROUP_ELEMENTS = 1 << 22


def _norm_scales_of_one_shape(loaded: Mapping[str, _Loaded], base: Base) -> dict[str, Tensor]:
    ones = list(loaded.values())
    norm = ones[0].weights.norm
    if norm.axis is None:  # they are m / ||V|| already
        return {path: _magnitude(one).to(one.lora_A.device, one.dtype) for path, one in loaded.items()}
    norms = factored_row_norms(
        [partial(dense_matrix, base.layers[path]) for path in loaded],
        torch.stack([base.squared_norms(path) for path in loaded]),
        torch.stack([one.lora_A for one in ones]),
        torch.stack([one.lora_B for one in ones]),
        torch.tensor([one.weights.scaling for one in ones], dtype=torch.float64, device=ones[0].lora_A.device),
        ones[0].dtype,
    )
    magnitudes = torch.stack([_magnitude(one).to(norms) for one in ones])
    scales = norm_scale(magnitudes, norms + norm.eps).to(ones[0].dtype)
    return dict(zip(loaded, scales, strict=True))


def _magnitude(one: _Loaded) -> Tensor:
    assert one.weights.magnitude is not None
    return one.weights.magnitude.load()


def _factors(loaded: _Loaded, scale: Tensor | None) -> Factors:
    weights, lora_a, dtype = loaded.weights, loaded.lora_A, loaded.dtype
    bias = None
    if weights.lora_bias is not None:
        bias = (weights.lora_bias.load().to(lora_a.device, torch.float64) * weights.scaling).to(dtype)
    scale = None if scale is None else scale.to(lora_a.device, dtype)
    columns = loaded.lora_B.to(dtype).T
    # Turned and scaled in one pass: every step of a decode reads it in this order.
    lora_b = torch.mul(columns, weights.scaling, out=columns.new_empty(columns.shape))
    return Factors(lora_a.to(dtype), lora_b, scale, bias)


def _is_finite(scale: Tensor) -> bool:
    return math.isfinite(float(scale.sum()))


def _unservable(adapter: Adapter, base: Base) -> list[Problem]:
    """What has no unmerged form here: each by name, never left out in silence."""
    wanted = "LoRA or DoRA factors on single layers"
    hint = "merge it with dora-export and serve the result"
    problems = [Problem(one.module, "LoRA on a parameter of experts", wanted, hint) for one in adapter.experts]
    problems += [Problem(rows.module, "trained token rows", wanted, hint) for rows in adapter.token_rows]
    for one in adapter.modules:
        if one.magnitude is not None and one.norm.axis == "in":
            problems.append(Problem(one.module, "a magnitude for each input", "one for each output", hint))
        if one.magnitude is not None and one.norm.scales_bias:
            problems.append(Problem(one.module, "a magnitude that scales the bias", "one that leaves it alone", hint))
        if adapter.keeps_ties and one.kind == "embedding":
            problems.append(Problem(one.module, "an update shared with the tied head", "one of this module", hint))
    if adapter.config.get("layer_replication"):
        problems.append(Problem("layer_replication", "layers that the base does not have", wanted, hint))
    for replacement in adapter.replacements:
        if not _is_the_base(replacement, base):
            kind = "a trained bias" if replacement.role == "bias" else "a whole trained tensor"
            problems.append(Problem(replacement.name, kind, wanted, hint))
    return problems


def _is_the_base(replacement: Replacement, base: Base) -> bool:
    """Whether a saved tensor is what the base has anyway: peft saves an embedding along with an adapter on it."""
    path, _, leaf = replacement.name.rpartition(".")
    name = base.names.find(path)
    own = getattr(base.names.modules[name], leaf, None) if name is not None else None
    if not isinstance(own, Tensor) or own.shape != replacement.tensor.shape:
        return False
    return torch.equal(replacement.tensor.load().to(own.device, own.dtype), own.detach())
