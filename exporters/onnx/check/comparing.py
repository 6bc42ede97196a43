"""The judgement: how far ONNX Runtime is from torch and from the unmerged model, and how far it may be."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from exporters.onnx.check.answers import Expected, Got, Weights
from exporters.onnx.check.distances import kl_divergence, max_abs_difference, mean_abs_difference, top1_agreement
from exporters.onnx.check.report import OnnxCheck

if TYPE_CHECKING:
    import torch


# What the real rounding of the weights did may exceed what random rounding errors did by this factor.
_ROUNDING_FACTOR = 3.0


def compare(
    expected: Expected,
    got: Got,
    weights: Weights,
    reference_logits: Sequence[torch.Tensor] | None,
    greedy_tokens: int,
    failures: list[str],
) -> OnnxCheck:
    tolerance = expected.tolerance

    def largest(what: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        distance = max((max_abs_difference(one, other) for one, other in pairs), default=inf)
        if pairs and distance > tolerance:
            failures.append(f"{what} differs from torch by {distance:.3g}, and {tolerance:.3g} is allowed.")
        return distance

    pairs = list(zip(got.answers, expected.answers, strict=bool(got.answers)))
    max_abs = largest("A whole prompt", pairs)
    decode = [*zip(got.decoded, expected.answers, strict=bool(got.decoded))]
    padded = [(answer, expected.answers[number]) for number, answer in got.padded]
    decode_max_abs = largest("A prompt fed through the cache", decode)
    padded_max_abs = largest("A prompt in a padded batch", padded)
    comparable = max_abs < inf
    if not all(bool(answer.isfinite().all()) for answer in expected.answers):
        failures.append("Torch computes values that are not finite from the model in the folder.")
    greedy_equal = count_greedy(expected, got, failures)
    reference_max_abs = reference_limit = None
    if reference_logits is not None:
        reference_max_abs, reference_limit = _against_reference(expected, got, reference_logits, failures)
    return OnnxCheck(
        prompts=len(expected.answers),
        max_abs=max_abs,
        mean_abs=mean_abs_difference(pairs) if comparable else inf,
        kl=(kl_divergence(pairs) if comparable else inf) if expected.distributions else None,
        top1=(top1_agreement(pairs) if comparable else 0.0) if expected.distributions else None,
        decode_max_abs=decode_max_abs if expected.greedy else None,
        padded_max_abs=padded_max_abs,
        greedy_equal=greedy_equal,
        greedy_total=len(expected.greedy),
        greedy_tokens=greedy_tokens,
        initializers=weights.total,
        initializers_equal=weights.equal,
        reference_max_abs=reference_max_abs,
        reference_limit=reference_limit,
        provider=got.provider,
        tolerance=tolerance,
        passed=not failures,
        failures=tuple(failures),
    )


def _against_reference(
    expected: Expected, got: Got, reference_logits: Sequence[torch.Tensor], failures: list[str]
) -> tuple[float, float]:
    """ONNX Runtime's distance from the unmerged model, and the largest allowed."""
    assert expected.rounding is not None
    references = [reference.reshape(-1, reference.shape[-1]).cpu() for reference in reference_logits]
    torch_distance = max(map(max_abs_difference, expected.answers, references))
    limit = min(torch_distance, _ROUNDING_FACTOR * expected.rounding) + expected.tolerance
    distance = max(map(max_abs_difference, got.answers, references), default=inf)
    if distance == inf or distance > limit:
        failures.append(
            f"ONNX Runtime is {distance:.3g} from the unmerged model's logits and {limit:.3g} is allowed; torch on the "
            f"merged folder is {torch_distance:.3g} from them, and rounding the weights moves them by "
            f"{expected.rounding:.3g}."
        )
    return distance, limit


def count_greedy(expected: Expected, got: Got, failures: list[str]) -> int:
    equal = 0
    for number, ((tokens, logits), found) in enumerate(zip(expected.greedy, got.greedy, strict=bool(got.greedy))):
        step = next((step for step, (one, other) in enumerate(zip(tokens, found, strict=True)) if one != other), None)
        if step is None:
            equal += 1
            continue
        # A graph of another vocabulary may name tokens that the model does not have.
        rival = logits[step, found[step]] if found[step] < logits.shape[1] else -inf
        margin = float(logits[step, tokens[step]] - rival)
        if margin > expected.tolerance:
            failures.append(
                f"Greedy token {step + 1} of prompt {number + 1} is {found[step]} and torch's is {tokens[step]}, "
                f"{margin:.3g} above it."
            )
    return equal
