"""Tiny seeded models, PEFT adapters on them and forwards, for the tests of the forward: none of our code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZES: Mapping[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of a model in the style of Llama, BERT or ViT; each takes the keys that it knows."""


class quiet(warnings.catch_warnings):
    """PEFT warns of nearly everything that is tested here."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


def build(auto_class: str, model_type: str, **sizes: Any) -> nn.Module:
    """A model of a class by name, e.g. "AutoModelForCausalLM", with seeded weights and nothing left constant."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    return vary(getattr(transformers, auto_class).from_config(config))


def vary(model: nn.Module) -> nn.Module:
    """Move every parameter a little, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def adapt(base: nn.Module, folder: Path, **config: Any) -> nn.Module:
    """A PEFT model over a copy of `base`, as if trained, and saved to `folder`. Returns the model in memory."""
    torch.manual_seed(11)
    generator = torch.Generator().manual_seed(11)
    with quiet(), torch.no_grad():
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1 + 0.2 * noise.clamp(-2, 2))
                else:
                    parameter.add_(0.2 * noise)
        model.save_pretrained(str(folder))
    return model.eval()


def save(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model in `dtype`, by save_pretrained."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)  # type: ignore[operator]
    return folder


def rewrite_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Load a safetensors file, change its tensors in place, save it again."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def tokens() -> dict[str, Tensor]:
    """Two sentences of token ids below 40."""
    return {"input_ids": torch.tensor([[1, 5, 9, 3, 7, 7, 12, 2], [4, 39, 11, 30, 6, 21, 5, 2]])}


def token_pairs() -> dict[str, Tensor]:
    return tokens() | {"decoder_input_ids": torch.tensor([[1, 8, 3, 5], [1, 13, 39, 6]])}


def pixels() -> dict[str, Tensor]:
    """Two pictures of 16 x 16."""
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The scores of a forward, in float64."""
    dtype = next(model.parameters()).dtype
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**given)
    return (output if isinstance(output, Tensor) else output.logits).double()
