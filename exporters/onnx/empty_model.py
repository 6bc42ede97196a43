"""A model whose parameters have shapes and no memory: what is traced, so that no weight is loaded for it.

Buffers that are computed from the configuration (rotary frequencies, position tables) are real, and become constants
of the graph. What the checkpoint holds does not, whatever its size.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exporters.onnx.architectures import architecture_of
from exporters.onnx.stored import StoredWeights

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedModel


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Within the mode tensors are made and computed with as shapes and dtypes alone; it is entered where it is wanted.

    After the block nothing is left of them, and none is there before: transformers keeps some tables from call to call,
    BEiT's relative positions among them, and a model with values would be given one without, or the other way round.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    _forget_tables()
    try:
        yield FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    finally:
        _forget_tables()


def _forget_tables() -> None:
    for kept in gc.get_objects():
        if type(kept) is _LRU_CACHE and str(kept.__module__).startswith(_MODELS):
            kept.cache_clear()


_LRU_CACHE = type(cache(lambda: None))
_MODELS = ("transformers.models.", "diffusers.models.")


def is_fake(tensor: object) -> bool:
    """Whether a tensor has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def empty_model(
    folder: Path,
    dtype: torch.dtype,
    weights: StoredWeights,
    mode: FakeTensorMode,
    attention: str | None = None,
    *,
    architecture: str | None = None,
) -> PreTrainedModel:
    """The model of a transformers folder in `dtype`, for inference; its experts multiply by batches.

    attention: transformers' `attn_implementation`, None for its default. architecture: the class, where it is known.

    Raises CheckpointError where the checkpoint lacks a parameter, or has another shape for it.
    """
    import transformers

    architecture = architecture or architecture_of(folder)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    # One matrix product over all experts traces to standard operators; the other implementations do not.
    config._experts_implementation = "batched_mm"
    chosen = {"attn_implementation": attention} if attention else {}
    with without_memory(mode):
        model = getattr(transformers, architecture)._from_config(config, dtype=dtype, **chosen).eval()
    _widen(model, mode)
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    wanted = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if weights.owner(name) is not None or not any(pattern.search(name) for pattern in optional)
    }
    weights.require_whole(wanted, architecture)
    _compute(model, {name for name, _ in model.named_parameters()} - wanted.keys())
    empty_stored_buffers(model, weights, mode)
    loaded: PreTrainedModel = model
    return loaded


def _compute(model: Any, names: Set[str]) -> None:
    """Give values to parameters that no checkpoint of the family holds, since the model computes them: Marian's table
    of positions. One that would be drawn at random is left as it is."""
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(path)
        own = dict(module.named_parameters(recurse=False))
        if not {f"{path}.{leaf}".lstrip(".") for leaf in own} <= names:
            continue
        made = []
        for filled in (0, 1):  # what initialising does not reach differs as well
            for leaf, empty in own.items():
                module._parameters[leaf] = torch.nn.Parameter(
                    torch.full(empty.shape, filled, dtype=empty.dtype), requires_grad=empty.requires_grad
                )
            with torch.no_grad():
                model._init_weights(module)
            made.append(dict(module.named_parameters(recurse=False)))
        if not all(torch.equal(made[0][leaf], made[1][leaf]) for leaf in own):
            module._parameters.update(own)


def empty_stored_buffers(model: torch.nn.Module, weights: StoredWeights, mode: FakeTensorMode) -> None:
    """Take the values of buffers that the checkpoint has (running statistics of a batch normalisation) away."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and weights.owner(f"{prefix}.{name}".lstrip(".")):
                with mode:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def without_memory(mode: FakeTensorMode) -> Iterator[None]:
    """Give every parameter that is registered within the block no memory; initialising it does nothing then."""
    register = torch.nn.Module.register_parameter

    def register_empty(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not is_fake(parameter.data):
            with mode:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                parameter = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            # How transformers knows what it need not initialise: drawing some distributions asks for values.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _widen(model: Any, mode: FakeTensorMode) -> None:
    """Keep in float32 what transformers keeps in it when it loads a float16 model (some of T5's matrices)."""
    patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    if not patterns or model.dtype != torch.float16:
        return
    kept = re.compile("|".join(rf"(^|\.){pattern}($|\.)" for pattern in patterns))
    for name, parameter in model.named_parameters():
        if kept.search(name):
            with mode:
                parameter.data = torch.empty(parameter.shape, dtype=torch.float32)
