"""Score a base, an adapter on it, or a merged folder, on the held-out items of a task.

python examples/score.py --task dates --base BASE [--adapter ADAPTER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data import TASKS, Example

HELD_OUT = {"dates": 200, "style": 24}
HELD_OUT_SEED = 1_000_000


def exact_match(outputs: Sequence[str], expected: Sequence[str]) -> float:
    """The share of outputs that equal what was expected, but for white space around them; 0 to 1."""
    return sum(o.strip() == e.strip() for o, e in zip(outputs, expected, strict=True)) / len(expected)


def in_style(output: str) -> bool:
    """Whether `output` is a terse ship's log: from "Log:" to "Over.", one line, 40 words at most."""
    text = output.strip()
    short = "\n" not in text and len(text.split()) <= 40
    return text.startswith("Log: ") and text.endswith(" Over.") and short


def style_rate(outputs: Sequence[str], expected: Sequence[str]) -> float:
    """The share of outputs that are in style, 0 to 1. There is no right answer, so `expected` is not looked at."""
    return sum(map(in_style, outputs)) / len(outputs)


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"dates": exact_match, "style": style_rate}


def held_out(task: str) -> list[Example]:
    """The items that every score in the table is measured on; the same for all seeds of training."""
    return TASKS[task](HELD_OUT_SEED, HELD_OUT[task], held_out=True)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 64, batch: int = 25
) -> list[str]:
    """Greedy answers to single user messages through the chat template; the end token is cut off."""
    import torch
    from peft.helpers import DoraCaching

    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers: list[str] = []
    for start in range(0, len(chats), batch):
        inputs = tokenizer.apply_chat_template(
            chats[start : start + batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        ).to(model.device)
        # Without its cache PEFT works out every DoRA weight norm again for every token.
        with torch.inference_mode(), DoraCaching():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def score(task: str, model: Any, tokenizer: Any) -> float:
    """The score of `model` on the held-out items of `task`, 0 to 1."""
    items = held_out(task)
    outputs = generate(model, tokenizer, [item.prompt for item in items])
    return SCORES[task](outputs, [item.answer for item in items])


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a base, an adapter on it, or a merged folder.")
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base or of a merged model")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter to put on the base")
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(arguments.base)
    if arguments.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    print(f"{arguments.task}: {100 * score(arguments.task, model.eval(), tokenizer):.1f} %")


if __name__ == "__main__":
    main()
