"""Other dtypes, and quantized weights: what they lose is measured, and what cannot run is refused before anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import transformers
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.torch import load_file, save_file

from dora_serve.errors import UnavailableError
from exporters.onnx.check.answers import token_inputs
from exporters.onnx.check.check import check_onnx
from exporters.onnx.check.report import OnnxCheck
from exporters.onnx.export import OnnxExport, export_onnx
from exporters.onnx.options import OnnxOptions, require_possible
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.skeleton import DATA_FILE
from tests.onnx_models import GROUPED, MODELS, PROMPTS, save

SIZES = {**GROUPED, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
TIED: Callable[[], Any] = lambda: transformers.LlamaForCausalLM(  # noqa: E731
    transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, OnnxExport]]:
    """A model of MODELS, or the tied one, with options; once. Read only."""

    @cache
    def make(name: str, **options: Any) -> tuple[Path, OnnxExport]:
        root = tmp_path_factory.mktemp(name)
        model = save((TIED if name == "tied" else MODELS[name])(), root / "model")
        out = root / "onnx"
        out.mkdir()
        return model, export_onnx(model, out, OnnxOptions(**options))

    return make


def check(made: tuple[Path, OnnxExport], **options: Any) -> OnnxCheck:
    model, export = made
    return check_onnx(export.folder, model, token_inputs(PROMPTS), **options)


@pytest.mark.parametrize("name", ["tied", "gpt2", "bert_classifier"])
def test_float16_is_as_close_as_float16_can_be(exported: Callable[..., Any], name: str) -> None:
    made = exported(name, dtype="float16")
    report = check(made)
    assert report.failures == ()
    assert report.dtype == "float16"
    assert report.max_abs is not None
    assert report.max_abs > 1e-5
    kinds = {value.dtype for value in onnx_ir.load(made[1].path).graph.inputs if "past" in str(value.name)}
    assert kinds <= {onnx_ir.DataType.FLOAT16}
    assert (made[1].folder / DATA_FILE).stat().st_size < 0.6 * (made[0] / "model.safetensors").stat().st_size


def test_bfloat16_is_made_for_cuda_and_its_weights_are_compared(exported: Callable[..., Any]) -> None:
    report = check(exported("tied", dtype="bfloat16", provider="cuda"))
    assert report.failures == ()
    assert "CUDA" in report.not_run[0]
    assert report.initializers == report.initializers_equal > 0
    assert report.max_abs is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bfloat16"}, "CPU provider has no bfloat16"),
        ({"dtype": "bfloat16", "provider": "cuda", "quantize": "int4"}, "int4 blocks"),
        ({"opset": 17}, "opset 17"),
    ],
)
def test_what_no_route_can_do_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnavailableError, match=said) as refused:
        require_possible(OnnxOptions(**options))
    assert refused.value.remedy


def test_a_value_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    model = save(TIED(), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UnavailableError, match=r"up_proj.*65504"):
        export_onnx(model, tmp_path / "out", OnnxOptions(dtype="float16"))


@pytest.mark.parametrize(("quantize", "limit"), [("int8", 0.01), ("int4", 1.0)])
@pytest.mark.parametrize("name", ["tied", "gpt2", "mixtral"])
def test_the_loss_of_quantized_weights_is_measured(
    exported: Callable[..., Any], name: str, quantize: str, limit: float
) -> None:
    made = exported(name, quantize=quantize)
    report = check(made)
    assert report.failures == ()
    assert report.initializers == report.initializers_equal > 0
    assert report.tolerance is None
    assert report.kl is not None
    assert 1e-8 < report.kl < limit
    assert report.exact_kl is not None
    assert report.exact_kl < 1e-8
    assert report.exact_max_abs is not None
    assert report.exact_tolerance is not None
    assert report.exact_max_abs <= report.exact_tolerance
    assert report.perplexity != report.torch_perplexity
    assert report.tokens_per_second
    strict = check(made, max_kl=report.kl / 2)
    assert any("KL divergence" in failure for failure in strict.failures)
    assert check(made, max_kl=report.kl * 2).failures == ()


def nodes(export: OnnxExport, op_type: str) -> list[onnx.NodeProto]:
    graph = onnx.load(export.path, load_external_data=False).graph
    return [node for node in graph.node if node.op_type == op_type]


def test_a_tied_head_is_quantized_with_its_embedding_and_stored_once(exported: Callable[..., Any]) -> None:
    model, export = exported("tied", quantize="int4")
    assert len(nodes(export, "MatMulNBits")) == 8  # seven linears and the head
    assert len(nodes(export, "GatherBlockQuantized")) == 1
    assert not nodes(export, "MatMul")
    elements = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values() if tensor.ndim > 1)
    assert (export.folder / DATA_FILE).stat().st_size < elements * (0.5 + 4 / 32) * 1.1 + 4096
    for node in nodes(export, "MatMulNBits"):
        values = {attribute.name: attribute.i for attribute in node.attribute}
        assert values["accuracy_level"] == 4


def test_a_router_stays_whole(exported: Callable[..., Any]) -> None:
    _, export = exported("mixtral", quantize="int8")
    names = {tensor.name for tensor in onnx.load(export.path, load_external_data=False).graph.initializer}
    assert any("mlp.gate.weight" in name and "int8" not in name for name in names)
    # Of the two stacks of experts one has rows of 48, which are no whole blocks of 32.
    assert len(nodes(export, "GatherBlockQuantized")) == 1
    assert any("down_proj" in note and "48" in note for note in export.notes)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_those_of_onnx_runtimes_own_quantizer(
    exported: Callable[..., Any], tmp_path: Path, bits: int
) -> None:
    model, export = exported("tied", quantize=f"int{bits}")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(model / "model.safetensors")[name].numpy()
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, weight.shape[1]])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, weight.shape[0]])
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    theirs = MatMulNBitsQuantizer(whole, bits=bits, block_size=32, is_symmetric=True, accuracy_level=4)
    theirs.process()
    wanted = {one.name: onnx.numpy_helper.to_array(one) for one in theirs.model.model.graph.initializer}
    ours = onnx_ir.load(export.path).graph.initializers
    for suffix, key in ((f".int{bits}", f"w_Q{bits}"), (f".int{bits}.scales", "w_scales")):
        value = ours[name + suffix].const_value
        assert value is not None
        assert np.array_equal(value.numpy().reshape(-1), wanted[key].reshape(-1))


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_one_integer_beside_the_nearest_fails(exported: Callable[..., Any], tmp_path: Path, quantize: str) -> None:
    model, export = exported("tied", quantize=quantize)
    folder = shutil.copytree(export.folder, tmp_path / "onnx")
    name = f"model.layers.0.mlp.up_proj.weight.{quantize}"
    tensors = {one.name: one for one in onnx.load(export.path, load_external_data=False).graph.initializer}
    place = int(next(entry.value for entry in tensors[name].external_data if entry.key == "offset"))
    data = bytearray((folder / DATA_FILE).read_bytes())
    data[place + 7] ^= 1
    (folder / DATA_FILE).write_bytes(data)
    report = check_onnx(folder, model, token_inputs(PROMPTS))
    assert report.initializers_equal == report.initializers - 1
    assert any(name in failure for failure in report.failures)


def _exchange(graph: onnx.GraphProto) -> None:
    one, other = (node for node in graph.node if node.op_type == "MatMulNBits" and "k_proj" in node.input[1])
    for place in (1, 2):
        one.input[place], other.input[place] = other.input[place], one.input[place]


def _shift(graph: onnx.GraphProto) -> None:
    """One zero point, of a block of 32, is not the middle of the range."""
    node = next(node for node in graph.node if node.op_type == "MatMulNBits" and "q_proj" in node.input[1])
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    zeros = np.full((sizes["N"], -(-sizes["K"] // 64)), 0x88, dtype=np.uint8)
    zeros[0, 0] += 1
    graph.initializer.append(onnx.numpy_helper.from_array(zeros, "zeros"))
    node.input.append("zeros")


def _move_padded_rows(graph: onnx.GraphProto) -> None:
    """Positions are twice what they are in rows that begin with padding."""
    for node in graph.node:
        node.input[:] = ["moved" if name == "position_ids" else name for name in node.input]
    for name, value in (("zero", 0), ("one", 1)):
        graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], [value]))
    made = [
        onnx.helper.make_node("Slice", ["attention_mask", "zero", "one", "one"], ["first"]),
        onnx.helper.make_node("Sub", ["one", "first"], ["padded"]),
        onnx.helper.make_node("Add", ["one", "padded"], ["times"]),
        onnx.helper.make_node("Mul", ["position_ids", "times"], ["moved"]),
    ]
    for node in reversed(made):
        graph.node.insert(0, node)


@pytest.mark.parametrize("fault", [_exchange, _shift, _move_padded_rows])
def test_the_right_codes_used_wrongly_fail(
    fault: Callable[[onnx.GraphProto], None], exported: Callable[..., Any], tmp_path: Path
) -> None:
    """What such a graph loses by int4 would hide it: the runs with float activations do not."""
    model, export = exported("llama", quantize="int4")
    folder = shutil.copytree(export.folder, tmp_path / "onnx")
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False)
    fault(graph.graph)
    onnx.save(graph, folder / MODEL_FILE)
    report = check_onnx(folder, model, token_inputs(PROMPTS))
    assert report.initializers == report.initializers_equal
    assert any("activations in floats" in failure for failure in report.failures)


@pytest.mark.parametrize("part", [".int8", ".int8.scales"])
def test_quantized_weights_of_another_model_fail(exported: Callable[..., Any], tmp_path: Path, part: str) -> None:
    """As of an export whose adapter was ignored: one matrix is the base's."""
    model, export = exported("tied", quantize="int8")
    name = "model.layers.0.mlp.up_proj.weight"
    other = shutil.copytree(model, tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    change = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    weights[name] += (0.1 if part == ".int8" else 0.02) * change * weights[name].abs().mean()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    report = check_onnx(export.folder, other, token_inputs(PROMPTS))
    assert report.initializers_equal < report.initializers
    assert any("do not equal" in failure and "up_proj" in failure for failure in report.failures)


def test_a_quantized_cache_that_mixes_up_its_layers_fails(tmp_path: Path) -> None:
    model = save(MODELS["llama"](), tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    export = export_onnx(model, tmp_path / "onnx", OnnxOptions(quantize="int8"))
    graph = onnx.load(export.path, load_external_data=False)
    names = {"present.0.key": "present.1.key", "present.1.key": "present.0.key"}
    for node in graph.graph.node:
        for outputs in (node.output, node.input):
            for index, name in enumerate(outputs):
                outputs[index] = names.get(name, name)
    onnx.save(graph, export.folder / MODEL_FILE)
    report = check((model, export))
    assert any("through the cache differs from the whole" in failure for failure in report.failures)
