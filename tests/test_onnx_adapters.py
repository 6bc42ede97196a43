"""Adapters swapped on exported bases: onnxruntime's own switch against PEFT's unmerged forward, on tiny models."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import psutil
import pytest
import torch
import transformers
from onnx.external_data_helper import load_external_data_for_model
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.torch import load_file, save_file

from dora_serve.errors import AdapterError, CheckpointError, PlanError, UnavailableError
from dora_serve.formats import read_adapter
from dora_serve.onnx_engine.adapters import Switch, Tables, read_adapter_file
from exporters.onnx.check.answers import token_inputs
from exporters.onnx.export import export_onnx
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.weight_blocks import weight_blocks
from exporters.onnx_adapters.adapter_file import SlottedBase, open_slotted, write_adapter
from exporters.onnx_adapters.check import check_swap
from exporters.onnx_adapters.export import put_slots, require_one_graph
from exporters.onnx_adapters.options import SlotOptions, Which
from tests.cases import adapt, merge_to, rewrite_tensors, vary
from tests.onnx_models import GROUPED, MODELS, ONE
from tests.onnx_swap import Swap, activate, make, open_session, peft_logits, read_arrays, run, slotted, write_arrays

PROMPTS = [np.random.default_rng(length).integers(3, 96, length).tolist() for length in (2, 6, 11, 17)]
SAMPLES = token_inputs(PROMPTS)

# Models of tests.onnx_models, whose traces serve both, and the modules that are adapted.
ADAPTED: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "qwen2": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "rank_pattern": {"k_proj": 2}},
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj"], "use_rslora": True},
    "gemma3": {"target_modules": "all-linear"},
    "opt": {"target_modules": ["q_proj", "v_proj", "fc1", "fc2"]},
    "mixtral": {"target_modules": ["q_proj", "o_proj"]},
    "bert_classifier": {"target_modules": ["query", "value", "dense"]},
}


@pytest.fixture(scope="module")
def swaps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Swap]:
    """Each model of ADAPTED with a LoRA and a DoRA, exported once. Read only."""

    @cache
    def get(name: str) -> Swap:
        torch.manual_seed(0)
        config = ADAPTED[name]
        adapters = {"lora": {**config, "r": 3}, "dora": {**config, "r": 5, "use_dora": True}}
        which: Which = "all" if name.startswith("bert") else "layers"  # for its pooler
        return make(vary(MODELS[name]()), tmp_path_factory.mktemp("swap"), adapters, SlotOptions(which))

    return get


def relative(got: Any, wanted: torch.Tensor) -> float:
    """The root mean square of the differences, in units of the wanted values'."""
    difference = torch.from_numpy(np.asarray(got)).double() - wanted.double()
    return float(difference.square().mean().sqrt() / wanted.double().square().mean().sqrt())


# A dot product of `in` terms in float32 errs by some sqrt(in) spacings of 6e-8 in the root of the mean square, and a
# layer passes on what the last one erred. A fault, such as another scaling, is 1e-2 and more.
FLOAT32 = 32 * sqrt(48) * 2**-24


@pytest.mark.parametrize("name", ADAPTED)
def test_swapped_on_one_session_is_peft_unmerged(name: str, swaps: Callable[[str], Swap]) -> None:
    swap = swaps(name)
    onnx.checker.check_model(str(swap.base.path), full_check=True)
    session = open_session(swap.base.path)
    answers = {adapter: peft_logits(swap, adapter, PROMPTS) for adapter in (None, "lora", "dora")}
    for adapter in (None, "dora", "lora", None, "dora"):
        options = activate(None if adapter is None else swap.file(adapter))
        rows = [run(session, [prompt], options)[0] for prompt in PROMPTS]
        if not name.startswith("bert"):  # whose padding is on the right
            rows += run(session, PROMPTS, options)
        for number, got in enumerate(rows):
            for other, wanted in answers.items():
                distance = relative(got, wanted[number % len(PROMPTS)])
                assert distance < FLOAT32 if other == adapter else distance > 100 * FLOAT32


def test_the_check_passes_and_sees_each_planted_fault(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")

    def check(file: Path, adapter: str = "dora") -> Any:
        return check_swap(swap.base, file, swap.model, read_adapter(swap.adapters[adapter]), SAMPLES, greedy_tokens=4)

    sound = check(swap.file("dora"))
    assert sound.failures == ()
    assert sound.kl < 1e-8
    assert sound.greedy_equal == sound.greedy_total == len(PROMPTS)
    assert sound.without_magnitude_max_abs > 100 * sound.tolerance
    assert sound.layers == sound.layers_equal == len(swap.base.table.slots)

    def fault(name: str, change: Callable[[str, Any], Any]) -> Any:
        return check(with_changed(swap.file("dora"), tmp_path / name, change))

    ignored = fault("ignored", lambda key, value: 0 * value if "lora_B" in key else value**0)
    assert any("adapter ignored" in failure for failure in ignored.failures)
    assert not fault("magnitude", lambda key, value: value**0 if "norm_scale" in key else value).passed
    assert not fault("scaling", lambda key, value: 1.1 * value if "lora_B" in key else value).passed
    one = "model.layers.1.self_attn.k_proj.norm_scale"
    one_lost = fault("one layer", lambda key, value: value**0 if key == one else value)
    assert any(f"1 of {sound.layers} layers" in failure for failure in one_lost.failures)
    assert not check(swap.file("lora")).passed


def with_changed(source: Path, target: Path, change: Callable[[str, Any], Any]) -> Path:
    """A copy of an adapter file with other tensors."""
    arrays = read_arrays(source)
    return write_arrays({key: np.ascontiguousarray(change(key, value)) for key, value in arrays.items()}, target)


def test_a_thousand_swaps_of_ten_ranks_stay_right_and_memory_flat(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"target_modules": "all-linear"}
    adapters = {f"rank {r}": {**config, "r": r, "use_dora": r % 2 == 0} for r in range(1, 11)}
    swap = make(vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE))), tmp_path, adapters)
    session, prompts = open_session(swap.base.path), PROMPTS[1:2]
    truth = {name: peft_logits(swap, name, prompts)[0] for name in adapters}
    chooser, loaded, process = random.Random(0), {}, psutil.Process()
    for name in adapters:
        loaded[name] = onnxruntime.LoraAdapter()
        loaded[name].Load(str(swap.file(name)))
    memory = 0
    for turn in range(1000):
        name = chooser.choice(list(adapters))
        if turn % 10 == 0:  # loaded anew, too
            loaded[name] = onnxruntime.LoraAdapter()
            loaded[name].Load(str(swap.file(name)))
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        options.add_active_adapter(loaded[name])
        assert relative(run(session, prompts, options)[0], truth[name]) < FLOAT32
        if turn == 300:
            gc.collect()
            memory = process.memory_info().rss
    gc.collect()
    # An adapter of rank 10 has 50 kB here, so that 700 of them that were kept would be 35 MB.
    assert process.memory_info().rss - memory < 10 << 20


def test_merged_and_swapped_give_the_same_tokens(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")
    merge_to(swap.model, swap.adapters["dora"], tmp_path / "merged")
    (tmp_path / "onnx").mkdir()
    merged = open_session(export_onnx(tmp_path / "merged", tmp_path / "onnx").path)
    base, options = open_session(swap.base.path), activate(swap.file("dora"))
    for prompt in PROMPTS:
        texts = []
        for session, chosen in ((merged, None), (base, options)):
            tokens = list(prompt)
            for _ in range(8):
                tokens.append(int(run(session, [tokens], chosen)[0][-1].argmax()))
            texts.append(tokens)
        assert texts[0] == texts[1]


def test_a_model_that_classifies_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = {"target_modules": "all-linear", "use_dora": True}
    swap = make(vary(MODELS["vit"]()), tmp_path, {"dora": adapter}, SlotOptions("all"))
    pictures = torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = [{"pixel_values": picture} for picture in pictures]
    found = check_swap(swap.base, swap.file("dora"), swap.model, read_adapter(swap.adapters["dora"]), samples)
    assert found.failures == ()
    assert found.effect_max_abs > 100 * found.tolerance


# Embeddings, heads, and which layers get a slot


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_swap_too(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE, tie_word_embeddings=tied)))
    config = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True}
    swap = make(model, tmp_path, {"dora": config}, SlotOptions(which="all"))
    assert {"model.embed_tokens", "lm_head"} < set(swap.base.table.slots)
    session = open_session(swap.base.path)
    for name in (None, "dora"):
        options = activate(None if name is None else swap.file(name))
        got = [run(session, [prompt], options)[0] for prompt in PROMPTS]
        assert all(relative(*pair) < FLOAT32 for pair in zip(got, peft_logits(swap, name, PROMPTS), strict=True))


def test_a_head_without_a_slot_is_refused_by_name(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")
    assert swap.base.table.without == ("lm_head", "model.embed_tokens")
    start = swap.kind.from_pretrained(swap.model)  # type: ignore[attr-defined]
    adapt(start, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with pytest.raises(PlanError, match="lm_head") as refused:
        write_adapter(read_adapter(tmp_path / "adapter"), swap.base, tmp_path / "out")
    assert "--slots all" in str(refused.value)
    assert not (tmp_path / "out").exists()


# Quantized graphs


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_slots_on_a_quantized_graph_take_norms_over_its_own_numbers(
    bits: int, symmetric: bool, swaps: Callable[[str], Swap], tmp_path: Path
) -> None:
    base = quantized(swaps("llama"), tmp_path, bits, symmetric)
    swap = swaps("llama")
    q_proj = base.linears["model.layers.0.self_attn.q_proj"]
    assert q_proj.storage == "packed"
    served = torch.cat([rows for _, rows in weight_blocks(q_proj)])
    # The oracle is the operator itself: the rows of the identity through it are the columns of the weight.
    assert torch.allclose(served.float(), _through_the_operator(base, "model.layers.0.self_attn.q_proj"), atol=1e-6)
    file = tmp_path / "dora.onnx_adapter"
    write_adapter(read_adapter(swap.adapters["dora"]), base, file)
    found = check_swap(base, file, swap.model, read_adapter(swap.adapters["dora"]), SAMPLES, greedy_tokens=2)
    assert found.failures == ()
    assert found.reference == "dequantized"
    assert found.exact_kl is not None
    assert found.exact_kl < 1e-8
    assert found.layers == found.layers_equal > 0
    lost = with_changed(file, tmp_path / "lost", lambda key, value: value**0 if "norm_scale" in key else value)
    judged = check_swap(base, lost, swap.model, read_adapter(swap.adapters["dora"]), SAMPLES, greedy_tokens=2)
    assert any("another thing than the unmerged" in failure for failure in judged.failures)
    # A file whose norms were taken over the weights before they were quantized is another one.
    scales = [read_arrays(path) for path in (file, swap.file("dora"))]
    name = "model.layers.0.self_attn.q_proj.norm_scale"
    assert np.abs(scales[0][name] - scales[1][name]).max() > 1e-5
    with pytest.raises(PlanError, match="another export"):
        read_adapter_file(swap.file("dora"), base.table)


def quantized(swap: Swap, folder: Path, bits: int, symmetric: bool) -> SlottedBase:
    """The model of `swap`, exported, quantized by onnxruntime's own tool, and given slots."""
    dense = onnx.load(str(swap.dense / MODEL_FILE))
    quantizer = MatMulNBitsQuantizer(dense, bits=bits, block_size=16, is_symmetric=symmetric, accuracy_level=1)
    quantizer.process()
    (folder / "packed").mkdir()
    quantizer.model.save_model_to_file(str(folder / "packed" / "model.onnx"), use_external_data_format=True)
    put_slots(folder / "packed" / "model.onnx", None, SlotOptions())
    return open_slotted(folder / "packed")


def _through_the_operator(base: SlottedBase, module: str) -> torch.Tensor:
    node = base.linears[module].nodes[0]
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape([None, None]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    values = {value.name: value for value in node.inputs[1:] if value is not None}
    copies = {
        name: onnx_ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        for name, value in values.items()
    }
    call = onnx_ir.node(
        "MatMulNBits",
        [x, *(None if value is None else copies[value.name] for value in node.inputs[1:])],
        attributes=dict(node.attributes),
        domain="com.microsoft",
    )
    call.outputs[0].name = "y"
    call.outputs[0].type = x.type
    graph = onnx_ir.Graph(
        [x],
        [call.outputs[0]],
        nodes=[call],
        initializers=list(copies.values()),
        opset_imports={"": 21, "com.microsoft": 1},
    )
    model = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10))
    load_external_data_for_model(model, str(base.path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    width = base.linears[module].in_features
    (out,) = session.run(None, {"x": np.eye(width, dtype=np.float32)})
    return torch.from_numpy(out.T.copy())


# Mixed batches


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_rows_of_one_run_have_an_adapter_each(name: str, swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps(name)
    base = slotted(swap.dense, tmp_path / "mixed", SlotOptions(mixed=True))
    onnx.checker.check_model(str(base.path), full_check=True)
    session, tables = open_session(base.path), Tables(base.table)
    files = {}
    for adapter in ("lora", "dora"):
        files[adapter] = tmp_path / adapter
        write_adapter(read_adapter(swap.adapters[adapter]), base, files[adapter])
    loaded = {adapter: read_adapter_file(path, base.table) for adapter, path in files.items()}
    slots: dict[str | None, int] = {None: 0, **{adapter: tables.fill(file) for adapter, file in loaded.items()}}

    def compare(rows: list[str | None]) -> None:
        got = run(session, PROMPTS, None, tables.feeds([slots[row] for row in rows]))
        for number, row in enumerate(rows):
            assert relative(got[number], peft_logits(swap, row, PROMPTS)[number]) < FLOAT32
            other = peft_logits(swap, "dora" if row is None else None, PROMPTS)[number]
            assert relative(got[number], other) > 100 * FLOAT32

    compare([None, "lora", "dora", "lora"])
    # Slots are replaced and emptied between runs.
    tables.replace(slots["lora"], loaded["dora"])
    tables.replace(slots["dora"], None)
    slots = {None: slots["dora"], "dora": slots["lora"]}
    compare(["dora", None, None, "dora"])
    with pytest.raises(IndexError):
        tables.replace(0, loaded["dora"])


# What is refused


def test_an_adapter_of_another_base_is_refused_here_and_by_onnxruntime(
    swaps: Callable[[str], Swap], tmp_path: Path
) -> None:
    swap = swaps("llama")
    torch.manual_seed(5)
    other = make(
        vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), 9),
        tmp_path,
        {"lora": {"target_modules": "all-linear"}},
    )
    with pytest.raises(PlanError, match="another export"):
        read_adapter_file(other.file("lora"), swap.base.table)
    with pytest.raises(Exception, match=r"Invalid input name: base_sha256\."):
        run(open_session(swap.base.path), PROMPTS[:1], activate(other.file("lora")))


def test_a_rank_above_a_fixed_one(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")
    base = slotted(swap.dense, tmp_path / "fixed", SlotOptions(rank=4))
    write_adapter(read_adapter(swap.adapters["lora"]), base, tmp_path / "lora")  # of rank 3, padded
    got = run(open_session(base.path), PROMPTS[:1], activate(tmp_path / "lora"))
    assert relative(got[0], peft_logits(swap, "lora", PROMPTS[:1])[0]) < FLOAT32
    with pytest.raises(PlanError, match="rank 5, wanted at most 4") as refused:
        write_adapter(read_adapter(swap.adapters["dora"]), base, tmp_path / "dora")
    assert "--slot-rank 5" in str(refused.value)
    assert not (tmp_path / "dora").exists()


def test_every_tensor_is_used_or_named(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")
    start = swap.kind.from_pretrained(swap.model)  # type: ignore[attr-defined]
    adapt(
        start,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [3, 5]},
    )
    with pytest.raises(PlanError) as refused:
        write_adapter(read_adapter(tmp_path / "adapter"), swap.base, tmp_path / "out")
    subjects = {problem.subject for problem in refused.value.problems}
    assert subjects == {"lm_head.weight", "model.embed_tokens"}
    assert "--to onnx" in str(refused.value)


def test_modules_that_the_graph_does_not_have(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in swap.adapters["lora"].iterdir():
        if path.name != "adapter_model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(swap.adapters["lora"] / "adapter_model.safetensors")
    save_file(
        {key.replace("layers.1.", "layers.7."): value for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(PlanError, match="no such layer in the graph") as refused:
        write_adapter(read_adapter(folder), swap.base, tmp_path / "out")
    assert len(refused.value.problems) == 7
    assert "model.layers.0" in str(refused.value.problems[0].hint)


def test_a_file_with_half_a_slot_or_a_slot_too_many(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")
    arrays = read_arrays(swap.file("lora"))
    del arrays["model.layers.0.self_attn.q_proj.norm_scale"]
    arrays["model.layers.9.mlp.lora_A"] = np.zeros((2, 2), np.float32)
    write_arrays(arrays, tmp_path / "half")
    with pytest.raises(PlanError) as refused:
        read_adapter_file(tmp_path / "half", swap.base.table)
    assert {problem.subject for problem in refused.value.problems} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.9.mlp.lora_A",
    }


def set_version(data: bytearray) -> None:
    root = int.from_bytes(data[:4], "little")
    layout = root - int.from_bytes(data[root : root + 4], "little", signed=True)
    place = root + int.from_bytes(data[layout + 4 : layout + 6], "little")
    data[place : place + 4] = (7).to_bytes(4, "little")


def set_rank(data: bytearray) -> None:
    """Of a tensor, so that it would reach far beyond the file. ONNX Runtime itself reads there, and is no more."""
    place = data.index(np.array([32, 3], dtype=np.int64).tobytes())
    data[place + 8 : place + 16] = np.array([1 << 40], dtype=np.int64).tobytes()


DAMAGE: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "empty": (bytearray.clear, "it is empty"),
    "another file": (lambda data: data.__setitem__(slice(None), b"no adapter at all"), "does not begin as one does"),
    "its beginning alone": (lambda data: data.__delitem__(slice(9, None)), "ends too early"),
    "cut": (lambda data: data.__delitem__(slice(len(data) // 2, None)), "ends too early"),
    "another version": (set_version, "format version 7"),
    "a shape beyond the file": (set_rank, "is said to have the shape"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_our_words(damage: str, swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap, (spoil, said) = swaps("llama"), DAMAGE[damage]
    data = bytearray(swap.file("lora").read_bytes())
    spoil(data)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(
        AdapterError, match=f"is no adapter file of ONNX Runtime, or a damaged one: .*{said}"
    ) as refused:
        read_adapter_file(tmp_path / "file", swap.base.table)
    assert "dora-export onnx-adapter" in str(refused.value)


def test_no_flipped_byte_ends_the_process(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    """What passes is loaded by ONNX Runtime, and run."""
    swap, chooser, passed = swaps("llama"), random.Random(0), 0
    session, whole = open_session(swap.base.path), swap.file("dora").read_bytes()
    for turn in range(400):
        data = bytearray(whole)
        # Most of the file is values; what says where they are begins and ends it, and lies between them.
        for _ in range(1 + turn % 3):
            data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        (tmp_path / "file").write_bytes(data)
        try:
            switch = Switch(read_adapter_file(tmp_path / "file", swap.base.table))
            run(session, PROMPTS[:1], switch.options())
            passed += 1
        except (AdapterError, PlanError):
            pass
    assert 100 < passed < 400


def test_what_is_no_exported_base(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as refused:
        open_slotted(tmp_path)
    assert "--to onnx-adapters" in str(refused.value)
    (tmp_path / "model.onnx").write_text("not a graph")
    with pytest.raises(CheckpointError):
        open_slotted(tmp_path)
    model = onnx.load(str(swaps("llama").base.path), load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(CheckpointError, match="no adapter slots"):
        open_slotted(tmp_path)


def test_a_magnitude_over_a_row_of_zeros(swaps: Callable[[str], Swap], tmp_path: Path) -> None:
    swap = swaps("llama")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in swap.adapters["dora"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if "layers.1.mlp.down_proj.lora_magnitude" in key)
        tensors[key][0] = float("inf")

    rewrite_tensors(folder / "adapter_model.safetensors", spoil)
    with pytest.raises((PlanError, AdapterError)):
        write_adapter(read_adapter(folder), swap.base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_a_model_of_several_graphs_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(UnavailableError, match=f"{architecture} is exported as several graphs"):
        require_one_graph(architecture)
