"""Planted faults: what broken tools write, made by PEFT, torch and safetensors from a correct merge. None of our code.

A World is a tiny seeded base, a PEFT adapter on it and PEFT's own merge of the two in float64, all as folders. A fault
is a function that writes a wrong merged folder for a world.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def causal(model_type: str, **changes: Any) -> nn.Module:
    """A tiny seeded causal model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **changes)
    return AutoModelForCausalLM.from_config(config)


def randomise(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """What training would have done: give every adapter parameter a value of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * noise(parameter).clamp(-2, 2))
            elif "lora_embedding_" in name or "lora_B" in name or "lora_A" in name:
                parameter.copy_(size * noise(parameter))
            elif "modules_to_save" in name or "token_adapter" in name:
                parameter.add_(size * noise(parameter))


def save_base(model: nn.Module, folder: Path, dtype: torch.dtype, max_shard_size: str = "5GB") -> Path:
    """Save a transformers model as a base, or a plain torch model as one safetensors file."""
    model = copy.deepcopy(model).to(dtype)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        folder.mkdir(parents=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
    return folder


def load_base(folder: Path, like: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The stored base as a model in `dtype`."""
    if hasattr(like, "save_pretrained"):
        return type(like).from_pretrained(folder, dtype=dtype)  # type: ignore[attr-defined]
    model = copy.deepcopy(like).to(dtype)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def save_adapter(base: nn.Module, config: LoraConfig, folder: Path, seed: int = 0, **kwargs: Any) -> Path:
    """Train nothing, randomise everything, save with PEFT."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config, **kwargs)
        randomise(model, seed)
        model.save_pretrained(folder)
    return folder


def peft_merge(
    base: nn.Module, adapter: Path, folder: Path, dtype: torch.dtype, max_shard_size: str = "5GB", **kwargs: Any
) -> Path:
    """PEFT's merge_and_unload of `adapter` into `base`, saved in `dtype`. kwargs: for PeftModel.from_pretrained."""
    safe = kwargs.pop("safe_merge", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), adapter, **kwargs)
        if next(base.parameters()).dtype == torch.float64:
            loaded = loaded.to(torch.float64)  # the adapter as well
        merged = loaded.merge_and_unload(safe_merge=safe)
    return save_base(merged, folder, dtype, max_shard_size)


@dataclass(frozen=True)
class World:
    """base, adapter, merged: folders. model: the base as a model, in float32. dtype: of base and merged."""

    name: str
    base: Path
    adapter: Path
    merged: Path
    model: nn.Module
    config: LoraConfig
    dtype: torch.dtype
    root: Path


def make_world(
    root: Path, name: str, model: nn.Module, config: LoraConfig, dtype: torch.dtype, max_shard_size: str = "5GB"
) -> World:
    folder = root / name
    base = save_base(model, folder / "base", dtype, max_shard_size)
    stored = load_base(base, model, torch.float32)
    adapter = save_adapter(stored, config, folder / "adapter")
    merged = peft_merge(stored.to(torch.float64), adapter, folder / "merged", dtype, max_shard_size)
    return World(name, base, adapter, merged, stored.to(torch.float32), config, dtype, folder)


def llama(root: Path, name: str, dtype: torch.dtype, **changes: Any) -> World:
    model = causal("llama", **{**SIZES, **changes.pop("sizes", {})})
    config = LoraConfig(**{"r": 5, "lora_alpha": 15, "target_modules": LINEARS, **changes})
    return make_world(root, name, model, config, dtype, "60KB")


def _llama_modules(root: Path) -> World:
    return llama(root, "llama-trained-head", torch.bfloat16, target_modules=["q_proj"], modules_to_save=["lm_head"])


def _llama_tokens(root: Path) -> World:
    indices = {"embed_tokens": [3, 5, 90]}
    return llama(
        root, "llama-tokens", torch.bfloat16, target_modules=["q_proj"], trainable_token_indices=indices, use_dora=True
    )


def _qwen2_model() -> nn.Module:
    model = causal("qwen2", **SIZES, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in (value for key, value in model.named_parameters() if key.endswith("bias")):
            parameter.normal_()
    return model


def _qwen2(root: Path) -> World:
    config = LoraConfig(r=5, lora_alpha=15, target_modules=LINEARS, use_dora=True)
    return make_world(root, "qwen2-dora", _qwen2_model(), config, torch.bfloat16)


def _qwen2_bias(root: Path) -> World:
    config = LoraConfig(r=5, lora_alpha=15, target_modules=["q_proj", "k_proj"], lora_bias=True)
    return make_world(root, "qwen2-lora-bias", _qwen2_model(), config, torch.bfloat16)


def _gpt2(root: Path) -> World:
    sizes = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = LoraConfig(
        r=5, lora_alpha=15, target_modules=["c_attn", "c_proj", "c_fc"], use_dora=True, fan_in_fan_out=True
    )
    return make_world(root, "gpt2-dora", causal("gpt2", **sizes), config, torch.bfloat16)


def _tied(root: Path) -> World:
    config = LoraConfig(r=5, lora_alpha=15, target_modules=["embed_tokens"])
    return make_world(root, "llama-tied", causal("llama", **SIZES, tie_word_embeddings=True), config, torch.bfloat16)


def _experts(root: Path) -> World:
    model = causal("mixtral", **SIZES, num_local_experts=3, num_experts_per_tok=2)
    config = LoraConfig(
        r=5,
        lora_alpha=15,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return make_world(root, "mixtral-experts", model, config, torch.bfloat16)


WORLDS: Mapping[str, Callable[[Path], World]] = {
    "dora": lambda root: llama(root, "dora", torch.bfloat16, use_dora=True),
    "dora-fp32": lambda root: llama(root, "dora-fp32", torch.float32, use_dora=True),
    "dora-fp16": lambda root: llama(root, "dora-fp16", torch.float16, use_dora=True, use_rslora=True),
    "lora": lambda root: llama(root, "lora", torch.bfloat16),
    "grouped": lambda root: llama(root, "grouped", torch.bfloat16, use_dora=True, sizes={"num_key_value_heads": 2}),
    "lora-fp32": lambda root: llama(root, "lora-fp32", torch.float32),
    "gpt2": _gpt2,
    "qwen2": _qwen2,
    "qwen2-bias": _qwen2_bias,
    "head": _llama_modules,
    "tokens": _llama_tokens,
    "tied": _tied,
    "experts": _experts,
}


# Reading and rewriting folders


def read_folder(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def write_like(source: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Copy a folder, its tensors changed by `change` in place; every tensor stays in its file."""
    tensors = read_folder(source)
    homes = {name: path.name for path in sorted(source.glob("*.safetensors")) for name in load_file(path)}
    shutil.copytree(source, out)
    change(tensors)
    last = sorted(homes.values())[-1]
    for file in sorted(set(homes.values())):
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if homes.get(name, last) == file}
        save_file(part, out / file, metadata={"format": "pt"})
    for index in out.glob("*.index.json"):
        table = json.loads(index.read_text())
        table["weight_map"] = {name: homes.get(name, last) for name in tensors}
        index.write_text(json.dumps(table))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@dataclass(frozen=True)
class Module:
    """One adapted weight of a world, in float64: weight (out, in), lora_a (r, in), lora_b (out, r), magnitude (out, 1).

    name: of the tensor in the merged folder. transposed: stored as (in, out).
    """

    name: str
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    scaling: float
    transposed: bool

    @property
    def delta(self) -> Tensor:
        return self.lora_b @ self.lora_a

    @property
    def direction(self) -> Tensor:
        return self.weight + self.scaling * self.delta

    @property
    def m(self) -> Tensor:
        assert self.magnitude is not None
        return self.magnitude

    def merged(self, scaling: float, weight: Tensor | None = None) -> Tensor:
        """LoRA or DoRA with this scaling, on this weight."""
        direction = (self.weight if weight is None else weight) + scaling * self.delta
        return direction if self.magnitude is None else self.m * direction / norm(direction)


def norm(values: Tensor, dim: int = 1) -> Tensor:
    return values.norm(dim=dim, keepdim=True)


def modules_of(world: World) -> list[Module]:
    """The adapter's linear modules with the base weights that they belong to."""
    base, adapter = read_folder(world.base), load_file(world.adapter / "adapter_model.safetensors")
    transposed = world.name.startswith("gpt2")
    config = json.loads((world.adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    found = []
    for key, lora_a in adapter.items():
        if not key.endswith(".lora_A.weight") or ".experts." in key:
            continue
        prefix = key.removesuffix(".lora_A.weight")
        name = prefix.removeprefix("base_model.model.") + ".weight"
        magnitude = adapter.get(f"{prefix}.lora_magnitude_vector")
        weight = base[name].double()
        found.append(
            Module(
                name,
                weight.T if transposed else weight,
                lora_a.double(),
                adapter[f"{prefix}.lora_B.weight"].double(),
                magnitude.double().view(-1, 1) if magnitude is not None else None,
                scaling,
                transposed,
            )
        )
    return found


def stored(module: Module, values: Tensor, dtype: torch.dtype) -> Tensor:
    return (values.T if module.transposed else values).to(dtype)


def formula(values: Callable[[Module], Tensor], only: str = "") -> Callable[[World, Path], None]:
    """A fault that writes `values` in place of every adapted weight, or of those whose name contains `only`."""

    def write(world: World, out: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for module in modules_of(world):
                if only in module.name:
                    tensors[module.name] = stored(module, values(module), world.dtype)

        write_like(world.merged, out, change)

    return write


def tensors_changed(change: Callable[[dict[str, Tensor]], None]) -> Callable[[World, Path], None]:
    """A fault that changes some tensors of the right merge."""
    return lambda world, out: write_like(world.merged, out, change)


# The faults


def _twice(module: Module) -> Tensor:
    return module.merged(module.scaling, module.merged(module.scaling))


def _peft_twice(world: World, out: Path) -> None:
    once = load_base(world.merged, world.model, torch.float32)
    peft_merge(once, world.adapter, out, world.dtype, "60KB")


def _unmerged(world: World, out: Path) -> None:
    shutil.copytree(world.base, out)


def _other_epoch(world: World, out: Path) -> None:
    """The same adapter some steps later: every parameter moved, none by much."""
    later = world.root / "later"
    if not later.exists():
        shutil.copytree(world.adapter, later)
        generator = torch.Generator().manual_seed(5)
        tensors = load_file(later / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor * (1 + 0.05 * noise) if "magnitude" in name else tensor + 0.03 * noise
        save_file(tensors, later / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_merge(world.model.double(), later, out, world.dtype, "60KB")
    world.model.float()


def _other_adapter(world: World, out: Path) -> None:
    other = world.root / "other"
    if not other.exists():
        save_adapter(world.model, world.config, other, seed=11)
    peft_merge(world.model, other, out, world.dtype, "60KB")


def _other_base(world: World, out: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(99)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(world.base))
    peft_merge(model.to(world.dtype).float(), world.adapter, out, world.dtype, "60KB")


def _peft_low_precision(world: World, out: Path) -> None:
    """PEFT with the adapter in the base's 16-bit dtype, as diffusers and autocast_adapter_dtype=False have it."""
    base = load_base(world.base, world.model, world.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base, world.adapter, autocast_adapter_dtype=False).to(world.dtype)
        save_base(loaded.merge_and_unload(), out, world.dtype, "60KB")


def _peft_safe(world: World, out: Path) -> None:
    base = load_base(world.base, world.model, world.dtype)
    peft_merge(base, world.adapter, out, world.dtype, "60KB", safe_merge=True)


def _rounded_delta(world: World, out: Path) -> None:
    """axolotl's merge-lora: s B A is cast to the base's dtype before it is added."""

    def values(module: Module) -> Tensor:
        direction = module.weight + (module.scaling * module.delta).to(world.dtype).double()
        return direction if module.magnitude is None else module.m * direction / norm(direction)

    formula(values)(world, out)


def _rounded_base(world: World, out: Path) -> None:
    """A float32 base loaded in bfloat16, and merged and saved so."""
    peft_merge(load_base(world.base, world.model, torch.bfloat16), world.adapter, out, torch.bfloat16, "60KB")


def _through_bfloat16(world: World, out: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.bfloat16).float()

    write_like(world.merged, out, change)


def _cut_off(world: World, out: Path) -> None:
    """bfloat16 made by dropping the low half of float32."""

    def values(module: Module) -> Tensor:
        single = module.merged(module.scaling).float()
        return (single.view(torch.int32) & -65536).view(torch.float32)

    formula(values)(world, out)


def _permuted_magnitudes(module: Module) -> Tensor:
    return module.m.roll(5, 0) * module.direction / norm(module.direction)


def _other_magnitudes(world: World, out: Path) -> None:
    """Layer 1's magnitudes on layer 0, and the other way round."""
    by_name = {module.name: module for module in modules_of(world)}

    def values(module: Module) -> Tensor:
        swap = {".0.": ".1.", ".1.": ".0."}
        key = next(key for key in swap if key in module.name)
        other = by_name[module.name.replace(key, swap[key])]
        return other.m * module.direction / norm(module.direction)

    formula(values)(world, out)


def _other_layers_adapter(world: World, out: Path) -> None:
    by_name = {module.name: module for module in modules_of(world)}

    def values(module: Module) -> Tensor:
        swap = {".0.": ".1.", ".1.": ".0."}
        key = next(key for key in swap if key in module.name)
        return by_name[module.name.replace(key, swap[key])].merged(module.scaling, module.weight)

    formula(values, "v_proj")(world, out)


def _swap(one: str, two: str) -> Callable[[World, Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if one in name and name.endswith("weight")]:
            other = name.replace(one, two)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return tensors_changed(change)


def _some_rows_left_out(world: World, out: Path) -> None:
    def values(module: Module) -> Tensor:
        merged = module.merged(module.scaling)
        merged[:7] = module.weight[:7]
        return merged

    formula(values, "up_proj")(world, out)


def flip(tensor: Tensor, index: int, bit: int) -> None:
    """Flip one bit of one element in place."""
    size = tensor.dtype.itemsize
    whole = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[size])
    mask = 1 << bit
    whole[index] ^= mask - (1 << 8 * size) if bit == 8 * size - 1 else mask


def _flipped(part: str, bit: int) -> Callable[[World, Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if part in name)
        flip(tensors[name], 17, bit)

    return tensors_changed(change)


def _value(part: str, value: float) -> Callable[[World, Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if part in name)
        tensors[name].view(-1)[40] = value

    return tensors_changed(change)


def _each(part: str, change_one: Callable[[Tensor], Tensor]) -> Callable[[World, Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = change_one(tensors[name])

    return tensors_changed(change)


def _from_base(parts: Iterable[str]) -> Callable[[World, Path], None]:
    """The base's tensors in place of the merged ones."""

    def write(world: World, out: Path) -> None:
        base = read_folder(world.base)

        def change(tensors: dict[str, Tensor]) -> None:
            for name in tensors:
                if any(part in name for part in parts):
                    tensors[name] = base[name]

        write_like(world.merged, out, change)

    return write


def _scaled_bias(world: World, out: Path) -> None:
    """fsdp_qlora's DoRA: the bias goes through m / ||V|| as well."""

    def change(tensors: dict[str, Tensor]) -> None:
        for module in modules_of(world):
            bias = module.name.removesuffix("weight") + "bias"
            if bias in tensors:
                scale = (module.m / norm(module.direction)).flatten()
                tensors[bias] = (tensors[bias].double() * scale).to(world.dtype)

    write_like(world.merged, out, change)


def _unscaled_lora_bias(world: World, out: Path) -> None:
    adapter, base = load_file(world.adapter / "adapter_model.safetensors"), read_folder(world.base)

    def change(tensors: dict[str, Tensor]) -> None:
        for key, vector in adapter.items():
            if key.endswith("lora_B.bias"):
                name = key.removeprefix("base_model.model.").replace("lora_B.bias", "bias")
                tensors[name] = (base[name].double() + vector.double()).to(world.dtype)

    write_like(world.merged, out, change)


def _rows_added(world: World, out: Path) -> None:
    """Trained token rows added to the base's rows, as their name (delta) suggests."""
    base = read_folder(world.base)

    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if "embed_tokens" in name)
        tensors[name][[3, 5, 90]] += base[name][[3, 5, 90]]

    write_like(world.merged, out, change)


def _experts_turned(world: World, out: Path) -> None:
    """The experts' updates given to the next expert."""
    base = read_folder(world.base)

    def change(tensors: dict[str, Tensor]) -> None:
        for leaf in ("w1", "w2", "w3"):
            for layer in (0, 1):
                names = [
                    name for name in sorted(tensors) if f"layers.{layer}." in name and name.endswith(f".{leaf}.weight")
                ]
                names = [name for name in names if ".experts." in name]
                deltas = [tensors[name].double() - base[name].double() for name in names]
                for position, name in enumerate(names):
                    tensors[name] = (base[name].double() + deltas[position - 1]).to(world.dtype)

    write_like(world.merged, out, change)


def _wrong_packing(world: World, out: Path) -> None:
    """lora_B of the experts read expert by expert, where PEFT packs it rank by rank."""
    base = read_folder(world.base)
    adapter = load_file(world.adapter / "adapter_model.safetensors")
    experts, rank = 3, world.config.r

    def change(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            prefix = next(key for key in adapter if f"layers.{layer}." in key and key.endswith("experts.lora_A.weight"))
            lora_a, lora_b = adapter[prefix].double(), adapter[prefix.replace("lora_A", "lora_B")].double()
            for expert in range(experts):
                part = slice(expert * rank, (expert + 1) * rank)
                delta = world.config.lora_alpha / rank * lora_b[:, part] @ lora_a[part]
                name = next(n for n in base if f"layers.{layer}." in n and f".experts.{expert}.w2" in n)
                tensors[name] = (base[name].double() + delta).to(world.dtype)

    write_like(world.merged, out, change)


def _without(part: str) -> Callable[[World, Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if part in name)]

    return tensors_changed(change)


def _with_more(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(3, 3)


def _peft_tied(world: World, out: Path) -> None:
    """What PEFT writes when only one side of a tie is adapted: one tensor for both."""
    peft_merge(load_base(world.base, world.model, world.dtype), world.adapter, out, world.dtype)


def _says_tied(world: World, out: Path) -> None:
    shutil.copytree(world.merged, out)
    edit_json(out / "config.json", tie_word_embeddings=True)


def _cut_shard(world: World, out: Path) -> None:
    shutil.copytree(world.merged, out)
    shard = sorted(out.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)


def _stale_index(world: World, out: Path) -> None:
    """The index of an earlier save with other shards."""
    shutil.copytree(world.merged, out)
    index = out / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    files = sorted(set(table["weight_map"].values()))
    name = next(name for name, file in table["weight_map"].items() if file == files[0])
    table["weight_map"][name] = files[-1]
    index.write_text(json.dumps(table))


def _lost_shard(world: World, out: Path) -> None:
    shutil.copytree(world.merged, out)
    sorted(out.glob("*.safetensors"))[0].unlink()


def _noisy(world: World, out: Path) -> None:
    """Quantized and dequantized on the way: nothing here names it, and it must not pass."""

    def values(module: Module) -> Tensor:
        merged = module.merged(module.scaling)
        step = merged.abs().amax(1, keepdim=True) / 7
        return (merged / step).round() * step

    formula(values)(world, out)


UNREADABLE = "CheckpointError"
"""The kind of a fault that opening the folder already refuses."""


@dataclass(frozen=True)
class Fault:
    """kind: the slug of the finding it must give. worlds: where it can be planted.

    part: in the names of all modules that the finding may name. besides: what else is wrong with it.
    """

    kind: str
    worlds: tuple[str, ...]
    write: Callable[[World, Path], None]
    part: str = ""
    besides: tuple[str, ...] = ()


_DORA = ("dora", "dora-fp32", "dora-fp16", "gpt2")
_LORA = ("lora", "lora-fp32")
_LLAMA = ("dora", "lora")

FAULTS: Mapping[str, Fault] = {
    "scaling missing": Fault("scaling-missing", (*_DORA, *_LORA), formula(lambda m: m.merged(1.0))),
    "alpha / sqrt(r)": Fault(
        "rslora", ("dora", "dora-fp32", "gpt2", *_LORA), formula(lambda m: m.merged(math.sqrt(5) * m.scaling))
    ),
    "alpha / r": Fault("rslora", ("dora-fp16",), formula(lambda m: m.merged(m.scaling / math.sqrt(5)))),
    "alpha not divided": Fault("scaling-undivided", (*_DORA[:2], *_LORA), formula(lambda m: m.merged(5 * m.scaling))),
    "another scaling": Fault("scaling", (*_DORA, *_LORA), formula(lambda m: m.merged(1.3 * m.scaling))),
    "update subtracted": Fault("sign", (*_DORA, *_LORA), formula(lambda m: m.merged(-m.scaling))),
    "update not added": Fault("delta-missing", _DORA, formula(lambda m: m.merged(0.0))),
    "magnitudes dropped": Fault("magnitude-dropped", _DORA, formula(lambda m: m.direction)),
    "magnitudes of the base": Fault(
        "magnitude-dropped", _DORA, formula(lambda m: norm(m.weight) * m.direction / norm(m.direction))
    ),
    "magnitudes permuted": Fault("magnitude-permuted", _DORA, formula(_permuted_magnitudes)),
    "magnitudes on the inputs": Fault(
        "magnitude-transposed",
        _DORA,
        formula(
            lambda m: m.m.T * m.direction / norm(m.direction) if len(m.m) == m.weight.shape[1] else m.merged(m.scaling)
        ),
    ),
    "magnitudes of another layer": Fault("magnitude-of-other", ("dora", "dora-fp32", "gpt2"), _other_magnitudes),
    "magnitudes 1 % too large": Fault(
        "magnitude-changed", ("dora", "dora-fp32"), formula(lambda m: 1.01 * m.merged(m.scaling))
    ),
    "norm along the wrong axis": Fault("norm-axis", _DORA, formula(lambda m: m.m * m.direction / norm(m.direction, 0))),
    "norm and magnitudes along the wrong axis": Fault(
        "norm-axis",
        _DORA,
        formula(
            lambda m: (
                m.m.T * m.direction / norm(m.direction, 0) if len(m.m) == m.weight.shape[1] else m.merged(m.scaling)
            )
        ),
    ),
    "norm of W": Fault("norm-of-base", _DORA, formula(lambda m: m.m * m.direction / norm(m.weight))),
    "no norm": Fault("norm-missing", _DORA, formula(lambda m: m.m * m.direction)),
    "scaling left out of the norm": Fault(
        "norm-scaling", _DORA, formula(lambda m: m.m * m.direction / norm(m.weight + m.delta))
    ),
    "one layer left out": Fault(
        "left-out", ("dora", "lora", "dora-fp32"), _from_base(["1.mlp.up_proj"]), "1.mlp.up_proj"
    ),
    "some rows left out": Fault("left-out", ("dora", "lora"), _some_rows_left_out, "up_proj"),
    "one layer twice": Fault(
        "merged-twice", ("dora", "lora", "dora-fp32"), formula(_twice, "0.self_attn.v_proj"), "0.self_attn.v_proj"
    ),
    "all merged twice": Fault("merged-twice", ("dora", "lora", "dora-fp32", "gpt2"), _peft_twice),
    "q and k of other sizes swapped": Fault("swapped", ("grouped",), _swap("q_proj", "k_proj")),
    "q and k swapped": Fault("swapped", _LLAMA, _swap("q_proj", "k_proj")),
    "layers swapped": Fault("swapped", ("dora", "gpt2"), _swap(".0.", ".1.")),
    "update of another layer": Fault("adapter-of-other", _LLAMA, _other_layers_adapter, "v_proj"),
    "B A transposed": Fault(
        "delta-transposed",
        _LLAMA,
        formula(
            lambda m: (lambda v: v if m.magnitude is None else m.m * v / norm(v))(m.weight + m.scaling * m.delta.T),
            "q_proj",
        ),
    ),
    "stored transposed": Fault(
        "tensor-transposed", _LLAMA, _each("o_proj", lambda tensor: tensor.T.contiguous()), "o_proj"
    ),
    "another epoch": Fault("another-adapter", ("dora", "lora", "dora-fp32", "lora-fp32"), _other_epoch),
    "another adapter": Fault("another-adapter", ("dora", "lora"), _other_adapter),
    "another base": Fault("another-base", ("dora", "lora", "gpt2"), _other_base),
    "the base itself": Fault("unmerged-base", (*_DORA, *_LORA, "experts"), _unmerged),
    "PEFT with a 16-bit adapter": Fault("cast-twice", ("dora", "dora-fp16", "lora", "gpt2"), _peft_low_precision),
    "PEFT's safe_merge": Fault("cast-twice", ("lora",), _peft_safe),
    "update rounded": Fault("cast-twice", ("dora", "dora-fp16", "lora", "gpt2"), _rounded_delta),
    "base rounded": Fault("cast-twice", ("dora-fp32", "lora-fp32"), _rounded_base),
    "through bfloat16": Fault("cast-twice", ("dora-fp32",), _through_bfloat16),
    "cut off": Fault("truncated", ("dora", "lora"), _cut_off),
    "quantized": Fault("unexplained", _LLAMA, _noisy),
    "a NaN": Fault("non-finite", _LLAMA, _value("up_proj", math.nan), "up_proj"),
    "an infinity": Fault("non-finite", ("dora", "dora-fp16"), _value("k_proj", math.inf), "k_proj"),
    "a NaN in an unadapted tensor": Fault("non-finite", _LLAMA, _value("embed_tokens", math.nan), "embed_tokens"),
    "a bit in an unadapted tensor": Fault("flipped", _LLAMA, _flipped("embed_tokens", 0), "embed_tokens"),
    "a bit in an adapted tensor": Fault("flipped", _LLAMA, _flipped("down_proj", 3)),
    "a sign in a norm": Fault("flipped", ("dora",), _flipped("model.norm", 15)),
    "a wrong element": Fault("flipped", ("dora", "dora-fp32"), _value("gate_proj", 0.25)),
    "zeros": Fault("zeroed", _LLAMA, _each("0.mlp.down_proj", torch.zeros_like), "0.mlp.down_proj"),
    "zeros in an unadapted tensor": Fault("zeroed", ("dora",), _each("lm_head", torch.zeros_like)),
    "an unadapted tensor scaled": Fault(
        "unadapted-changed", ("dora",), _each("model.norm", lambda tensor: tensor * 1.5)
    ),
    "bias scaled": Fault("bias-scaled", ("qwen2",), _scaled_bias),
    "lora_bias not scaled": Fault("scaling-missing", ("qwen2-bias",), _unscaled_lora_bias),
    "lora_bias left out": Fault("left-out", ("qwen2-bias",), _from_base([".bias"])),
    "trained head left out": Fault("left-out", ("head",), _from_base(["lm_head"])),
    "token rows left out": Fault("left-out", ("tokens",), _from_base(["embed_tokens"])),
    "token rows added": Fault("rows-added", ("tokens",), _rows_added),
    "experts in another order": Fault("adapter-of-other", ("experts",), _experts_turned),
    "experts' B packed otherwise": Fault("expert-packing", ("experts",), _wrong_packing),
    "a tensor missing": Fault("missing-tensor", _LLAMA, _without("k_proj")),
    "a norm missing": Fault("missing-tensor", ("dora",), _without("1.input_layernorm"), "1.input_layernorm"),
    "a tensor more": Fault("extra-tensor", ("dora",), tensors_changed(_with_more)),
    "a vocabulary cut": Fault("wrong-shape", ("dora",), _each("embed_tokens", lambda tensor: tensor[:90])),
    "whole numbers": Fault("wrong-dtype", ("dora",), _each("model.norm", lambda tensor: tensor.to(torch.int8))),
    "tied head not untied": Fault("tied-head", ("tied",), _peft_tied, besides=("cast-twice",)),
    "says tied, is not": Fault("config", ("dora",), _says_tied),
    "truncated shard": Fault(UNREADABLE, ("dora",), _cut_shard),
    "stale index": Fault(UNREADABLE, ("dora",), _stale_index),
    "lost shard": Fault(UNREADABLE, ("dora",), _lost_shard),
}
