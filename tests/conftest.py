"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dora_serve.demo_base import make_demo_base

ROOT = Path(__file__).resolve().parent.parent

# Graphs that one test traced serve the others, those in processes of their own too.
os.environ.setdefault("DORA_SERVE_CACHE", str(ROOT / ".cache"))
# What `make genai-env` makes.
os.environ.setdefault("DORA_SERVE_GENAI_PYTHON", str(ROOT / ".venv-genai" / "bin" / "python"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, made once for this checkout and kept in .cache. Read only."""
    return make_demo_base(ROOT / ".cache" / "smollm2-135m")
