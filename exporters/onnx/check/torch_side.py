"""What torch computes from the model in the folder, and how exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING

from exporters.onnx.architectures import is_causal, output_names
from exporters.onnx.check.answers import Expected, answer_of
from exporters.onnx.check.distances import max_abs_difference

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# ONNX Runtime may be this many times as far from torch's float32 as torch's float32 is from its float64.
_FLOAT32_FACTOR = 8.0


# Least error, in spacings of float32 at the largest logit, to take for torch's: a tiny model can be exact by luck.
_FLOAT32_FLOOR = 2.0


def run_torch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], greedy_tokens: int, stored: torch.dtype | None
) -> Expected:
    """Answers and greedy tokens in float32, what float64 changes, what rounding to `stored` does. Spoils `model`."""
    import torch

    causal = is_causal(type(model).__name__)
    answers = [torch_answer(model, prompt) for prompt in prompts]
    greedy = [torch_greedy(model, prompt, greedy_tokens) for prompt in prompts] if causal else []
    with _float64(model):
        error = max(
            max_abs_difference(torch_answer(model, prompt), answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        )
    spacing = torch.finfo(torch.float32).eps * max(float(answer.abs().max()) for answer in answers)
    rounding = None
    if stored is not None:
        round_at_random(model, stored)
        rounding = max(
            max_abs_difference(torch_answer(model, prompt), answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        )
    return Expected(
        answers=answers,
        greedy=greedy,
        # Of a model that is not finite nothing may pass.
        tolerance=_FLOAT32_FACTOR * max(error, _FLOAT32_FLOOR * spacing) if error < inf else 0.0,
        rounding=rounding,
        distributions="last_hidden_state" not in output_names(type(model).__name__),
    )


def torch_answer(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """The outputs on one prompt, in the form of `answer_of`."""
    import torch

    architecture = type(model).__name__
    ids = torch.tensor([prompt], device=model.device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
    outputs = {name: output[name].cpu() for name in output_names(architecture) if output.get(name) is not None}
    return answer_of(architecture, outputs, 0, slice(None))


def torch_greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` tokens through transformers' own cache, an end token being a token like any other."""
    import torch

    ids, cache, tokens, tops = torch.tensor([prompt], device=model.device), None, [], []
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tops.append(output.logits[0, -1].cpu())
        tokens.append(int(tops[-1].argmax()))
        ids = torch.tensor([tokens[-1:]], device=model.device)
    return tokens, torch.stack(tops) if tops else torch.empty(0, 0)


@contextmanager
def _float64(model: PreTrainedModel) -> Iterator[None]:
    """Compute in float64 within the block. To save memory, a module's weights are widened only while it runs; those
    of embeddings, which other modules also read (a tied head, relative positions), throughout.
    """
    import torch

    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }

    def convert(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)

    def hook(dtype: torch.dtype) -> Callable[..., None]:
        return lambda module, *_: convert(set(module.parameters(recurse=False)) - embeddings, dtype)

    convert(embeddings, torch.float64)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(hook(torch.float64)))
        handles.append(module.register_forward_hook(hook(torch.float32), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        convert(embeddings, torch.float32)


def round_at_random(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every weight an error drawn uniformly within half a spacing of `dtype`, as rounding to it does."""
    import torch

    generator = torch.Generator(model.device).manual_seed(0)
    eps = torch.finfo(dtype).eps
    for parameter in model.parameters():
        _, exponent = torch.frexp(parameter)
        error = torch.rand(parameter.shape, generator=generator, device=parameter.device) - 0.5
        parameter.add_(torch.ldexp(error * eps, exponent - 1))
