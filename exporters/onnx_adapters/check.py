"""A slotted graph with an adapter on it, in ONNX Runtime, against torch's unmerged forward of base and adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_serve.adapter import Adapter
from dora_serve.onnx_engine import adapters
from dora_serve.onnx_engine.adapters import AdapterFile, Feeding, OneSlot, Switch, read_adapter_file
from dora_serve.onnx_engine.genai_runner import is_genai
from dora_serve.onnx_engine.slots import SlotTable
from dora_serve.reference import attach_adapter
from exporters.onnx.architectures import architecture_of, kind_of, output_names
from exporters.onnx.check.answers import Expected, Got, Inputs, Weights
from exporters.onnx.check.check import compare_any
from exporters.onnx.check.coded_weights import serve_codes
from exporters.onnx.check.comparing import count_greedy
from exporters.onnx.check.distances import kl_divergence, max_abs_difference, top1_agreement
from exporters.onnx.check.genai_runner import GenaiRunner
from exporters.onnx.check.memory import why_not_run
from exporters.onnx.check.onnx_side import Runner, run_onnx, whole_answers
from exporters.onnx.check.session import Opening
from exporters.onnx.check.torch_side import half_limits, round_at_random, torch_answer, torch_greedy
from exporters.onnx.loading import load_model, quiet, require
from exporters.onnx_adapters.adapter_file import SlottedBase
from exporters.onnx_adapters.check_layers import differing_slots
from exporters.onnx_adapters.fingerprint import fingerprint

if TYPE_CHECKING:
    import torch

FLOAT32_KL = 1e-8
"""Nats per position: what float32 may lose. The good routes measured 4e-11 and less; a fault has 1e-4 and more."""

_ROUNDING_FACTOR = 8.0
"""How far two evaluations in float32 may be apart, in units of what errors of half a spacing on every weight do to the
answers. With the shipped adapters those do 0.7 to 1.2 of what torch's float32 differs from its float64 by."""

_FLOOR = 2.0
"""Least such effect, in spacings of float32 at the largest logit: a tiny model can be exact by luck."""

_BASE_FACTOR = 4.0
"""Where the graph computes in something coarser: how much further from torch it may be with an adapter than without."""


@dataclass(frozen=True)
class SwapCheck:
    """What was found. Differences are of logits, or of a head's outputs; KL in nats per position, from torch.

    base_max_abs, base_kl: the graph without an adapter against torch's base. max_abs, kl, top1: with the adapter,
    against torch's unmerged forward, whole prompts; decode_max_abs: through the cache; padded_max_abs: a padded batch
    of 4. tolerance and kl_limit: for the adapter's. effect_max_abs: how far the adapter moves torch's answers, 0 for
    one that changes nothing. without_magnitude_max_abs: the distance when the file's norm_scale is left out, which has
    to be seen; None for LoRA. layers_equal of layers: those whose tensors in the file do what the unmerged layer does.
    greedy_equal of greedy_total prompts go on with the same tokens.
    initializers, initializers_equal: weights of the graph, and those that are the base's, as for `OnnxCheck`.
    reference: what torch ran: "base", or "dequantized" where the graph's weights are codes. lost_kl: what the graph
    without an adapter lost against torch's float32 of the model itself, quantizing included. exact_max_abs,
    exact_tolerance, exact_kl: of a graph of codes, whole prompts with activations left in floats. not_run: why nothing
    was run, and every number is None then.
    """

    prompts: int
    reference: str
    initializers: int
    initializers_equal: int
    passed: bool
    failures: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    provider: str = "none"
    base_max_abs: float | None = None
    base_kl: float | None = None
    lost_kl: float | None = None
    max_abs: float | None = None
    kl: float | None = None
    kl_limit: float | None = None
    top1: float | None = None
    decode_max_abs: float | None = None
    padded_max_abs: float | None = None
    tolerance: float | None = None
    effect_max_abs: float | None = None
    without_magnitude_max_abs: float | None = None
    exact_max_abs: float | None = None
    exact_tolerance: float | None = None
    exact_kl: float | None = None
    layers: int = 0
    layers_equal: int = 0
    greedy_equal: int = 0
    greedy_total: int = 0


def check_swap(
    base: SlottedBase,
    adapter_file: Path,
    model_folder: Path,
    adapter: Adapter,
    samples: Sequence[Inputs],
    *,
    device: str = "cpu",
    max_kl: float | None = None,
    genai_python: str | None = None,
    greedy_tokens: int = 16,
    on_progress: Callable[[str], None] | None = None,
) -> SwapCheck:
    """Compare the graph, with and without `adapter_file`, with torch on `model_folder`, with and without `adapter`.

    Torch runs in float32 with eager attention, the adapter by `dora_serve.reference`, which shares no code with what
    made the file. Where the graph's weights are codes, torch is given the numbers that these stand for: what
    quantizing cost is not the adapter's fault, and its norms are taken over those numbers. Such a graph is run once
    more with its activations in floats, and judged as strictly as one of whole weights. max_kl: what the graph may
    have lost at most (`lost_kl`). genai_python: as for `check_onnx`.

    samples: of one row each, as `torch_answer` takes them. Raises ValueError without any, and what `load_model` and
    `read_adapter_file` raise.
    """
    require("onnxruntime", "onnx_ir", "transformers")
    if not samples:
        raise ValueError("check_swap needs at least one sample")
    import torch

    tell = on_progress or (lambda message: None)
    failures: list[str] = []
    file, architecture = read_adapter_file(adapter_file, base.table), architecture_of(model_folder)
    packed = any(linear.storage == "packed" for linear in base.linears.values())
    with quiet(), torch.no_grad():
        genai = is_genai(base.path.parent)
        reference = "dequantized" if packed else "base"
        if too_large := why_not_run(model_folder, base.path.parent):
            weights = compare_any([base.path], model_folder, lambda name: None, failures)
            return SwapCheck(
                len(samples), reference, weights.total, weights.equal, not failures, tuple(failures), (too_large,)
            )
        tell("running torch, the adapter unmerged")
        model: Any = load_model(model_folder, attention="eager", experts="eager")
        torch.nn.Module.to(model, device)
        whole = [torch_answer(model, sample) for sample in samples]
        weights = compare_any([base.path], model_folder, model.state_dict().get, failures)
        unplaced = serve_codes([base.path], model)
        plain = [torch_answer(model, sample) for sample in samples]
        with attach_adapter(model, adapter):
            wanted = [torch_answer(model, sample) for sample in samples]
            causal = kind_of(architecture) == "decoder"
            greedy = [torch_greedy(model, sample, greedy_tokens) for sample in samples] if causal else []
            layers, differing = differing_slots(model, base.table, file)
            round_at_random(model, torch.float32)
            moved = [torch_answer(model, sample) for sample in samples]
        del model
        distributions = "last_hidden_state" not in output_names(architecture)
        in_float32 = base.table.dtype == "float32"
        half = None
        if not in_float32:
            of_base = Expected(plain, [], 0.0, FLOAT32_KL, None, distributions)
            dtype = getattr(torch, base.table.dtype)
            half = half_limits(
                model_folder, dtype, device, samples, of_base, lambda narrow: serve_codes([base.path], narrow)
            )
        tell("running ONNX Runtime, with the adapter and without")

        folder, on = base.path.parent, partial(_on, base.table)
        ignored = _without_magnitude(file) if file.is_dora else None

        def run(exact: bool, tokens: int) -> _Runs:
            def opening(feeding: Feeding) -> Opening:
                return Opening(device, feeding, exact)

            def runner(swapped_in: Path | None = None) -> Callable[[Opening], Runner] | None:
                if not genai:
                    return None
                return lambda opened: GenaiRunner(folder, architecture, opened, samples, genai_python, swapped_in)

            bare, served = opening(on(None)), opening(on(file))
            without = whole_answers(folder, architecture, bare, samples, failures, runner())
            swapped = run_onnx(folder, architecture, served, samples, tokens, failures, runner(adapter_file))
            if ignored is None:
                return _Runs(without, swapped, None)
            lost = opening(on(ignored, as_inputs=True))
            return _Runs(without, swapped, whole_answers(folder, architecture, lost, samples, failures, runner()))

        deployed = run(False, greedy_tokens)
        strict = run(True, 0) if packed and not unplaced else None
    rounding = tolerance = _tolerance(wanted, moved)
    if packed or not in_float32:
        tolerance = max(rounding, _BASE_FACTOR * _distance(deployed.without, plain))
    # Of a model that is not finite nothing may pass.
    tolerance = tolerance if tolerance < inf else 0.0
    expected = Expected(wanted, greedy, tolerance, FLOAT32_KL, None, distributions)
    lost_kl = _kl(deployed.without, whole, distributions)
    if max_kl is not None and lost_kl is not None and lost_kl > max_kl:
        failures.append(
            f"The graph's KL divergence from torch in float32 is {lost_kl:.3g}, and --max-kl is {max_kl:g}."
        )
    if fingerprint(base.model) != base.table.fingerprint:
        failures.append("The graph's weights are not those that its slots were made for.")
    if differing:
        failures.append(
            f"{len(differing)} of {layers} layers have tensors in the file that do another thing than the unmerged "
            f"adapter, {differing[0]} among them."
        )
    found = _judge(expected, plain, deployed, weights, exact=not packed and in_float32, failures=failures)
    exactly = None
    if strict is not None:
        wrong: list[str] = []
        narrow = 0.0 if in_float32 else _BASE_FACTOR * _distance(strict.without, plain)
        finest = max(rounding, narrow)
        strictly = replace(expected, tolerance=finest if finest < inf else 0.0)
        exactly = _judge(strictly, plain, strict, weights, exact=in_float32, failures=wrong)
        failures += [f"With the graph's activations in floats: {one[0].lower()}{one[1:]}" for one in wrong]
    if half is not None and (strict is not None or not packed):
        failures += _beyond(half, (strict or deployed).without, plain, distributions)
    swapped, without, spoiled = deployed.swapped, deployed.without, deployed.spoiled
    # To the bit: however coarsely the graph computes, what it takes in shows.
    if rounding < (found.effect_max_abs or 0) and _distance(swapped.answers, without) == 0:
        failures.append("The graph answers as it does without the adapter: it is ignored.")
    if spoiled is not None and _scales(file) and _distance(swapped.answers, spoiled) == 0:
        failures.append("The graph answers as it does without the file's norm_scale: the magnitude is ignored.")
    equal = layers - len(differing)
    return replace(
        found,
        reference=reference,
        passed=not failures,
        failures=tuple(failures),
        lost_kl=lost_kl,
        layers=layers,
        layers_equal=equal,
        exact_max_abs=exactly.max_abs if exactly else None,
        exact_tolerance=exactly.tolerance if exactly else None,
        exact_kl=exactly.kl if exactly else None,
    )


@dataclass(frozen=True)
class _Runs:
    """Of ONNX Runtime: without an adapter, with it, and with it as if its magnitude were ignored, None for LoRA."""

    without: list[torch.Tensor]
    swapped: Got
    spoiled: list[torch.Tensor] | None


def _beyond(
    limits: tuple[float, float], without: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], distributions: bool
) -> Iterator[str]:
    """What is wrong with a base in half precision, whose error else would excuse the adapter's."""
    distance, kl = _distance(without, plain), _kl(without, plain, distributions)
    if distance > limits[0]:
        yield f"Without an adapter the graph differs from torch by {distance:.3g}, and {limits[0]:.3g} is allowed."
    if kl is not None and kl > limits[1]:
        yield f"Without an adapter the KL divergence from torch is {kl:.3g}, and {limits[1]:.3g} is allowed."


def _tolerance(wanted: Sequence[torch.Tensor], moved: Sequence[torch.Tensor]) -> float:
    """For the largest difference between two evaluations in float32."""
    spacing = float(np.finfo(np.float32).eps) * max(float(answer.abs().max()) for answer in wanted)
    return _ROUNDING_FACTOR * max(_distance(moved, wanted), _FLOOR * spacing)


def _on(table: SlotTable, adapter: AdapterFile | None, *, as_inputs: bool = False) -> Feeding:
    if table.mixed:
        return OneSlot(table, adapter)
    return adapters.Inputs(table, adapter) if as_inputs or table.required else Switch(adapter)


def _without_magnitude(file: AdapterFile) -> AdapterFile:
    """As a tool that takes DoRA for LoRA would serve it."""
    ones = {name: np.ones_like(value) for name, value in file.tensors.items() if name.endswith(".norm_scale")}
    return replace(file, tensors={**file.tensors, **ones})


def _scales(file: AdapterFile) -> bool:
    """Whether a norm scale is further from 1 than an adapter that was not trained has it by rounding."""
    scales = [value for name, value in file.tensors.items() if name.endswith(".norm_scale")]
    return any(float(np.abs(np.asarray(one, dtype=np.float32) - 1).max(initial=0)) > 0.02 for one in scales)


def _judge(
    expected: Expected,
    plain: Sequence[torch.Tensor],
    runs: _Runs,
    weights: Weights,
    *,
    exact: bool,
    failures: list[str],
) -> SwapCheck:
    wanted, tolerance = expected.answers, expected.tolerance
    without, swapped, spoiled = runs.without, runs.swapped, runs.spoiled
    base_max_abs, base_kl = _distance(without, plain), _kl(without, plain, expected.distributions)
    kl_limit = None if base_kl is None else FLOAT32_KL if exact else max(FLOAT32_KL, _BASE_FACTOR * base_kl)
    if exact and base_kl is not None and base_kl > FLOAT32_KL:
        failures.append(f"Without an adapter the KL divergence from the base is {base_kl:.3g}.")
    max_abs, kl = _distance(swapped.answers, wanted), _kl(swapped.answers, wanted, expected.distributions)
    decode = _distance(swapped.decoded, wanted) if expected.greedy else None
    padded = _distance([answer for _, answer in swapped.padded], [wanted[number] for number, _ in swapped.padded])
    for what, distance in (
        ("A whole prompt", max_abs),
        ("A prompt through the cache", decode),
        ("A padded batch", padded),
    ):
        if distance is not None and distance > tolerance:
            failures.append(
                f"{what} with the adapter differs from the unmerged model by {distance:.3g}, and {tolerance:.3g} is "
                "allowed."
            )
    if kl is not None and kl_limit is not None and kl > kl_limit:
        failures.append(f"The KL divergence from the unmerged model is {kl:.3g}, and {kl_limit:.3g} is allowed.")
    effect = _distance(plain, wanted)
    if tolerance < effect < inf and max_abs > 0.5 * effect:
        failures.append("The graph answers as it does without the adapter, or nearly: is the adapter ignored?")
    lost = None if spoiled is None else _distance(spoiled, wanted)
    if lost is not None and lost <= tolerance < effect and exact:
        failures.append("The answers are the same without the file's norm_scale: the magnitude is ignored.")
    return SwapCheck(
        prompts=len(wanted),
        reference="base",
        initializers=weights.total,
        initializers_equal=weights.equal,
        provider=swapped.provider,
        base_max_abs=base_max_abs,
        base_kl=base_kl,
        max_abs=max_abs,
        kl=kl,
        kl_limit=kl_limit,
        top1=top1_agreement(_pairs(swapped.answers, wanted)) if kl is not None and kl < inf else None,
        decode_max_abs=decode,
        padded_max_abs=padded,
        tolerance=tolerance,
        effect_max_abs=effect,
        without_magnitude_max_abs=lost,
        greedy_equal=count_greedy(expected, swapped, failures),
        greedy_total=len(expected.greedy),
        passed=not failures,
        failures=tuple(failures),
    )


def _pairs(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(got, wanted, strict=True))


def _distance(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference; infinite where there is nothing to compare."""
    if len(got) != len(wanted):
        return inf
    return max((max_abs_difference(one, other) for one, other in _pairs(got, wanted)), default=inf)


def _kl(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], distributions: bool) -> float | None:
    if not distributions:
        return None
    return kl_divergence(_pairs(got, wanted)) if _distance(got, wanted) < inf else inf
