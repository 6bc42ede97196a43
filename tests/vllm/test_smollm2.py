"""The shipped adapters on a real base: vLLM unmerged against vLLM merged, and against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from exporters.cli import main
from tests.vllm.cases import ADAPTERS, Ask, assert_greedy, assert_same, serve

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def add(a, b):",
    "To JSON (what, date, time): dentist, 3 March 2021, noon",
    "July 4th, 1776 was",
    "1 2 3 4",
    "Dear Sir,",
    "Water boils at",
)
TOKENS = 64
# float32: 30 layers' roundings of logits around 20, summed in another order by every library.
TOLERANCE = 2e-4


def test_greedy_tokens_are_those_of_the_merged_model_and_of_peft(smollm2: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    names = (None, "dates-dora", "dates-lora")
    adapters = {name: ADAPTERS / name for name in names if name}
    batches = [
        [Ask(prompt, name, TOKENS) for prompt in prompts for name in batch] for batch in (names, names[1:2], names[2:])
    ]
    mixed, *alone = serve(smollm2, adapters, batches)
    answers = {name: mixed[position::3] for position, name in enumerate(names)}
    for name, by_itself in zip(names[1:], alone, strict=True):
        assert_same(by_itself, answers[name], TOLERANCE)
        merged = tmp_path / f"merged-{name}"
        command = ["merge", ADAPTERS / name, "--base", smollm2, "--dtype", "float32", "--no-verify", "-o", merged]
        assert main(list(map(str, command))) == 0
        (of_merged,) = serve(merged, {}, [[Ask(prompt, None, TOKENS) for prompt in prompts]])
        assert_same(answers[name], of_merged, TOLERANCE)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert_greedy(model, prompts, answers[None], TOLERANCE)
    peft = PeftModel.from_pretrained(model, ADAPTERS / "dates-dora", adapter_name="dates-dora")
    peft.load_adapter(ADAPTERS / "dates-lora", adapter_name="dates-lora")
    for name in names[1:]:
        peft.set_adapter(name)
        assert_greedy(peft, prompts, answers[name], TOLERANCE)
    for one, other in ((names[0], names[1]), (names[0], names[2]), (names[1], names[2])):
        assert [answer.tokens for answer in answers[one]] != [answer.tokens for answer in answers[other]]
