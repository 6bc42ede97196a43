"""A base in int4: served with the norms of the weights that it holds, which a layer tells by its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dora_serve.checkpoint import open_checkpoint
from dora_serve.quantized.decode import open_values
from dora_serve.quantized.view import dense_view
from tests.vllm.cases import Answer, Ask, serve, tiny_adapter, tiny_base, token_prompts
from tests.vllm.quantized import gptq_and_dense

TOKENS = 12
TOLERANCE = 0.15
"""Of a log-probability in bfloat16, two layers and logits around 10: three times what was seen. From the DoRA on the
base it is 3, and on the weights before they were quantized 0.5 to 0.8."""


def test_a_dora_on_an_int4_base_is_that_on_the_dense_base_of_the_same_weights(tmp_path: Path) -> None:
    gptq_and_dense(tiny_base(tmp_path / "base"), tmp_path / "int4", tmp_path / "dense")
    require_same_values(tmp_path / "int4", tmp_path / "dense")
    dora = tiny_adapter(tmp_path / "dense", tmp_path / "dora")
    prompts = token_prompts()
    batches = [[Ask(prompt, name, TOKENS) for prompt in prompts] for name in (None, "dora")]
    answers = serve(tmp_path / "int4", {"dora": dora}, batches, skip_tokenizer_init=True, dtype="bfloat16")
    for found, adapter, other in zip(answers, (None, dora), (dora, None), strict=True):
        assert distance(tmp_path / "dense", adapter, prompts, found) < TOLERANCE
        assert distance(tmp_path / "dense", other, prompts, found) > 10 * TOLERANCE
        assert distance(tmp_path / "base", adapter, prompts, found) > 2 * TOLERANCE


def require_same_values(int4: Path, dense: Path) -> None:
    """A merge reads of the int4 base what vLLM is seen to serve: the dense one's weights, to the bit."""
    tensors = load_file(dense / "model.safetensors")
    view = dense_view(open_checkpoint(int4)).tensors
    assert view.keys() == tensors.keys()
    for name, entry in view.items():
        assert torch.equal(open_values(entry)(0, tensors[name].numel()), tensors[name].flatten()), name
    assert sum(entry.coding is not None for entry in view.values()) == 14


@torch.inference_mode()
def distance(base: Path, adapter: Path | None, prompts: list[list[int]], answers: list[Answer]) -> float:
    """The largest difference of a log-probability from what PEFT gives the same tokens, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    largest = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1].double()
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
        largest = max(largest, float((wanted - torch.tensor(answer.logprobs)).abs().max()))
    return largest
