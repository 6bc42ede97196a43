"""What the comparison of an ONNX graph finds: faults are planted in exported graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from dora_serve.errors import CheckpointError
from exporters.onnx.check.answers import Expected, Got, token_inputs
from exporters.onnx.check.check import check_onnx
from exporters.onnx.check.comparing import count_greedy
from exporters.onnx.export import export_onnx
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.skeleton import DATA_FILE
from tests.onnx_models import MODELS, PROMPTS, Case, cases, check, save


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cases(tmp_path_factory.mktemp("models"))


@pytest.fixture
def copied(case: Callable[[str], Case], tmp_path: Path) -> Case:
    """A copy of the llama case, to break."""
    source = case("llama")
    shutil.copytree(source.onnx, tmp_path / "onnx")
    shutil.copytree(source.model, tmp_path / "model")
    return Case(tmp_path / "model", tmp_path / "onnx", source.export)


def load_initializers(folder: Path) -> dict[str, TensorProto]:
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    return {tensor.name: tensor for tensor in graph.initializer}


def place(tensor: TensorProto) -> tuple[int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries.get("offset", 0)), int(entries["length"])


def write_weight(folder: Path, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change one tensor in the data file in place."""
    offset, length = place(load_initializers(folder)[name])
    data = bytearray((folder / DATA_FILE).read_bytes())
    array = np.frombuffer(data, np.float32, count=length // 4, offset=offset).copy()
    change(array)
    data[offset : offset + length] = array.tobytes()
    (folder / DATA_FILE).write_bytes(data)


def edit_graph(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    change(model.graph)
    onnx.save(model, folder / MODEL_FILE)


def only(nodes: Sequence[onnx.NodeProto], op_type: str) -> list[onnx.NodeProto]:
    return [node for node in nodes if node.op_type == op_type]


QUERY = "model.layers.{}.self_attn.q_proj.weight.T"


def test_one_bit_of_a_weight(copied: Case) -> None:
    def flip(array: np.ndarray[Any, Any]) -> None:
        array.view(np.uint32)[5] ^= 1

    write_weight(copied.onnx, QUERY.format(1), flip)
    report = check(copied)
    assert report.initializers_equal == report.initializers - 1
    assert not report.passed
    assert QUERY.format(1) in report.failures[0]


def test_a_value_that_is_not_a_number(copied: Case) -> None:
    def spoil(array: np.ndarray[Any, Any]) -> None:
        array[7] = np.nan

    write_weight(copied.onnx, QUERY.format(0), spoil)
    report = check(copied)
    assert not report.passed
    assert report.max_abs == inf


def test_a_checkpoint_that_is_not_finite(case: Callable[[str], Case], tmp_path: Path) -> None:
    model = shutil.copytree(case("mistral").model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    report = check(Case(model, case("mistral").onnx, case("mistral").export), reference_logits=reference(model))
    assert not report.passed
    assert any("not finite" in failure for failure in report.failures)
    assert report.reference_max_abs == inf


def test_two_layers_swapped(copied: Case) -> None:
    first, second = (place(load_initializers(copied.onnx)[QUERY.format(layer)]) for layer in (0, 1))
    data = bytearray((copied.onnx / DATA_FILE).read_bytes())
    one, other = (bytes(data[offset : offset + length]) for offset, length in (first, second))
    data[first[0] : first[0] + first[1]], data[second[0] : second[0] + second[1]] = other, one
    (copied.onnx / DATA_FILE).write_bytes(data)
    report = check(copied)
    assert report.initializers_equal == report.initializers - 2
    assert report.max_abs > report.tolerance
    assert not report.passed


def test_the_folder_of_another_model(copied: Case, case: Callable[[str], Case]) -> None:
    report = check(Case(case("qwen2").model, copied.onnx, copied.export))
    assert not report.passed
    assert report.max_abs > report.tolerance
    report = check(Case(case("gpt2").model, copied.onnx, copied.export))
    assert not report.passed
    report = check(Case(case("bert_classifier").model, copied.onnx, copied.export))
    assert not report.passed
    assert report.max_abs == inf


def test_a_graph_that_computes_something_else_with_the_right_weights(copied: Case) -> None:
    def rescale(graph: onnx.GraphProto) -> None:
        attention = only(graph.node, "Attention")[1]
        (scale,) = [attribute for attribute in attention.attribute if attribute.name == "scale"]
        scale.f *= 1.001

    edit_graph(copied.onnx, rescale)
    report = check(copied)
    assert report.initializers_equal == report.initializers
    assert report.max_abs > report.tolerance
    assert not report.passed


def test_a_cache_that_mixes_up_its_layers(copied: Case) -> None:
    """The whole prompt is right; only what is fed back for the next token is not."""

    def swap(graph: onnx.GraphProto) -> None:
        names = {"present.0.key": "present.1.key", "present.1.key": "present.0.key"}
        for node in graph.node:
            for outputs in (node.output, node.input):
                for index, name in enumerate(outputs):
                    outputs[index] = names.get(name, name)

    edit_graph(copied.onnx, swap)
    report = check(copied)
    assert report.max_abs <= report.tolerance
    assert report.decode_max_abs is not None
    assert report.decode_max_abs > report.tolerance
    assert not report.passed


def test_a_graph_that_ignores_the_attention_mask(copied: Case) -> None:
    """Prompts alone are right; only padding shows it."""

    def ignore(graph: onnx.GraphProto) -> None:
        (index, cast) = next((i, node) for i, node in enumerate(graph.node) if "attention_mask" in node.input)
        assert cast.op_type == "Cast"
        result = cast.output[0]
        cast.output[0] = "mask_as_given"
        graph.node.insert(index + 1, onnx.helper.make_node("Not", ["mask_as_given"], ["mask_turned"]))
        graph.node.insert(index + 2, onnx.helper.make_node("Or", ["mask_as_given", "mask_turned"], [result]))

    edit_graph(copied.onnx, ignore)
    report = check(copied)
    assert report.max_abs <= report.tolerance
    assert report.padded_max_abs > report.tolerance
    assert not report.passed


@pytest.mark.parametrize("size", [None, 0, 1000])
def test_missing_or_short_weights(copied: Case, size: int | None) -> None:
    if size is None:
        (copied.onnx / DATA_FILE).unlink()
    else:
        (copied.onnx / DATA_FILE).write_bytes((copied.onnx / DATA_FILE).read_bytes()[:size])
    report = check(copied)
    assert not report.passed
    assert report.max_abs == report.padded_max_abs == inf
    assert any("ONNX Runtime cannot run the model" in failure for failure in report.failures)


def test_weights_outside_the_folder(copied: Case, tmp_path: Path) -> None:
    shutil.copy(copied.onnx / DATA_FILE, tmp_path / "elsewhere")

    def point(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../elsewhere"

    edit_graph(copied.onnx, point)
    report = check(copied)
    assert not report.passed
    assert any("../elsewhere" in failure for failure in report.failures)


def test_a_graph_that_is_not_one(copied: Case) -> None:
    (copied.onnx / MODEL_FILE).write_bytes(b"not a graph")
    assert not check(copied).passed
    (copied.onnx / MODEL_FILE).unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        check(copied)


def reference(folder: Path) -> list[torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def test_the_reference_finds_what_torch_and_onnx_share(case: Callable[[str], Case], tmp_path: Path) -> None:
    """A config that lost its rope_theta fools every comparison with the folder, but not the unmerged logits."""
    whole = case("qwen2")
    right = check(whole, reference_logits=reference(whole.model))
    assert right.failures == ()
    assert right.reference_max_abs is not None
    assert right.reference_limit is not None
    assert right.reference_max_abs <= right.reference_limit

    model = shutil.copytree(whole.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "onnx").mkdir()
    wrong = Case(model, tmp_path / "onnx", export_onnx(model, tmp_path / "onnx"))
    assert check(wrong).passed
    report = check(wrong, reference_logits=reference(whole.model))
    assert not report.passed
    assert "unmerged" in report.failures[0]


def test_rounded_weights_are_within_the_reference(case: Callable[[str], Case], tmp_path: Path) -> None:
    """A merge into bfloat16 rounds the weights once: further from the unmerged logits, and rightly so."""
    exact = case("mistral").model
    model = save(MODELS["mistral"](), tmp_path / "model", torch.bfloat16)
    (tmp_path / "onnx").mkdir()
    made = Case(model, tmp_path / "onnx", export_onnx(model, tmp_path / "onnx"))
    report = check(made, reference_logits=reference(exact))
    assert report.failures == ()
    assert report.reference_max_abs is not None
    assert report.reference_max_abs > 100 * report.tolerance


@pytest.mark.parametrize(("margin", "passes"), [(0.5, True), (2.0, False)])
def test_a_near_tie_is_no_failure(margin: float, passes: bool) -> None:
    """Tolerance 1: the tokens part at the second step, where torch's logits are `margin` apart."""
    logits = torch.zeros(3, 9)
    logits[1, 4] = margin
    expected = Expected([], [([4, 4, 4], logits), ([7, 7, 7], logits)], 1.0, 1e-8, None, True)
    failures: list[str] = []
    assert count_greedy(expected, Got("", greedy=[[4, 5, 8], [7, 7, 7]]), failures) == 1
    assert (failures == []) == passes


def test_prompts_that_cannot_be_compared(case: Callable[[str], Case]) -> None:
    made = case("llama")
    for prompts in ([], [[]], [[3], []]):
        with pytest.raises(ValueError, match="prompt"):
            check_onnx(made.onnx, made.model, token_inputs(prompts))
    with pytest.raises(ValueError, match="reference"):
        check(made, reference_logits=[])
