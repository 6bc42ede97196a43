"""ONNX Runtime against torch for the models of a pipeline, one component and one graph after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_serve.checkpoint import read_json
from dora_serve.denoiser_inputs import denoiser_samples, nested
from dora_serve.forward_report import ForwardReport
from dora_serve.model_classes import ModelClass
from exporters.onnx.check.answers import Weights
from exporters.onnx.check.distances import max_abs_difference
from exporters.onnx.check.memory import why_not_run
from exporters.onnx.check.session import Opening, Refusal, Session
from exporters.onnx.check.structure import check_structure
from exporters.onnx.check.torch_side import round_at_random
from exporters.onnx.check.weights import compare_weights, numbers_of
from exporters.onnx.components import VAE_PARTS, Component, component_of
from exporters.onnx.diffusion import CONDITIONS
from exporters.onnx.loading import quiet
from exporters.onnx.saving import MODEL_FILE

if TYPE_CHECKING:
    pass

_ROUNDING_FACTOR = 16.0
"""How far two evaluations in float32 may be apart, in units of what errors of half a spacing on every weight do: every
activation is rounded as well. The tiny pipelines of the tests measure 2 to 5."""
_FLOOR = 2.0
"""Least such effect, in spacings of float32 at the largest value: a tiny model can be exact by luck."""
_HALF_FACTOR = 4.0
"""In half precision: in units of what computing in it costs torch."""
_WORDS = (3, 8, 16)


@dataclass(frozen=True)
class GraphCheck:
    """One graph on seeded inputs. max_abs: whole inputs one at a time; batched_max_abs: two of them in one batch, of
    another height and width where it takes any. relative: the root mean square of the difference over that of torch's
    values, which is what quantized weights cost. reference_max_abs, reference_limit: from the unmerged model's
    recorded outputs, where the component was adapted.
    """

    folder: str
    samples: int
    dtype: str
    quantize: str | None
    initializers: int
    initializers_equal: int
    provider: str = "none"
    max_abs: float | None = None
    batched_max_abs: float | None = None
    relative: float | None = None
    tolerance: float | None = None
    reference_max_abs: float | None = None
    reference_limit: float | None = None
    not_run: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "passed": not self.failures}


def check_components(
    out: Path,
    merged: Path,
    components: Sequence[str],
    forwards: Mapping[str, ForwardReport | None],
    *,
    device: str = "cpu",
    on_progress: Callable[[str], None] = lambda message: None,
) -> tuple[GraphCheck, ...]:
    """Every graph of the ONNX pipeline in `out` against the component in `merged` that it is of.

    forwards: what the verification of adapted components recorded, by component. Torch runs a component in float32 and
    has left memory before ONNX Runtime starts. A float32 graph may differ from torch by 16 times what errors of half a
    spacing on every weight do to the values, one in half precision by 4 times what that precision costs torch;
    quantized weights have no tolerance, and what they cost is measured. From the unmerged model it may be no further
    than torch is on the merged component, plus that. Every weight equals the merged tensor.
    """
    found: list[GraphCheck] = []
    for name in components:
        component = component_of(merged / name)
        for part in component.parts:
            if not (out / part / MODEL_FILE).is_file():
                continue
            on_progress(f"comparing {part} with torch")
            with quiet(), torch.no_grad():
                found.append(_check_graph(out / part, merged / name, component, forwards.get(name), device))
            gc.collect()
    return tuple(found)


def _check_graph(
    folder: Path, model_folder: Path, component: Component, forward: ForwardReport | None, device: str
) -> GraphCheck:
    failures: list[str] = []
    graph, part = folder / MODEL_FILE, folder.name
    check_structure([graph], failures)
    dtype, quantize = numbers_of([graph])
    too_large = why_not_run(model_folder, folder)
    if too_large is None and dtype == "bfloat16" and not device.startswith("cuda"):
        too_large = "bfloat16 graphs run on CUDA only: the weights and the structure were compared."
    if too_large is not None:
        weights = compare_weights([graph], model_folder, lambda name: None, failures)
        return _checked(part, 0, dtype, quantize, weights, failures, not_run=(too_large,))
    model = _load(model_folder, component, torch.float32, device)
    weights = compare_weights([graph], model_folder, model.state_dict().get, failures)
    samples = _samples(model, component, part)
    wanted = [_torch_outputs(model, component, part, sample) for sample in samples]
    recorded = _recorded(model, component, part, forward)
    if dtype == "float32":
        round_at_random(model, torch.float32)
        moved = [_torch_outputs(model, component, part, sample) for sample in samples]
        tolerance = _ROUNDING_FACTOR * max(_distance(moved, wanted), _FLOOR * _spacing(wanted))
    else:
        del model
        model = _load(model_folder, component, getattr(torch, dtype), device)
        moved = [_torch_outputs(model, component, part, sample) for sample in samples]
        tolerance = _HALF_FACTOR * _distance(moved, wanted)
    del model
    gc.collect()
    try:
        session = Session(graph, Opening(device))
        got = [_onnx_outputs(session, sample) for sample in samples]
        single, batch = list(got[:-1]), got[-1:]
        ours = [_onnx_outputs(session, sample) for sample, _, _ in recorded]
    except Refusal as refusal:
        return _checked(
            part, len(samples), dtype, quantize, weights, [*failures, f"ONNX Runtime cannot run it: {refusal}."]
        )
    max_abs, batched = _distance(single, wanted[:-1]), _distance(batch, wanted[-1:])
    allowed = tolerance if tolerance < inf else 0.0  # of a model that is not finite nothing may pass
    if quantize is None and max(max_abs, batched) > allowed:
        failures.append(f"It differs from torch by {max(max_abs, batched):.3g}, and {allowed:.3g} is allowed.")
    elif max(max_abs, batched) == inf:
        failures.append("Its values are not finite, or of another shape.")
    reference = limit = None
    if recorded:
        theirs = [truth for _, truth, _ in recorded]
        reference = max(_from_recorded(one, truth) for one, truth in zip(ours, theirs, strict=True))
        merged_one = max(_from_recorded(one, truth) for _, truth, one in recorded)
        limit = merged_one + allowed
        if quantize is None and reference > limit:
            failures.append(f"It is {reference:.3g} from the unmerged model, and {limit:.3g} is allowed.")
    return _checked(
        part,
        len(samples),
        dtype,
        quantize,
        weights,
        failures,
        provider=session.provider,
        max_abs=max_abs,
        batched_max_abs=batched,
        relative=_relative(got, wanted) if max(max_abs, batched) < inf else inf,
        tolerance=None if quantize else allowed,
        reference_max_abs=reference,
        reference_limit=None if quantize else limit,
    )


def _checked(
    part: str,
    samples: int,
    dtype: str,
    quantize: str | None,
    weights: Weights,
    failures: Sequence[str],
    **found: Any,
) -> GraphCheck:
    said = tuple(f"{part}: {failure}" for failure in failures)
    return GraphCheck(part, samples, dtype, quantize, weights.total, weights.equal, failures=said, **found)


_Sample = Mapping[str, Tensor]
_Outputs = Sequence[Tensor]


def _load(folder: Path, component: Component, dtype: torch.dtype, device: str) -> Any:
    config = read_json(folder)
    return ModelClass.of(folder, config).load(folder, dtype, device)[0]


def _samples(model: Any, component: Component, part: str) -> list[_Sample]:
    """Inputs by the names of the forward; the last is a batch."""
    if part == component.name and not hasattr(model.config, "_class_name"):
        vocabulary, generator = int(model.config.vocab_size), torch.Generator().manual_seed(0)
        rows = [torch.randint(0, vocabulary, (1, length), generator=generator) for length in _WORDS]
        return [*({"input_ids": row} for row in rows), {"input_ids": torch.cat([rows[-1], rows[-1].flip(1)])}]
    made = [sample.inputs for sample in denoiser_samples(model).samples]
    if part == VAE_PARTS[1]:
        made = [{"latent_sample": _latents(model, sample)} for sample in made]
    elif part == VAE_PARTS[0]:
        made = [{"sample": next(iter(sample.values()))} for sample in made]
    return [*made, {name: _batched(name, made[0][name], made[-1][name]) for name in made[0]}]


def _latents(model: Any, sample: _Sample) -> Tensor:
    encoded: Tensor = model.encode(next(iter(sample.values())).to(model.device)).latent_dist.mean.cpu()
    return encoded


def _batched(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Two inputs as a batch, twice as wide where they are pictures; what all rows share stays one."""
    if name in ("timestep", "img_ids", "txt_ids"):
        return one.repeat(2) if name == "timestep" else one
    both = torch.cat([one, other])
    return torch.cat([both, both.flip(-1)], dim=-1) if both.ndim == 4 else both


def _torch_outputs(model: Any, component: Component, part: str, sample: _Sample) -> _Outputs:
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in sample.items()
    }
    if part == VAE_PARTS[0]:
        found = [model.encode(given["sample"]).latent_dist.parameters]
    elif part == VAE_PARTS[1]:
        found = [model.decode(given["latent_sample"]).sample]
    elif "input_ids" in given:
        states = component.class_name.startswith("CLIP")
        output = model(**given, output_hidden_states=states)
        names = ("text_embeds", "last_hidden_state", "pooler_output")
        found = [output[name] for name in names if output.get(name) is not None]
        found += output.hidden_states if states else ()
    else:
        found = [model(**nested(given), return_dict=False)[0]]
    return [value.float().cpu() for value in found]


def _onnx_outputs(session: Session, sample: _Sample) -> _Outputs:
    known = {}
    for name, value in sample.items():
        array = value.numpy()
        if name == "timestep" and not session.inputs["timestep"].shape:
            array = array[:1].reshape(())  # one for all rows
        known[CONDITIONS.get(name, name)] = array
    outputs, _ = session.run(known)
    return [torch.from_numpy(outputs[name]).float() for name in session.outputs]


def _recorded(
    model: Any, component: Component, part: str, forward: ForwardReport | None
) -> list[tuple[_Sample, Tensor, _Outputs]]:
    """Samples of the verification, the unmerged model's output on each, and torch's on the merged component."""
    if forward is None or not forward.samples or part in VAE_PARTS:
        return []
    found: list[tuple[_Sample, Tensor, _Outputs]] = []
    for sample, truth in zip(forward.samples, forward.unmerged_logits, strict=True):
        inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
        found.append((inputs, truth.float(), _torch_outputs(model, component, part, inputs)))
    return found


def _from_recorded(outputs: _Outputs, truth: Tensor) -> float:
    """The forward check records outputs as (positions, classes), channels last, and of a text encoder with a
    projection both, in rows of a common width: compared by value, whatever the order of axes."""
    sizes = [value.numel() for value in outputs]
    best = inf
    for count in range(1, len(outputs) + 1):
        if sum(sizes[:count]) != truth.numel():
            continue
        parts = [value.movedim(1, -1) if value.ndim > 3 else value for value in outputs[:count]]
        for order in (parts, parts[::-1]):
            flat = torch.cat([value.flatten() for value in order])
            best = min(best, max_abs_difference(flat, truth.flatten()))
    return best


def _distance(got: Sequence[_Outputs], wanted: Sequence[_Outputs]) -> float:
    pairs = [pair for one, other in zip(got, wanted, strict=True) for pair in zip(one, other, strict=True)]
    return max((max_abs_difference(one, other) for one, other in pairs), default=inf)


def _relative(got: Sequence[_Outputs], wanted: Sequence[_Outputs]) -> float:
    ours, theirs = (torch.cat([value.flatten() for one in side for value in one]).double() for side in (got, wanted))
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def _spacing(wanted: Sequence[_Outputs]) -> float:
    return torch.finfo(torch.float32).eps * max(float(value.abs().max()) for one in wanted for value in one)
