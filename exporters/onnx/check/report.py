"""What a comparison of exported graphs found."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class OnnxCheck:
    """ONNX Runtime against torch in float32, on the same inputs. Differences are of logits, or of a head's outputs.

    max_abs, mean_abs, kl (of ONNX from torch, nats per position), top1 (share of positions): whole prompts, one alone.
    decode_max_abs: the same positions through the cache: one token on an empty past, a chunk, then one at a time.
    padded_max_abs: a batch of four padded to one length (a causal model on the left, its last token as a step of its
        own; an encoder on the right), against each alone in torch.
    perplexity, torch_perplexity: of the prompts, for a causal model.
    greedy_equal of greedy_total prompts continue with the same `greedy_tokens` tokens. Another token is a failure
        only where torch's logits tell the two apart by more than the tolerance; else it is a near tie.
    tokens_per_second, torch_tokens_per_second: of these continuations, the prompt included; a rough figure.
    initializers: weights in the graphs; initializers_equal: those that equal a tensor of the checkpoint cast to the
        graph's dtype, or its transpose, bit for bit; a quantized one within the step of its scale, which must be the
        checkpoint's. Stacked experts are compared with the stack that transformers makes.
    reference_max_abs: distance from the given logits of the unmerged model; reference_limit: what was allowed.
    exact_max_abs, exact_tolerance, exact_kl: of quantized weights, the largest difference of all of these runs with
        activations left in floats from torch on the numbers that the codes stand for, what was allowed, and the KL
        divergence of whole prompts; None where codes have no place in torch's model.
    tolerance: for every difference but the reference's, None for quantized weights, whose loss is measured instead;
        check_onnx says where it comes from. kl_limit: what was allowed of kl.
    not_run: a sentence for each part that this machine could not run. failures: one for each thing that does not hold;
        `passed` means there are none.

    None where there is nothing to measure: decode_max_abs without a cache (greedy_total is 0 then), kl and top1 of
    hidden states, the reference's without one, all of these where not_run says so. A difference is infinite where ONNX
    Runtime gave a value that is not finite, another shape, or nothing.
    """

    prompts: int
    dtype: str
    initializers: int
    initializers_equal: int
    max_abs: float | None = None
    mean_abs: float | None = None
    kl: float | None = None
    top1: float | None = None
    decode_max_abs: float | None = None
    padded_max_abs: float | None = None
    perplexity: float | None = None
    torch_perplexity: float | None = None
    greedy_equal: int = 0
    greedy_total: int = 0
    greedy_tokens: int = 0
    tokens_per_second: float | None = None
    torch_tokens_per_second: float | None = None
    reference_max_abs: float | None = None
    reference_limit: float | None = None
    exact_max_abs: float | None = None
    exact_tolerance: float | None = None
    exact_kl: float | None = None
    provider: str = "none"
    tolerance: float | None = None
    kl_limit: float | None = None
    not_run: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}
