"""What a comparison of an exported graph found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OnnxCheck:
    """ONNX Runtime against torch in float32, on the same tokens. Differences are of logits, or of a head's outputs.

    max_abs, mean_abs, kl (of ONNX from torch, nats per position), top1 (share of positions): whole prompts.
    decode_max_abs: the same positions through the cache: one token on an empty past, a chunk, then one at a time.
    padded_max_abs: a batch of prompts padded to one length (with a cache: on the left, the last token as a step of its
        own), against each prompt alone in torch.
    greedy_equal of greedy_total prompts continue with the same `greedy_tokens` tokens. Another token is a failure
        only where torch's logits tell the two apart by more than the tolerance; else it is a near tie.
    initializers: weights in the graph; initializers_equal: those that equal a tensor of the checkpoint cast to
        float32, or its transpose, bit for bit. Stacked experts are compared with the stack that transformers makes.
    reference_max_abs: distance from the given logits of the unmerged model; reference_limit: what was allowed.
    tolerance: for every difference but the reference's; check_onnx says where it comes from.
    failures: a sentence for each thing that does not hold; `passed` means there are none.

    None where there is nothing to measure: decode_max_abs without a cache (greedy_total is 0 then), kl and top1 of
    hidden states, the reference's without one. A difference is infinite where ONNX Runtime gave a value that is not
    finite, another shape, or nothing.
    """

    prompts: int
    max_abs: float
    mean_abs: float
    kl: float | None
    top1: float | None
    decode_max_abs: float | None
    padded_max_abs: float
    greedy_equal: int
    greedy_total: int
    greedy_tokens: int
    initializers: int
    initializers_equal: int
    reference_max_abs: float | None
    reference_limit: float | None
    provider: str
    tolerance: float
    passed: bool
    failures: tuple[str, ...]
