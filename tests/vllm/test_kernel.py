"""The kernel for GPUs, run by Triton's interpreter, against the operator's plain path."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.vllm.cases import ROOT

PROGRAM = """
import torch
from dora_serve.vllm_plugin import scale_kernel, scaling
assert scale_kernel.AVAILABLE
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for with_bias in (False, True):
        width = 1500  # more than a block, and no multiple of one
        bias = torch.randn(width, generator=generator).to(dtype) if with_bias else None
        scales = scaling.SlotScales(2, width, torch.device("cpu"), bias)
        scales.set(0, 1 + torch.randn(width, generator=generator))
        before = torch.randn(5, width + 7, generator=generator).to(dtype)[:, :width]  # rows lie apart
        slots = torch.tensor([0, 1, -1, 0, 1, 5])
        wanted, got = before.clone(), before.clone()
        scaling.scale_rows(wanted, scales.norm_scale, scales.offset, slots, torch.ones(1, dtype=torch.bool))
        scale_kernel.scale_rows(got, scales.norm_scale, scales.offset, slots)
        assert torch.equal(got[[1, 2, 4]], before[[1, 2, 4]])
        assert not torch.equal(got[0], before[0])
        # A product and a sum may be rounded once or twice in float32.
        torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
        # What was in memory beyond a batch is no slot.
        stale = before.clone()
        scale_kernel.scale_rows(stale, scales.norm_scale, scales.offset, torch.tensor([2, 10**12, -7, 3, -1]))
        assert torch.equal(stale, before)
print("as wanted")
"""


def test_the_kernel_computes_what_the_plain_path_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "as wanted", run.stdout + run.stderr
