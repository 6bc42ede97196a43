"""Bases that compressed-tensors wrote, as vLLM runs them: its own decompression is the oracle, to the bit."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import CheckpointError
from dora_serve.quantized.decode import open_values
from dora_serve.quantized.view import dense_view
from dora_serve.reference_decode import decoded_range
from exporters.cli import main
from tests.cases import LINEARS, adapt, ask_here, llama, read_tensors, rewrite_json, rewrite_tensors, save
from tests.quantized_bases import put_part, write_quantized
from tests.test_quantized_merge import SIZE

INPUTS = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)
FLOAT_INPUTS = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
KINDS: dict[str, tuple[str, dict[str, Any], QuantizationArgs | None]] = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, None),
    "int4 groups, zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        None,
    ),
    "int8 rows": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "int2 rows, zeros": ("pack-quantized", {"num_bits": 2, "strategy": "channel", "symmetric": False}, None),
    "int8 beside int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, INPUTS),
    "float8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, FLOAT_INPUTS),
    "float8 whole": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, None),
    "float8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 32]},
        None,
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        None,
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, None),
}
MERGED = ("int4 groups, zeros", "int8 beside int8", "float8 blocks", "nvfp4")


def by_scale(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """(rows of scales, columns of scales, the values of one)."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, 1, -1)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        grid = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
        return grid.flatten(2)
    return weight.unflatten(1, (-1, args.group_size or columns))


def compressed(weight: Tensor, kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """What the library stores of a weight, and what it makes of that again."""
    form, said, inputs = KINDS[kind]
    args = QuantizationArgs(**said)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs, format=form)
    values = by_scale(weight.float(), args)
    state = {"weight": weight}
    largest = 2 ** (args.num_bits - 1) - 1 if args.type == "int" else 448.0 if args.num_bits == 8 else 6.0
    if args.symmetric:
        scales = values.abs().amax(-1) / largest
    else:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        scales = (high - low) / (2**args.num_bits - 1)
        zeros = torch.round(-(2 ** (args.num_bits - 1)) - low / scales)
        state["weight_zero_point"] = zeros.clamp(-(2 ** (args.num_bits - 1)), largest).to(torch.int8)
    if form == "nvfp4-pack-quantized":
        divisor = 448.0 / scales.max()
        scales = (scales * divisor).to(torch.float8_e4m3fn).float()
        state["weight_global_scale"] = divisor.reshape(1)
    state["weight_scale"] = scales.to(dtype) if args.strategy != "tensor" else scales.to(dtype).reshape(1)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def settings(kind: str) -> dict[str, Any]:
    form, said, inputs = KINDS[kind]
    group = {
        "targets": ["Linear"],
        "weights": said,
        "input_activations": None if inputs is None else inputs.model_dump(),
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(json.dumps(group, default=str))},
        "ignore": ["lm_head"],
    }


def write(root: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A base as the library compresses it, and the same decompressed by it."""
    dense = save(llama(**SIZE), root / "dense", dtype)
    quantized = write_quantized(root, dense, lambda weight: compressed(weight, kind, dtype), settings(kind))
    return quantized, dense


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", list(KINDS))
def test_codes_are_what_the_library_makes_of_them(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    quantized, dense = write(tmp_path, kind, dtype)
    view = dense_view(open_checkpoint(quantized))
    wanted = load_file(dense / "model.safetensors")
    assert view.tensors.keys() == wanted.keys()
    decoded = 0
    for name, entry in view.tensors.items():
        if entry.coding is None:
            continue
        decoded += 1
        assert (entry.shape, entry.dtype) == (wanted[name].shape, wanted[name].dtype)
        read, count = open_values(entry), prod(entry.shape)
        for start, stop in ((0, count), (0, 7), (entry.shape[1] - 3, 5 * entry.shape[1] + 11), (count - 5, count)):
            theirs = wanted[name].flatten()[start:stop]
            assert torch.equal(read(start, stop), theirs)
            assert torch.equal(decoded_range(entry, start, stop), theirs)
    assert decoded == 14
    assert KINDS[kind][2] is None or "activations are rounded" in str(view.quantization)


@pytest.mark.parametrize("kind", MERGED)
def test_merged_as_into_the_decompressed_base(tmp_path: Path, kind: str) -> None:
    quantized, dense = write(tmp_path, kind)
    adapt(llama(**SIZE), tmp_path / "adapter", target_modules=list(LINEARS), use_dora=True)
    for base in (quantized, dense):
        words = ["merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / f"{base.name}-merged"]
        assert main([str(word) for word in words]) == 0
    ours, theirs = (read_tensors(tmp_path / f"{name}-merged") for name in ("quantized", "dense"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "quantized-merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_columns_in_an_order_of_their_own(tmp_path: Path) -> None:
    """Activation ordering, which the library wrote until 0.17: each column says its group."""
    quantized, dense = write(tmp_path, "int4 groups")
    name = "model.layers.0.mlp.down_proj"
    width = load_file(dense / "model.safetensors")[f"{name}.weight"].shape[1]
    order = torch.arange(width)[torch.randperm(width, generator=torch.Generator().manual_seed(1))] // 16
    before = dense_view(open_checkpoint(quantized)).tensors[f"{name}.weight"]
    codes = open_values(before)(0, prod(before.shape)).view(before.shape).unflatten(1, (-1, 16))
    stored = load_file(quantized / "model.safetensors")
    scales = stored[f"{name}.weight_scale"].float()
    integers = torch.round(codes.float() / scales.unsqueeze(-1)).flatten(1)
    wanted = (integers * scales[:, order]).to(torch.bfloat16)
    rewrite_tensors(quantized / "model.safetensors", lambda all_: all_.update({f"{name}.weight_g_idx": order.int()}))
    entry = dense_view(open_checkpoint(quantized)).tensors[f"{name}.weight"]
    assert torch.equal(open_values(entry)(0, wanted.numel()), wanted.flatten())
    assert torch.equal(decoded_range(entry, 0, wanted.numel()), wanted.flatten())
    unset = torch.full_like(order, -1).int()
    rewrite_tensors(quantized / "model.safetensors", lambda all_: all_.update({f"{name}.weight_g_idx": unset}))
    entry = dense_view(open_checkpoint(quantized)).tensors[f"{name}.weight"]
    assert torch.equal(open_values(entry)(0, wanted.numel()), codes.flatten())


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", None, "no weight_scale"),
        ("weight_zero_point", None, "no weight_zero_point"),
        ("weight_shape", None, "no weight_shape"),
        ("weight_shape", torch.tensor([64, 65]), "wanted"),
        ("weight_scale", torch.ones(7, 3), "a grid that fits it"),
        ("weight_zero_point", torch.ones(3, 3, dtype=torch.int32), "one for each scale"),
        ("weight_g_idx", torch.zeros(64, dtype=torch.int32), "uneven groups"),
        ("weight_global_scale", torch.ones(1), "scaled twice"),
    ],
)
def test_unsound_codes_are_refused(tmp_path: Path, part: str, value: Tensor | None, message: str) -> None:
    quantized, _ = write(tmp_path, "int4 groups, zeros")
    put_part(quantized, f"{Q}.{part}", value)
    with pytest.raises(CheckpointError, match=message):
        dense_view(open_checkpoint(quantized))


@pytest.mark.parametrize(
    ("kind", "part", "value", "message"),
    [
        ("nvfp4", "weight_scale", None, "no weight_scale"),
        ("nvfp4", "weight_global_scale", None, "no weight_global_scale, wanted one"),
        ("mxfp4", "weight_global_scale", torch.ones(1), "a weight_global_scale, wanted none"),
        ("nvfp4", "weight_global_scale", torch.ones(2), r"weight_global_scale \[2\]"),
        ("nvfp4", "weight_scale", torch.ones(64, 4), "scales of torch.float32"),
        ("mxfp4", "weight_scale", torch.ones(64, 3, dtype=torch.uint8), r"wanted \[64, 2\] for MXFP4"),
        ("mxfp4", "weight_packed", torch.ones(64, 24, dtype=torch.uint8), "whole groups of 32"),
        ("mxfp4", "weight_zero_point", torch.ones(64, 2), "float4 with zero points"),
        ("mxfp4", "weight_scale", torch.ones(64, 4).to(torch.float8_e4m3fn), "weight_global_scale"),
    ],
)
def test_unsound_float4_is_refused(tmp_path: Path, kind: str, part: str, value: Tensor | None, message: str) -> None:
    quantized, _ = write(tmp_path, kind)
    put_part(quantized, f"{Q}.{part}", value)
    with pytest.raises(CheckpointError, match=message):
        dense_view(open_checkpoint(quantized))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"group_size": 64}, "64 in config.json"), ({"type": "int"}, "no float4"), ({"symmetric": False}, "zero points")],
)
def test_float4_that_config_json_contradicts_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    quantized, _ = write(tmp_path, "mxfp4")
    said = settings("mxfp4")
    said["config_groups"]["group_0"]["weights"] = {**KINDS["mxfp4"][1], **changes}
    rewrite_json(quantized / "config.json", quantization_config=said)
    with pytest.raises(CheckpointError, match=message):
        dense_view(open_checkpoint(quantized))


def test_zero_points_of_codes_that_are_said_to_be_symmetric(tmp_path: Path) -> None:
    """Early versions wrote them, all zero. The library subtracts them where it decompresses, and drops others."""
    quantized, dense = write(tmp_path, "int4 groups")
    wanted = load_file(dense / "model.safetensors")[f"{Q}.weight"].flatten()
    zeros = torch.zeros_like(load_file(quantized / "model.safetensors")[f"{Q}.weight_scale"], dtype=torch.int8)
    for value in (zeros, zeros.to(torch.float8_e4m3fn)):
        rewrite_tensors(
            quantized / "model.safetensors",
            lambda tensors, value=value: tensors.update({f"{Q}.weight_zero_point": value}),
        )
        entry = dense_view(open_checkpoint(quantized)).tensors[f"{Q}.weight"]
        assert torch.equal(open_values(entry)(0, wanted.numel()), wanted)
        assert f"{Q}.weight_zero_point" not in dense_view(open_checkpoint(quantized)).tensors
    zeros[3, 1] = 1
    rewrite_tensors(quantized / "model.safetensors", lambda tensors: tensors.update({f"{Q}.weight_zero_point": zeros}))
    with pytest.raises(CheckpointError, match=f"{Q} .* not zero, and symmetric codes"):
        dense_view(open_checkpoint(quantized))


@pytest.mark.parametrize(
    ("first", "second", "sound"),
    [
        ("Linear", "re:.*q_proj$", False),
        ("re:.*self_attn.*", Q, False),
        (Q, "re:.*q_proj$", True),
        ("re:.*q_proj$", "Linear", True),
        ("re:(", "Linear", False),
    ],
)
def test_the_group_of_a_layer_says_whether_it_has_zero_points(
    tmp_path: Path, first: str, second: str, sound: bool
) -> None:
    """The first group is symmetric, the second is not; the closest target decides, as in the library."""
    quantized, _ = write(tmp_path, "int4 groups")
    said = settings("int4 groups")
    group = said["config_groups"]["group_0"]
    other = {**group, "targets": [second], "weights": {**group["weights"], "symmetric": False}}
    said["config_groups"] = {"group_0": {**group, "targets": [first]}, "group_1": other}
    keep = {f"{Q}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}

    def only(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.split(".")[-2] in LINEARS and name not in keep]:
            del tensors[name]

    rewrite_tensors(quantized / "model.safetensors", only)
    rewrite_json(quantized / "config.json", quantization_config=said)
    if sound:
        assert dense_view(open_checkpoint(quantized)).tensors[f"{Q}.weight"].coding is not None
    else:
        with pytest.raises(CheckpointError, match="no weight_zero_point"):
            dense_view(open_checkpoint(quantized))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"transform_config": {"config_groups": {"R3": {}}}}, "rotated as it runs"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}}, "num_bits"),
        ({"config_groups": {}}, "num_bits"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    quantized, _ = write(tmp_path, "int4 groups")
    rewrite_json(quantized / "config.json", quantization_config={**settings("int4 groups"), **changes})
    with pytest.raises(CheckpointError, match=message):
        dense_view(open_checkpoint(quantized))


def test_an_awq_checkpoint_by_way_of_the_librarys_converter(tmp_path: Path) -> None:
    """It is what is read directly; the codes are packed by hand, in the order of AutoAWQ's kernel."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (64, 16), generator=generator)
    zeros = torch.randint(0, 16, (2, 16), generator=generator)
    scales = torch.rand(2, 16, generator=generator).half()

    def packed(values: Tensor) -> Tensor:
        nibbles = values.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return (nibbles << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)

    tensors = {f"{Q}.qweight": packed(codes), f"{Q}.qzeros": packed(zeros), f"{Q}.scales": scales}
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    save_file(tensors, tmp_path / "model.safetensors")
    direct = dense_view(open_checkpoint(tmp_path)).tensors[f"{Q}.weight"]
    read = open_values(direct)(0, 64 * 16)
    converter = AutoAWQConverter.from_autoawq_config(said)
    save_file(converter.process(dict(tensors)), tmp_path / "model.safetensors")
    converted = converter.update_config(None)
    assert converted is not None
    rewrite_json(tmp_path / "config.json", quantization_config=json.loads(json.dumps(converted.to_dict(), default=str)))
    entry = dense_view(open_checkpoint(tmp_path)).tensors[f"{Q}.weight"]
    group = torch.arange(64) // 32
    wanted = ((codes - zeros[group]).half() * scales[group]).T
    assert torch.equal(open_values(entry)(0, 64 * 16).view(16, 64), wanted)
    assert torch.equal(read.view(16, 64), wanted)
    assert torch.equal(decoded_range(entry, 0, 64 * 16).view(16, 64), wanted)
