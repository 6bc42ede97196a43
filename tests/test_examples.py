"""The example data, the shipped adapters, and the table that describes them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # scripts that import one another, as `python examples/train.py` does

import data  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402

ADAPTERS = [f"{task}-{method}" for task in ("dates", "style") for method in ("lora", "dora")]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def base(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(data.TASKS))
def test_a_seed_decides_the_data(task: str) -> None:
    make = data.TASKS[task]
    assert make(7, 50, held_out=False) == make(7, 50, held_out=False)
    assert make(7, 50, held_out=False) != make(8, 50, held_out=False)
    assert make(7, 50, held_out=False)[:20] == make(7, 20, held_out=False)


@pytest.mark.parametrize("task", sorted(data.TASKS))
def test_no_two_examples_are_alike(task: str) -> None:
    examples = data.TASKS[task](3, 320, held_out=False)
    assert len(set(examples)) == 320


def test_held_out_dates_are_never_trained_on() -> None:
    recipe = train.RECIPES["dates"]
    held_out = {json.loads(item.answer)["date"] for item in score.held_out("dates")}
    for seed in train.SEEDS:
        trained = data.dates(seed, recipe.steps * recipe.batch, held_out=False)
        assert not held_out & {json.loads(item.answer)["date"] for item in trained}


def test_held_out_questions_are_on_other_topics() -> None:
    asked = " ".join(item.prompt.lower() for item in score.held_out("style"))
    assert not [topic for topic in data.FACTS if re.search(rf"\b{topic}\b", asked)]


def test_dates_answers_are_strict_json() -> None:
    for item in data.dates(5, 500, held_out=False):
        answer = json.loads(item.answer)
        assert list(answer) == ["what", "date", "time"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", answer["date"])
        assert answer["time"] is None or re.fullmatch(r"[012]\d:[0-5]\d", answer["time"])
        assert answer["what"] in item.prompt


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("quarter to six in the afternoon", "17:45"),
        ("half past twelve in the afternoon", "12:30"),
        ("nine o'clock in the morning", "09:00"),
        ("12pm", "12:00"),
        ("quarter to twelve in the morning", "11:45"),
    ],
)
def test_spoken_times_mean_what_they_say(text: str, answer: str) -> None:
    meant = {json.loads(i.answer)["time"] for i in data.dates(1, 5000, held_out=False) if text in i.prompt}
    assert meant == {answer}


def test_style_answers_are_in_style() -> None:
    assert all(score.in_style(item.answer) for item in data.style(0, 500, held_out=False))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_exact_match() -> None:
    assert score.exact_match(["a", " b\n", "C", ""], ["a", "b", "c", "d"]) == 0.5
    with pytest.raises(ValueError, match="longer"):
        score.exact_match(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Log: Calm sea. Ice ahead. Over.", True),
        ("  Log: Calm sea. Over.\n", True),
        ("Calm sea. Over.", False),
        ("Log: Calm sea.", False),
        ("Log: Calm\nsea. Over.", False),
        ("Log: " + 50 * "sea " + "Over.", False),
    ],
)
def test_in_style(text: str, expected: bool) -> None:
    assert score.in_style(text) is expected


def test_style_rate() -> None:
    assert score.style_rate(["Log: Calm. Over.", "Hello."], ["", ""]) == 0.5


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_over_the_answers_alone(smollm2: Path, tokenizer: Any) -> None:
    """Left padding and the cut logits change nothing: the loss is that of each sequence by itself, labelled in full."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    examples = data.dates(0, 2, held_out=False) + data.style(0, 1, held_out=False)
    recipe = train.Recipe(targets=(), rank=1, alpha=1, rate=0.0, steps=1, batch=3)
    (batch,) = train.batches(examples, recipe, tokenizer, seed=0)
    with torch.no_grad():
        got = train.loss_of(model, batch, tokenizer.pad_token_id)
        summed = 0.0
        for tokens, answer in batch:
            labels = torch.tensor([[-100] * (len(tokens) - answer) + tokens[-answer:]])
            summed += answer * model(input_ids=torch.tensor([tokens]), labels=labels).loss.item()
    # float32: a few hundred roundings of 2^-24 on values near one
    assert got.item() == pytest.approx(summed / sum(answer for _, answer in batch), rel=1e-4)


# --- the shipped adapters ---------------------------------------------------------------------------------------------


def test_the_adapters_are_small() -> None:
    assert sorted(path.name for path in (EXAMPLES / "adapters").iterdir()) == sorted(ADAPTERS)
    files = [path for path in (EXAMPLES / "adapters").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in files) <= 15_000_000


@pytest.mark.parametrize("name", ADAPTERS)
def test_config_agrees_with_the_recipe(name: str) -> None:
    config = json.loads((EXAMPLES / "adapters" / name / "adapter_config.json").read_text())
    task, method = name.split("-")
    recipe = train.RECIPES[task]
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (recipe.rank, recipe.alpha, method == "dora")
    assert set(config["target_modules"]) == set(recipe.targets)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_whole_and_changes_the_output(name: str, smollm2: Path, tokenizer: Any) -> None:
    model = base(smollm2)
    prompt = score.held_out(name.split("-")[0])[0].prompt
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        before = model(**inputs).logits
        adapted = PeftModel.from_pretrained(model, EXAMPLES / "adapters" / name).eval()
        after = adapted(**inputs).logits
    stored = load_file(EXAMPLES / "adapters" / name / "adapter_model.safetensors")
    loaded = {key for key, _ in adapted.named_parameters() if "lora_" in key}
    assert len(stored) == len(loaded)
    assert (after - before).abs().max() > 1
    assert before[0, -1].argmax() != after[0, -1].argmax()


@pytest.mark.parametrize("task", ["dates", "style"])
def test_dora_moved_its_magnitudes(task: str, smollm2: Path) -> None:
    weights = load_file(smollm2 / "model.safetensors")
    stored = load_file(EXAMPLES / "adapters" / f"{task}-dora" / "adapter_model.safetensors")
    magnitudes = {key: value for key, value in stored.items() if "magnitude" in key}
    assert len(magnitudes) == 30 * len(train.RECIPES[task].targets)
    for key, magnitude in magnitudes.items():
        module = key.removeprefix("base_model.model.").split(".lora_magnitude_vector")[0]
        norms = weights[f"{module}.weight"].float().norm(dim=1)
        # They start at the norms, to float32 rounding; training moves them by far more.
        assert ((magnitude - norms).abs() / norms).max() > 1e-3, key


def test_the_dates_adapter_does_what_the_base_does_not(smollm2: Path, tokenizer: Any) -> None:
    items = score.held_out("dates")[:8]
    prompts, expected = [item.prompt for item in items], [item.answer for item in items]
    model = base(smollm2)
    without = score.exact_match(score.generate(model, tokenizer, prompts), expected)
    adapted = PeftModel.from_pretrained(model, EXAMPLES / "adapters" / "dates-dora").eval()
    assert score.exact_match(score.generate(adapted, tokenizer, prompts), expected) > without


# --- the table --------------------------------------------------------------------------------------------------------


def test_readme_and_results_agree() -> None:
    results = json.loads((EXAMPLES / "results.json").read_text())
    assert {task: {**recipe, "held_out": 0} for task, recipe in results["recipes"].items()} == {
        task: {**json.loads(json.dumps(vars(recipe))), "held_out": 0} for task, recipe in train.RECIPES.items()
    }
    cells = {(run["task"], run["method"], run["seed"]) for run in results["runs"]}
    wanted = {(task, method, seed) for task in train.RECIPES for method in train.METHODS for seed in train.SEEDS}
    assert cells == wanted | {(task, "base", None) for task in train.RECIPES}
    assert train.table(results) in (EXAMPLES / "README.md").read_text()
