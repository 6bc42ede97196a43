"""A checkpoint as transformers' own model, in float32, and what this machine needs for it."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import CheckpointError, UnavailableError
from exporters.onnx.architectures import architecture_of
from exporters.onnx.stored import incomplete

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def require(*modules: str) -> None:
    """UnavailableError, naming the pip command, unless every one of `modules` is installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UnavailableError(
            f"ONNX needs {', '.join(missing)}, not installed here.",
            remedy="Install it with: pip install 'dora-serve[onnx]'",
            missing=missing,
        )


def load_model(
    model_folder: Path,
    *,
    attention: str | None = None,
    experts: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model on the CPU, for inference, from local safetensors and transformers' own code only.

    dtype: None for float32.

    attention, experts: transformers' `attn_implementation` and `experts_implementation`; None is its default.
    Raises as `architecture_of` does, and CheckpointError where a weight is missing or of another shape.
    """
    import torch
    import transformers

    architecture = architecture_of(model_folder)
    open_checkpoint(model_folder)  # says what is wrong with the files better than transformers does
    try:
        model, info = getattr(transformers, architecture).from_pretrained(
            model_folder,
            dtype=dtype or torch.float32,
            attn_implementation=attention,
            experts_implementation=experts,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # for the sake of a better message, below
            output_loading_info=True,
        )
    except OSError as error:
        raise CheckpointError(
            f"{str(model_folder)!r} cannot be loaded as {architecture}: {error}", folder=str(model_folder)
        ) from error
    wrong = sorted([*info["missing_keys"], *(str(mismatch[0]) for mismatch in info["mismatched_keys"])])
    if wrong:
        raise incomplete(model_folder, architecture, wrong)
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings, log lines and progress bars of torch's exporter and of transformers."""
    from transformers.utils import logging as transformers_logging

    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")
    ]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
