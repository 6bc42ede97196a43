"""Codes of bitsandbytes into values, to the bit what its own kernels make of them; HQQ and float8 by their formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from safetensors.torch import save_file
from torch import Tensor

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.errors import CheckpointError
from dora_serve.quantized.codings import Quantization, QuantizedOnLoad, Transposed
from dora_serve.quantized.decode import open_decoder
from dora_serve.quantized.quantize import dynamic_code
from dora_serve.quantized.view import dense_view
from dora_serve.reference_decode import decoded_range
from dora_serve.safetensors_file import TensorEntry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAME = "layer.weight"


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    """Rows of very different sizes, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows).unsqueeze(1)
    values[rows // 2] = 0
    return values.to(dtype)


def store(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> ShardedCheckpoint:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def four_bit_tensors(
    values: Tensor, quant_type: str, blocksize: int = 64, *, double: bool = False, storage: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """What Linear4bit.state_dict saves of a layer with this weight."""
    layer = Linear4bit(values.shape[1], values.shape[0], bias=False)
    layer.weight = Params4bit(
        values,
        requires_grad=False,
        quant_type=quant_type,
        blocksize=blocksize,
        compress_statistics=double,
        quant_storage=storage,
    ).to("cpu")
    return {f"layer.{name}": value for name, value in layer.state_dict().items()}


def four_bit_values(values: Tensor, quant_type: str, blocksize: int = 64, *, double: bool = False) -> Tensor:
    """By bitsandbytes' own functions."""
    codes, state = bnb.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type, compress_statistics=double)
    if values.shape[1] % blocksize == 0:
        return bnb.dequantize_4bit(codes, state)
    # Its kernel for CPUs with AVX512 reads another block's absmax where a row ends within a block (0.50.2); its
    # portable one does not, as those for GPUs.
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    return _dequantize_4bit_compute(codes.flatten(), absmax, state.code, blocksize, values.shape, values.dtype)


def decode_all(entry: TensorEntry, step: int) -> Tensor:
    """Both decoders over the whole tensor in pieces of `step`, which must agree to the bit."""
    read = open_decoder(entry)
    count = entry.shape[0] * entry.shape[1]
    pieces = [(start, min(start + step, count)) for start in range(0, count, step)]
    ours = torch.cat([read(start, stop) for start, stop in pieces])
    judge = torch.cat([decoded_range(entry, start, stop) for start, stop in pieces])
    assert ours.dtype == judge.dtype == entry.dtype
    assert torch.equal(ours, judge)
    return ours.view(entry.shape)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_weights_are_what_bitsandbytes_makes_of_them(
    tmp_path: Path, quant_type: str, dtype: torch.dtype, double: bool
) -> None:
    values = weight(300, 128, dtype)
    view = dense_view(store(tmp_path / "base", four_bit_tensors(values, quant_type, double=double)))
    entry = view.tensors[NAME]
    assert (entry.shape, entry.dtype, list(view.tensors)) == ((300, 128), dtype, [NAME])
    wanted = four_bit_values(values, quant_type, double=double)
    assert torch.equal(decode_all(entry, 128 * 7), wanted)
    assert not torch.equal(wanted, values)


@pytest.mark.parametrize("shape", [(9, 96), (5, 33), (7, 64)])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
def test_blocks_may_cross_rows_and_ranges_may_start_anywhere(
    tmp_path: Path, shape: tuple[int, int], blocksize: int
) -> None:
    values = weight(*shape)
    entry = dense_view(store(tmp_path / "base", four_bit_tensors(values, "nf4", blocksize))).tensors[NAME]
    wanted = four_bit_values(values, "nf4", blocksize)
    for step in (1000, 37):
        assert torch.equal(decode_all(entry, step), wanted)


def test_codes_may_be_stored_as_floats(tmp_path: Path) -> None:
    """FSDP wants one dtype for all: bnb_4bit_quant_storage."""
    values = weight(16, 64, torch.bfloat16)
    tensors = four_bit_tensors(values, "nf4", double=True, storage=torch.bfloat16)
    assert tensors[NAME].dtype == torch.bfloat16
    entry = dense_view(store(tmp_path / "base", tensors)).tensors[NAME]
    assert torch.equal(decode_all(entry, 500), four_bit_values(values, "nf4", double=True))


def test_int8_rows_are_what_bitsandbytes_makes_of_them(tmp_path: Path) -> None:
    layer = Linear8bitLt(48, 20, bias=False, has_fp16_weights=False)
    layer.weight.data = weight(20, 48)
    layer = layer.to("cpu")
    tensors = {f"layer.{name}": value for name, value in layer.state_dict().items()}
    assert set(tensors) == {NAME, "layer.SCB", "layer.weight_format"}
    view = dense_view(store(tmp_path / "base", tensors))
    assert list(view.tensors) == [NAME]
    wanted = bnb.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert torch.equal(decode_all(view.tensors[NAME], 37), wanted)


def on_load(tmp_path: Path, values: Tensor, quantization: Quantization) -> TensorEntry:
    stored = store(tmp_path / "dense", {NAME: values}).tensors[NAME]
    dtype = torch.float32 if quantization.kind == "int8" else quantization.dtype or stored.dtype
    return replace(stored, dtype=dtype, coding=QuantizedOnLoad(stored, quantization))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_dense_weight_is_quantized_as_bitsandbytes_does_it(tmp_path: Path, kind: Any, dtype: torch.dtype) -> None:
    values = weight(200, 192, dtype)
    entry = on_load(tmp_path, values, Quantization(kind))
    assert torch.equal(decode_all(entry, 5000), four_bit_values(values, kind))


def test_a_weight_may_be_cast_before_it_is_quantized(tmp_path: Path) -> None:
    values = weight(20, 64)
    entry = on_load(tmp_path, values, Quantization("nf4", dtype=torch.bfloat16))
    assert torch.equal(decode_all(entry, 500), four_bit_values(values.bfloat16(), "nf4"))
    assert not torch.equal(decode_all(entry, 500), four_bit_values(values, "nf4").bfloat16())


def test_the_dynamic_code_is_that_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())


def test_double_quantization_is_that_of_bitsandbytes_but_for_ties(tmp_path: Path) -> None:
    """bitsandbytes' kernel for CPUs finds the code of an absmax in a table of 2^16 steps; those of GPUs, and ours, to
    the nearest. So an absmax within a step of the middle of two codes may have the neighbour, and no other."""
    values = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    entry = on_load(tmp_path, values, Quantization("nf4", double=True))
    ours, theirs = decode_all(entry, 1 << 18), four_bit_values(values, "nf4", double=True)
    differing = (ours != theirs).view(-1, 64).any(dim=1)
    absmax = values.view(-1, 64).abs().amax(dim=1)
    outer = (absmax - absmax.mean()).view(-1, 256)
    scaled = (outer / outer.abs().amax(dim=1, keepdim=True)).flatten()
    code = dynamic_code()
    middles = (code[:-1] + code[1:]) / 2
    from_middle = (scaled.unsqueeze(1) - middles).abs().amin(dim=1)
    assert differing.float().mean() < 0.01
    assert bool((from_middle[differing] <= 2.0**-15).all())
    single = four_bit_values(values, "nf4")
    assert (ours != single).float().mean() > 0.5


def test_a_dense_weight_becomes_int8_as_bitsandbytes_does_it(tmp_path: Path) -> None:
    values = weight(400, 48)[torch.arange(400) != 200]  # of a row of zeros it makes NaN before it casts that to int8
    codes, scales, _ = bnb.int8_vectorwise_quant(values.half())
    entry = on_load(tmp_path, values, Quantization("int8"))
    assert torch.equal(decode_all(entry, 100), bnb.int8_vectorwise_dequant(codes, scales))


def test_a_transposed_weight_is_turned_before_and_after(tmp_path: Path) -> None:
    """transformers turns a Conv1D, which stores (in, out), before bitsandbytes quantizes it."""
    values = weight(64, 96)
    stored = store(tmp_path / "base", {NAME: values}).tensors[NAME]
    turned = replace(stored, shape=(96, 64), coding=Transposed(stored))
    coded = replace(turned, coding=QuantizedOnLoad(turned, Quantization("nf4")))
    entry = replace(stored, coding=Transposed(coded))
    assert torch.equal(decode_all(entry, 777), four_bit_values(values.T.contiguous(), "nf4").T)


# HQQ: files by hand, in the layout of HQQLinear.state_dict, against the formula over the numbers before packing.


def characters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) of small numbers into words of which each holds a row and those a whole part further down."""
    per_word, word = {8: (1, torch.uint8), 4: (2, torch.uint8), 2: (4, torch.uint8), 1: (8, torch.uint8)}.get(
        bits, (10, torch.int32)
    )
    rows = -(-len(codes) // per_word)
    padded = torch.zeros(rows * per_word, codes.shape[1], dtype=torch.int64)
    padded[: len(codes)] = codes
    total = torch.zeros(rows, codes.shape[1], dtype=torch.int64)
    for part in padded.split(rows):
        total = total * 2**bits + part
    return total.to(word)


def hqq_layer(
    shape: tuple[int, int], bits: int, axis: int, group: int, dtype: torch.dtype, *, as_float: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and its weight by the formula W = (Q - zero) * scale in the compute dtype."""
    generator = torch.Generator().manual_seed(bits)
    count = shape[0] * shape[1]
    grid = (count // group, group) if axis == 1 else (group, count // group)
    codes = torch.randint(0, 2**bits, grid, generator=generator)
    per_group = (count // group, 1) if axis == 1 else (1, count // group)
    scale = (0.01 + torch.rand(per_group, generator=generator)).to(dtype)
    zero = (2**bits * torch.rand(per_group, generator=generator)).to(dtype)
    packed = pack(codes, bits)
    name = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}[bits]
    tensors = {
        "layer.W_q": packed.view(dtype) if as_float else packed,
        "layer.scale": scale,
        "layer.zero": zero,
        "layer.shape": torch.tensor(shape),
        "layer.nbits": torch.tensor(bits, dtype=torch.int32),
        "layer.group_size": torch.tensor(group, dtype=torch.int32),
        "layer.axis": torch.tensor(axis, dtype=torch.int32),
        "layer.packing": characters(name),
        "layer.compute_dtype": characters(str(dtype)),
        "layer.view_as_float": torch.tensor(int(as_float), dtype=torch.uint8),
        "layer.encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
    }
    return tensors, ((codes.to(dtype) - zero) * scale).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq_weights_follow_the_formula(tmp_path: Path, bits: int, axis: int, dtype: torch.dtype) -> None:
    tensors, wanted = hqq_layer((24, 128), bits, axis, 64, dtype)
    base = store(tmp_path / "base", tensors, quantization_config={"quant_method": "hqq"})
    view = dense_view(base)
    assert list(view.tensors) == [NAME]
    for step in (10_000, 301):
        assert torch.equal(decode_all(view.tensors[NAME], step), wanted)


def test_hqq_codes_may_be_viewed_as_floats(tmp_path: Path) -> None:
    """As fsdp_qlora has them: view_as_float."""
    tensors, wanted = hqq_layer((64, 64), 4, 0, 64, torch.bfloat16, as_float=True)
    assert tensors["layer.W_q"].dtype == torch.bfloat16
    view = dense_view(store(tmp_path / "base", tensors, quantization_config={"quant_method": "hqq"}))
    assert torch.equal(decode_all(view.tensors[NAME], 100), wanted)


@pytest.mark.parametrize("part", ["zero_scale", "meta_zero"])
def test_hqq_with_packed_scales_is_refused(tmp_path: Path, part: str) -> None:
    tensors, _ = hqq_layer((64, 64), 4, 1, 64, torch.float16)
    tensors[f"layer.{part}"] = torch.zeros(4)
    base = store(tmp_path / "base", tensors, quantization_config={"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match=part) as caught:
        dense_view(base)
    assert "dequantize" in str(caught.value.remedy)


# float8


@pytest.mark.parametrize("shape", [(256, 384), (200, 150)])
def test_float8_blocks_are_multiplied_by_their_scales(tmp_path: Path, shape: tuple[int, int]) -> None:
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(2)) + 0.1
    base = store(
        tmp_path / "base",
        {NAME: codes, f"{NAME}_scale_inv": scales, "norm.weight": torch.ones(3)},
        dtype="bfloat16",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    view = dense_view(base)
    assert set(view.tensors) == {NAME, "norm.weight"}
    full = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert torch.equal(decode_all(view.tensors[NAME], 999), (codes.float() * full).bfloat16())


def test_float8_is_what_transformers_makes_of_it() -> None:
    """Its own dequantization, where the grid divides the matrix, is the formula of the test above."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=torch.Generator().manual_seed(2)) + 0.1
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    full = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(theirs, (codes.float() * full).bfloat16())


@pytest.mark.parametrize("block", [128, [128], [0, 128], "128", [128, None]])
def test_a_malformed_block_is_an_error(tmp_path: Path, block: Any) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    with pytest.raises(CheckpointError, match="weight_block_size"):
        dense_view(store(tmp_path / "base", {NAME: torch.ones(2, 2)}, **config))


# What is wrong with a base is said by name.


@pytest.mark.parametrize("method", ["torchao", "quanto", "something-new"])
def test_other_quantizations_are_refused_by_name(tmp_path: Path, method: str) -> None:
    base = store(tmp_path / "base", {NAME: torch.ones(2, 2)}, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=method) as caught:
        dense_view(base)
    assert "--merge-into original" in str(caught.value.remedy)


def spoiled(tensors: dict[str, Tensor], **state: Any) -> dict[str, Tensor]:
    """The packed quant_state with some of its facts changed."""
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(tensors[key].tolist())) | state
    return {**tensors, key: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [8, 65]}, "bytes of codes"),
        ({"shape": "8"}, "shape"),
        ({"blocksize": 0}, "blocksize"),
        ({"blocksize": 128}, "absmax"),
        ({"dtype": "int4"}, "dtype"),
        ({"quant_type": "fp4"}, "quant_type"),
        ({"nested_offset": 1.0}, "absmax"),
    ],
)
def test_an_inconsistent_state_is_an_error(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    tensors = spoiled(four_bit_tensors(weight(8, 64), "nf4"), **change)
    with pytest.raises(CheckpointError, match=said):
        dense_view(store(tmp_path / "base", tensors))


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    tensors = four_bit_tensors(weight(8, 64), "nf4", double=True)
    del tensors[f"{NAME}.{part}"]
    with pytest.raises(CheckpointError, match=f"{NAME}.{part}"):
        dense_view(store(tmp_path / "base", tensors))


def test_another_table_of_values_is_refused(tmp_path: Path) -> None:
    """bitsandbytes' kernels never look at the stored one, so it is only a sign of another meaning."""
    tensors = four_bit_tensors(weight(8, 64), "nf4")
    tensors[f"{NAME}.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(CheckpointError, match="quant_map"):
        dense_view(store(tmp_path / "base", tensors))


def test_a_state_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    tensors = four_bit_tensors(weight(8, 64), "nf4")
    tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.full((20,), 200, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="quant_state"):
        dense_view(store(tmp_path / "base", tensors))


def test_values_that_were_not_fetched_are_said_to_be_missing(tmp_path: Path) -> None:
    """`inspect` of a Hub repository reads headers, and zeros stand for the rest."""
    tensors = {name: torch.zeros_like(value) for name, value in four_bit_tensors(weight(8, 64), "nf4").items()}
    with pytest.raises(CheckpointError, match="is zeros"):
        dense_view(store(tmp_path / "base", tensors))


def test_old_int8_layouts_are_refused(tmp_path: Path) -> None:
    tensors = {
        NAME: torch.zeros(4, 8, dtype=torch.int8),
        "layer.SCB": torch.ones(4),
        "layer.weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    base = store(tmp_path / "base", tensors, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="weight_format"):
        dense_view(base)


def test_a_config_that_claims_a_quantization_is_not_believed(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(CheckpointError, match="none of its tensors"):
        dense_view(store(tmp_path / "base", {NAME: torch.ones(2, 2)}, **config))


def test_a_dense_checkpoint_is_itself(tmp_path: Path) -> None:
    base = store(tmp_path / "base", {NAME: torch.ones(2, 2)})
    assert dense_view(base) is base


def test_codes_are_known_by_their_names_without_a_config(tmp_path: Path) -> None:
    tensors, wanted = hqq_layer((64, 64), 4, 1, 64, torch.float16)
    assert torch.equal(decode_all(dense_view(store(tmp_path / "base", tensors)).tensors[NAME], 100), wanted)
