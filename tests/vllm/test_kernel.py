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
        batch = scaling.Batch(torch.zeros(6, dtype=torch.long))
        batch.slots.add(0)
        batch.update(torch.tensor([0, 1, -1, 0, 1, -1]), [7, 8, 0, 7, 8], [7, 8])
        assert batch.any_in_use
        wanted, got = before.clone(), before.clone()
        scaling.scale_rows(wanted, scales.norm_scale, scales.offset, batch.rows, batch.row)
        scale_kernel.scale_rows(got, scales.norm_scale, scales.offset, batch.rows)
        assert torch.equal(got[[1, 2, 4]], before[[1, 2, 4]])
        assert not torch.equal(got[0], before[0])
        # A product and a sum may be rounded once or twice in float32.
        torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
        # Where all tokens have one row, it is not looked up for each.
        one = before[:3].clone()
        batch.update(torch.tensor([0, 0, 0, 1, 1, 1]), [7, 7, 7], [7, 8])
        assert batch.row.item() == 0
        scaling.scale_rows(one, scales.norm_scale, scales.offset, batch.rows, batch.row)
        kernel_one = before[:3].clone()
        scale_kernel.scale_rows(kernel_one, scales.norm_scale, scales.offset, batch.rows)
        torch.testing.assert_close(one, kernel_one, rtol=torch.finfo(dtype).eps, atol=1e-6)
# A graph that is larger than its batch reads beyond it, where anything may lie in memory: no row but these.
batch.update(torch.tensor([2, 10**12, -7, 3, -(10**12), 0]), [7], [7, 8])
assert batch.rows.min() >= 0 and batch.rows.max() <= 2
print("as wanted")
"""


def test_the_kernel_computes_what_the_plain_path_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "as wanted", run.stdout + run.stderr
