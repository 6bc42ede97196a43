"""Which device is meant, and whether this machine has it."""

from __future__ import annotations

import re

import torch

from dora_serve.errors import UnavailableError


def require_device(device: str) -> None:
    """Raise UnavailableError where `device` is a GPU that this machine does not have, or no device at all."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise UnavailableError(
            f"--device {device!r} is not known here: wanted auto, cpu, cuda or cuda:N.",
            remedy="Leave --device away to use the CPU.",
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(match[1] or 0) >= found:
        raise UnavailableError(
            f"--device {device} was asked for, and torch finds {found or 'no'} CUDA devices here.",
            remedy="Leave --device away to use the CPU, or install a CUDA build of torch.",
        )
