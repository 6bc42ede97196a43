"""ONNX export and its check, against transformers and ONNX Runtime, on tiny seeded models that transformers saved."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dora_serve.errors import CheckpointError, UnavailableError
from exporters.onnx import DATA_FILE, MODEL_FILE, OnnxExport, architecture_of, export_onnx
from exporters.onnx_check import OnnxCheck, _count_greedy, _Expected, _Got, check_onnx

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
# Longer than the sliding windows, and one token alone.
PROMPTS = [np.random.default_rng(length).integers(3, VOCABULARY, length).tolist() for length in (1, 6, 17)]

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**GROUPED, "num_hidden_layers": 1})),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**GROUPED, "num_hidden_layers": 1}, head_dim=8)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**{**GROUPED, "num_hidden_layers": 1})),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**GROUPED, "num_hidden_layers": 1}, head_dim=8, sliding_window=4)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **GROUPED,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**GROUPED, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **{**GROUPED, "num_hidden_layers": 1},
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "bert_classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, num_labels=3)
    ),
    "bert_tagger": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, num_labels=3)),
    "bert_answers": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)),
    "roberta_masked": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, type_vocab_size=1)),
    "llama_classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}, num_labels=3)
    ),
}
CAUSAL = ("llama", "gpt2", "qwen2", "qwen3", "phi3", "mistral", "gemma3", "mixtral", "qwen3_moe")
OUTPUTS = {
    "bert": ("last_hidden_state", "pooler_output"),
    "bert_classifier": ("logits",),
    "bert_tagger": ("logits",),
    "bert_answers": ("start_logits", "end_logits"),
    "roberta_masked": ("logits",),
    "llama_classifier": ("logits",),
}


@dataclass(frozen=True)
class Case:
    model: Path
    onnx: Path
    export: OnnxExport


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model as a folder. Weights are drawn wide enough for attention, gates and windows to matter to the logits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.25 * drawn if parameter.ndim > 1 else 1 + 0.1 * drawn)
    model.to(dtype).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each model of MODELS saved and exported, once. Read only."""

    @cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name)
        model = save(MODELS[name](), folder / "model")
        out = folder / "onnx"
        out.mkdir()
        return Case(model, out, export_onnx(model, out, metadata={"base_model": "tests/base"}))

    return make


@pytest.fixture
def copied(case: Callable[[str], Case], tmp_path: Path) -> Case:
    """A copy of the llama case, to break."""
    source = case("llama")
    shutil.copytree(source.onnx, tmp_path / "onnx")
    shutil.copytree(source.model, tmp_path / "model")
    return Case(tmp_path / "model", tmp_path / "onnx", source.export)


def check(case: Case, **options: Any) -> OnnxCheck:
    return check_onnx(case.onnx / MODEL_FILE, case.model, PROMPTS, **options)


# What is exported


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_agrees_with_torch(case: Callable[[str], Case], name: str) -> None:
    made = case(name)
    layers = transformers.AutoConfig.from_pretrained(made.model).num_hidden_layers
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    assert made.export.inputs == (
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{part}" for part in parts),
    )
    assert made.export.outputs == ("logits", *(f"present.{part}" for part in parts))
    report = check(made)
    assert report.failures == ()
    assert report.passed
    assert report.top1 == 1.0
    assert report.kl is not None
    assert report.kl < report.tolerance
    assert report.greedy_equal == report.greedy_total == len(PROMPTS)
    assert report.initializers == report.initializers_equal > 0
    assert report.decode_max_abs is not None


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_an_encoder_or_a_head_agrees_with_torch(case: Callable[[str], Case], name: str) -> None:
    made = case(name)
    segments = name.startswith("bert")
    assert made.export.inputs == ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))
    assert made.export.outputs == OUTPUTS[name]
    report = check(made)
    assert report.failures == ()
    assert report.decode_max_abs is None
    assert report.greedy_total == 0
    assert (report.kl is None) == (name == "bert")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_left_padded_generation_equals_transformers_generate(case: Callable[[str], Case], name: str) -> None:
    """A loop over the session that shares nothing with check_onnx, against transformers' own generation."""
    made, count = case(name), 10
    model = transformers.AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    width = max(map(len, PROMPTS))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    wanted = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=count, do_sample=False, pad_token_id=0
    )[:, width:]

    session = onnxruntime.InferenceSession(made.onnx / MODEL_FILE, providers=["CPUExecutionProvider"])
    past = {
        each.name: np.zeros((len(PROMPTS), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()[3:]
    }
    found = []
    for _ in range(count):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        logits, *present = session.run(
            None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        )
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        found.append(ids)
    assert np.concatenate(found, axis=1).tolist() == wanted.tolist()


def test_right_padding_changes_nothing(case: Callable[[str], Case]) -> None:
    made = case("mistral")
    session = onnxruntime.InferenceSession(made.onnx / MODEL_FILE, providers=["CPUExecutionProvider"])
    prompt = PROMPTS[2]

    def logits(padding: int) -> np.ndarray[Any, Any]:
        ids = np.array([prompt + [0] * padding])
        empty = {name: np.zeros((1, 2, 0, 8), np.float32) for name in made.export.inputs[3:]}
        feed = {"input_ids": ids, "attention_mask": np.array([[1] * len(prompt) + [0] * padding])}
        feed["position_ids"] = np.arange(ids.shape[1])[None]
        return session.run(["logits"], {**feed, **empty})[0][:, : len(prompt)]

    np.testing.assert_allclose(logits(5), logits(0), rtol=0, atol=check(made).tolerance)


def test_the_files_are_what_the_report_says(case: Callable[[str], Case]) -> None:
    made = case("llama")
    assert sorted(path.name for path in made.onnx.iterdir()) == [MODEL_FILE, DATA_FILE]
    assert made.export.bytes == sum(path.stat().st_size for path in made.onnx.iterdir())
    model = onnx.load(made.onnx / MODEL_FILE, load_external_data=False)
    onnx.checker.check_model(made.onnx / MODEL_FILE)
    assert made.export.opset == 23
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""}
    assert made.export.nodes == len(model.graph.node)
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= {node.op_type for node in model.graph.node}
    assert tuple(each.name for each in model.graph.input) == made.export.inputs
    assert tuple(each.name for each in model.graph.output) == made.export.outputs
    assert (model.producer_name, {prop.key: prop.value for prop in model.metadata_props}) == (
        "dora-serve",
        {"base_model": "tests/base"},
    )
    places = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert places == {DATA_FILE}
    text = (made.onnx / MODEL_FILE).read_bytes()
    assert b"site-packages" not in text
    assert str(made.model.parent).encode() not in text


def test_batch_and_sequence_axes_are_dynamic(case: Callable[[str], Case]) -> None:
    model = onnx_ir.load(case("llama").onnx / MODEL_FILE)
    shapes = {each.name: [str(axis) for axis in each.shape or ()] for each in model.graph.inputs}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", "2", "past_sequence_length", "8"]


def test_a_tied_weight_is_stored_once(case: Callable[[str], Case]) -> None:
    made = case("llama")
    embedding = load_file(made.model / "model.safetensors")["model.embed_tokens.weight"].numpy()
    weights = [
        value.const_value.numpy()
        for value in onnx_ir.load(made.onnx / MODEL_FILE).graph.initializers.values()
        if value.const_value is not None
    ]
    same = [array for array in weights if array.shape in (embedding.shape, embedding.T.shape)]
    assert len(same) == 1
    assert np.array_equal(same[0], embedding)


def test_weights_keep_the_names_of_the_checkpoint(case: Callable[[str], Case]) -> None:
    made = case("qwen2")
    stored = load_file(made.model / "model.safetensors")
    initializers = onnx_ir.load(made.onnx / MODEL_FILE).graph.initializers
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        value = initializers[f"model.layers.0.{name}.T"].const_value
        assert value is not None
        assert np.array_equal(value.numpy(), stored[f"model.layers.0.{name}"].numpy().T)


def test_a_half_precision_checkpoint_is_exported_in_float32(tmp_path: Path) -> None:
    model = save(MODELS["mistral"](), tmp_path / "model", torch.float16)
    (tmp_path / "onnx").mkdir()
    export = export_onnx(model, tmp_path / "onnx")
    assert export.dtype == "float32"
    kinds = {value.dtype for value in onnx_ir.load(export.path).graph.initializers.values()}
    assert not {onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT16} & kinds
    assert check(Case(model, tmp_path / "onnx", export)).failures == ()


def test_another_opset(case: Callable[[str], Case], tmp_path: Path) -> None:
    model = case("mistral").model
    export = export_onnx(model, tmp_path, opset=20)
    assert export.opset == 20
    assert check(Case(model, tmp_path, export)).failures == ()
    with pytest.raises(UnavailableError, match="opset 99"):
        export_onnx(model, tmp_path, opset=99)


def test_nothing_is_printed_and_stages_are_told(
    case: Callable[[str], Case], tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = case("mistral").model
    capfd.readouterr()
    recwarn.clear()
    level, told = logging.getLogger("torch.onnx").level, list[str]()
    export_onnx(model, tmp_path, on_progress=told.append)
    check_onnx(tmp_path / MODEL_FILE, model, PROMPTS[1:2], greedy_tokens=2, on_progress=told.append)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert logging.getLogger("torch.onnx").level == level
    assert [message.split()[0] for message in told] == ["loading", "tracing", "writing", "running", "running"]


# What check_onnx finds


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
    expected = _Expected([], [([4, 4, 4], logits), ([7, 7, 7], logits)], 1.0, None, True)
    failures: list[str] = []
    assert _count_greedy(expected, _Got("", [], [], [], [[4, 5, 8], [7, 7, 7]]), failures) == 1
    assert (failures == []) == passes


def test_prompts_that_cannot_be_compared(case: Callable[[str], Case]) -> None:
    made = case("llama")
    for prompts in ([], [[]], [[3], []]):
        with pytest.raises(ValueError, match="prompt"):
            check_onnx(made.onnx / MODEL_FILE, made.model, prompts)
    with pytest.raises(ValueError, match="reference"):
        check(made, reference_logits=[])


# What is refused


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "not one of"),
        ({"architectures": ["ViTForImageClassification"]}, "not one of"),
        ({"architectures": ["HomeMadeForCausalLM"]}, "not one of"),
        ({"model_type": "llama"}, "names no architecture"),
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}, "quantized"),
        ({"architectures": ["LlamaForCausalLM"], "transformers_version": "99.0.0"}, "transformers 99"),
    ],
)
def test_architectures_are_refused_by_name(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnavailableError, match=reason) as refused:
        architecture_of(tmp_path)
    assert config.get("architectures", ["architecture"])[0] in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: transformers.MambaForCausalLM(
                transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)
            ),
            "past_key_values",
        ),
        (
            lambda: transformers.BloomForCausalLM(
                transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
            ),
            "position_ids",
        ),
        (
            lambda: transformers.ViTModel(
                transformers.ViTConfig(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32
                )
            ),
            "pixel_values",
        ),
    ],
    ids=["mamba", "bloom", "vit"],
)
def test_models_without_such_a_graph_are_refused(
    tmp_path: Path, make: Callable[[], PreTrainedModel], reason: str
) -> None:
    model = make()
    save(model, tmp_path)
    with pytest.raises(UnavailableError, match=reason) as refused:
        export_onnx(tmp_path, tmp_path)
    assert type(model).__name__ in str(refused.value)
    assert "safetensors" in str(refused.value)
    assert not (tmp_path / MODEL_FILE).exists()


def test_a_checkpoint_that_lacks_a_weight(case: Callable[[str], Case], tmp_path: Path) -> None:
    model = shutil.copytree(case("mistral").model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        export_onnx(model, tmp_path)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="shape"):
        export_onnx(model, tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export_onnx(tmp_path, tmp_path)


def test_missing_packages_are_named_with_the_command(
    case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("onnxscript", "onnxruntime") else found(name)
    )
    made = case("llama")
    with pytest.raises(UnavailableError, match=r"onnxscript.*pip install 'dora-serve\[onnx\]'"):
        export_onnx(made.model, tmp_path)
    with pytest.raises(UnavailableError, match=r"onnxruntime.*pip install 'dora-serve\[onnx\]'"):
        check(made)
