"""ONNX export against transformers and ONNX Runtime, on tiny seeded models."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from dora_serve.errors import CheckpointError, UnavailableError
from exporters.onnx.architectures import architecture_of
from exporters.onnx.check.answers import token_inputs
from exporters.onnx.check.check import check_onnx
from exporters.onnx.empty_model import fake_mode, is_fake
from exporters.onnx.export import export_onnx
from exporters.onnx.options import OnnxOptions
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.skeleton import DATA_FILE
from tests.onnx_models import (
    CAUSAL,
    GROUPED,
    MODELS,
    OF_PICTURES,
    OUTPUTS,
    PROMPTS,
    SEVERAL,
    SIZES,
    VISION,
    VOCABULARY,
    Case,
    cases,
    check,
    samples,
    save,
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cases(tmp_path_factory.mktemp("models"))


# What is exported


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_agrees_with_torch(case: Callable[[str], Case], name: str) -> None:
    made = case(name)
    layers = transformers.AutoConfig.from_pretrained(made.model).num_hidden_layers
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    assert made.graph.inputs == (
        "input_ids",
        "attention_mask",
        *(("position_ids",) if name != "bloom" else ()),
        *(f"past_key_values.{part}" for part in parts),
    )
    assert made.graph.outputs == ("logits", *(f"present.{part}" for part in parts))
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
    tokens = ("input_ids", "attention_mask", *(("token_type_ids",) if name.startswith("bert") else ()))
    assert made.graph.inputs == (("pixel_values",) if name in OF_PICTURES else tokens)
    assert made.graph.outputs == OUTPUTS[name]
    report = check_onnx(made.onnx, made.model, samples(name))
    assert report.failures == ()
    assert report.decode_max_abs is None
    assert report.greedy_total == 0
    assert (report.kl is None) == (name == "bert")


@pytest.mark.parametrize("name", sorted(SEVERAL))
def test_several_graphs_agree_with_torch_and_share_their_weights(case: Callable[[str], Case], name: str) -> None:
    made = case(name)
    assert tuple(graph.file for graph in made.export.graphs) == SEVERAL[name]
    report = check_onnx(made.onnx, made.model, samples(name))
    assert report.failures == ()
    assert report.top1 == 1.0
    assert report.greedy_equal == report.greedy_total == 3
    assert report.decode_max_abs is not None
    assert report.initializers == report.initializers_equal > 0
    stored = sum(tensor.nbytes for tensor in load_file(made.model / "model.safetensors").values())
    assert (made.onnx / DATA_FILE).stat().st_size < 1.1 * stored


def test_an_encoder_decoder_generates_what_transformers_does(case: Callable[[str], Case]) -> None:
    """The loop of a user: the encoder once, then the decoder, on an empty past first and always with the states."""
    made = case("bart")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.model, dtype=torch.float32)
    ids = np.array([[5, 9, 11, 13, 7, 2], [8, 4, 2, 0, 0, 0]])
    mask = (ids != 0).astype(np.int64)
    wanted = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
        num_beams=1,
        forced_eos_token_id=None,
        suppress_tokens=None,
    )
    encoder, decoder = (
        onnxruntime.InferenceSession(made.onnx / file, providers=["CPUExecutionProvider"]) for file in SEVERAL["bart"]
    )
    (states,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    names = [each.name for each in decoder.get_inputs()[3:]]
    past = {name: np.zeros((2, 4, 0, 8), np.float32) for name in names}
    tokens = np.full((2, 1), model.generation_config.decoder_start_token_id)
    found = [tokens]
    for _ in range(9):
        fed = {"input_ids": tokens, "encoder_attention_mask": mask, "encoder_hidden_states": states, **past}
        logits, *present = decoder.run(None, fed)
        logits[:, -1, 2] = -np.inf  # as min_new_tokens has it
        tokens, past = logits[:, -1].argmax(-1)[:, None], dict(zip(names, present, strict=True))
        found.append(tokens)
    assert np.concatenate(found, axis=1).tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "bloom"])
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
        for each in session.get_inputs()
        if each.name.startswith("past_key_values")
    }
    found = []
    for _ in range(count):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        fed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = session.run(None, {name: fed[name] for name in made.graph.inputs})
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
        empty = {name: np.zeros((1, 2, 0, 8), np.float32) for name in made.graph.inputs[3:]}
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
    assert made.graph.nodes == len(model.graph.node)
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= {node.op_type for node in model.graph.node}
    assert tuple(each.name for each in model.graph.input) == made.graph.inputs
    assert tuple(each.name for each in model.graph.output) == made.graph.outputs
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


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_keys_are_not_repeated_for_the_heads_that_share_them(case: Callable[[str], Case], name: str) -> None:
    """Nor is a rotation's cosine computed for each layer. That the answers are right, the other tests show."""
    graph = onnx.load(case(name).onnx / MODEL_FILE, load_external_data=False).graph
    sizes = {
        value.name: [size.dim_value or None for size in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert attentions
    for node in attentions:
        heads = [sizes[name][1] for name in node.input[:3]]
        assert heads == [GROUPED["num_attention_heads"], *[GROUPED["num_key_value_heads"]] * 2]
    assert sum(node.op_type == "Cos" for node in graph.node) == 1


def test_nothing_without_values_is_left_behind() -> None:
    """BEiT keeps a table from call to call, of whichever model asks first."""
    table = BeitRelativePositionBias.generate_relative_position_index
    assert not is_fake(table((2, 2)))
    with fake_mode() as mode, mode:
        assert is_fake(table((2, 2)))
    assert not is_fake(table((2, 2)))


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
    export = export_onnx(model, tmp_path, OnnxOptions(opset=20))
    assert export.opset == 20
    assert check(Case(model, tmp_path, export)).failures == ()
    with pytest.raises(UnavailableError, match="opset 99"):
        export_onnx(model, tmp_path, OnnxOptions(opset=99))


def test_nothing_is_printed_and_stages_are_told(
    case: Callable[[str], Case], tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = case("mistral").model
    capfd.readouterr()
    recwarn.clear()
    level, told = logging.getLogger("torch.onnx").level, list[str]()
    export_onnx(model, tmp_path, OnnxOptions(cache=None), on_progress=told.append)
    check_onnx(tmp_path, model, token_inputs(PROMPTS[1:2]), greedy_tokens=2, on_progress=told.append)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert logging.getLogger("torch.onnx").level == level
    assert [message.split()[0] for message in told] == ["tracing", "writing", "checking", "running", "running"]


# What is refused


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["BartForSequenceClassification"], "is_encoder_decoder": True}, "those that generate"),
        ({"architectures": ["DetrForObjectDetection"]}, "not one of"),
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


ROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}


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
            lambda: transformers.Qwen2VLForConditionalGeneration(
                transformers.Qwen2VLConfig(
                    text_config={**GROUPED, "num_hidden_layers": 1, "rope_scaling": ROPE},
                    vision_config={"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 8},
                )
            ),
            "positions in three axes",
        ),
        (
            lambda: transformers.Wav2Vec2Model(
                transformers.Wav2Vec2Config(
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    conv_dim=(8,),
                    conv_stride=(5,),
                    conv_kernel=(10,),
                    num_feat_extract_layers=1,
                    num_conv_pos_embeddings=16,
                    num_conv_pos_embedding_groups=2,
                )
            ),
            "input_values",
        ),
        (
            lambda: transformers.CLIPModel(
                transformers.CLIPConfig(text_config={**SIZES}, vision_config={**VISION}, projection_dim=8)
            ),
            "cannot trace it",
        ),
    ],
    ids=["mamba", "qwen2_vl", "wav2vec2", "clip"],
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
    made = case("llama")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("onnxscript", "onnxruntime") else found(name)
    )
    with pytest.raises(UnavailableError, match=r"onnxscript.*pip install 'dora-serve\[onnx\]'"):
        export_onnx(made.model, tmp_path)
    with pytest.raises(UnavailableError, match=r"onnxruntime.*pip install 'dora-serve\[onnx\]'"):
        check(made)
