"""A model that vLLM has compiled, as it does on a GPU: what was looked at while it was traced holds for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.vllm.cases import Ask, assert_same, peft_answers, serve, token_prompts
from tests.vllm.test_tiny import TOKENS, TOLERANCE

PROMPTS = token_prompts()


def test_a_compiled_model_answers_every_batch_as_peft(tiny: Mapping[str, Path], tmp_path: Path) -> None:
    paths = {None: None, "dora": tiny["dora"], "lora": tiny["lora"]}
    wanted = {name: peft_answers(tiny["base"], path, PROMPTS, TOKENS) for name, path in paths.items()}
    kinds = [(None,), ("lora",), (None, "lora"), (None, "dora", "lora"), ("dora",), ("lora",), (None,)]
    batches = [[Ask(prompt, name, TOKENS) for prompt in PROMPTS for name in names] for names in kinds]
    found = serve(
        tiny["base"],
        {"dora": tiny["dora"], "lora": tiny["lora"]},
        batches,
        environment={"VLLM_CACHE_ROOT": str(tmp_path)},  # nothing that an earlier version compiled
        compiled=True,
        skip_tokenizer_init=True,
        enforce_eager=False,
    )
    for names, answers in zip(kinds, found, strict=True):
        for position, name in enumerate(names):
            assert_same(answers[position :: len(names)], wanted[name], TOLERANCE)
