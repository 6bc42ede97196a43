"""The check of every tensor: the arithmetic it stands on, and no false alarm on clean merges of many families."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_serve.checkpoint import open_checkpoint
from dora_serve.formats import read_adapter
from dora_serve.plan import MergePlan
from dora_serve.progress import Progress
from dora_serve.reference_weight import (
    FLOAT32,
    error_rows,
    exact_rows,
    open_reference,
    round_once,
    row_blocks,
    spacing,
    sum_growth,
    within,
)
from dora_serve.resolve import plan_merge
from dora_serve.structure_check import config_difference, match_names
from dora_serve.tensor_check import check_tensors
from dora_serve.tensor_report import TensorReport
from exporters.safetensors import write_model
from tests.faults import (
    LINEARS,
    SIZES,
    causal,
    edit_json,
    llama,
    load_base,
    make_world,
    peft_merge,
    read_folder,
    save_adapter,
    save_base,
    write_like,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def plan_of(base: Path, adapter: Path, **kwargs: Any) -> MergePlan:
    return plan_merge(open_checkpoint(base), read_adapter(adapter), **kwargs)


def check(plan: MergePlan, merged: Path) -> TensorReport:
    return check_tensors(plan, open_checkpoint(merged))


# The arithmetic


def _values(dtype: torch.dtype, count: int = 4000) -> Tensor:
    """float64 values over the whole range of a dtype: normal, subnormal, exact, in the middle, and just beside it."""
    generator = torch.Generator().manual_seed(3)
    info = torch.finfo(dtype)
    low, high = math.log2(info.tiny * info.eps), math.log2(info.max)
    exponents = torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low
    spread = torch.exp2(exponents) * torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    held = spread.to(dtype).double()
    step = spacing(held, dtype)
    nudge = step * 2.0**-30
    values = torch.cat(
        [spread, held, held + step / 2, held + step / 2 + nudge, held + step / 2 - nudge, held + step / 4]
    )
    return torch.cat([values, torch.tensor([0.0, -0.0, 1.0, 1.5, 1 + 2**-8 + 2**-40, info.max, info.tiny])])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    held = _values(dtype).to(dtype)
    held = held[held.abs() < torch.finfo(dtype).max].abs()
    above = torch.nextafter(held, torch.full_like(held, torch.inf))
    assert torch.equal(spacing(held.double(), dtype), above.double() - held.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounding_once_is_numpys(dtype: torch.dtype) -> None:
    values = torch.cat([_values(dtype), torch.tensor([torch.finfo(dtype).max * 1.5, -torch.inf], dtype=torch.float64)])
    with np.errstate(over="ignore"):
        wanted = values.numpy().astype({torch.float16: np.float16, torch.float32: np.float32}[dtype])
    assert torch.equal(round_once(values, dtype), torch.from_numpy(wanted).double())


def test_rounding_once_to_bfloat16_takes_the_nearest_and_of_two_the_even_one() -> None:
    values = _values(torch.bfloat16, 300)
    values = values[values.abs() < torch.finfo(torch.bfloat16).max]
    for value, rounded in zip(values.tolist(), round_once(values, torch.bfloat16).tolist(), strict=True):
        near = torch.tensor(value).to(torch.bfloat16)  # rounded twice, so it or a neighbour is the nearest
        inf = torch.tensor(torch.inf, dtype=torch.bfloat16)
        options = [torch.nextafter(near, -inf), near, torch.nextafter(near, inf)]
        options = [option for option in options if torch.isfinite(option)]
        even = {float(option): int(option.view(torch.int16)) % 2 for option in options}
        nearest = min(even, key=lambda option: (abs(Fraction(option) - Fraction(value)), even[option]))
        assert rounded == nearest


def test_what_torch_rounds_twice_is_told_from_what_is_rounded_once() -> None:
    """1 + 2**-8 + 2**-40 is just above the middle of two bfloat16 numbers; through float32 it becomes the middle."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert float(value.to(torch.bfloat16)) == 1.0
    assert float(round_once(value, torch.bfloat16)) == 1 + 2**-7
    assert not bool(within(value.to(torch.bfloat16).double(), value, 0.0, torch.bfloat16))
    assert bool(within(value.to(torch.bfloat16).double(), value, 2.0**-40, torch.bfloat16))


def test_the_bound_on_a_sum_is_the_smaller_of_the_certain_and_the_likely_one() -> None:
    assert sum_growth(4) == 4
    assert sum_growth(49) == 49
    assert sum_growth(4900) == 490


@pytest.mark.parametrize("kind", ["lora-fp32", "dora-fp32", "gpt2-fp32"])
def test_float32_arithmetic_stays_within_its_bound_and_the_bound_is_not_loose(tmp_path: Path, kind: str) -> None:
    """PEFT in float32 as the arithmetic: every element within the bound, the worst above a two-hundredth of it."""
    if kind == "gpt2-fp32":
        sizes = {"vocab_size": 96, "n_embd": 192, "n_layer": 1, "n_head": 4, "n_positions": 64}
        config = LoraConfig(r=16, lora_alpha=24, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True)
        world = make_world(tmp_path, kind, causal("gpt2", **sizes), config, torch.float32)
    else:
        sizes = {"hidden_size": 192, "intermediate_size": 400}
        world = llama(tmp_path, kind, torch.float32, r=16, lora_alpha=24, use_dora="dora" in kind, sizes=sizes)
    merged = read_folder(peft_merge(world.model, world.adapter, tmp_path / "peft", torch.float32))
    worst = 0.0
    for tensor in plan_of(world.base, world.adapter).edited:
        reference = open_reference(tensor, 1 << 12)
        for start, stop in row_blocks(reference, 1 << 12):
            exact = exact_rows(reference, start, stop)
            got = merged[tensor.name].double()[start:stop]
            error = error_rows(reference, start, stop, FLOAT32)
            beyond = ((got - exact).abs() - spacing(exact, torch.float32) / 2).clamp(min=0)
            worst = max(worst, float((beyond / error).max()))
    assert 1 / 200 < worst <= 1


# Names and structure


def test_names_match_exactly_or_by_one_prefix() -> None:
    assert match_names(["h.0.w", "wte.w"], ["transformer.h.0.w", "transformer.wte.w", "lm_head.w"]) == {
        "h.0.w": "transformer.h.0.w",
        "wte.w": "transformer.wte.w",
    }
    assert match_names(["model.a.w", "model.b.w", "lm_head.w"], ["a.w", "b.w", "lm_head.w"]) == {
        "lm_head.w": "lm_head.w",
        "model.a.w": "a.w",
        "model.b.w": "b.w",
    }
    assert match_names(["a.w"], ["b.w"]) == {}
    assert match_names(["a.w", "x.w"], ["a.w", "p.a.w"]) == {"a.w": "a.w"}


@pytest.fixture(scope="module")
def gpt2_tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MergePlan, Path]:
    """gpt2 as its authors' checkpoint has it: no `transformer.` in front, causal masks stored, no head."""
    root = tmp_path_factory.mktemp("gpt2")
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    world = make_world(root, "gpt2", causal("gpt2", **sizes), config, torch.float32)
    old = root / "old"
    old.mkdir()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in read_folder(world.base).items()}
    tensors.pop("lm_head.weight", None)
    tensors |= {f"h.{layer}.attn.bias": torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16) for layer in (0, 1)}
    save_file(tensors, old / "model.safetensors")
    (old / "config.json").write_text((world.base / "config.json").read_text())
    return root, plan_of(old, world.adapter), world.merged


def test_a_folder_with_a_prefix_and_without_buffers_passes(gpt2_tied: tuple[Path, MergePlan, Path]) -> None:
    _, plan, merged = gpt2_tied
    report = check(plan, merged)
    assert report.passed, report.findings
    assert report.exact
    assert report.counts["buffer"] == 2
    assert any("other names" in note for note in report.notes)


def test_a_tied_head_may_be_stored_twice_or_once(gpt2_tied: tuple[Path, MergePlan, Path], tmp_path: Path) -> None:
    _, plan, merged = gpt2_tied

    def store_twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    def store_another(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] * 2

    write_like(merged, tmp_path / "twice", store_twice)
    report = check(plan, tmp_path / "twice")
    assert report.passed, report.findings
    assert report.counts["tied"] == 1
    write_like(merged, tmp_path / "another", store_another)
    assert [finding.kind for finding in check(plan, tmp_path / "another").findings] == ["extra-tensor"]


def test_a_base_that_stores_its_tied_head_twice_may_be_merged_into_one_that_does_not(tmp_path: Path) -> None:
    model = causal("llama", **SIZES, tie_word_embeddings=True)
    world = make_world(tmp_path, "tied", model, LoraConfig(r=4, target_modules=["q_proj"]), torch.bfloat16)
    twice = tmp_path / "twice"

    def store_twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    write_like(world.base, twice, store_twice)
    plan = plan_of(twice, world.adapter)
    report = check(plan, world.merged)
    assert report.passed, report.findings
    assert report.counts["tied"] == 1
    edit_json(world.merged / "config.json", tie_word_embeddings=False)
    kinds = {finding.kind for finding in check(plan, world.merged).findings}
    assert kinds == {"missing-tensor", "config"}


def test_the_configuration_must_have_what_the_plan_changes(tmp_path: Path) -> None:
    model = causal("llama", **SIZES, tie_word_embeddings=True)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"])
    base = save_base(model, tmp_path / "base", torch.bfloat16)
    plan = plan_of(base, save_adapter(model, config, tmp_path / "adapter"))
    assert plan.untied
    good = write(plan, tmp_path / "good")
    assert check(plan, good).exact
    edit_json(good / "config.json", tie_word_embeddings=True)
    assert [finding.kind for finding in check(plan, good).findings] == ["tied-head"]
    changed = replace(plan, config_changes={**plan.config_changes, ("vocab_size",): 97})
    assert [finding.kind for finding in check(changed, good).findings] == ["tied-head", "config"]


# Clean merges


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.one = nn.Conv1d(24, 32, 3)
        self.two = nn.Conv2d(8, 16, 3)
        self.three = nn.Conv3d(4, 8, 2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(32, 12)


def _conv_net() -> nn.Module:
    torch.manual_seed(7)
    return ConvNet()


def _auto(kind: str, model_type: str, **changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **changes)
    return getattr(transformers, kind).from_config(config)


GPT2: dict[str, Any] = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5: dict[str, Any] = {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
BERT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 48,
}


@dataclass(frozen=True)
class Clean:
    """A family, a configuration and a dtype.

    in_float32: PEFT merges in float32, because it casts parameters of an embedding or of experts to the base's dtype.
    """

    model: Callable[[], nn.Module]
    dtype: str
    targets: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    in_float32: bool = False


CLEAN: Mapping[str, Clean] = {
    "llama LoRA bf16": Clean(lambda: causal("llama", **SIZES), "bf16", LINEARS),
    "llama DoRA bf16": Clean(lambda: causal("llama", **SIZES), "bf16", LINEARS, {"use_dora": True}),
    "llama DoRA fp32": Clean(lambda: causal("llama", **SIZES), "fp32", LINEARS, {"use_dora": True}),
    "llama rsLoRA patterns fp16": Clean(
        lambda: causal("llama", **SIZES),
        "fp16",
        LINEARS,
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 9}, "alpha_pattern": {"v_proj": 3}},
    ),
    "llama DoRA head bf16": Clean(
        lambda: causal("llama", **SIZES), "bf16", ["q_proj"], {"use_dora": True, "modules_to_save": ["lm_head"]}
    ),
    "llama DoRA tokens bf16": Clean(
        lambda: causal("llama", **SIZES),
        "bf16",
        ["v_proj"],
        {"use_dora": True, "trainable_token_indices": {"embed_tokens": [3, 5]}},
    ),
    "llama DoRA embeddings fp32": Clean(
        lambda: causal("llama", **SIZES), "fp32", ["embed_tokens", "lm_head"], {"use_dora": True}
    ),
    "llama LoRA embeddings bf16": Clean(
        lambda: causal("llama", **SIZES), "bf16", ["embed_tokens", "lm_head"], in_float32=True
    ),
    "gpt2 DoRA bf16": Clean(
        lambda: causal("gpt2", **GPT2), "bf16", ["c_attn", "c_proj", "c_fc"], {"use_dora": True, "fan_in_fan_out": True}
    ),
    "gpt2 LoRA fp32": Clean(
        lambda: causal("gpt2", **GPT2), "fp32", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}
    ),
    "gpt2 DoRA fp16": Clean(lambda: causal("gpt2", **GPT2), "fp16", ["c_attn"], {"use_dora": True}),
    "t5 DoRA fp32": Clean(
        lambda: _auto("AutoModelForSeq2SeqLM", "t5", **T5), "fp32", ["q", "v", "wi", "wo"], {"use_dora": True}
    ),
    "t5 rsLoRA bf16": Clean(
        lambda: _auto("AutoModelForSeq2SeqLM", "t5", **T5), "bf16", ["q", "k", "v", "o"], {"use_rslora": True}
    ),
    "bert DoRA bf16": Clean(
        lambda: _auto("AutoModelForMaskedLM", "bert", **BERT), "bf16", ["query", "value", "dense"], {"use_dora": True}
    ),
    "bert LoRA biases fp16": Clean(
        lambda: _auto("AutoModelForSequenceClassification", "bert", **BERT),
        "fp16",
        ["query", "key"],
        {"lora_bias": True, "task_type": "SEQ_CLS"},
    ),
    "qwen2 DoRA bf16": Clean(
        lambda: causal("qwen2", **SIZES, tie_word_embeddings=True),
        "bf16",
        LINEARS,
        {"use_dora": True, "bias": "lora_only"},
    ),
    "mistral rsLoRA fp16": Clean(lambda: causal("mistral", **SIZES), "fp16", LINEARS, {"use_rslora": True}),
    "gemma DoRA bf16": Clean(lambda: causal("gemma", **SIZES, head_dim=12), "bf16", LINEARS, {"use_dora": True}),
    "opt LoRA bf16": Clean(lambda: causal("opt", **OPT), "bf16", ["q_proj", "out_proj", "fc1"]),
    "opt DoRA fp32": Clean(lambda: causal("opt", **OPT), "fp32", ["k_proj", "v_proj", "fc2"], {"use_dora": True}),
    "gpt-neox DoRA bf16": Clean(
        lambda: causal("gpt_neox", **SIZES), "bf16", ["query_key_value", "dense_4h_to_h"], {"use_dora": True}
    ),
    "phi DoRA fp16": Clean(lambda: causal("phi", **SIZES), "fp16", ["q_proj", "dense", "fc1"], {"use_dora": True}),
    "mixtral experts bf16": Clean(
        lambda: causal("mixtral", **SIZES, num_local_experts=3, num_experts_per_tok=2),
        "bf16",
        ["q_proj"],
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        in_float32=True,
    ),
    "convolutions DoRA fp32": Clean(_conv_net, "fp32", ["one", "two", "three", "head", "embed"], {"use_dora": True}),
    "convolutions LoRA bf16": Clean(_conv_net, "bf16", ["one", "two", "three", "head"]),
    "convolutions DoRA fp16": Clean(_conv_net, "fp16", ["one", "two", "three", "head"], {"use_dora": True}),
}


@dataclass(frozen=True)
class Prepared:
    case: Clean
    model: nn.Module
    base: Path
    adapter: Path
    plan: MergePlan
    root: Path


@pytest.fixture(scope="module", params=CLEAN.keys())
def clean(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    case = CLEAN[request.param]
    root = tmp_path_factory.mktemp("clean")
    model = case.model()
    config = LoraConfig(r=5, lora_alpha=15, target_modules=case.targets, **case.options)
    base = save_base(model, root / "base", DTYPES[case.dtype])
    adapter = save_adapter(load_base(base, model, torch.float32), config, root / "adapter")
    return Prepared(case, model, base, adapter, plan_of(base, adapter), root)


def write(plan: MergePlan, folder: Path) -> Path:
    folder.mkdir()
    write_model(plan, folder, metadata={})
    return folder


def _adapted(report: TensorReport) -> int:
    return sum(result.action in ("DoRA", "LoRA") for result in report.results)


def test_a_clean_merge_by_peft_is_no_alarm(clean: Prepared) -> None:
    """PEFT as its users run it: the base in its own dtype, the adapter in float32 (its default)."""
    dtype = DTYPES[clean.case.dtype]
    base = load_base(clean.base, clean.model, torch.float32 if clean.case.in_float32 else dtype)
    merged = peft_merge(base, clean.adapter, clean.root / "peft", dtype)
    report = check(clean.plan, merged)
    assert report.passed, [finding.message for finding in report.findings]
    assert config_difference(clean.plan, open_checkpoint(merged)) is None
    assert _adapted(report) >= 2
    assert report.counts.keys() <= {"exact", "float32 arithmetic", "tied", "buffer"}
    unmerged = check(clean.plan, clean.base)
    assert unmerged.findings[0].kind in ("unmerged-base", "left-out", "tied-head")
    assert sum(result.failed for result in unmerged.results if result.action in ("DoRA", "LoRA")) == _adapted(report)


def test_our_merge_is_exact(clean: Prepared) -> None:
    report = check(clean.plan, write(clean.plan, clean.root / "ours"))
    assert report.exact, [finding.message for finding in report.findings]
    assert report.differing == 0
    assert report.largest_error <= 0.5 + 1e-6
    checked = [result.norms for result in report.results if result.action == "DoRA"]
    assert all(norms is not None and norms.outputs and not norms.wrong for norms in checked)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_may_be_stored_in_another_dtype_than_the_base(tmp_path: Path, stored: str, dtype: str) -> None:
    """A base in one dtype, merged by PEFT in float64 and saved in another: rounded once, adapted or not."""
    world = llama(tmp_path, "world", DTYPES[stored], use_dora=True)
    out = peft_merge(world.model.double(), world.adapter, tmp_path / "out", DTYPES[dtype])
    report = check(plan_of(world.base, world.adapter), out)
    assert report.passed, [finding.message for finding in report.findings]
    # torch's own cast from float64 goes through float32: a tie in ten thousand elements or so.
    assert report.differing <= report.elements / 1000
    ours = write(plan_of(world.base, world.adapter, dtype=DTYPES[dtype]), tmp_path / "ours")
    assert check(plan_of(world.base, world.adapter), ours).exact


# Sharpness


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_spacing_in_one_element_is_noticed(tmp_path: Path, dtype: str) -> None:
    """In a 16-bit dtype float32 arithmetic explains no whole spacing, wherever it is."""
    world = llama(tmp_path, "world", DTYPES[dtype], use_dora=True)
    plan = plan_of(world.base, world.adapter)
    generator = torch.Generator().manual_seed(1)
    names = sorted(plan.tensors)
    for number in range(12):
        name = names[int(torch.randint(len(names), (1,), generator=generator))]

        def move(tensors: dict[str, Tensor], name: str = name) -> None:
            flat = tensors[name].view(-1)
            at = int(torch.randint(len(flat), (1,), generator=generator))
            flat[at] = torch.nextafter(flat[at], torch.tensor(torch.inf, dtype=flat.dtype))

        out = tmp_path / str(number)
        write_like(world.merged, out, move)
        report = check(plan, out)
        assert [(result.name, result.outside) for result in report.results if result.failed] == [(name, 1)]
        assert [finding.kind for finding in report.findings] == ["flipped"]
        assert report.ranked[0].tensor in names


def test_the_report_is_plain_values_and_progress_ends_at_its_total(tmp_path: Path) -> None:
    world = llama(tmp_path, "world", torch.bfloat16, use_dora=True)
    seen: list[Progress] = []
    merged = open_checkpoint(world.merged)
    report = check_tensors(plan_of(world.base, world.adapter), merged, on_progress=seen.append, row_block_elements=100)
    assert report.passed
    assert seen[-1].done == seen[-1].total == merged.nbytes
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    summary = json.loads(json.dumps(report.summary(), allow_nan=False))
    assert summary["passed"] is True
    assert summary["norms_checked"] == sum(len(m) for m in _magnitudes(world.adapter))
    broken = check(plan_of(world.base, world.adapter), world.base)
    summary = json.loads(json.dumps(broken.summary(), allow_nan=False))
    assert summary["findings"][0]["kind"] == "unmerged-base"
    assert math.isclose(sum(share.share for share in broken.ranked), 1)


def _magnitudes(adapter: Path) -> list[Tensor]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [tensor for name, tensor in tensors.items() if "magnitude" in name]


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from dora_serve.checkpoint import open_checkpoint
from dora_serve.formats import read_adapter
from dora_serve.resolve import plan_merge
from dora_serve.tensor_check import check_tensors
torch.ones(64, 64, dtype=torch.float64) @ torch.ones(64, 64, dtype=torch.float64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base, adapter, merged = map(Path, sys.argv[1:])
report = check_tensors(plan_merge(open_checkpoint(base), read_adapter(adapter)), open_checkpoint(merged))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, report.passed, report.elements)
"""


def test_memory_is_some_blocks_whatever_the_tensor(tmp_path: Path) -> None:
    """Two linear layers of 64 MB each, one of them DoRA, right and wrong: far less than one of them is held."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 4096, bias=False))
    base = save_base(model, tmp_path / "base", torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], use_dora=True)
    adapter = save_adapter(model, config, tmp_path / "adapter")
    right = write(plan_of(base, adapter), tmp_path / "right")
    for folder, passed in ((right, "True"), (base, "False")):
        command = [sys.executable, "-c", MEMORY, str(base), str(adapter), str(folder)]
        kilobytes, verdict, elements = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()
        assert (verdict, int(elements)) == (passed, 2 * 4096 * 4096)
        assert int(kilobytes) < 60_000
