"""vLLM that compiles a model with LoRA on a CPU as it does on a GPU: in pieces, once, with no look at the batch after.

On a CPU it leaves such models as they are, since its functions of LoRA there look at the batch in Python. Those here do
not, as those for GPUs: one custom operator, which reads buffers that never move. And the plugin's operator does what a
CUDA graph holds of it, which was captured with dummies that count as DoRA.
"""

# No `from __future__ import annotations`: torch reads the operator's schema off the annotations themselves.

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.platforms.cpu import CpuPlatform

from dora_serve.vllm_plugin import scaling


@torch.library.custom_op("dora_tests::add_lora", mutates_args=["y"])
def add_lora(y: Tensor, x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], slots: Tensor, scale: float) -> None:
    """Add s B A x, in y's columns one factor after the other; without lora_a x is A x. A slot of -1 is the base."""
    slots, start = slots[: len(x)], 0
    chosen, is_adapted = slots.clamp(min=0), (slots >= 0).unsqueeze(1)
    for place, factor in enumerate(lora_b):
        low = torch.einsum("ti,tri->tr", x, lora_a[place][chosen, 0]) if lora_a else x
        added = scale * torch.einsum("tr,tor->to", low, factor[chosen, 0])
        y[:, start : start + added.shape[1]] += added * is_adapted
        start += added.shape[1]


@add_lora.register_fake
def _(y: Tensor, x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], slots: Tensor, scale: float) -> None:
    return None


class CompilablePunicaWrapper(PunicaWrapperBase):
    """What vLLM needs of one for a model without experts and without fully_sharded_loras."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        PunicaWrapperBase.__init__(self, max_num_batched_tokens, max_batches, device)

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        self.is_prefill = mapping.is_prefill
        self._update_base_metadata(mapping, *args)

    def add_lora_linear(self, y: Tensor, x: Tensor, a: Any, b: Any, scale: float, slices: Any, **kwargs: Any) -> None:
        add_lora(y, x, list(a), list(b), self._token_lora_indices, scale)

    def add_lora_embedding(self, y: Tensor, x: Tensor, b: Tensor, **kwargs: Any) -> None:
        add_lora(y, x, [], [b], self._token_lora_indices, 1.0)

    def add_lora_logits(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, **kwargs: Any) -> None:
        add_lora(y, x, [a], [b], self._sampler_indices, scale)

    def _is_not_called(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    add_shrink = add_expand = apply_lora_full_linear = _is_not_called


@wraps(scaling.scale_rows)
def captured(outputs: Tensor, norm_scale: Tensor, offset: Any, rows: Tensor, row: Tensor) -> None:
    scaling._scale(outputs, norm_scale, offset, rows[: len(outputs)])


def compile_on_cpus() -> None:
    """Of this process, before it makes an engine."""
    check = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
        compilation.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    wrapper = f"{__name__}.{CompilablePunicaWrapper.__name__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
    scaling.scale_rows = captured
    # It names operators of vLLM's that its build for CPUs has not got, and does nothing to others.
    FixFunctionalizationPass.__call__ = lambda self, graph: None
