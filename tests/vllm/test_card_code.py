"""The vLLM code on a model card runs as it is printed, on SmolLM2 from the loopback Hub."""

from __future__ import annotations

from pathlib import Path

from tests.fake_hub import FakeHub
from tests.test_card_snippets import QUICKLY, ROOT, code_of, environment, hub, main, publish, run
from tests.vllm.generate import SETTINGS

__all__ = ["environment", "hub"]


def test_the_code_of_a_card_runs(hub: FakeHub, environment: dict[str, str], smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    adapter = str(ROOT / "examples" / "adapters" / "dates-dora")
    assert main(["merge", adapter, "--base", str(smollm2), "-o", str(out), *QUICKLY]) == 0
    publish(out, "anna/dates", environment)
    settings = {**SETTINGS, "HF_HUB_OFFLINE": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    printed = run(code_of(hub, "anna/dates")["vLLM"], environment | settings, tmp_path)
    assert '"what"' in printed  # the adapter answers whatever it is asked in JSON, and the base does not
