"""Somebody else's model, run: its scores, its greedy tokens, and what stops it as a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dora_serve.denoiser_inputs import nested
from dora_serve.errors import DoraServeError, in_a_line
from dora_serve.prompts import Sample, room_for


class CannotRun(Exception):
    """Why a model cannot be run, as a sentence."""


class MergedCannotRun(CannotRun):
    """The merged folder cannot be run, where the base can: a failure."""


class OutOfMemory(CannotRun):
    """The device is too small, which says nothing of the model."""


def call(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    moved = {
        name: value.to(device=model.device, dtype=model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    return model(**nested(moved), **options)


def scores_of(model: Any, sample: Sample) -> tuple[str, Tensor]:
    """What a model puts out, in a word, and as (positions, classes): token or class logits, the hidden states of a
    model without a head, with the projection where a text encoder has one, or what a denoiser makes of its latents."""
    output = call(model, sample.inputs)
    denoised = getattr(output, "sample", None)
    if isinstance(denoised, list):
        denoised = torch.stack(denoised)  # of a model that takes a list of latents: here it was one
    if isinstance(denoised, Tensor):
        channels_last = denoised.movedim(1, -1) if denoised.ndim > 3 else denoised
        return "output", channels_last.flatten(0, -2)
    hidden, projected = getattr(output, "last_hidden_state", None), getattr(output, "text_embeds", None)
    if isinstance(hidden, Tensor) and isinstance(projected, Tensor):
        width = math.gcd(hidden.shape[-1], projected.shape[-1])
        return "hidden states", torch.cat([hidden.reshape(-1, width), projected.reshape(-1, width)])
    for name, what in (("logits", "logits"), ("logits_per_image", "logits"), ("last_hidden_state", "hidden states")):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return what, value.flatten(0, -2)
    floating = [value for value in output.to_tuple() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(floating) > 1 and floating[0].shape == floating[1].shape:
        return "logits", torch.stack(floating[:2]).flatten(0, -2)  # the start and end of an answer
    if not floating:
        raise ValueError("its output holds no tensor")
    return "output", floating[0].flatten(0, -2)


def greedy_tokens(model: Any, sample: Sample, count: int) -> list[int]:
    """Tokens that the model goes on with, the most likely one each time, up to and with an end token."""
    if sample.grows is None:
        return []
    room = room_for(model, sample)
    count = count if room is None else min(count, room)
    ends = _end_tokens(model)
    tokens: list[int] = []
    # Models that see keep positions of the last picture between calls, which a cached step would take for its own.
    cached = getattr(model.config, "vision_config", None) is None
    # Encoders of some models are handed what the whole is told, and refuse it: there the configuration decides.
    decided = cached and getattr(model.config, "is_encoder_decoder", False)
    options: dict[str, Any] = {} if decided else {"use_cache": cached}
    output = call(model, sample.inputs, **options)
    while len(tokens) < count:
        tokens.append(int(output.logits[0, -1].argmax()))
        if tokens[-1] in ends or len(tokens) == count:
            break
        cache = getattr(output, "past_key_values", None) if cached else None
        if cache is None:
            output = call(model, sample.continued(tokens).inputs)
            continue
        step = dict(sample.continued(tokens).inputs)
        step[sample.grows] = step[sample.grows][:, -1:]
        output = call(model, step, past_key_values=cache, **options)
    return tokens


def _end_tokens(model: Any) -> set[int]:
    ends: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config):
        value = getattr(owner, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends


@contextmanager
def as_cannot_run(what: str) -> Iterator[None]:
    """Turn whatever other people's code raises into a reason. Errors of ours for the user pass."""
    try:
        yield
    except (DoraServeError, CannotRun):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"{what}: the device has too little memory; another one can be named (--device cpu)."
        ) from error
    except Exception as error:
        raise CannotRun(f"{what}: {in_a_line(error)}") from error


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 means float32: convolutions on a GPU would round their inputs to TF32's ten bits."""
    settings: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn,
    )
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
