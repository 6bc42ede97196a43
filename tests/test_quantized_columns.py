"""GPTQ's and AWQ's bases: AutoRound's own layers and compressed-tensors' converter are the oracles, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.engine.loading import load_base
from dora_serve.errors import CheckpointError, UnavailableError
from dora_serve.quantized.decode import open_values
from dora_serve.quantized.view import dense_view
from dora_serve.reference_decode import decoded_range
from dora_serve.safetensors_file import TensorEntry
from exporters.cli import main
from tests.auto_round_layers import quantized, values
from tests.cases import LINEARS, adapt, ask_here, build, llama, load, read_tensors, rewrite_tensors, save
from tests.quantized_bases import write_quantized
from tests.test_quantized_merge import SIZE

Change = Callable[[dict[str, Tensor]], Any]

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that lies in each four bits of a word, from the lowest on (AutoAWQ's order_map)."""


@dataclass(frozen=True)
class Gptq:
    bits: int = 4
    group: int = 16
    symmetric: bool = True
    less_one: bool = True
    shuffled: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": self.shuffled,
            "checkpoint_format": "gptq" if self.less_one else "gptq_v2",
        }

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What is stored of a weight, and what it stands for."""
        parts, layer = quantized(
            weight, self.bits, self.group, symmetric=self.symmetric, less_one=self.less_one, dtype=self.dtype
        )
        if self.shuffled:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(4))
            parts["g_idx"] = layer.g_idx = layer.g_idx[order]
        return parts, values(layer)


@dataclass(frozen=True)
class Awq:
    group: int = 32
    dtype: torch.dtype = torch.float16

    @property
    def settings(self) -> dict[str, Any]:
        return {"quant_method": "awq", "bits": 4, "group_size": self.group, "zero_point": True, "version": "gemm"}

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Packed by hand, in the order of AutoAWQ's kernel; decoded by the library's converter and decompression."""
        group = weight.shape[1] if self.group == -1 else self.group
        groups = weight.float().unflatten(1, (-1, group))
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scales = ((high - low) / 15).to(self.dtype)
        zeros = torch.round(-low / scales.float()).clamp(0, 15)
        codes = (torch.round(groups / scales.float()) + zeros).clamp(0, 15).flatten(1)
        parts = {
            "qweight": awq_words(codes.T),
            "qzeros": awq_words(zeros.squeeze(-1).T),
            "scales": scales.squeeze(-1).T.contiguous(),
        }
        converter = AutoAWQConverter.from_autoawq_config({**self.settings, "group_size": group})
        given = {f"layer.{name}": part.clone() for name, part in parts.items()}
        state = {name.removeprefix("layer."): part for name, part in converter.process(given).items()}
        scheme = converter.update_config(None).config_groups["config_group_0"]
        restored = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)
        return parts, restored["weight"]


def awq_words(codes: Tensor) -> Tensor:
    """(n, m) codes as (n, m / 8) words of int32."""
    placed = codes.long().unflatten(1, (-1, 8))[:, :, AWQ_PLACES]
    words = (placed << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


Kind = Gptq | Awq
KINDS: dict[str, Kind] = {
    "gptq": Gptq(),
    "gptq of rows in 8 bits, bfloat16": Gptq(8, -1, dtype=torch.bfloat16),
    "gptq with zeros": Gptq(group=32, symmetric=False),
    "gptq_v2 with zeros": Gptq(symmetric=False, less_one=False),
    "gptq_v2 with zeros in 8 bits": Gptq(8, 32, symmetric=False, less_one=False),
    "gptq_v2 with zeros in 2 bits": Gptq(2, 16, symmetric=False, less_one=False),
    "gptq_v2 with zeros in 3 bits": Gptq(3, 32, symmetric=False, less_one=False),
    "gptq in 3 bits": Gptq(3, 32),
    "gptq in an order of its own": Gptq(group=32, symmetric=False, shuffled=True, dtype=torch.float32),
    "awq": Awq(),
    "awq of rows, bfloat16": Awq(-1, torch.bfloat16),
}
MERGED = ("gptq", "gptq in an order of its own", "awq")


def write(root: Path, kind: Kind, model: Any = None, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A base whose linear layers are quantized, and the dense one of what they stand for."""
    dense = save(model or llama(**SIZE), root / "dense", dtype)
    folder = write_quantized(root, dense, kind, kind.settings)
    return folder, dense


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)
    # Stripes of less than a tensor of this size.
    monkeypatch.setattr("dora_serve.column_reader.STRIPE_BYTES", 1000)


def equals(entry: TensorEntry, wanted: Tensor) -> bool:
    """Whether both decoders give these values, in ranges that begin and end anywhere."""
    flat, width, count = wanted.flatten(), wanted.shape[-1], wanted.numel()
    read = open_values(entry)
    ranges = [(0, 7), (width - 3, 5 * width + 11), (count // 2 - 1, count // 2 + 1), (count - 5, count), (0, count)]
    return all(
        torch.equal(ours, flat[start:stop])
        for start, stop in ranges
        for ours in (read(start, stop), decoded_range(entry, start, stop))
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_codes_are_what_the_library_makes_of_them(tmp_path: Path, kind: str) -> None:
    folder, dense = write(tmp_path, KINDS[kind])
    view = dense_view(open_checkpoint(folder))
    wanted = load_file(dense / "model.safetensors")
    assert view.tensors.keys() == wanted.keys()
    coded = [name for name, entry in view.tensors.items() if entry.coding is not None]
    assert len(coded) == 14
    for name in coded:
        entry = view.tensors[name]
        assert (entry.shape, entry.dtype) == (wanted[name].shape, KINDS[kind].dtype)
        assert equals(entry, wanted[name]), name


@pytest.mark.parametrize("kind", MERGED)
def test_merged_as_into_the_dense_base_of_the_same_weights(tmp_path: Path, kind: str) -> None:
    folder, dense = write(tmp_path, KINDS[kind])
    (folder / "quantize_config.json").write_text("{}")
    adapt(llama(**SIZE), tmp_path / "adapter", target_modules=list(LINEARS), use_dora=True)
    for base in (folder, dense):
        out = tmp_path / f"{base.name}-merged"
        words = ["merge", tmp_path / "adapter", "--base", base, "-o", out, "--dtype", "bfloat16"]
        assert main([str(word) for word in words]) == 0
    ours, theirs = (read_tensors(tmp_path / f"{name}-merged") for name in ("quantized", "dense"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "quantized-merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "quantized-merged" / "quantize_config.json").exists()
    record = json.loads((tmp_path / "quantized-merged" / "dora_export.json").read_text())
    assert record["verification"]["passed"]
    assert record["verification"]["forward"]["ran"]


def test_a_head_in_codes_and_biases_and_conv1d_layers(tmp_path: Path) -> None:
    """A quantized lm_head of a Qwen2; and GPT-2, whose weights are turned before they are quantized."""
    model = build("AutoModelForCausalLM", "qwen2", **{**SIZE, "vocab_size": 64, "tie_word_embeddings": False})
    kind = Gptq()
    folder, dense = write(tmp_path, kind, model)
    stored, wanted = kind(load_file(dense / "model.safetensors")["lm_head.weight"])

    def head(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors.update({f"lm_head.{part}": tensor for part, tensor in stored.items()})

    rewrite_tensors(folder / "model.safetensors", head)
    saving = {"save_embedding_layers": False}  # PEFT would save the dense head with the adapter, which replaces it
    adapt(model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"], saving=saving)
    out = tmp_path / "merged"
    words = ["merge", str(tmp_path / "adapter"), "--base", str(folder), "-o", str(out), "--no-verify"]
    assert main(words) == 0
    merged, before = read_tensors(out), load_file(dense / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(merged[f"{name}.weight"], before[f"{name}.weight"].bfloat16())
    assert torch.equal(merged[f"{name}.bias"], before[f"{name}.bias"])
    factors = {name: value.double() for name, value in read_tensors(tmp_path / "adapter").items()}
    delta = 1.5 * factors["base_model.model.lm_head.lora_B.weight"] @ factors["base_model.model.lm_head.lora_A.weight"]
    torch.testing.assert_close(merged["lm_head.weight"].double(), wanted.double() + delta, rtol=2.0**-8, atol=0)
    assert load(out, model) is not None

    config = {"model_type": "gpt2", "quantization_config": kind.settings}
    stored, wanted = kind(torch.randn(96, 32, generator=torch.Generator().manual_seed(1)))
    base = store(tmp_path / "gpt2", {f"h.0.attn.c_attn.{part}": tensor for part, tensor in stored.items()}, **config)
    assert equals(dense_view(base).tensors["h.0.attn.c_attn.weight"], wanted.T)


def store(folder: Path, tensors: dict[str, Tensor], **config: Any) -> ShardedCheckpoint:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


NAME = "layers.3.up_proj"
WEIGHT = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))


def layer(
    folder: Path, kind: Kind, change: Callable[[dict[str, Tensor]], Any] | None = None, **said: Any
) -> TensorEntry:
    """One quantized layer as it is read, after a change of its parts and of what config.json says of it."""
    parts, _ = kind(WEIGHT)
    if change is not None:
        change(parts)
    settings = {key: value for key, value in {**kind.settings, **said}.items() if value is not None}
    tensors = {part if "." in part else f"{NAME}.{part}": tensor for part, tensor in parts.items()}
    return dense_view(store(folder, tensors, quantization_config=settings)).tensors[f"{NAME}.weight"]


def dynamic(bits: int, rule: str = r"+:.*\.3\.up_proj") -> dict[str, Any]:
    return {"-:.*down": {}, rule: {"bits": bits, "group_size": 32}, ".*": {"bits": 2}}


def test_a_dynamic_rule_holds_for_the_layers_that_it_matches(tmp_path: Path) -> None:
    kind = Gptq(8, 32)
    entry = layer(tmp_path / "a", kind, bits=4, group_size=16, dynamic=dynamic(8))
    assert equals(entry, kind(WEIGHT)[1])
    with pytest.raises(CheckpointError, match="groups of 32"):
        layer(tmp_path / "b", kind, bits=8, group_size=16, dynamic=dynamic(4))
    with pytest.raises(CheckpointError, match="or the other"):
        layer(tmp_path / "c", kind, dynamic={r"-:layers\.3": {}})
    with pytest.raises(CheckpointError, match="regular expression"):
        layer(tmp_path / "d", kind, dynamic={"+:(": {"bits": 8}})
    with pytest.raises(CheckpointError, match="pack_dtype"):
        layer(tmp_path / "e", kind, dynamic={".*": {"pack_dtype": "int16"}})


def test_auto_round_says_the_same_in_words_of_its_own(tmp_path: Path) -> None:
    """Which of GPTQ's formats or AWQ a checkpoint of its own lies in, and what holds for a layer (its backend.py)."""

    def read(name: str, kind: Kind, **said: Any) -> bool:
        words: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}
        entry = layer(tmp_path / name, kind, **{**dict.fromkeys(kind.settings), **words, **said})
        return equals(entry, kind(WEIGHT)[1])

    assert read("v1", Gptq(group=32))
    assert read("v1 asymmetric", ZEROS, packing_format="auto_round:auto_gptq", sym=False)
    assert read("v2", Gptq(group=32, symmetric=False, less_one=False), packing_format="auto_round", sym=False)
    assert read("awq", Awq(), packing_format="auto_round:auto_awq", sym=False)
    eight, others = {"bits": 8, "group_size": 16}, {"lm_head": {"bits": 16}, "layers.4.up_proj": {"bits": 16}}
    assert read("a name", Gptq(8), extra_config={r".*up_proj.*": {"bits": 2}, NAME: eight, **others})
    assert read("an expression", Gptq(8), extra_config={**others, r"3\.up_": eight})
    for said, message in (
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format"),
        ({"data_type": "mx_fp"}, "mx_fp"),
        ({"act_bits": 8}, "activations are rounded"),
        ({"rotation_config": {"x": 1}}, "rotated"),
        ({"extra_config": {"up_proj": {"bits": 16}}}, "or the other"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(message, Gptq(group=32), **said)


def test_a_conversion_compares_the_logits_on_what_the_codes_stand_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, dense = write(tmp_path, KINDS["gptq"])
    adapt(llama(**SIZE), tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    said = []
    for base in (folder, dense):
        out = tmp_path / f"{base.name}-lora"
        words = ["convert", tmp_path / "adapter", "--base", base, "--to", "lora", "--rank", "4", "-o", out, "--json"]
        assert main([str(word) for word in words]) == 0
        said.append(capsys.readouterr().out.replace(base.name, "base"))
    assert said[0] == said[1]
    assert '"kl"' in said[0]


def test_the_engine_says_what_such_a_base_needs(tmp_path: Path) -> None:
    """transformers loads GPTQ and AWQ by libraries that are not here, and a merge needs none."""
    for name in ("gptq", "awq"):
        (tmp_path / name).mkdir()
        folder, _ = write(tmp_path / name, KINDS[name])
        with pytest.raises(UnavailableError, match=r"optimum|gptqmodel") as caught:
            load_base(folder, None, "cpu")
        assert "dora-export merge" in str(caught.value.remedy)


def test_what_is_said_in_a_file_beside_is_found(tmp_path: Path) -> None:
    """Older checkpoints of AutoGPTQ and AutoAWQ say nothing in config.json."""
    for name, kind, said in (
        ("quantize_config.json", Gptq(), Gptq().settings),
        ("quant_config.json", Awq(), {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ):
        parts, wanted = kind(WEIGHT)
        folder = tmp_path / name.removesuffix(".json")
        base = store(folder, {f"{NAME}.{part}": tensor for part, tensor in parts.items()})
        with pytest.raises(CheckpointError, match="unknown"):
            dense_view(base)
        (folder / name).write_text(json.dumps({key: value for key, value in said.items() if key != "quant_method"}))
        assert equals(dense_view(base).tensors[f"{NAME}.weight"], wanted)


def test_an_index_that_was_never_set_is_the_plain_order(tmp_path: Path) -> None:
    _, wanted = Gptq()(WEIGHT)
    for number, change in enumerate((lambda parts: parts.pop("g_idx"), lambda parts: parts["g_idx"].zero_())):
        assert equals(layer(tmp_path / str(number), Gptq(), change), wanted)
        with pytest.raises(CheckpointError, match="desc_act"):
            layer(tmp_path / f"{number} ordered", Gptq(), change, desc_act=True)


def test_headers_alone_are_enough_to_plan_with(tmp_path: Path) -> None:
    """`inspect` of a repository of the Hub fetches no values: zeros stand for them."""
    for number, kind in enumerate((Gptq(), Gptq(symmetric=False), Gptq(shuffled=True), Awq())):
        entry = layer(tmp_path / str(number), kind, lambda parts: [part.zero_() for part in parts.values()])
        assert entry.shape == WEIGHT.shape


def fill(part: str, value: int) -> Change:
    return lambda parts: parts[part].view(-1).__setitem__(0, value)


def drop(part: str) -> Change:
    return lambda parts: parts.pop(part)


def put(part: str, value: Tensor) -> Change:
    return lambda parts: parts.__setitem__(part, value)


ZEROS = Gptq(symmetric=False, group=32)
FAULTS: dict[str, tuple[Kind, Change | None, dict[str, Any], str]] = {
    "no scales": (Gptq(), drop("scales"), {}, "no scales"),
    "no zeros": (Gptq(), drop("qzeros"), {}, "no qzeros"),
    "no codes": (
        Gptq(),
        lambda parts: parts.__setitem__("other.qzeros", parts["qzeros"].clone()),
        {},
        "without its qweight",
    ),
    "two weights": (Gptq(), put("weight", WEIGHT), {}, "a qweight and a weight"),
    "other words": (Gptq(), lambda parts: put("qweight", parts["qweight"].long())(parts), {}, "words of int32"),
    "other groups": (Gptq(), None, {"group_size": 32}, r"wanted \[3, 64\] floats for groups of 32"),
    "no group size": (Gptq(), None, {"group_size": None}, "group_size None"),
    "other bits": (Gptq(), None, {"bits": 8}, "8 of which hold 32"),
    "5 bits": (Gptq(), None, {"bits": 5}, "bits 5 in config.json"),
    "marlin": (Gptq(), None, {"checkpoint_format": "marlin"}, "one kernel .marlin."),
    "marlin, as it was said": (Gptq(), None, {"is_marlin_format": True}, "one kernel"),
    "words of 16 bits": (Gptq(), None, {"pack_dtype": "int16"}, "int16"),
    "EoRA": (Gptq(), None, {"adapter": {"path": "x"}}, "EoRA"),
    "zeros of symmetric codes": (Gptq(), fill("qzeros", 0), {}, "symmetric codes"),
    "asymmetric codes said to be symmetric": (ZEROS, None, {"sym": True}, "symmetric codes"),
    "the other format": (Gptq(), None, {"checkpoint_format": "gptq_v2"}, "symmetric codes"),
    "a zero point that kernels differ in": (ZEROS, fill("qzeros", -1), {}, "for 0 or for 16"),
    "3 bits": (
        Gptq(3, 32, symmetric=False, less_one=False),
        None,
        {"checkpoint_format": "gptq"},
        "AutoGPTQ and GPTQModel differ",
    ),
    "an order that is denied": (Gptq(shuffled=True), None, {"desc_act": False}, "kernels follow either"),
    "an order beyond the groups": (Gptq(shuffled=True), fill("g_idx", 6), {}, "uneven groups"),
    "an index of floats": (Gptq(), put("g_idx", torch.zeros(96)), {}, "whole numbers"),
    "awq without zeros": (Awq(), drop("qzeros"), {}, "no qzeros"),
    "awq without scales": (Awq(), drop("scales"), {}, "no scales"),
    "awq with two weights": (Awq(), put("weight", WEIGHT), {}, "a qweight and a weight"),
    "awq of other groups": (Awq(), None, {"group_size": 16}, "floats for groups of 16"),
    "awq of uneven groups": (Awq(), None, {"group_size": 64}, "whole groups"),
    "gemv": (Awq(), None, {"version": "gemv"}, "another kernel .gemv"),
    "llm-awq": (Awq(), None, {"backend": "llm-awq"}, "another kernel"),
    "awq of 8 bits": (Awq(), None, {"bits": 8}, "8 bits"),
    "awq said to have no zeros": (Awq(), None, {"zero_point": False}, "zero_point"),
    "awq of activations": (Awq(), put("mlp.act.scales", torch.ones(4)), {}, "divides activations"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_unsound_codes_and_other_layouts_are_refused(tmp_path: Path, fault: str) -> None:
    kind, change, said, message = FAULTS[fault]
    layer(tmp_path / "sound", kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        layer(tmp_path / "spoiled", kind, change, **said)
    assert "--merge-into original" in str(caught.value.remedy)
