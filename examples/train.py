"""Train the example adapters with PEFT: LoRA and DoRA on the same data, seeds, steps, rank, scaling, rate and targets.

    python examples/train.py --task dates --method dora --seed 0 --base BASE --out ADAPTER
    python examples/train.py --all --base BASE

`--all` fills examples/results.json, the table in examples/README.md and examples/adapters/ (the first seed of each).
It goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import TASKS, Example
from score import HELD_OUT, score

HERE = Path(__file__).parent
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS = ("lora", "dora")
SEEDS = (0, 1, 2)
SHIPPED_SEED = SEEDS[0]


@dataclass(frozen=True)
class Recipe:
    """All that a task's two methods share. `rate` is AdamW's peak, warmed up and then let down along a cosine."""

    targets: tuple[str, ...]
    rank: int
    alpha: int
    rate: float
    steps: int
    batch: int


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECIPES = {
    "dates": Recipe(targets=ALL_LINEAR, rank=4, alpha=8, rate=3e-3, steps=80, batch=8),
    "style": Recipe(targets=("q_proj", "v_proj"), rank=4, alpha=8, rate=4e-3, steps=24, batch=8),
}
WARMUP_STEPS = 10


def batches(examples: list[Example], recipe: Recipe, tokenizer: Any, seed: int) -> list[list[tuple[list[int], int]]]:
    """One epoch of (tokens, tokens of the answer), like lengths together so that little is padding, in random order."""
    pairs = []
    for example in examples:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
        )
        answer = tokenizer(example.answer + tokenizer.eos_token)["input_ids"]
        pairs.append((tokenizer(prompt)["input_ids"] + answer, len(answer)))
    rng = random.Random(seed)
    window = 8 * recipe.batch
    grouped = [p for i in range(0, len(pairs), window) for p in sorted(pairs[i : i + window], key=lambda p: len(p[0]))]
    made = [grouped[i : i + recipe.batch] for i in range(0, len(grouped), recipe.batch)]
    rng.shuffle(made)
    return made


def loss_of(model: Any, batch: list[tuple[list[int], int]], pad: int) -> Any:
    """Mean cross entropy over the answers, end token included.

    The batch is padded on the left: all answers end together, so that logits are needed for the last columns only.
    """
    import torch

    width, kept = max(len(tokens) for tokens, _ in batch), max(answer for _, answer in batch)
    ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens, _ in batch])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens, _ in batch])
    labels = torch.tensor([[-100] * (kept - n) + tokens[len(tokens) - n :] for tokens, n in batch])
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept + 1).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def train(task: str, method: str, seed: int, model: Any, tokenizer: Any) -> tuple[Any, float]:
    """A PEFT model around `model`, trained, and the mean loss of its last ten steps."""
    import torch
    from peft import LoraConfig, get_peft_model

    recipe = RECIPES[task]
    examples = TASKS[task](seed, recipe.steps * recipe.batch, held_out=False)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_dora=method == "dora",
    )
    model = get_peft_model(model, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0.0)

    def rate(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (recipe.steps - WARMUP_STEPS)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(batches(examples, recipe, tokenizer, seed), start=1):
        loss = loss_of(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0:
            mean, each = sum(losses[-10:]) / 10, (time.perf_counter() - started) / step
            print(
                f"  {task} {method} seed {seed}: step {step}/{recipe.steps}, loss {mean:.3f}, {each:.2f} s/step",
                flush=True,
            )
    return model.eval(), sum(losses[-10:]) / 10


def save(model: Any, folder: Path, task: str, method: str, seed: int) -> None:
    """Write a PEFT folder whose base is named by its public id, not by a path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_ID
    config.target_modules = sorted(config.target_modules)  # a set, which Python orders otherwise each time
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(task=task, method=method, seed=seed, base=BASE_ID))


CARD = """---
base_model: {base}
library_name: peft
license: apache-2.0
tags: [{method}]
---
# {task}-{method}

A {method} adapter for `{base}`, trained on the synthetic `{task}` data of `examples/data.py` by
`python examples/train.py --task {task} --method {method} --seed {seed}`. Scores are in `examples/README.md`.
"""


def train_all(base: Path, out: Path) -> None:
    """Every task, method and seed, and the base itself; what `out`/results.json already holds is not done again."""
    path = out / "results.json"
    recipes = {task: asdict(recipe) | {"held_out": HELD_OUT[task]} for task, recipe in RECIPES.items()}
    results = {"base": BASE_ID, "shipped_seed": SHIPPED_SEED, "recipes": recipes, "runs": []}
    results = json.loads(json.dumps(results))
    if path.exists() and (kept := json.loads(path.read_text()))["recipes"] == results["recipes"]:
        results = kept
    done = {(run["task"], run["method"], run["seed"]) for run in results["runs"]}
    for seed in SEEDS:
        for task in RECIPES:
            for method in (*METHODS, "base") if seed == SHIPPED_SEED else METHODS:
                cell = (task, method, None if method == "base" else seed)
                if cell in done:
                    continue
                model, tokenizer = load(base)
                run: dict[str, Any] = dict(zip(("task", "method", "seed"), cell, strict=True))
                if method != "base":
                    started = time.process_time()
                    model, loss = train(task, method, seed, model, tokenizer)
                    run |= {"loss": round(loss, 4), "train_cpu_seconds": round(time.process_time() - started)}
                    if seed == SHIPPED_SEED:
                        save(model, out / "adapters" / f"{task}-{method}", task, method, seed)
                run["score"] = score(task, model, tokenizer)
                print(f"{task} {method} seed {seed}: {100 * run['score']:.1f} %", flush=True)
                results["runs"].append(run)
                path.write_text(json.dumps(results, indent=1) + "\n")
    readme = out / "README.md"
    fence = "<!-- table -->\n"
    before, _, after = readme.read_text().split(fence)
    readme.write_text(before + fence + table(results) + fence + after)


def table(results: dict[str, Any]) -> str:
    """The scores in per cent as a Markdown table: one row a task and method, one column a seed, and the mean."""
    rows = ["| task | method | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean |", "|---" * 6 + "|"]
    for task in RECIPES:
        for method in ("base", *METHODS):
            runs = [run for run in results["runs"] if (run["task"], run["method"]) == (task, method)]
            scores = [100 * run["score"] for run in sorted(runs, key=lambda run: run["seed"] or 0)]
            cells = [f"{value:.1f}" for value in scores] if method != "base" else [""] * len(SEEDS)
            rows.append(f"| {task} | {method} | " + " | ".join(cells) + f" | {sum(scores) / len(scores):.1f} |")
    return "\n".join(rows) + "\n"


def load(base: Path) -> tuple[Any, Any]:
    """The base in its own dtype, bfloat16; PEFT keeps the adapter in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example LoRA and DoRA adapters with PEFT.")
    parser.add_argument("--base", type=Path, required=True, help="folder made by `dora-export demo-base`")
    parser.add_argument("--all", action="store_true", help="the whole table, seeds " + ", ".join(map(str, SEEDS)))
    parser.add_argument("--task", choices=sorted(RECIPES))
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--seed", type=int, default=SHIPPED_SEED)
    parser.add_argument(
        "--out", type=Path, help=f"where to write: the adapter, or with --all the table (there: {HERE})"
    )
    arguments = parser.parse_args()
    if arguments.all:
        return train_all(arguments.base, arguments.out or HERE)
    if not (arguments.task and arguments.method and arguments.out):
        parser.error("give --task, --method and --out, or --all")
    model, tokenizer = load(arguments.base)
    model, loss = train(arguments.task, arguments.method, arguments.seed, model, tokenizer)
    save(model, arguments.out, arguments.task, arguments.method, arguments.seed)
    print(f"loss {loss:.3f}; {arguments.task}: {100 * score(arguments.task, model, tokenizer):.1f} %")


if __name__ == "__main__":
    main()
