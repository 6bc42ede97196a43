"""Tiny bases with PEFT adapters on everything that vLLM adapts, what PEFT makes of them, and vLLM in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / ".cache" / "smollm2-135m"
ADAPTERS = ROOT / "examples" / "adapters"
VOCABULARY = 512
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Answer:
    """Of one request: the greedy tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Ask:
    prompt: str | list[int]
    adapter: str | None = None
    tokens: int = 16


@dataclass(frozen=True)
class Swap:
    """Put another adapter in the place of one, under its name."""

    adapter: str
    path: Path


def serve(
    model: Path,
    adapters: Mapping[str, Path],
    batches: Sequence[Sequence[Ask] | Swap],
    *,
    environment: Mapping[str, str] | None = None,
    compiled: bool = False,
    **engine: Any,
) -> list[list[Answer]]:
    """The batches, one after the other, in one vLLM; of a Swap there are no answers. compiled: as on a GPU."""
    job = {
        "model": str(model),
        "engine": engine,
        "compiled": compiled,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "batches": [
            {"adapter": batch.adapter, "path": str(batch.path)}
            if isinstance(batch, Swap)
            else [vars(ask) for ask in batch]
            for batch in batches
        ],
    }
    answers = []
    for batch in run_job(job, environment or {}):
        assert isinstance(batch, list), batch
        answers.append([Answer(**one) for one in batch])
    return answers


def run_job(job: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        run = subprocess.run(
            [sys.executable, "-m", "tests.vllm.generate", answer.name],
            cwd=ROOT,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
            timeout=600,  # where one of the processes of a parallel engine fails, the others may wait for ever
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
        return json.loads(Path(answer.name).read_text())


def tiny_base(folder: Path, *, heads: int = 4, kv_heads: int = 2) -> Path:
    """A Llama with biases on all of its layers, two of them, whose logits are far enough apart for greedy tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def tiny_adapter(
    base: Path, folder: Path, *, dora: bool = True, targets: Sequence[str] = LINEAR, rank: int = 4, seed: int = 1
) -> Path:
    """An adapter that PEFT made, with every part of it moved away from where training starts."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=6, use_dora=dora, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=True
    )
    model = get_peft_model(model, config)
    train_at_random(model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def train_at_random(model: Any) -> None:
    """Move every part of PEFT's adapter away from where training starts."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        elif "lora_" in name:
            parameter.normal_(std=0.1)


def peft_answers(base: Path, adapter: Path | None, prompts: Sequence[list[int]], tokens: int) -> list[Answer]:
    """What PEFT, or without an adapter transformers, generates."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            out = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
            new = out.sequences[0, len(prompt) :].tolist()
            logprobs = [
                float(torch.log_softmax(step[0].double(), -1)[token])
                for step, token in zip(out.logits, new, strict=True)
            ]
            answers.append(Answer(new, logprobs))
    return answers


def assert_greedy(model: Any, prompts: Sequence[list[int]], answers: Sequence[Answer], tolerance: float) -> None:
    """That these are the model's own greedy tokens: each is its likeliest after the prompt and the tokens before."""
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.tokens])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.tokens
        wanted = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, rtol=0, atol=tolerance)


def assert_same(got: Sequence[Answer], wanted: Sequence[Answer], tolerance: float) -> None:
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), rtol=0, atol=tolerance)


def token_prompts(count: int = 4, length: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
