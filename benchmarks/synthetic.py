"""A made-up Llama of any size and a DoRA on all its linears, written shard by shard with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HEAD_DIM = 64
STD = 0.02


@dataclass(frozen=True)
class Sizes:
    """Of a Llama with tied embeddings. key_value: outputs of k_proj and of v_proj."""

    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int
    layers: int

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of the linears of one layer, in the order in which they are stored."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.key_value, self.hidden),
            "self_attn.v_proj": (self.key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def adapted(self) -> int:
        """Elements of all linears."""
        return self.layers * sum(out * width for out, width in self.linears.values())

    @property
    def parameters(self) -> int:
        return self.adapted + self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def with_layers(self, layers: int) -> Sizes:
        return replace(self, layers=layers)


LLAMA_1B = Sizes(hidden=2048, intermediate=8192, key_value=512, vocabulary=128256, layers=16)
"""Llama-3.2-1B's own: 1.24 billion parameters."""


def write_base(folder: Path, sizes: Sizes, shards: int, seed: int = 0) -> None:
    """bfloat16, tied embeddings, an index: what save_pretrained would write. One shard is in memory at a time."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * STD).to(torch.bfloat16)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", normal(sizes.vocabulary, sizes.hidden)
        for layer in range(sizes.layers):
            prefix = f"model.layers.{layer}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}.{name}.weight", torch.ones(sizes.hidden, dtype=torch.bfloat16)
            for name, shape in sizes.linears.items():
                yield f"{prefix}.{name}.weight", normal(*shape)
        yield "model.norm.weight", torch.ones(sizes.hidden, dtype=torch.bfloat16)

    total = sizes.layers * (len(sizes.linears) + 2) + 2
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    number, nbytes = 1, 0
    for index, (name, tensor) in enumerate(tensors()):
        shard[name] = tensor
        nbytes += tensor.nbytes
        if (index + 1) * shards >= number * total:
            file = f"model-{number:05d}-of-{shards:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    index_file = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (folder / "config.json").write_text(json.dumps(config_of(sizes)))


def config_of(sizes: Sizes) -> dict[str, object]:
    """config.json of a Llama of these sizes, with a tied head."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.hidden // HEAD_DIM,
        "num_key_value_heads": sizes.key_value // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write_adapter(folder: Path, base: Path, sizes: Sizes, rank: int, seed: int = 1) -> None:
    """A PEFT DoRA in float32, as PEFT saves one for a bfloat16 base."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(sizes.layers):
        for name, (out, width) in sizes.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * STD
            spread = 1 + 0.1 * torch.randn(out, generator=generator)
            tensors[f"{prefix}.lora_magnitude_vector"] = STD * width**0.5 * spread
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "use_dora": True,
        "target_modules": [name.rpartition(".")[2] for name in sizes.linears],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
