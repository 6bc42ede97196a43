"""The reader of PEFT's adapters: configurations, spellings and variants, with PEFT itself as the judge; and what it
refuses, with the reason."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_serve.adapter import Adapter
from dora_serve.errors import AdapterError, UnmergeableError
from dora_serve.formats import ReadOptions, read_adapter
from tests.cases import (
    LINEARS,
    Case,
    adapt,
    ask_here,
    check_merged_is_unmerged,
    llama,
    load,
    logits,
    merge_to,
    quiet,
    read_tensors,
    rewrite_json,
    rewrite_tensors,
    save,
    tokens,
    train,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases, untied, as a folder."""
    return save(llama(attention_bias=True), tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def kept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Adapters on `base` to be spoiled: copies of them are cheap."""
    model, root = load(base, type(llama())), tmp_path_factory.mktemp("kept")
    configs: dict[str, dict[str, Any]] = {
        "lora": {"target_modules": ["q_proj", "down_proj"]},
        "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]},
        "bias": {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"},
        "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    }
    for name, config in configs.items():
        adapt(model, root / name, **config)
    return {name: root / name for name in configs}


# What a configuration means


def settings(name: str, model: Callable[[], nn.Module] | None = None, **config: Any) -> Case:
    return Case(name, model or (lambda: llama(attention_bias=True, mlp_bias=True)), config)


SETTINGS = (
    settings("rank stabilised DoRA", target_modules=list(LINEARS), use_rslora=True, use_dora=True),
    settings(
        "patterns",
        target_modules=list(LINEARS),
        rank_pattern={"^model.layers.0.self_attn.q_proj": 2, "layers.1.mlp.up_proj": 3, ".*v_proj": 5},
        alpha_pattern={"q_proj": 3, "layers.0.mlp.*_proj": 9.5},
        use_dora=True,
    ),
    settings("bias of all", target_modules=["q_proj", "up_proj"], bias="all"),
    settings("bias of the adapted", target_modules=["q_proj", "up_proj"], bias="lora_only", use_dora=True),
    settings("lora_bias", target_modules=["q_proj", "up_proj"], lora_bias=True, use_rslora=True),
    settings("lora_bias over a trained bias", target_modules=["q_proj"], lora_bias=True, bias="all"),
    settings("saved norms", target_modules=["q_proj"], modules_to_save=["norm"]),
    settings("saved layer", target_modules=["q_proj"], modules_to_save=["layers.1.mlp", "lm_head"]),
    settings("rows", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [39, 3], "lm_head": [3]}),
    settings("BD-LoRA", target_modules=["q_proj", "o_proj"], use_bdlora=BdLoraConfig(["o_proj"], ["q_proj"], 2)),
    settings(
        "BD-LoRA, loose",
        target_modules=["q_proj", "o_proj", "v_proj"],
        use_bdlora=BdLoraConfig(["o_proj"], ["q_proj"], 2, match_strict=False),
    ),
    settings("VeLoRA", target_modules=["q_proj"], velora_config=VeloraConfig()),
    settings("MonteCLoRA", target_modules=["q_proj", "v_proj"], monteclora_config=MontecloraConfig()),
    settings("MiCA", target_modules=["q_proj"], init_lora_weights="mica"),
    settings("gaussian", target_modules=["q_proj"], init_lora_weights="gaussian"),
    settings("orthogonal", target_modules=["q_proj"], init_lora_weights="orthogonal"),
)


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_a_configuration_means_what_peft_makes_of_it(case: Case, tmp_path: Path) -> None:
    check_merged_is_unmerged(case, tmp_path)


PATTERNS: tuple[dict[str, Any], ...] = (
    {"layers.1.q_proj": 2},
    {"q_proj": 2},
    {"^q_proj": 2},
    {"^layers.1.q_proj": 2, "layers.1.q_proj": 3, "q_proj": 5},
    {"q_proj": 5, "^layers.1.q_proj": 2},
    {"layers.1": 2, r"layers\.(0|11)\..*_proj": 3},
    {"layers.1.": 2, "1.q_proj": 3},
    {"layersX1Xq_proj": 2, "layers.11.q.proj": 3},
    {"proj": 2, "(q|k)_proj": 3, "blocks.*": 5},
    {"sq_proj": 2, "q_proj$": 3},
    {r"layers\.\d+\.q_proj": 2, "layers.1.q_proj": 3},
)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: " ".join(pattern))
def test_patterns_match_as_in_peft(pattern: Mapping[str, int], rslora: bool, tmp_path: Path) -> None:
    """Rank and scaling of every module, over names that are each other's ends: layers.1 and layers.11, q_proj and
    sq_proj, a prefix and none. The first key that matches counts, and PEFT sorts the keys when it saves."""

    def block() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "sq_proj", "k_proj")})

    layers = nn.ModuleDict({index: block() for index in ("0", "1", "11")})
    model = nn.ModuleDict({"layers": layers, "blocks": nn.ModuleDict({"layers": nn.ModuleDict({"1": block()})})})
    ranks = dict(sorted(pattern.items()))
    alphas = {key: 3 * rank + 1 for key, rank in ranks.items()}
    targets = ["q_proj", "sq_proj", "k_proj"]
    config: dict[str, Any] = {"target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas}
    trained = adapt(model, tmp_path / "adapter", use_rslora=rslora, **config)
    wanted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in trained.named_modules()
        if hasattr(module, "scaling")
    }
    read = read_adapter(tmp_path / "adapter")
    assert {module.module: (module.rank, module.scaling) for module in read.modules} == wanted
    assert len(wanted) == 12


def test_what_the_reader_says_of_an_adapter(base: Path, kept: Mapping[str, Path]) -> None:
    read = read_adapter(kept["dora"])
    assert (read.format, read.method, read.base, read.task_type) == ("peft", "DoRA", str(base), None)
    assert {(module.module, module.kind) for module in read.modules} == {
        ("model.layers.0.self_attn.q_proj", "linear"),
        ("model.layers.1.self_attn.q_proj", "linear"),
        ("model.embed_tokens", "embedding"),
    }
    table = next(module for module in read.modules if module.kind == "embedding")
    assert table.magnitude is not None
    assert (table.lora_A.shape, table.lora_B.shape, table.magnitude.shape) == ((4, 40), (16, 4), (16,))
    roles = {change.name: change.role for change in read.replacements}
    assert roles == {"lm_head.weight": "modules_to_save", "model.embed_tokens.weight": "base_layer"}
    assert [path.name for path in read.files] == [CONFIG, WEIGHTS]


def test_a_task_and_a_revision_are_kept(base: Path, tmp_path: Path) -> None:
    adapt(load(base, type(llama())), tmp_path / "adapter", target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM)
    rewrite_json(tmp_path / "adapter" / CONFIG, revision="abc123")
    read = read_adapter(tmp_path / "adapter")
    assert (read.task_type, read.base_revision) == ("CAUSAL_LM", "abc123")


def test_a_converted_pissa_adapter_belongs_to_the_original_base(base: Path, tmp_path: Path) -> None:
    """PEFT writes [A | A0] and [B | -B0] with twice the rank; unconverted, it belongs to the residual of the base."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    start = str(tmp_path / "start")
    with quiet():
        model: Any = get_peft_model(load(base, type(llama())), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=start)
        model.save_pretrained(tmp_path / "residual")
    merge_to(base, tmp_path / "converted", tmp_path / "merged")
    got, truth = logits(load(tmp_path / "merged", type(llama())), tokens(model)), logits(model, tokens(model))
    # The residual was rounded to float32 once more, and the updates of rank 8 all but cancel: some tens of roundings.
    assert float((got - truth).abs().max()) < 64 * torch.finfo(torch.float32).eps * float(truth.abs().max())
    with pytest.raises(UnmergeableError, match="init_lora_weights is 'pissa'"):
        read_adapter(tmp_path / "residual")
    allowed = read_adapter(tmp_path / "residual", ReadOptions(ignore_config=frozenset({"init_lora_weights"})))
    assert {module.rank for module in allowed.modules} == {4}


# Spellings


def respell(folder: Path, out: Path, change: Callable[[str], str]) -> Path:
    shutil.copytree(folder, out)
    tensors = {change(name): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, out / WEIGHTS)
    return out


def named_default(name: str) -> str:
    """As a raw state dict has it: the adapter's name after every part of the adapter."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta"):
        name = name.replace(f".{part}", f".{part}.default")
    name = name.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
    return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


SPELLINGS: Mapping[str, Callable[[str], str]] = {
    "the adapter's name": named_default,
    "magnitudes as modules": lambda name: name.replace("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "distributed": lambda name: f"module.{name}",
    "FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "compiled": lambda name: name.replace("model.layers", "_orig_mod.model.layers"),
}


@pytest.mark.parametrize("adapter", ["dora", "bias", "rows"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_adapter(
    spelling: str, adapter: str, base: Path, kept: Mapping[str, Path], tmp_path: Path
) -> None:
    respelt = respell(kept[adapter], tmp_path / "adapter", SPELLINGS[spelling])
    for name, folder in (("wanted", kept[adapter]), ("got", respelt)):
        merge_to(base, folder, tmp_path / name)
    wanted, got = read_tensors(tmp_path / "wanted"), read_tensors(tmp_path / "got")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_training_state_beside_the_adapter_is_ignored_and_told(kept: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kept["dora"], tmp_path / "adapter")
    spare = {"base_model.model.model.layers.0.self_attn.q_proj.lora_velora_projection": torch.ones(3)}
    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, lambda held: held.update(spare))
    read = read_adapter(tmp_path / "adapter")
    assert any("1 tensors of training state" in note for note in read.notes)
    assert read.modules == read_adapter(kept["dora"]).modules


def test_an_embedding_that_was_saved_three_times_over(kept: Mapping[str, Path], tmp_path: Path) -> None:
    """save_embedding_layers with modules_to_save writes it plain, without its adapter's name, and as it was before."""
    shutil.copytree(kept["dora"], tmp_path / "adapter")
    head = "base_model.model.lm_head"

    def repeat(held: dict[str, Tensor]) -> None:
        held[f"{head}.modules_to_save.weight"] = held[f"{head}.weight"].clone()
        held[f"{head}.original_module.weight"] = torch.zeros(40, 16)

    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, repeat)
    assert read_adapter(tmp_path / "adapter").replacements == read_adapter(kept["dora"]).replacements


def test_a_pickle_is_read_only_when_it_is_allowed(base: Path, kept: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kept["dora"], tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    torch.save(load_file(kept["dora"] / WEIGHTS), tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle, which can run code") as caught:
        read_adapter(tmp_path / "adapter")
    assert "--allow-pickle" in str(caught.value)
    merge_to(base, tmp_path / "adapter", tmp_path / "got", read=ReadOptions(allow_pickle=True))
    merge_to(base, kept["dora"], tmp_path / "wanted")
    assert (tmp_path / "got" / "model.safetensors").read_bytes() == (
        tmp_path / "wanted" / "model.safetensors"
    ).read_bytes()


# Refusals


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "aLoRA": ({"alora_invocation_tokens": [5, 9]}, "after its invocation tokens"),
    "QALoRA": ({"use_qalora": True, "qalora_group_size": 8}, "group-quantized base"),
    "Arrow": ({"arrow_config": ArrowConfig().__dict__}, "mixture of adapters"),
    "KaSA": ({"kasa_config": KasaConfig().__dict__}, "smallest singular components"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "left of the base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "left of the base"),
    "CorDA": ({"init_lora_weights": "corda"}, "left of the base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "left of the base"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "left of the base"),
}


@pytest.mark.parametrize("variant", REFUSED)
def test_what_no_dense_weights_equal_is_refused(variant: str, kept: Mapping[str, Path], tmp_path: Path) -> None:
    changes, reason = REFUSED[variant]
    shutil.copytree(kept["lora"], tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / CONFIG, **changes)
    with pytest.raises(UnmergeableError, match=reason) as caught:
        read_adapter(tmp_path / "adapter")
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_peft_refuses_those_as_well(base: Path, tmp_path: Path) -> None:
    """Where PEFT has no merge either; the others it merges into something else than it was trained on."""
    model = load(base, type(llama()))
    adapted = adapt(
        model, tmp_path / "adapter", target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    )
    with pytest.raises(UnmergeableError):
        read_adapter(tmp_path / "adapter")
    with pytest.raises(NotImplementedError):
        adapted.merge_and_unload()


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=4))
    adapted = adapt(model, tmp_path / "adapter", target_modules=["0"])
    with pytest.raises(UnmergeableError, match="grouped convolution"):
        read_adapter(tmp_path / "adapter")
    with pytest.raises(NotImplementedError), quiet():
        adapted.merge_and_unload()


def test_xlora_is_refused_with_the_reason(kept: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kept["lora"], tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / CONFIG, peft_type="XLORA")
    with pytest.raises(UnmergeableError, match="anew for every token"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("peft_type", ["LOHA", "IA3", None])
def test_another_method_is_refused_by_name(peft_type: str | None, kept: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kept["lora"], tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / CONFIG, peft_type=peft_type)
    with pytest.raises(AdapterError, match=f"says peft_type {peft_type!r}, wanted 'LORA'"):
        read_adapter(tmp_path / "adapter")


def test_keys_that_are_not_known_are_refused_unless_the_user_knows_them(
    kept: Mapping[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(kept["lora"], tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / CONFIG, use_tomorrows_lora=True, colour="blue", enable_lora=False)
    with pytest.raises(AdapterError, match=r"colour='blue', use_tomorrows_lora=True\.") as caught:
        read_adapter(tmp_path / "adapter")
    assert "--ignore-config" in str(caught.value)
    with pytest.raises(AdapterError, match="colour"):
        read_adapter(tmp_path / "adapter", ReadOptions(ignore_config=frozenset({"use_tomorrows_lora"})))
    options = ReadOptions(ignore_config=frozenset({"use_tomorrows_lora", "colour"}))
    assert len(read_adapter(tmp_path / "adapter", options).modules) == 4


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda held: held.pop(name)


def setting(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda held: held.update({name: value})


SPOILT: Mapping[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no A": ("lora", without(f"{Q0}.lora_A.weight"), "layers.0.self_attn.q_proj: has B, lora_A is missing"),
    "no B": ("lora", without(f"{Q0}.lora_B.weight"), "layers.0.self_attn.q_proj: has A, lora_B is missing"),
    "no embedding A": (
        "dora",
        without("base_model.model.model.embed_tokens.lora_embedding_A"),
        "has embedding_B, magnitude, lora_embedding_A is missing",
    ),
    "no magnitude": ("dora", without(f"{Q0}.lora_magnitude_vector"), "use_dora and lora_magnitude_vector is missing"),
    "a magnitude without DoRA": (
        "lora",
        setting(f"{Q0}.lora_magnitude_vector", torch.ones(16)),
        "has a lora_magnitude_vector, and adapter_config.json says use_dora is false",
    ),
    "a magnitude of another size": (
        "dora",
        setting(f"{Q0}.lora_magnitude_vector", torch.ones(15)),
        r"lora_magnitude_vector \[15\], wanted 16 values",
    ),
    "a magnitude alone": (
        "dora",
        setting("base_model.model.model.norm.lora_magnitude_vector", torch.ones(16)),
        "model.norm: has magnitude, lora_A and lora_B is missing",
    ),
    "another rank": ("lora", setting(f"{Q0}.lora_A.weight", torch.ones(3, 16)), "says rank 4"),
    "one dimension": ("lora", setting(f"{Q0}.lora_A.weight", torch.ones(64)), "ZeRO-3 or FSDP"),
    "nothing in it": ("lora", setting(f"{Q0}.lora_B.weight", torch.ones(0, 4)), "ZeRO-3 or FSDP"),
    "not a number": (
        "lora",
        setting(f"{Q0}.lora_A.weight", torch.full((4, 16), math.nan)),
        "NaN or infinite.*64 of 64",
    ),
    "infinite": ("rows", setting(f"{Q0}.lora_B.weight", torch.full((16, 4), -math.inf)), "NaN or infinite"),
    "a bias that is not said": ("lora", setting(f"{Q0}.lora_B.bias", torch.ones(16)), "lora_bias = False"),
    "a bias that is said and missing": ("bias", without(f"{Q0}.lora_B.bias"), "lora_B.bias is missing"),
    "a bias of another size": ("bias", setting(f"{Q0}.lora_B.bias", torch.ones(3)), r"lora_B.bias \[3\]"),
    "part of another method": ("lora", setting(f"{Q0}.lora_E", torch.ones(4, 1)), r"not understood: .*lora_E \[4, 1\]"),
    "a kernel in B": ("lora", setting(f"{Q0}.lora_B.weight", torch.ones(16, 4, 3)), "wanted a 1x1 kernel"),
    "rows without indices": (
        "lora",
        setting("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 16)),
        "trainable_token_indices is None, wanted as many indices",
    ),
    "indices without rows": (
        "rows",
        without("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
        "the file holds no trained token rows",
    ),
    "two heads": (
        "dora",
        setting("base_model.model.lm_head.modules_to_save.other.weight", torch.ones(40, 16)),
        "holds 'lm_head.weight' twice, with different values",
    ),
    "the same twice": ("lora", setting(f"{Q0}.lora_A.default.weight", torch.ones(4, 16)), "holds A of .* twice"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_tensors_that_do_not_belong_together(fault: str, kept: Mapping[str, Path], tmp_path: Path) -> None:
    adapter, spoil, reason = SPOILT[fault]
    shutil.copytree(kept[adapter], tmp_path / "adapter")
    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, spoil)
    with pytest.raises(AdapterError, match=reason) as caught:
        read_adapter(tmp_path / "adapter")
    assert caught.value.remedy


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(kept: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kept["lora"], tmp_path / "adapter")

    def spoil(held: dict[str, Tensor]) -> None:
        held.pop(f"{Q0}.lora_A.weight")
        held.pop(f"{Q0.replace('.0.', '.1.')}.lora_B.weight")

    rewrite_tensors(tmp_path / "adapter" / WEIGHTS, spoil)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "adapter")
    problems = caught.value.facts["problems"]
    assert isinstance(problems, list)
    assert len(problems) == 2


VALUES: Mapping[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"r": 0}, "r = 0, wanted a positive whole number"),
    "rank -1": ({"r": -1}, "wanted a positive whole number"),
    "rank 1.5": ({"r": 1.5}, "wanted a positive whole number"),
    "rank true": ({"r": True}, "r = True, wanted a number"),
    "rank of a word": ({"r": "four"}, "r = 'four', wanted a number"),
    "rank of nothing": ({"r": []}, "wanted a number"),
    "alpha NaN": ({"lora_alpha": math.nan}, "lora_alpha = nan, wanted a number"),
    "alpha infinite": ({"lora_alpha": -math.inf}, "wanted a number"),
    "alpha a word": ({"lora_alpha": "16"}, "wanted a number"),
    "patterns a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern = .*, wanted an object of numbers"),
    "a pattern's value": ({"alpha_pattern": {"q_proj": "x"}}, "wanted an object of numbers"),
    "a pattern that is none": ({"rank_pattern": {"q_proj(": 2}}, "wanted regular expressions as keys"),
    "modules a number": ({"modules_to_save": 3}, "modules_to_save = 3, wanted a list of names"),
    "parameters of numbers": ({"target_parameters": [1]}, "wanted a list of names"),
    "another packing": ({"lora_B_layout": "diagonal"}, "wanted 'rank_major' or 'grouped_by_expert'"),
    "blocks a list": ({"use_bdlora": ["a"]}, "use_bdlora = .*, wanted an object"),
    "no blocks": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 0}}, "cannot be cut into nblocks"),
}


@pytest.mark.parametrize("fault", VALUES)
def test_values_that_mean_nothing(fault: str, kept: Mapping[str, Path], tmp_path: Path) -> None:
    changes, reason = VALUES[fault]
    shutil.copytree(kept["lora"], tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / CONFIG, **changes)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", None])
def test_indices_that_are_none(value: object, kept: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kept["rows"], tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / CONFIG, trainable_token_indices=[3, value])
    with pytest.raises(AdapterError, match="wanted as many indices"):
        read_adapter(tmp_path / "adapter")


def test_an_adapter_without_its_configuration(kept: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kept["lora"], tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).unlink()
    with pytest.raises(AdapterError, match="wanted the configuration that says their rank"):
        read_adapter(tmp_path / "adapter")


# Experts, as far as their file alone tells


def expert_adapter(folder: Path, **changes: Any) -> Adapter:
    """Three experts of rank 2 over a square (8, 8) parameter."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["experts.down_proj"]}
    (folder / CONFIG).write_text(json.dumps(config | changes))
    name = "base_model.model.model.layers.0.mlp.experts"
    save_file({f"{name}.lora_A.weight": torch.ones(6, 8), f"{name}.lora_B.weight": torch.ones(8, 6)}, folder / WEIGHTS)
    return read_adapter(folder)


@pytest.mark.parametrize(
    ("version", "in_first"), [("0.18.1", True), (None, True), ("0.19.1", None), ("0.21.2", None), ("1.0", None)]
)
def test_versions_read_a_square_parameter_their_own_way(version: str | None, in_first: bool, tmp_path: Path) -> None:
    read = expert_adapter(tmp_path / "adapter", peft_version=version)
    assert [expert.in_is_dim_1 for expert in read.experts] == [in_first]


def test_the_version_that_had_them_exchanged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnmergeableError, match=r"0\.19\.0"):
        expert_adapter(tmp_path / "adapter", peft_version="0.19.0")


def test_unsloths_packing_is_read_from_its_key(tmp_path: Path) -> None:
    assert not expert_adapter(tmp_path / "own").experts[0].expert_slowest
    assert expert_adapter(tmp_path / "packed", lora_B_layout="grouped_by_expert").experts[0].expert_slowest


def test_experts_do_no_dora(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="without DoRA"):
        expert_adapter(tmp_path / "adapter", use_dora=True)


def test_experts_of_a_rank_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"wanted \[experts \* 4, in\] and \[out, 4 \* experts\]"):
        expert_adapter(tmp_path / "adapter", r=4)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.0\..*(q|down)_proj"},
        {"target_modules": ["model.layers.1.self_attn.q_proj"]},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": ["blocks"]},
    ],
)
def test_weights_that_the_configuration_does_not_name_are_told(
    kept: Mapping[str, Path], tmp_path: Path, changed: dict[str, Any]
) -> None:
    """PEFT would load the others alone; it says itself which."""
    folder = Path(shutil.copytree(kept["lora"], tmp_path / "adapter"))
    rewrite_json(folder / CONFIG, **changed)
    adapter = read_adapter(folder)
    config = LoraConfig.from_pretrained(str(folder))
    unnamed = [one.module for one in adapter.modules if not check_target_module_exists(config, one.module)]
    assert len(unnamed) < len(adapter.modules) or changed.get("layers_pattern") == ["blocks"]
    said = [note for note in adapter.notes if "PEFT would leave them out" in note]
    assert len(said) == bool(unnamed)
    assert not unnamed or (said[0].startswith(f"{len(unnamed)} modules") and unnamed[0] in said[0])
