"""What torch computes from the model in the folder, and how exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exporters.onnx.architectures import kind_of, output_names
from exporters.onnx.check.answers import Expected, Inputs, answer_of
from exporters.onnx.check.distances import kl_divergence, max_abs_difference
from exporters.onnx.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ONNX Runtime may be this many times as far from torch's float32 as torch's float32 is from its float64.
_FLOAT32_FACTOR = 8.0
# Least error, in spacings of float32 at the largest logit, to take for torch's: a tiny model can be exact by luck.
_FLOAT32_FLOOR = 2.0
_FLOAT32_KL = 1e-8
# In half precision both sides round every result, in different orders: as far apart as torch's own is from float32,
# times what the largest of many errors varies by.
_HALF_FACTOR = 4.0
_PIECE_ELEMENTS = 1 << 22


def run_torch(
    model: PreTrainedModel, samples: Sequence[Inputs], greedy_tokens: int, stored: torch.dtype | None
) -> Expected:
    """Answers and greedy tokens in float32, what float64 changes, what rounding to `stored` does. Spoils `model`."""
    architecture = type(model).__name__
    answers = [torch_answer(model, sample) for sample in samples]
    began = time.perf_counter()
    generates = kind_of(architecture) != "plain"
    greedy = [torch_greedy(model, sample, greedy_tokens) for sample in samples] if generates else []
    seconds = time.perf_counter() - began

    def largest_change() -> float:
        pairs = zip(samples, answers, strict=True)
        return max(max_abs_difference(torch_answer(model, sample), answer) for sample, answer in pairs)

    with _float64(model):
        error = largest_change()
    spacing = torch.finfo(torch.float32).eps * max(float(answer.abs().max()) for answer in answers)
    rounding = None
    if stored is not None:
        round_at_random(model, stored)
        rounding = largest_change()
    return Expected(
        answers=answers,
        greedy=greedy,
        # Of a model that is not finite nothing may pass.
        tolerance=_FLOAT32_FACTOR * max(error, _FLOAT32_FLOOR * spacing) if error < inf else 0.0,
        kl_limit=_FLOAT32_KL,
        rounding=rounding,
        distributions="last_hidden_state" not in output_names(architecture),
        seconds=seconds,
    )


def half_limits(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    samples: Sequence[Inputs],
    expected: Expected,
    change: Callable[[PreTrainedModel], object] = lambda model: None,
) -> tuple[float, float]:
    """(tolerance, KL limit) of a graph in `dtype`: what computing in it costs torch, times a factor.

    change: what was done to the model that `expected` is of.
    """
    model = load_model(folder, attention="eager", experts="eager", dtype=dtype)
    change(model)
    torch.nn.Module.to(model, device)
    pairs = [(torch_answer(model, sample), answer) for sample, answer in zip(samples, expected.answers, strict=True)]
    largest = max(max_abs_difference(one, other) for one, other in pairs)
    kl = kl_divergence(pairs) if expected.distributions and largest < inf else 0.0
    return max(expected.tolerance, _HALF_FACTOR * largest), max(expected.kl_limit, _HALF_FACTOR**2 * kl)


def _on(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    moved: dict[str, Any] = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    if "input_ids" in moved:
        moved.setdefault("attention_mask", torch.ones_like(moved["input_ids"]))
    return moved


def torch_answer(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The outputs on one sample, in the form of `answer_of`."""
    architecture = type(model).__name__
    output = model(**_on(model, inputs), return_dict=True)
    outputs = {name: output[name].cpu() for name in output_names(architecture) if output.get(name) is not None}
    return answer_of(architecture, outputs, 0, slice(None))


def torch_greedy(model: PreTrainedModel, inputs: Inputs, count: int) -> tuple[list[int], torch.Tensor]:
    """`count` tokens through transformers' own cache, an end token being a token like any other."""
    tokens: list[int] = []
    tops: list[torch.Tensor] = []
    grows = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    given = _on(model, inputs)
    later = {name: value for name, value in given.items() if grows != "input_ids" and name != grows}
    cache = None
    for _ in range(count):
        output = model(**given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tops.append(output.logits[0, -1].cpu())
        tokens.append(int(tops[-1].argmax()))
        given = {**later, grows: torch.tensor([tokens[-1:]], device=model.device)}
    return tokens, torch.stack(tops) if tops else torch.empty(0, 0)


@contextmanager
def _float64(model: PreTrainedModel) -> Iterator[None]:
    """Compute in float64 within the block. To save memory, a module's weights are widened only while it runs; those
    of embeddings, which other modules also read (a tied head, relative positions), throughout.
    """
    embeddings: set[torch.Tensor] = {
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }

    def convert(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)

    def own(module: torch.nn.Module) -> set[torch.Tensor]:
        tensors = {*module.parameters(recurse=False), *module.buffers(recurse=False)} - embeddings
        return {tensor for tensor in tensors if tensor.is_floating_point()}

    def widen(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        convert(own(module), torch.float64)
        # Pictures come in float32, and some models cast to the dtype that another module's weights have just now.
        return tuple(map(_widened, args)), {name: _widened(value) for name, value in kwargs.items()}

    def narrow(module: torch.nn.Module, *_: Any) -> None:
        convert(own(module), torch.float32)

    convert(embeddings, torch.float64)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(widen, with_kwargs=True))
        handles.append(module.register_forward_hook(narrow, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        convert(embeddings, torch.float32)


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def round_at_random(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every weight an error drawn uniformly within half a spacing of `dtype`, as rounding to it does."""
    generator = torch.Generator(model.device).manual_seed(0)
    eps = torch.finfo(dtype).eps
    for parameter in model.parameters():
        # In pieces: a table of a large vocabulary would take its size several times over.
        for piece in parameter.view(-1).split(_PIECE_ELEMENTS):
            _, exponent = torch.frexp(piece)
            error = torch.rand(piece.shape, generator=generator, device=piece.device) - 0.5
            piece.add_(torch.ldexp(error * eps, exponent - 1))
