"""A DoRA on the head of a classifier, whose rows are requests where those of all other layers are tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.vllm.cases import LINEAR, VOCABULARY, run_job, token_prompts, train_at_random

PROMPTS = [prompt[:length] for prompt, length in zip(token_prompts(3), (7, 4, 6), strict=True)]
TOLERANCE = 5e-6
"""Of a probability in float32. From the other adapter and the base it is 0.1 to 0.5."""


def test_requests_with_a_dora_on_the_head_share_a_batch(tmp_path: Path) -> None:
    base = tiny_classifier(tmp_path / "base")
    targets = {"head": (*LINEAR, "score"), "layers": LINEAR}
    adapters = {name: adapter(base, tmp_path / name, of) for name, of in targets.items()}
    wanted = {name: probabilities(base, adapters.get(name)) for name in (None, *adapters)}
    assert (wanted["head"] - wanted[None]).abs().amax() > 0.1
    assert (wanted["head"] - wanted["layers"]).abs().amax() > 0.1
    batches = [("head",), (None, "head"), ("head", "layers", None)]
    job = {
        "model": str(base),
        "classify": True,
        "engine": {},
        "adapters": {name: str(path) for name, path in adapters.items()},
        "batches": [[{"prompt": prompt, "adapter": name} for prompt in PROMPTS for name in names] for names in batches],
    }
    for names, answers in zip(batches, run_job(job, {}), strict=True):
        for position, name in enumerate(names):
            found = torch.tensor(answers[position :: len(names)])
            torch.testing.assert_close(found, wanted[name], rtol=0, atol=TOLERANCE)


def tiny_classifier(folder: Path) -> Path:
    """With a tokenizer, which vLLM's `classify` wants to have."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.1,
        num_labels=4,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, targets: Sequence[str]) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=list(targets)))
    train_at_random(model)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def probabilities(base: Path, folder: Path | None) -> Tensor:
    """(prompts, classes): what PEFT, or without an adapter transformers, answers."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    return torch.cat([model(input_ids=torch.tensor([prompt])).logits.softmax(-1) for prompt in PROMPTS])
