"""A QDoRA's way for real: SmolLM2 quantized as a trainer loads it, the example adapter merged in, four bits again.

The oracle of the codes is bitsandbytes, that of the merge PEFT's formula in float64, that of the folder transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import PeftConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_serve.ops import round_once
from exporters.cli import main
from tests.cases import quiet

DATES = Path(__file__).parent.parent / "examples" / "adapters" / "dates-dora"
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.29.mlp.down_proj")


def merge(base: Path, out: Path, *words: str) -> dict[str, object]:
    assert main(["merge", str(DATES), "--base", str(base), "-o", str(out), "--no-verify", *words]) == 0
    record: dict[str, object] = json.loads((out / "dora_export.json").read_text())
    return record


@pytest.mark.parametrize("into", ["dequantized", "original"])
def test_merged_into_what_was_chosen(tmp_path: Path, smollm2: Path, into: str) -> None:
    record = merge(smollm2, tmp_path / "merged", "--base-quantization", "nf4", "--merge-into", into)
    assert any(
        ("quantized and dequantized again" if into == "dequantized" else "not the model") in note
        for note in record["notes"]
    )  # type: ignore[attr-defined]
    config = PeftConfig.from_pretrained(DATES)
    scaling = config.lora_alpha / config.r
    with (
        safe_open(smollm2 / "model.safetensors", "pt") as base,
        safe_open(DATES / "adapter_model.safetensors", "pt") as adapter,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged,
    ):
        for module in MODULES:
            stored = base.get_tensor(f"{module}.weight")
            codes, state = bnb.quantize_4bit(stored, quant_type="nf4", blocksize=64, compress_statistics=False)
            weight = bnb.dequantize_4bit(codes, state) if into == "dequantized" else stored
            assert torch.equal(weight, stored) == (into == "original")
            parts = [adapter.get_tensor(f"base_model.model.{module}.lora_{part}.weight").double() for part in "AB"]
            magnitude = adapter.get_tensor(f"base_model.model.{module}.lora_magnitude_vector").double()
            v = weight.double() + scaling * parts[1] @ parts[0]
            wanted = (magnitude / v.norm(dim=1))[:, None] * v
            # torch's own cast goes through float32, and rounds one value of these twice
            assert torch.equal(merged.get_tensor(f"{module}.weight"), round_once(wanted, torch.bfloat16))


def test_four_bits_again_load_and_answer(tmp_path: Path, smollm2: Path) -> None:
    record = merge(smollm2, tmp_path / "nf4", "--to", "nf4")
    four_bit = record["four_bit"]
    assert isinstance(four_bit, dict)
    assert four_bit["differing"] == 0
    assert 0.05 < four_bit["relative_error"] < 0.15  # a quantile code of 16 levels is about a tenth off
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nf4")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    prompt = "To JSON (what, date, time): choir practice, 14 March 2025, 7 pm"
    chat = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith(
        '{"what": "choir practice"'
    )  # as the adapter was taught; the base does not
