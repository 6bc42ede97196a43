"""The unmerged forward against PEFT's own: equal to it, different from the base, and gone without a trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_serve.adapter import Adapter, LazyTensor
from dora_serve.errors import PlanError
from dora_serve.formats import read_adapter
from dora_serve.reference import attach_adapter, row_norms
from tests.tiny_models import SIZES, adapt, build, logits, pixels, quiet, token_pairs, tokens, vary

# Both sides compute in float64, in another order of operations.
EXACT = 1e-12


class _Convolutions(nn.Module):
    """One convolution of each kind, with strides, padding and no bias somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 6, 4, stride=2, padding=1)
        self.plane = nn.Conv2d(6, 5, (3, 1), bias=False)
        self.space = nn.Conv3d(5, 4, (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.space(self.plane(self.line(x)[..., None])[..., None])
        return result


def _gpt2(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return build("AutoModelForCausalLM", "gpt2", **sizes, bos_token_id=1, eos_token_id=2, **changes)


def _t5(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return build("AutoModelForSeq2SeqLM", "t5", **sizes, decoder_start_token_id=0, **changes)


def _bert() -> nn.Module:
    return build("AutoModelForSequenceClassification", "bert", **SIZES, num_labels=3)


def _vit() -> nn.Module:
    return build("AutoModelForImageClassification", "vit", **SIZES, image_size=16, patch_size=8, num_labels=3)


def _gemma3() -> nn.Module:
    return build("AutoModelForCausalLM", "gemma3_text", **SIZES)


def _mixtral() -> nn.Module:
    model = build("AutoModelForCausalLM", "mixtral", **SIZES, num_local_experts=4)
    model.set_experts_implementation("eager")  # type: ignore[operator] # the grouped product has no float64
    return model


def _gpt_oss() -> nn.Module:
    """Its experts are (experts, in, out), one of them square."""
    model = build("AutoModelForCausalLM", "gpt_oss", **{**SIZES, "intermediate_size": 16}, num_local_experts=4)
    model.set_experts_implementation("eager")  # type: ignore[operator]
    return model


def llama(**changes: Any) -> nn.Module:
    return build("AutoModelForCausalLM", "llama", **{**SIZES, "tie_word_embeddings": False, **changes})


def _convolutions() -> nn.Module:
    torch.manual_seed(7)
    return vary(_Convolutions())


def _signal() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(5))}


def _tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BOTH: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "llama": (llama, tokens, {"target_modules": "all-linear"}),
    "llama, all linear layers and both embeddings": (
        llama,
        tokens,
        {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
    ),
    "tied, the embedding alone": (_tied, tokens, {"target_modules": ["embed_tokens"]}),
    "tied, the head alone": (_tied, tokens, {"target_modules": ["lm_head"]}),
    "tied, a trained copy of the head": (_tied, tokens, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, both trained as one": (
        _tied,
        tokens,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied token rows": (_tied, tokens, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "token rows of both embeddings": (
        llama,
        tokens,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
    ),
    "ranks and alphas by pattern": (
        llama,
        tokens,
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 5}},
    ),
    "rank stabilised": (llama, tokens, {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "repeated layers": (llama, tokens, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}),
    "gpt2": (_gpt2, tokens, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, embeddings and head": (_gpt2, tokens, {"target_modules": ["wte", "wpe", "lm_head"]}),
    "gpt2, biases": (_gpt2, tokens, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "t5": (_t5, token_pairs, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}),
    "t5, its three embeddings": (_t5, token_pairs, {"target_modules": ["shared", "embed_tokens", "lm_head"]}),
    "bert classifier": (_bert, tokens, {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "gemma3, a scaled embedding": (_gemma3, tokens, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    "vit": (_vit, pixels, {"target_modules": ["projection", "q_proj", "fc1", "classifier"]}),
    "convolutions": (_convolutions, _signal, {"target_modules": ["line", "plane", "space"]}),
}
LORA_ONLY: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "lora_bias": (
        _gpt2,
        tokens,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True},
    ),
    "tied adapters": (_tied, tokens, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "mixtral experts": (_mixtral, tokens, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one of the experts' parameters, and the router": (
        _mixtral,
        tokens,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj", "gate.weight"]},
    ),
    "gpt-oss experts": (_gpt_oss, tokens, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


@pytest.mark.parametrize(
    ("case", "use_dora"),
    [
        *((case, use_dora) for case in BOTH for use_dora in (False, True)),
        *((case, False) for case in LORA_ONLY),
    ],
)
def test_equals_pefts_unmerged_forward(case: str, use_dora: bool, tmp_path: Path) -> None:
    make, inputs_of, config = (BOTH | LORA_ONLY)[case]
    model = make().double()
    inputs = inputs_of()
    trained = adapt(model, tmp_path, use_dora=use_dora, r=3, lora_alpha=6, **copy.deepcopy(config))
    expected, base = logits(trained, inputs), logits(model, inputs)
    before = dict(model.named_parameters())

    with attach_adapter(model, read_adapter(tmp_path)):
        result = logits(model, inputs)

    scale = float(expected.abs().max())
    assert float((result - expected).abs().max()) <= EXACT * scale
    assert float((base - expected).abs().max()) > 1e-3 * scale
    assert torch.equal(logits(model, inputs), base)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_equals_pefts_forward_in_the_deployed_dtype(dtype: torch.dtype, use_dora: bool, tmp_path: Path) -> None:
    """A single layer, whose base rounds to `dtype` and whose adapter stays in float32, by PEFT's default as by ours."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(24, 16)).to(dtype)
    trained = adapt(model, tmp_path, target_modules=["0"], use_dora=use_dora, r=3)
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        expected = trained(x)
        exact = copy.deepcopy(trained).double()(x.double())
        with attach_adapter(model, read_adapter(tmp_path)):
            result = model(x)
    assert result.dtype == expected.dtype == dtype
    # PEFT rounds the base's part with its bias, we without: at most one spacing apart, and no worse.
    assert float((result - expected).abs().max()) <= torch.finfo(dtype).eps * float(expected.abs().max())
    ours, theirs = ((value.double() - exact).square().mean().sqrt() for value in (result, expected))
    assert float(ours) <= 1.05 * float(theirs)


def test_norms_are_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, lora_a, lora_b = (torch.randn(shape, generator=generator) for shape in ((9, 7), (2, 7), (9, 2)))
    expected = torch.linalg.vector_norm(weight.double() + 0.5 * lora_b.double() @ lora_a.double(), dim=1)
    assert torch.equal(row_norms(weight, lora_a, lora_b, 0.5), expected)


def test_detaches_when_the_work_fails(tmp_path: Path) -> None:
    model = llama()
    adapt(model, tmp_path, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    base = logits(model, tokens())

    class Broken(Exception):
        pass

    with pytest.raises(Broken), attach_adapter(model, read_adapter(tmp_path)):
        raise Broken
    assert torch.equal(logits(model, tokens()), base)


def test_names_without_the_prefix_of_a_head(tmp_path: Path) -> None:
    """An adapter of the model below the head fits the model with it, and the other way round."""
    model = llama().double()
    trained = adapt(model, tmp_path / "whole", target_modules=["q_proj", "up_proj"], use_dora=True)
    expected = logits(trained, tokens())
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    (shorter / "adapter_config.json").write_text((tmp_path / "whole" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.model.", "base_model.model."): value for name, value in tensors.items()}
    save_file(renamed, shorter / "adapter_model.safetensors", metadata={"format": "pt"})

    with attach_adapter(model, read_adapter(shorter)) as attached:
        assert float((logits(model, tokens()) - expected).abs().max()) <= EXACT * float(expected.abs().max())
    assert attached.modules[0].startswith("model.layers.")
    inner: Any = model.model
    with attach_adapter(inner, read_adapter(tmp_path / "whole")) as attached:
        states = inner(**tokens()).last_hidden_state
    assert attached.modules[0].startswith("layers.")
    assert not torch.equal(states, inner(**tokens()).last_hidden_state)


def test_names_of_transformers_4(tmp_path: Path) -> None:
    model = _vit().double()
    trained = adapt(model, tmp_path, target_modules=["q_proj", "fc1"], use_dora=True)
    expected = logits(trained, pixels())
    path = tmp_path / "adapter_model.safetensors"
    former = {"vit.layers": "vit.encoder.layer", ".q_proj": ".attention.query", "mlp.fc1": "intermediate.dense"}

    def rename(name: str) -> str:
        for new, old in former.items():
            name = name.replace(new, old)
        return name

    save_file({rename(name): value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with attach_adapter(model, read_adapter(tmp_path)) as attached:
        result = logits(model, pixels())
    assert "vit.layers.0.attention.q_proj" in attached.modules
    assert float((result - expected).abs().max()) <= EXACT * float(expected.abs().max())


def test_experts_of_transformers_4(tmp_path: Path) -> None:
    """An adapter with a module an expert, on the model whose experts are fused; PEFT converts it when it loads it."""
    model = _mixtral()
    generator = torch.Generator().manual_seed(5)
    shapes = {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for leaf, (out, width) in shapes.items():
                name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(3, width, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(out, 3, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = logits(model, tokens())
    with quiet():
        trained = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)  # type: ignore[arg-type]
    expected = logits(trained, tokens())

    with attach_adapter(model, read_adapter(tmp_path)) as attached:
        result = logits(model, tokens())
    assert len(attached.modules) == 2 * 4 * 3
    # float32, and both sides hold the sum W + s B A in it.
    scale = float(expected.abs().max())
    assert float((result - expected).abs().max()) <= 64 * torch.finfo(torch.float32).eps * scale
    assert float((base - expected).abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("case", ["llama, all linear layers and both embeddings", "gpt2", "vit", "convolutions"])
def test_rounded_is_a_merge_rounded_once(case: str, tmp_path: Path) -> None:
    make, inputs_of, config = BOTH[case]
    # Stored in bfloat16, computed in float64, in which PEFT's merge rounds nothing that is seen after bfloat16.
    model = make().bfloat16().double()
    inputs = inputs_of()
    trained: Any = adapt(model, tmp_path, use_dora=True, r=3, **copy.deepcopy(config))
    unmerged = logits(trained, inputs)
    with quiet():
        merged = trained.merge_and_unload().bfloat16().double()
    expected = logits(merged, inputs)
    with attach_adapter(model, read_adapter(tmp_path), rounded_to=torch.bfloat16):
        result = logits(model, inputs)
    scale = float(expected.abs().max())
    assert float((result - expected).abs().max()) <= EXACT * scale
    assert float((result - unmerged).abs().max()) > 1e-5 * scale


def test_rounds_what_the_adapter_leaves_alone(tmp_path: Path) -> None:
    model = llama()
    adapt(model, tmp_path, target_modules=["q_proj"])
    weight = model.get_submodule("lm_head").weight
    with attach_adapter(model, read_adapter(tmp_path), rounded_to=torch.bfloat16):
        assert torch.equal(model.get_submodule("lm_head").weight, weight.bfloat16().float())
    assert model.get_submodule("lm_head").weight is weight


def test_tells_what_no_forward_reached(tmp_path: Path) -> None:
    """T5's `shared` is not called: both stacks have embeddings of their own."""
    model = _t5()
    adapt(model, tmp_path, target_modules=["shared", "q"])
    with attach_adapter(model, read_adapter(tmp_path)) as attached:
        logits(model, token_pairs())
    assert attached.uncalled == ("shared",)


def test_every_problem_at_once(tmp_path: Path) -> None:
    adapt(llama(), tmp_path, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = llama(intermediate_size=20, num_hidden_layers=1)
    base = logits(model, tokens())
    with pytest.raises(PlanError) as raised, attach_adapter(model, read_adapter(tmp_path)):
        pass
    subjects = [problem.subject for problem in raised.value.problems]
    assert subjects == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert "model.layers.0.self_attn.q_proj" in str(raised.value)
    assert torch.equal(logits(model, tokens()), base)


def _read(folder: Path, **config: Any) -> Adapter:
    adapt(llama(), folder, **config)
    return read_adapter(folder)


def test_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    attention = nn.Sequential(nn.MultiheadAttention(16, 2))
    grouped = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    plain = nn.Sequential(nn.Conv1d(2, 4, 3))
    adapt(plain, tmp_path / "plain", target_modules=["0"])
    rows = _read(tmp_path / "rows", target_modules=["q_proj"], trainable_token_indices=[3])
    beyond = replace(rows, token_rows=(replace(rows.token_rows[0], indices=(40,)),))
    saved = _read(tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    wider = replace(saved, replacements=(replace(saved.replacements[0], tensor=LazyTensor.of(torch.zeros(40, 17))),))
    twice = replace(rows, modules=(*rows.modules, rows.modules[0]))
    for model, adapter, words in (
        (attention, read_adapter(tmp_path / "plain"), "nn.MultiheadAttention"),
        (grouped, read_adapter(tmp_path / "plain"), "groups = 1"),
        (nn.Sequential(nn.LayerNorm(4)), read_adapter(tmp_path / "plain"), "a layer with a weight"),
        (llama(), beyond, "rows within"),
        (llama(), wider, "a trained tensor of"),
        (llama(), twice, "a module of its own"),
        (llama(num_hidden_layers=3), replace(rows, config={"layer_replication": [[0, 4]]}), "within 3 layers"),
    ):
        with pytest.raises(PlanError, match=words), attach_adapter(model, adapter):
            pass
