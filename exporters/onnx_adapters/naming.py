"""What the file of an adapter is called."""

from __future__ import annotations

import re

SUFFIX = ".onnx_adapter"
ADAPTERS = "adapters"


def file_stem(spec: str) -> str:
    """What a file of the adapter that a user named so is called: the last part of a folder or a Hub id."""
    last = re.split(r"[/\\:]", spec.partition("@")[0].rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._+-]", "-", last).strip(".") or "adapter"
