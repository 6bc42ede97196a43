"""The judgement: how far ONNX Runtime is from torch and from the unmerged model, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import inf
from typing import TypeAlias

import torch

from exporters.onnx.check.answers import Exact, Expected, Got, Inputs, Weights, token_ids
from exporters.onnx.check.distances import kl_divergence, max_abs_difference, mean_abs_difference, top1_agreement
from exporters.onnx.check.report import OnnxCheck

# What the real rounding of the weights did may exceed what random rounding errors did by this factor.
_ROUNDING_FACTOR = 3.0
# Runs of a quantized graph round activations too, in another way for another batch, by up to what quantizing costs: on
# SmolLM2 in int8 a padded batch differs by 0.78 of it from a prompt alone.
_QUANTIZED_PART = 1.0


def compare(
    expected: Expected,
    got: Got,
    weights: Weights,
    samples: Sequence[Inputs],
    *,
    dtype: str,
    quantize: str | None,
    exact: Exact | None,
    reference_logits: Sequence[torch.Tensor] | None,
    greedy_tokens: int,
    max_kl: float | None,
    failures: list[str],
) -> OnnxCheck:
    """The report; what does not hold is added to `failures` first. quantize: None where every weight is whole. exact:
    what `compare_exactly` found of one that is not.
    """
    pairs, decode, padded = _paired(expected, got)
    max_abs = _largest(pairs)
    if max_abs == inf and got.answers:
        failures.append("A whole prompt gives values that are not finite, or of another shape.")
    comparable = max_abs < inf
    kl = (kl_divergence(pairs) if comparable else inf) if expected.distributions else None
    kl_limit = max_kl if max_kl is not None else None if quantize else expected.kl_limit
    if quantize is None:
        _judge_all("", expected, got, failures)
    elif comparable:
        allowed = max(expected.tolerance, _QUANTIZED_PART * max_abs)
        own = [*zip(got.decoded, got.answers, strict=bool(got.decoded))]
        _judge("A prompt fed through the cache differs from the whole", _largest(own), allowed, failures, own)
        own = [(answer, got.answers[number]) for number, answer in got.padded]
        _judge("A prompt in a padded batch differs from it alone", _largest(own), allowed, failures, own)
    if kl is not None and kl_limit is not None and kl > kl_limit and got.answers:
        failures.append(
            f"The predictions are {kl:.3g} nats (mean KL divergence) from torch's; {kl_limit:.3g} is allowed."
        )
    if not all(bool(answer.isfinite().all()) for answer in expected.answers):
        failures.append("Torch computes values that are not finite from the model in the folder.")
    greedy_equal = count_greedy(expected, got, [] if quantize else failures)
    reference_max_abs = reference_limit = None
    if reference_logits is not None:
        judged = [] if quantize else failures
        reference_max_abs, reference_limit = _against_reference(expected, got, reference_logits, judged)
    tokens = len(expected.greedy) * greedy_tokens
    return OnnxCheck(
        prompts=len(expected.answers),
        dtype=dtype,
        max_abs=max_abs,
        mean_abs=mean_abs_difference(pairs) if comparable else inf,
        kl=kl,
        top1=(top1_agreement(pairs) if comparable else 0.0) if expected.distributions else None,
        decode_max_abs=_largest(decode) if expected.greedy else None,
        padded_max_abs=_largest(padded),
        perplexity=_perplexity(got.answers, samples) if expected.greedy and comparable else None,
        torch_perplexity=_perplexity(expected.answers, samples) if expected.greedy else None,
        greedy_equal=greedy_equal,
        greedy_total=len(expected.greedy),
        greedy_tokens=greedy_tokens,
        tokens_per_second=tokens / got.seconds if tokens and got.seconds else None,
        torch_tokens_per_second=tokens / expected.seconds if tokens and expected.seconds else None,
        initializers=weights.total,
        initializers_equal=weights.equal,
        reference_max_abs=reference_max_abs,
        reference_limit=None if quantize else reference_limit,
        provider=got.provider,
        tolerance=None if quantize else expected.tolerance,
        kl_limit=kl_limit if kl is not None else None,
        exact_max_abs=exact.max_abs if exact else None,
        exact_tolerance=exact.tolerance if exact else None,
        exact_kl=exact.kl if exact else None,
        failures=tuple(failures),
    )


def compare_exactly(expected: Expected, got: Got, failures: list[str]) -> Exact:
    """A quantized graph run with float activations against torch on the numbers of its codes, as one of whole weights.

    What does not hold is added to `failures`: the codes are the right ones or not, and this is about the rest.
    """
    pairs, decode, padded = _paired(expected, got)
    largest = max(map(_largest, (each for each in (pairs, decode, padded) if each)), default=inf)
    _judge_all("With its activations in floats, ", expected, got, failures)
    kl = kl_divergence(pairs) if expected.distributions and largest < inf else None
    if kl is not None and kl > expected.kl_limit:
        failures.append(
            f"With its activations in floats, the predictions are {kl:.3g} nats (mean KL divergence) from torch's on "
            f"the numbers that the codes stand for; {expected.kl_limit:.3g} is allowed."
        )
    return Exact(largest, expected.tolerance, kl)


_Pairs: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"


def _paired(expected: Expected, got: Got) -> tuple[_Pairs, _Pairs, _Pairs]:
    """Answers of whole prompts, through the cache and in a padded batch, each with torch's."""
    return (
        list(zip(got.answers, expected.answers, strict=bool(got.answers))),
        list(zip(got.decoded, expected.answers, strict=bool(got.decoded))),
        [(answer, expected.answers[number]) for number, answer in got.padded],
    )


def _judge_all(how: str, expected: Expected, got: Got, failures: list[str]) -> None:
    pairs, decode, padded = _paired(expected, got)
    of = " on the numbers that the codes stand for" if how else ""
    for what, found in (
        ("a whole prompt", pairs),
        ("a prompt fed through the cache", decode),
        ("a prompt in a padded batch", padded),
    ):
        said = f"{how}{what} differs from torch{of}"
        _judge(said[0].upper() + said[1:], _largest(found), expected.tolerance, failures, found)


def _largest(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return max((max_abs_difference(one, other) for one, other in pairs), default=inf)


def _judge(
    what: str,
    distance: float,
    allowed: float,
    failures: list[str],
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    if pairs and distance > allowed:
        failures.append(f"{what} by {distance:.3g}, and {allowed:.3g} is allowed.")


def _perplexity(answers: Sequence[torch.Tensor], samples: Sequence[Inputs]) -> float | None:
    """Of the tokens after the first, over all prompts."""
    loss, count = 0.0, 0
    for answer, sample in zip(answers, samples, strict=True):
        following = torch.tensor(token_ids(sample)[1:])
        if len(following) and len(answer) == len(following) + 1 and int(following.max()) < answer.shape[1]:
            chosen = answer[:-1].double().log_softmax(-1).gather(1, following[:, None])
            loss, count = loss - float(chosen.sum()), count + len(following)
    return math.exp(min(loss / count, 700.0)) if count else None


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
