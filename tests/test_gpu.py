"""What needs an NVIDIA GPU: the same bits as on the CPU, and the forward check on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.test_readme import ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture
def adapter() -> Path:
    return ROOT / "examples" / "adapters" / "dates-dora"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_gpu_merges_to_the_same_bytes(smollm2: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    from dora_serve.checkpoint import open_checkpoint
    from dora_serve.formats import read_adapter
    from dora_serve.merge import merge
    from dora_serve.resolve import plan_merge

    plan = plan_merge(open_checkpoint(smollm2), read_adapter(adapter), dtype=getattr(torch, dtype))
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        merge(plan, tmp_path / device, device=device)
    for name in plan.files:
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "cuda" / name).read_bytes()


def test_the_verification_runs_on_the_gpu(smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    from exporters.pipeline import ExportRequest, run_export

    export = run_export(ExportRequest(str(adapter), str(smollm2), tmp_path / "out", device="cuda"))
    assert export.verification is not None
    assert export.verification.forward is not None
    assert export.verification.passed
    assert export.verification.forward.device.startswith("cuda")


def test_the_engine_on_the_gpu_writes_what_peft_writes(smollm2: Path) -> None:
    """All example adapters and the base in one batch, greedily in float32, against PEFT's own models on the device."""
    from dora_serve.engine import Engine, Request
    from tests.engine_oracle import greedy, peft_model

    folder = ROOT / "examples" / "adapters"
    engine = Engine.load(smollm2, dtype=torch.float32, device="cuda")
    names = ("dates-lora", "dates-dora", "style-lora", "style-dora")
    for name in names:
        assert engine.pool.load(name, folder / name).changes_output
    prompts = [tuple(range(100, 110 + 7 * number)) for number in range(4)]
    requests = [
        Request(prompt, adapter=name, max_tokens=64, ignore_eos=True) for prompt in prompts for name in (None, *names)
    ]
    answers = engine.complete(requests)
    for name in (None, *names):
        model = peft_model(smollm2, None if name is None else folder / name, engine.model).cuda()
        for request, answer in zip(requests, answers, strict=True):
            if request.adapter == name:
                assert isinstance(request.prompt, tuple)
                assert answer.token_ids == greedy(model, request.prompt, 64).tokens
    assert engine.why_not_recorded is None
    assert engine.replayed_steps > 64
