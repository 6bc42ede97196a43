"""kohya's names: LyCORIS makes and runs its own; OneTrainer and ai-toolkit are hand-written after their code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_serve.errors import AdapterError, PlanError, UnmergeableError
from dora_serve.formats import ReadOptions, read_adapter
from tests.cases import llama, logits, merge_to, noise, plan, read_tensors, save, tokens
from tests.format_oracle import check_forward, check_reference, check_weights

TOLERANCE = 3e-6
"""Logits of about 1 in float32, after some dozens of roundings."""

EPS = torch.finfo(torch.float32).eps
METHODS: list[dict[str, Any]] = [{}, *({"dora_wd": True, "wd_on_output": on_output} for on_output in (True, False))]


class Convolutions(nn.Module):
    """Kernels of 1 and 3, square and not, so that shapes tell little."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(6, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.up = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(torch.tanh(self.same(torch.tanh(self.down(x)))))
        return up


def train(model: nn.Module, file: Path, *, targets: list[str], dtype: torch.dtype | None = None, **options: Any) -> Any:
    """LyCORIS applied to a copy of `model`, moved as training would, and saved by it. Returns the copy."""
    torch.manual_seed(5)
    LycorisNetwork.apply_preset({"target_module": targets, "target_name": []})
    copied = copy.deepcopy(model)
    sizes = {"linear_dim": 4, "linear_alpha": 6, "conv_dim": 4, "conv_alpha": 2}
    network = create_lycoris(copied, 1.0, algo="lora", **sizes, **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            step = torch.randn(parameter.shape, generator=generator)
            if "dora_scale" in name:
                parameter.mul_(1 + 0.2 * step.clamp(-2, 2))
            else:
                parameter.add_(0.2 * step)
    file.parent.mkdir()
    network.save_weights(str(file), dtype, {})
    return copied.eval()


@pytest.mark.parametrize("options", METHODS)
def test_language_model(tmp_path: Path, options: dict[str, Any]) -> None:
    start = llama()
    save(start, tmp_path / "base")
    trained = train(start, tmp_path / "adapter" / "name.safetensors", targets=["LlamaDecoderLayer"], **options)
    assert read_adapter(tmp_path / "adapter").format == "kohya"
    theirs = logits(trained, tokens(start))
    check_forward(tmp_path, start, tokens(start), theirs, TOLERANCE)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("options", METHODS)
def test_convolutions(tmp_path: Path, tucker: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    start = Convolutions()
    base = save(start, tmp_path / "base")
    file = tmp_path / "adapter" / "x.safetensors"
    trained = train(start, file, targets=["Convolutions"], use_tucker=tucker, **options)
    assert any("lora_mid" in name for name in load_file(file)) == tucker
    merge_to(base, file, tmp_path / "merged")
    merged = copy.deepcopy(start)
    merged.load_state_dict(read_tensors(tmp_path / "merged"))
    x = noise(2, 6, 5, 5)
    with torch.no_grad():
        assert torch.allclose(merged(x), trained(x), rtol=0, atol=5e-6)
        assert not torch.allclose(merged(x), start(x), rtol=0, atol=1e-2)


def lycoris_formula(weight: Tensor, tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """W' in float64, from the file, as LyCORIS documents it."""
    up, down = tensors[f"{key}.lora_up.weight"].double(), tensors[f"{key}.lora_down.weight"].double()
    v = weight.double() + float(tensors[f"{key}.alpha"]) / len(down) * (up @ down)
    scale = tensors.get(f"{key}.dora_scale")
    if scale is None:
        return v
    dim = 1 if scale.shape[1] == 1 else 0
    return v * scale.double() / (v.norm(dim=dim, keepdim=True) + torch.finfo(scale.dtype).eps)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_output", [True, False])
def test_every_element_is_the_formula(tmp_path: Path, on_output: bool, saved: torch.dtype) -> None:
    """Square layers too, where no shape but that of dora_scale tells the axis; and the eps of bfloat16, which shows."""
    start = llama()
    base = save(start, tmp_path / "base", torch.bfloat16)
    file = tmp_path / "adapter" / "name.safetensors"
    train(start, file, targets=["LlamaAttention"], dtype=saved, dora_wd=True, wd_on_output=on_output)
    weights, tensors = read_tensors(base), load_file(file)
    modules = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    names = {name for name in weights if f"lycoris_{name.removesuffix('.weight').replace('.', '_')}" in modules}
    assert len(names) == len(modules) == 8
    wanted = {
        name: lycoris_formula(weights[name], tensors, f"lycoris_{name.removesuffix('.weight').replace('.', '_')}")
        for name in names
    }
    check_weights(base, file, tmp_path / "merged", wanted)
    check_reference(base, file, wanted)
    assert any("16 bits" in note for note in read_adapter(file).notes) == (saved != torch.float32)


# Hand-written files


def write(file: Path, metadata: dict[str, str] | None = None, **changes: Any) -> dict[str, Tensor]:
    """LoRA of rank 4 on a square q_proj, under kohya's names; changes: tensors by role, None for none."""
    generator = torch.Generator().manual_seed(9)
    tensors = {
        "lora_up.weight": torch.randn(16, 4, generator=generator),
        "lora_down.weight": torch.randn(4, 16, generator=generator),
        "alpha": torch.tensor(6.0),
        **changes,
    }
    file.parent.mkdir(exist_ok=True)
    key = "lora_te_model_layers_0_self_attn_q_proj"
    present = {f"{key}.{role}": tensor.contiguous() for role, tensor in tensors.items() if tensor is not None}
    save_file(present, file, metadata)
    return {role: tensor for role, tensor in tensors.items() if tensor is not None}


Q = "model.layers.0.self_attn.q_proj.weight"
MAGNITUDE = 1 + torch.rand(16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(llama(), tmp_path / "base")


def direction(base: Path, tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
    delta = tensors["lora_up.weight"].double().flatten(1) @ tensors["lora_down.weight"].double().flatten(1)
    return read_tensors(base)[Q].double() + scaling * delta


@pytest.mark.parametrize(
    ("alpha", "scaling"), [(torch.tensor(6.0), 1.5), (torch.tensor([2.0]), 0.5), (torch.tensor(0.0), 1.0), (None, 1.0)]
)
def test_alpha(tmp_path: Path, base: Path, alpha: Tensor | None, scaling: float) -> None:
    tensors = write(tmp_path / "adapter.safetensors", alpha=alpha)
    wanted = {Q: direction(base, tensors, scaling)}
    check_weights(base, tmp_path / "adapter.safetensors", tmp_path / "merged", wanted)
    notes = read_adapter(tmp_path / "adapter.safetensors").notes
    assert any("no alpha" in note for note in notes) == (alpha is None)


def test_a_missing_alpha_can_be_said(tmp_path: Path, base: Path) -> None:
    tensors = write(tmp_path / "adapter.safetensors", alpha=None)
    read = ReadOptions(lora_alpha=2.0)
    check_weights(base, tmp_path / "adapter.safetensors", tmp_path / "out", {Q: direction(base, tensors, 0.5)}, read)


def test_a_magnitude_of_one_dimension_is_the_outputs(tmp_path: Path, base: Path) -> None:
    """What diffusers writes for PEFT's: on a square layer nothing tells, so that the paper's meaning is taken."""
    tensors = write(tmp_path / "adapter.safetensors", dora_scale=MAGNITUDE)
    v = direction(base, tensors, 1.5)
    wanted = {Q: MAGNITUDE.double()[:, None] * v / v.norm(dim=1, keepdim=True)}
    check_weights(base, tmp_path / "adapter.safetensors", tmp_path / "merged", wanted)
    assert any("one dimension" in note for note in read_adapter(tmp_path / "adapter.safetensors").notes)


@pytest.mark.parametrize("eps", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_onetrainer(tmp_path: Path, base: Path, eps: bool, dim: int) -> None:
    metadata = {"ot_branch": "master", "ot_config": json.dumps({"lora_decompose_norm_epsilon": eps})}
    scale = MAGNITUDE.unsqueeze(dim)
    tensors = write(tmp_path / "adapter.safetensors", metadata, dora_scale=scale)
    assert read_adapter(tmp_path / "adapter.safetensors").format == "onetrainer"
    v = direction(base, tensors, 1.5)
    wanted = {Q: v * scale.double() / (v.norm(dim=dim, keepdim=True) + (EPS if eps else 0.0))}
    check_weights(base, tmp_path / "adapter.safetensors", tmp_path / "merged", wanted)


def test_onetrainer_without_its_configuration_is_asked(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    tensors = write(file, {"ot_branch": "master"}, dora_scale=MAGNITUDE[None])
    with pytest.raises(AdapterError, match="--norm-eps"):
        read_adapter(file)
    v = direction(base, tensors, 1.5)
    wanted = {Q: v * MAGNITUDE.double() / (v.norm(dim=0, keepdim=True) + 1e-3)}
    check_weights(base, file, tmp_path / "merged", wanted, ReadOptions(norm_eps=1e-3))


def test_forced_format(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    write(file, dora_scale=MAGNITUDE[None])
    assert read_adapter(file, ReadOptions(format="onetrainer", norm_eps=0.0)).modules[0].norm.eps == 0
    assert read_adapter(file).modules[0].norm.eps == EPS


def test_ai_toolkit(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    tensors = write(file, magnitude=MAGNITUDE)
    assert read_adapter(file).format == "ai-toolkit"
    v = direction(base, tensors, 1.5)
    check_weights(base, file, tmp_path / "merged", {Q: MAGNITUDE.double()[:, None] * v / v.norm(dim=1, keepdim=True)})


FAULTS: Mapping[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "LoHa": (lambda file: write(file, hada_w1_a=torch.ones(2, 2)), UnmergeableError, "LoHa"),
    "LoKr": (lambda file: write(file, lokr_w1=torch.ones(2, 2)), UnmergeableError, "LoKr"),
    "difference": (lambda file: write(file, diff=torch.ones(2, 2)), UnmergeableError, "full difference"),
    "no up": (lambda file: write(file, **{"lora_up.weight": None}), AdapterError, "wanted lora_down and lora_up"),
    "ranks": (lambda file: write(file, **{"lora_up.weight": torch.ones(16, 3)}), AdapterError, "no rank in common"),
    "alpha": (lambda file: write(file, alpha=torch.ones(2)), AdapterError, "wanted a scalar"),
    "long": (lambda file: write(file, dora_scale=torch.ones(17, 1)), AdapterError, "16 outputs"),
    "square": (lambda file: write(file, dora_scale=torch.ones(4, 4)), AdapterError, r"wanted \[out, 1"),
    "mid": (lambda file: write(file, **{"lora_mid.weight": torch.ones(4, 3, 3, 3)}), AdapterError, "do not fit"),
    "more": (lambda file: write(file, other=torch.ones(3)), AdapterError, "not understood"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, fault: str) -> None:
    plant, kind, message = FAULTS[fault]
    plant(tmp_path / "adapter.safetensors")
    with pytest.raises(kind, match=message):
        read_adapter(tmp_path / "adapter.safetensors", ReadOptions(format="kohya"))


def test_names_that_mean_nothing_here(tmp_path: Path) -> None:
    other = save(llama(num_hidden_layers=1), tmp_path / "base")
    file = tmp_path / "adapter.safetensors"
    write(file)
    tensors = {name.replace("layers_0", "layers_7"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(PlanError, match="layers_7"):
        plan(other, file)


def apply_method(model: nn.Module, file: Path, algo: str) -> LycorisNetwork:
    """Another method of LyCORIS on every linear layer, moved and saved by it."""
    torch.manual_seed(5)
    LycorisNetwork.apply_preset({"target_module": ["LlamaDecoderLayer"], "target_name": []})
    network = create_lycoris(model, 1.0, algo=algo, linear_dim=4, linear_alpha=2)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_weights(str(file), None, {})
    return network


@pytest.mark.parametrize(
    ("algo", "name"),
    [
        ("loha", "LoHa"),
        ("lokr", "LoKr"),
        ("full", "a full difference"),
        ("diag-oft", "OFT"),
        ("glora", "GLoRA"),
        ("ia3", r"\(IA\)\^3"),
    ],
)
def test_other_methods_of_lycoris_are_refused_by_name(tmp_path: Path, algo: str, name: str) -> None:
    apply_method(llama(), tmp_path / "x.safetensors", algo)
    with pytest.raises(UnmergeableError, match=f"The adapter holds {name}"):
        read_adapter(tmp_path / "x.safetensors")


def test_dylora_does_not_say_its_scale(tmp_path: Path) -> None:
    """At its full rank it is scaled by alpha over the blocks of four, here one; every reader takes alpha / rank."""
    start = llama()
    base = save(start, tmp_path / "base")
    file = tmp_path / "x.safetensors"
    network = apply_method(copy.deepcopy(start), file, "dylora")
    with pytest.raises(UnmergeableError, match="DyLoRA"):
        read_adapter(file)
    tensors = load_file(file)
    save_file(
        {name: tensor.float() * 4 if name.endswith("alpha") else tensor for name, tensor in tensors.items()}, file
    )
    merge_to(base, file, tmp_path / "merged")  # as the error says to
    with torch.no_grad():
        theirs = {lora.lora_name: lora.get_merged_weight(rank=0)[0] for lora in network.loras}
    own, merged = read_tensors(base), read_tensors(tmp_path / "merged")
    changed = [name for name in own if not torch.equal(own[name], merged[name])]
    assert len(changed) == len(theirs) == 14
    for name in changed:
        wanted = theirs[f"lycoris_{name.removesuffix('.weight').replace('.', '_')}"]
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=4 * EPS)
