"""Run with the environment that `make vllm-venv` makes: the project's own has no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.cases import LINEAR, SMOLLM2, tiny_adapter, tiny_base

EVERYTHING = (*LINEAR, "embed_tokens", "lm_head")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo base, which the project's own environment has made (`make test` runs it first)."""
    assert (SMOLLM2 / "config.json").is_file(), "run `make .cache/smollm2-135m/config.json`"
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base, a DoRA on all its layers, embedding and head among them, and a LoRA on its linear layers."""
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny_base(folder / "base")
    return {
        "base": base,
        "dora": tiny_adapter(base, folder / "dora", targets=EVERYTHING),
        "lora": tiny_adapter(base, folder / "lora", dora=False, seed=2),
    }
