"""The merge: no element off, nothing else touched, the base's own layout.

The oracle of the elements is the formula in integers, rounded once; that this is the formula, PEFT's merge says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dora_serve.merge
from dora_serve.errors import UnmergeableError
from dora_serve.merge import merge
from exporters.safetensors import write_model
from tests.cases import (
    ATTENTION,
    LINEARS,
    SIZES,
    adapt,
    ask_here,
    build,
    distance,
    llama,
    load,
    logits,
    merge_to,
    plan,
    quiet,
    read_tensors,
    rewrite_json,
    rewrite_tensors,
    save,
    vary,
)

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIGITS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}
"""Of the significand, and the exponent of the smallest normal number."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


# Every element


UNIT = 149
"""2**-149 is the smallest float32: each stored number is a whole number of those."""


def whole(values: Tensor) -> NDArray[np.object_]:
    """The numbers of a tensor of at most 32 bits as Python integers, in units of 2**-UNIT."""
    ratios = [float(value).as_integer_ratio() for value in values.flatten().tolist()]
    numbers = np.array([top * (2**UNIT // bottom) for top, bottom in ratios] + [0], dtype=object)[:-1]
    return numbers.reshape(values.shape)


def round_ratio(top: int, bottom: int, dtype: torch.dtype) -> float:
    """top / bottom, to nearest, ties to even: the definition, in integers."""
    digits, lowest = DIGITS[dtype]
    size = abs(top)
    exponent = size.bit_length() - bottom.bit_length()
    exponent -= size << max(0, -exponent) < bottom << max(0, exponent)
    step = max(exponent, lowest) - digits + 1
    count, rest = divmod(size << max(0, -step), bottom << max(0, step))
    divisor = bottom << max(0, step)
    count += 2 * rest > divisor or (2 * rest == divisor and count % 2 == 1)
    return math.copysign(math.ldexp(count, step), top)


def exact(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """W + s B A, or m (W + s B A) / ||W + s B A||, of an (out, in) matrix: rounded once, held in float64.

    All but the root is exact, and that has a thousand digits. s is alpha / r, not the float64 next to it.
    """
    top, bottom = Fraction(scaling).limit_denominator(1000).as_integer_ratio()
    assert top / bottom == scaling
    direction = (whole(weight) * 2**UNIT) * bottom + top * (whole(lora_b) @ whole(lora_a))
    if magnitude is None:
        divisor = bottom << 2 * UNIT
        rows = [[round_ratio(value, divisor, dtype) for value in row] for row in direction]
    else:
        rows = []
        for row, size in zip(direction, whole(magnitude), strict=True):
            norm = math.isqrt(sum(value * value for value in row) << 1000)
            rows.append([round_ratio((size * value) << 500, norm << UNIT, dtype) for value in row])
    return torch.tensor(rows, dtype=torch.float64)


class Layers(nn.Module):
    """One of each layer, square where it can be, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 6, 3)
        self.second = nn.Conv2d(4, 6, (2, 3))
        self.third = nn.Conv3d(3, 5, (1, 2, 2))
        self.table = nn.Embedding(12, 12)
        self.flat = nn.Linear(12, 12)
        self.flipped = Conv1D(10, 12)


GPT2 = {"vocab_size": 20, "n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 8}
T5 = {"vocab_size": 20, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
RESNET = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"}
SMALL = {**SIZES, "hidden_size": 12, "head_dim": 6, "num_hidden_layers": 1, "vocab_size": 20}

FAMILIES: Mapping[str, tuple[Callable[[], Any], list[str]]] = {
    "gpt2": (lambda: build("AutoModelForCausalLM", "gpt2", **GPT2), ["c_attn", "c_proj", "c_fc", "wpe"]),
    "llama": (lambda: llama(**SMALL), list(LINEARS)),
    "t5": (lambda: build("AutoModelForSeq2SeqLM", "t5", **T5), ["q", "k", "v", "o", "wi", "wo"]),
    "resnet": (lambda: build("AutoModelForImageClassification", "resnet", **RESNET), ["convolution"]),
    "layers": (lambda: vary(Layers()), ["first", "second", "third", "table", "flat", "flipped"]),
    "untied embedding": (lambda: llama(**SMALL), ["embed_tokens", "lm_head"]),
    "tied embedding": (lambda: llama(**SMALL, tie_word_embeddings=True), ["embed_tokens", "lm_head"]),
}


def exact_tensors(trained: Any, stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What the merge has to write for each module that a PEFT model adapts, from the values that are stored."""
    wanted = {}
    for name, module in trained.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        key = f"{name.removeprefix('base_model.model.')}.weight"
        part: Any = module  # its parts are modules of modules
        layer = part.get_base_layer()
        weight = stored[key] if key in stored else stored["model.embed_tokens.weight"]
        is_table = isinstance(layer, nn.Embedding)
        flips = is_table or isinstance(layer, Conv1D)
        lora_a = part.lora_embedding_A["default"] if is_table else part.lora_A["default"].weight
        lora_b = part.lora_embedding_B["default"] if is_table else part.lora_B["default"].weight
        vectors = part.lora_magnitude_vector
        magnitude = vectors["default"].weight.detach().flatten() if "default" in vectors else None
        matrix = weight.T if flips else weight.flatten(1)
        factors = (lora_a.detach().flatten(1), lora_b.detach().flatten(1), part.scaling["default"])
        merged = exact(matrix, *factors, magnitude, dtype)
        wanted[key] = (merged.T if flips else merged).reshape(weight.shape)
    return wanted


@pytest.mark.parametrize("use_dora", [True, False], ids=["DoRA", "LoRA"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_element_differs_from_the_formula_rounded_once(
    family: str, dtype: torch.dtype, use_dora: bool, tmp_path: Path
) -> None:
    """Over adapters in float32 and in bfloat16; and PEFT's merge in float64 is that formula."""
    build_model, targets = FAMILIES[family]
    model = build_model().to(dtype)
    save(model, tmp_path / "base", dtype)
    stored = read_tensors(tmp_path / "base")
    for label, adapter_dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        adapter, out = tmp_path / f"adapter {label}", tmp_path / f"merged {label}"
        # Of 4 / 3 the nearest float64 moves sums of bfloat16 products off the middle of two numbers.
        config: dict[str, Any] = {"target_modules": targets, "use_dora": use_dora, "r": 3, "lora_alpha": 4}
        trained = adapt(copy.deepcopy(model).float(), adapter, dtype=adapter_dtype, **config)
        merge_to(tmp_path / "base", adapter, out)
        merged = read_tensors(out)
        wanted = exact_tensors(trained, stored, dtype)
        assert len(wanted) >= 2
        differing = sum(int((merged[name].double() != value).sum()) for name, value in wanted.items())
        assert differing == 0
        assert all(merged[name].dtype == dtype for name in wanted)

        # Both sides: most elements moved, and nothing else did.
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if family == "tied embedding" else {}
        before = {name: stored[tied.get(name, name)] for name in merged}
        moved = sum(int((merged[name] != before[name]).sum()) for name in wanted)
        assert moved > 0.8 * sum(value.numel() for value in wanted.values())
        assert all(same_bits(merged[name], before[name]) for name in merged.keys() - wanted.keys())

        with quiet():
            exactly = PeftModel.from_pretrained(copy.deepcopy(model).double(), adapter).double().merge_and_unload()
        theirs = exactly.state_dict()
        for name, value in wanted.items():
            if family == "tied embedding":
                continue  # there PEFT's merge changes both sides of the tie with each of the two updates
            # Half a spacing of the output, and what float64 loses.
            step = torch.finfo(dtype).eps / 2 * value.abs() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
            assert bool(((theirs[name] - value).abs() <= step * (1 + 2**-20)).all())


def same_bits(first: Tensor, second: Tensor) -> bool:
    one, two = (value.reshape(-1).view(torch.uint8) for value in (first, second))
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(one, two)


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16], ids=["adapter fp32", "adapter bf16"])
@pytest.mark.parametrize("use_dora", [True, False], ids=["DoRA", "LoRA"])
def test_peft_merges_the_same_within_its_own_rounding(
    use_dora: bool, adapter_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """PEFT rounds the update, the sum, the norm, the factor and the product to bfloat16, at most: six roundings of
    values no larger than |W| + s |B| |A|, scaled. This merge rounds once, so it is the nearer one."""
    model = llama(hidden_size=64, head_dim=32, intermediate_size=96, num_hidden_layers=1).to(torch.bfloat16)
    save(model, tmp_path / "base", torch.bfloat16)
    config: dict[str, Any] = {"target_modules": list(LINEARS), "use_dora": use_dora, "r": 8, "lora_alpha": 8}
    trained = adapt(model.float(), tmp_path / "adapter", dtype=adapter_dtype, **config)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, stored = read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "base")
    with quiet():
        start = type(model).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        theirs = PeftModel.from_pretrained(start, tmp_path / "adapter", autocast_adapter_dtype=adapter_dtype is None)
        state = theirs.merge_and_unload().state_dict()
    factors = load_file(tmp_path / "adapter" / WEIGHTS)
    count = 0
    for name in exact_tensors(trained, stored, torch.bfloat16):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        product = factors[f"{key}.lora_B.weight"].double().abs() @ factors[f"{key}.lora_A.weight"].double().abs()
        size = stored[name].double().abs() + product
        if use_dora:
            direction = (
                stored[name].double()
                + factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            )
            size *= (factors[f"{key}.lora_magnitude_vector"].double() / direction.norm(dim=1))[:, None]
        assert bool(((merged[name].double() - state[name].double()).abs() <= 6 * 2**-8 * size).all())
        count += int((merged[name] != state[name]).sum())
    # formats.md 1.5: hardly any for an adapter in float32; for one in bfloat16 a tenth of LoRA, half of DoRA.
    share = count / sum(stored[name].numel() for name in exact_tensors(trained, stored, torch.bfloat16))
    assert share < 0.001 if adapter_dtype is None else share > 0.05


@pytest.mark.parametrize("elements", [1, 7, 16, 100, 1 << 18])
@pytest.mark.parametrize("family", ["llama", "gpt2", "layers"])
def test_blocks_and_workers_change_nothing(
    family: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row blocks smaller than a row, larger than a tensor, and everything between; one worker and four."""
    build_model, targets = FAMILIES[family]
    model = build_model().to(torch.bfloat16)
    save(model, tmp_path / "base", torch.bfloat16)
    adapt(model.float(), tmp_path / "adapter", target_modules=targets, use_dora=True)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    monkeypatch.setattr(dora_serve.merge, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(dora_serve.merge, "TASK_ELEMENTS", 3 * elements)
    monkeypatch.setattr(dora_serve.merge, "COPY_BYTES", 5 * elements)
    for workers in (1, 4):
        out = tmp_path / f"by {workers}"
        out.mkdir()
        merge(plan(tmp_path / "base", tmp_path / "adapter"), out, metadata={"format": "pt"}, workers=workers)
        wanted = (tmp_path / "wanted" / "model.safetensors").read_bytes()
        assert (out / "model.safetensors").read_bytes() == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_is_a_rounding_too(dtype: str, tmp_path: Path) -> None:
    """--dtype: adapted and unadapted tensors in one rounding from what is stored, integers and configuration apart."""
    model = build("AutoModelForImageClassification", "resnet", **RESNET)
    save(model, tmp_path / "base")
    trained = adapt(model, tmp_path / "adapter", target_modules=["convolution"], use_dora=True)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=DTYPES[dtype])
    stored, merged = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    wanted = exact_tensors(trained, stored, DTYPES[dtype])
    for name, value in stored.items():
        if not value.is_floating_point():
            assert same_bits(merged[name], value)
            continue
        if name not in wanted:
            ratios = [float(item).as_integer_ratio() for item in value.flatten()]
            held = [round_ratio(top, bottom, DTYPES[dtype]) for top, bottom in ratios]
            wanted[name] = torch.tensor(held, dtype=torch.float64).reshape(value.shape)
        assert merged[name].dtype == DTYPES[dtype]
        assert torch.equal(merged[name].double(), wanted[name])
    assert any(not value.is_floating_point() for value in stored.values())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    assert load(tmp_path / "merged", type(model), DTYPES[dtype]).dtype == DTYPES[dtype]


def test_another_dtype_is_told_wherever_one_is_named(tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    for before, after in (
        ({"torch_dtype": "float32", "dtype": None}, {"torch_dtype": "float16"}),
        ({"torch_dtype": None, "dtype": None}, {"dtype": "float16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "x": 1}, "vision_config": {"y": 2}},
            {"dtype": "float16", "text_config.dtype": "float16"},
        ),
    ):
        rewrite_json(tmp_path / "base" / "config.json", **before)
        planned = plan(tmp_path / "base", tmp_path / "adapter", dtype=torch.float16)
        assert {".".join(path): value for path, value in planned.config_changes.items()} == after


def test_whole_tensors_of_the_adapter_take_the_dtype_of_the_base(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    save(model, tmp_path / "base", torch.bfloat16)
    rows_of: dict[str, Any] = {"trainable_token_indices": [3, 39]}
    adapt(model.float(), tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"], **rows_of)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, held = read_tensors(tmp_path / "merged"), load_file(tmp_path / "adapter" / WEIGHTS)
    assert merged["lm_head.weight"].dtype == torch.bfloat16
    # float32 to bfloat16 is one rounding in torch as well.
    head = held["base_model.model.lm_head.weight"]
    assert head.dtype == torch.float32
    assert torch.equal(merged["lm_head.weight"], head.to(torch.bfloat16))
    rows = held["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    table = read_tensors(tmp_path / "base")["model.embed_tokens.weight"]
    table[[3, 39]] = rows.to(torch.bfloat16)
    assert torch.equal(merged["model.embed_tokens.weight"], table)


# Numbers that cannot be merged


def spoilt_world(root: Path, dtype: torch.dtype, use_dora: bool, spoil: Callable[[dict[str, Tensor]], object]) -> None:
    model = llama().to(dtype)
    save(model, root / "base", dtype)
    adapt(model.float(), root / "adapter", target_modules=["q_proj"], use_dora=use_dora)
    rewrite_tensors(root / "base" / "model.safetensors", spoil)


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("use_dora", [True, False], ids=["DoRA", "LoRA"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_base_that_is_not_finite_where_it_is_adapted(value: float, use_dora: bool, tmp_path: Path) -> None:
    spoilt_world(tmp_path, torch.float32, use_dora, lambda held: held[Q0].view(-1)[37:38].fill_(value))
    with pytest.raises(UnmergeableError, match="q_proj") as caught:
        merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert caught.value.remedy


def test_what_is_not_finite_stays_so_under_a_magnitude_of_zero(tmp_path: Path) -> None:
    spoilt_world(tmp_path, torch.float32, True, lambda held: held[Q0][5].fill_(math.nan))
    key = f"base_model.model.{Q0.removesuffix('.weight')}.lora_magnitude_vector"
    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, lambda held: held[key][5].zero_())
    with pytest.raises(UnmergeableError, match="q_proj"):
        merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_a_base_that_is_not_finite_elsewhere_is_copied(tmp_path: Path) -> None:
    spoilt_world(tmp_path, torch.bfloat16, True, lambda held: held["lm_head.weight"].fill_(math.nan))
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    name = "lm_head.weight"
    assert same_bits(read_tensors(tmp_path / "merged")[name], read_tensors(tmp_path / "base")[name])


def test_a_row_without_a_direction(tmp_path: Path) -> None:
    """A magnitude over a row of zeros is NaN in PEFT's forward; a magnitude of zero leaves nothing, which is exact."""
    spoilt_world(tmp_path, torch.float32, True, lambda held: held[Q0][5].zero_())
    key = f"base_model.model.{Q0.removesuffix('.weight')}"
    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, lambda held: held[f"{key}.lora_B.weight"][5].zero_())
    with pytest.raises(UnmergeableError, match="is zero or not finite"):
        merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "refused")
    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, lambda held: held[f"{key}.lora_magnitude_vector"][5].zero_())
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert read_tensors(tmp_path / "merged")[Q0][5].abs().max() == 0


@pytest.mark.parametrize("use_dora", [True, False], ids=["DoRA", "LoRA"])
def test_values_beyond_float16(use_dora: bool, tmp_path: Path) -> None:
    """Refused in float16; in bfloat16 they fit."""
    spoilt_world(tmp_path, torch.float16, use_dora, lambda held: held[Q0][5].fill_(60000))
    key = f"base_model.model.{Q0.removesuffix('.weight')}"

    def enlarge(held: dict[str, Tensor]) -> None:
        part = f"{key}.lora_magnitude_vector" if use_dora else f"{key}.lora_B.weight"
        held[part][5] = 1e7

    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, enlarge)
    with pytest.raises(UnmergeableError, match="overflows the dtype"):
        merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "refused")
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    assert bool(torch.isfinite(read_tensors(tmp_path / "merged")[Q0]).all())


def test_an_adapter_that_changes_nothing_is_reported(tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj"])

    def silence(held: dict[str, Tensor]) -> None:
        for name in held:
            if "k_proj" in name and "lora_B" in name:
                held[name].zero_()

    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, silence)
    (tmp_path / "merged").mkdir()
    report = write_model(plan(tmp_path / "base", tmp_path / "adapter"), tmp_path / "merged", metadata={})
    assert report.unchanged == tuple(f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1))


# Layout


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def order_in(path: Path) -> list[str]:
    """The names of a safetensors file in the order of their bytes."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: (header[name]["data_offsets"], name))


def raw(path: Path, name: str) -> bytes:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        start, stop = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        return file.read(stop - start)


def test_shards_index_and_unadapted_bytes_are_the_bases_own(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    save(model, tmp_path / "base", torch.bfloat16, max_shard_size="4KB")
    adapt(model.float(), tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)
    before = hashes(tmp_path)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert {name: value for name, value in hashes(tmp_path).items() if not name.startswith("merged")} == before

    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    own, other = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text()) for folder in ("base", "merged")
    )
    assert other == own
    for shard in shards:
        first, second = tmp_path / "base" / shard, tmp_path / "merged" / shard
        assert order_in(second) == order_in(first)
        for name in order_in(first):
            adapted = "q_proj" in name or "down_proj" in name
            assert (raw(first, name) == raw(second, name)) != adapted
        with safe_open(second, "pt") as opened:  # the library's own reader takes it
            assert set(opened.keys()) == set(order_in(second))
    # Nothing in config.json changed, so its very bytes are kept.
    assert (tmp_path / "merged" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_what_is_added_goes_to_a_shard_and_into_the_index(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base", max_shard_size="8KB")
    adapt(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    planned = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in order_in(tmp_path / "merged" / index["weight_map"]["lm_head.weight"])
    tensors = read_tensors(tmp_path / "merged")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values()) == planned.nbytes
    assert index["weight_map"].keys() == tensors.keys()
    assert load(tmp_path / "merged", model).config.tie_word_embeddings is False


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"]
)
def test_a_single_file_keeps_its_name(name: str, tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / name)
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merge_to(tmp_path / "base" / name, tmp_path / "adapter", tmp_path / "by file")
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors*")] == [name]
    assert (tmp_path / "by file" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_side_files_come_along_and_other_weights_do_not(tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    kept = ["LICENSE", "README.md", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"]
    left = ["pytorch_model.bin", "onnx/model.onnx", ".cache/x.json", "original/consolidated.00.pth", "x.gguf"]
    left += ["checkpoint-5/trainer_state.json", "dora_export.json", "tf_model.h5"]
    for name in (*kept, *left):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(f"of {name}")
    (tmp_path / "base" / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "base" / "loop").symlink_to(tmp_path / "base")
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(hashes(tmp_path / "merged")) == {*own, *kept}
    assert (tmp_path / "merged" / kept[-1]).read_text() == f"of {kept[-1]}"


def test_a_base_of_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path / "base", max_shard_size="8KB")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    for folder in ("base", "adapter"):
        (tmp_path / "blobs" / folder).mkdir(parents=True)
        (tmp_path / "links" / folder).mkdir(parents=True)
        for path in (tmp_path / folder).iterdir():
            blob = tmp_path / "blobs" / folder / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            (tmp_path / "links" / folder / path.name).symlink_to(f"../../blobs/{folder}/{blob.name}")
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    merge_to(tmp_path / "links" / "base", tmp_path / "links" / "adapter", tmp_path / "merged")
    assert hashes(tmp_path / "merged") == hashes(tmp_path / "wanted")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def test_metadata_of_the_header(tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "merged").mkdir()
    told = {"format": "pt", "tool": "x", "unicode": "größer"}
    write_model(plan(tmp_path / "base", tmp_path / "adapter"), tmp_path / "merged", metadata=told)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == told


def test_tensors_of_no_elements_and_of_no_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(6, 4)})
    odd = {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "flags": torch.tensor([True, False])}
    odd |= {"codes": torch.arange(5, dtype=torch.int8), "wide": torch.arange(3, dtype=torch.float64)}
    (tmp_path / "base").mkdir()
    save_file({**model.state_dict(), **odd}, tmp_path / "base" / "model.safetensors")
    adapt(model, tmp_path / "adapter", target_modules=["linear"])
    for dtype in (None, torch.bfloat16):
        out = tmp_path / f"merged {dtype}"
        merge_to(tmp_path / "base", tmp_path / "adapter", out, dtype=dtype)
        merged = read_tensors(out)
        for name, value in odd.items():
            wanted = value.to(dtype) if dtype and value.is_floating_point() else value
            assert merged[name].shape == value.shape
            assert merged[name].dtype == wanted.dtype
            assert torch.equal(merged[name], wanted)


# A vocabulary that grew


def test_a_resized_vocabulary_brings_its_tables_and_its_tokenizer(tmp_path: Path) -> None:
    """Tokens added before the training: PEFT saves both tables, and the trainer its tokenizer beside them."""
    base = llama()
    save(base, tmp_path / "base")
    for folder, text in (("base", "old"), ("adapter", "new")):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / folder / name).write_text(text)
    (tmp_path / "base" / "merges.txt").write_text("old")
    larger = load(tmp_path / "base", base)
    larger.resize_token_embeddings(44)
    trained = adapt(larger, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 41, 43])
    planned = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert planned.config_changes == {("vocab_size",): 44}
    merged = load(tmp_path / "merged", base)
    assert merged.config.vocab_size == 44
    inputs = {"input_ids": torch.tensor([[1, 41, 3, 43, 9, 42]])}
    own_error = distance(logits(trained, inputs), truth := logits(trained.double(), inputs))
    assert distance(logits(merged, inputs), truth) <= 4 * own_error
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "new"
    assert not (tmp_path / "merged" / "merges.txt").exists()
    assert any("tokenizer is the adapter's" in note for note in planned.notes)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_tables_of_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=tied)
    save(base, tmp_path / "base")
    larger = load(tmp_path / "base", base)
    larger.resize_token_embeddings(44)
    trained = adapt(
        larger, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    planned = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged", base)
    inputs = {"input_ids": torch.tensor([[1, 41, 3, 43, 9, 42]])}
    own_error = distance(logits(trained, inputs), truth := logits(trained.double(), inputs))
    assert distance(logits(merged, inputs), truth) <= 4 * own_error
    assert planned.untied == (("lm_head.weight",) if tied else ())
    assert any("brings no tokenizer" in note for note in planned.notes)


# What a merge costs


def test_a_merge_imports_neither_transformers_nor_peft(tmp_path: Path) -> None:
    """Not even to ask what is tied: a plain Llama's names and ties are known here."""
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["embed_tokens", *ATTENTION], use_dora=True)
    program = (
        "import sys, subprocess\n"
        "def refuse(*args, **kwargs): raise AssertionError('another process was started')\n"
        "subprocess.run = subprocess.Popen = refuse\n"
        "from exporters.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'transformers', 'peft', 'onnx', 'onnxruntime', 'gradio', 'safetensors', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out", "--no-verify"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert load(tmp_path / "out", model).config.tie_word_embeddings is False
