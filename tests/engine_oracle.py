"""What the engine has to say, said by transformers and PEFT: greedy continuations and log-probabilities. None of our
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.cases import load, quiet

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Greedy:
    """tokens: what follows the prompt. logprobs: of each of them, float64."""

    tokens: tuple[int, ...]
    logprobs: Tensor


def peft_model(base: Path, adapter: Path | None, like: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT's own unmerged model, the adapter's own dtypes widened to `dtype`; without an adapter, the base."""
    model = load(base, like)
    if adapter is not None:
        with quiet():
            model = PeftModel.from_pretrained(model, adapter)
    if dtype == torch.float64 and getattr(model.config, "_experts_implementation", None):
        model.config._experts_implementation = "eager"  # the fused kernels know no float64
    return model.to(dtype).eval()


def greedy(model: Any, prompt: Sequence[int], count: int) -> Greedy:
    """transformers' own generate, with its own cache, past every end token."""
    settings = getattr(model, "generation_config", None)
    assert settings is not None
    settings.eos_token_id, settings.pad_token_id = None, 0
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = made.sequences[0, len(prompt) :]
    scores = torch.cat(made.logits).double().log_softmax(dim=-1)
    assert len(tokens) == count
    return Greedy(tuple(tokens.tolist()), scores.gather(1, tokens[:, None])[:, 0].cpu())


def forced(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The log-probabilities of `tokens` after `prompt`, from one forward over all of them, in float64."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
    return scores.gather(1, torch.tensor([list(tokens)]).T)[:, 0]


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
