"""Whatever lies in an adapter's folder: reading it and planning its merge ends in an adapter or in an error of ours,
soon, and within the memory of its files.

`FUZZ_SECONDS=600 pytest tests/test_formats_fuzz.py` goes on for longer than the 20 seconds of a usual run.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dora_serve.adapter import Adapter, LazyTensor
from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.errors import AdapterError, DoraServeError
from dora_serve.formats import FORMATS, ReadOptions, read_adapter
from dora_serve.resolve import plan_merge
from exporters.convert.meaning import needs_base, plain
from tests.cases import llama, rewrite_json
from tests.cases import save as save_model

SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))
EXAMPLES = 100
"""Of a round, each of which has a seed of its own."""

SLACK = 100 << 20
"""What reading may take above the size of its files."""

LIMIT_SECONDS = 20.0
"""A hang takes for ever; an example takes milliseconds, on a machine with others' work a few more."""

FILES = ("adapter_model.safetensors", "adapters.safetensors", "model_state_dict.safetensors", "x.safetensors")
FILES += ("pytorch_lora_weights.safetensors", "checkpoint/model.safetensors", "model.safetensors")
FILES += ("adapter_model.bin", "adapter_model.pt", "prune_state_dict.pt", "non_lora_trainables.bin", "adapters.npz")
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.embed_tokens", "lm_head")
MODULES += ("layers.0.attn.q_proj", "layers.0.mlp.w1", "output", "lora_unet_down_blocks_0_to_q", "lora_te1_a_0_b")
MODULES += ("lycoris_model_layers_0_self_attn_q_proj", "decoder.layers.0.self_attention.linear_qkv", "unet.mid.to_q")
MODULES += ("decoder.layers.0.mlp.linear_fc1", "text_encoder.a.to_out", "model.layers.0.mlp.switch_mlp.gate_proj", "")
MODULES += ("model.layers.0.mlp.experts", "a", "..", "model.model.layers.0.self_attn.q_proj", "\N{SNOWMAN}.b")
LEAVES = ("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector")
LEAVES += ("lora_embedding_A", "lora_embedding_B", "lora_B.bias", "lora_E", "lora_A", "lora_B", "ranknum", "weight")
LEAVES += ("weight_m_wdecomp.weight", "lora_a", "lora_b", "m", "lora_a.weight", "lora_b.weight", "magnitude", "alpha")
LEAVES += ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "dora_scale", "hada_w1_a", "lora.up.weight")
LEAVES += ("lora.down.weight", "to_q_lora.up.weight", "dora_layer.lora_A.weight", "dora_layer.lora_B.weight", "bias")
LEAVES += ("magnitude_layer.magnitude", "lora_AB.0.weight", "lora_AB.1.weight", "lora_a_linear.weight", "lora_scaler")
LEAVES += ("lora_b_linear.weight", "linear.weight", "adapter.linear_in.weight", "adapter.linear_out.weight")
LEAVES += ("adapter.weight_magnitude", "modules_to_save.default.weight", "token_adapter.trainable_tokens_delta", "")
KEYS = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
KEYS += ("modules_to_save", "bias", "target_parameters", "trainable_token_indices", "layer_replication", "use_bdlora")
KEYS += ("fine_tune_type", "lora_parameters", "num_layers", "lora_layers", "model", "init_r", "init_lora_weights")
KEYS += ("Wdecompose_target_modules", "enable_lora", "base_model_name_or_path", "alora_invocation_tokens", "other")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)

plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([1e400, -1e308, float("nan"), 10**400, 0.5, "", "LORA", "DORA", "ADALORA", "dora", "lora", "full"]),
    st.sampled_from(["all", "lora_only", "none", "pissa", "q_proj", "(", "(a+)+b", "\x00", "a" * 3000]),
)
values = st.recursive(
    plain_values,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["rank", "scale", "alpha", "keys", "q_proj", "nblocks"]), inner, max_size=4),
    ),
    max_leaves=8,
)
likely = st.fixed_dictionaries(
    {},
    optional={
        "peft_type": st.sampled_from(["LORA", "DORA", "ADALORA"]),
        "r": st.integers(1, 4),
        "lora_alpha": st.integers(0, 8),
        "use_dora": st.booleans(),
        "init_r": st.integers(1, 4),
        "fine_tune_type": st.sampled_from(["lora", "dora", "full"]),
        "lora_parameters": st.fixed_dictionaries({"rank": st.integers(1, 4), "scale": st.floats(0, 4)}),
    },
)
configs = st.one_of(st.dictionaries(st.sampled_from(KEYS), values, max_size=6), likely, likely)
sizes = st.one_of(st.integers(0, 4), st.sampled_from([4, 4, 16, 16, 40]))
shapes = st.one_of(st.lists(sizes, max_size=4), st.sampled_from([[4, 16], [16, 4], [16], [16, 1], [1, 16], []]))
tensors = st.dictionaries(
    st.tuples(
        st.sampled_from(["", "", "base_model.model.", "model."]), st.sampled_from(MODULES), st.sampled_from(LEAVES)
    ).map(lambda parts: f"{parts[0]}{parts[1]}.{parts[2]}"),
    st.tuples(shapes, st.sampled_from(DTYPES), st.sampled_from([0, 1, 1, 1, "nan"])),
    max_size=8,
)
texts = st.sampled_from(["", "{}", "[]", "nan", "-1", "0", "{" * 2000, '{"unet.r": 4}'])
metadata = st.dictionaries(
    st.sampled_from(["format", "lora_adapter_metadata", "ot_branch", "ot_config", "dora_norm_eps"]),
    st.one_of(texts, configs.map(json.dumps)),
    max_size=3,
)
damage = st.one_of(
    *(st.none() for _ in range(6)),
    st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 4000), st.integers(0, 255)),
)
options = st.builds(
    ReadOptions,
    allow_pickle=st.booleans(),
    format=st.one_of(st.none(), st.none(), st.none(), st.sampled_from(sorted(FORMATS))),
    lora_alpha=st.sampled_from([None, 2.0, 2.0, "rank"]),
    magnitudes=st.sampled_from([None, None, "norm", "norm-scale"]),
    norm_eps=st.sampled_from([None, 0.0]),
)


A, B, M = ([4, 16], torch.float32, 1), ([16, 4], torch.float32, 1), ([16], torch.float32, 1)
Q = "model.layers.0.self_attn.q_proj"
PEFT = {f"base_model.model.{Q}.lora_A.weight": A, f"base_model.model.{Q}.lora_B.weight": B}
KOHYA = {"lora_te_model_layers_0_self_attn_q_proj.lora_down.weight": A}
KOHYA |= {"lora_te_model_layers_0_self_attn_q_proj.lora_up.weight": B}
PARAMETERS = {"rank": 4, "scale": 2.0}
SOUND: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("adapter_model.safetensors", PEFT, {"peft_type": "LORA", "r": 4}),
    (
        "adapter_model.safetensors",
        {**PEFT, f"base_model.model.{Q}.lora_magnitude_vector": M},
        {"peft_type": "LORA", "r": 4, "use_dora": True},
    ),
    (
        "adapter_model.safetensors",
        {**PEFT, f"base_model.model.{Q}.weight_m_wdecomp.weight": ([16, 1], torch.float32, 1)},
        {"peft_type": "DORA", "r": 4, "lora_alpha": 8},
    ),
    (
        "adapter_model.safetensors",
        {f"base_model.model.{Q}.lora_{x}": shape for x, shape in (("A", A), ("B", B), ("E", ([4, 1], *A[1:])))},
        {"peft_type": "ADALORA", "init_r": 6},
    ),
    (
        "adapters.safetensors",
        {f"{Q}.lora_a": B, f"{Q}.lora_b": A, f"{Q}.m": M},
        {"fine_tune_type": "dora", "lora_parameters": PARAMETERS},
    ),
    ("adapters.npz", {f"{Q}.lora_a": B, f"{Q}.lora_b": A}, {"lora_layers": 4, "lora_parameters": PARAMETERS}),
    ("x.safetensors", {**KOHYA, "lora_te_model_layers_0_self_attn_q_proj.dora_scale": ([1, 16], *A[1:])}, {}),
    ("pytorch_lora_weights.safetensors", {f"unet.{Q}.lora.down.weight": A, f"unet.{Q}.lora.up.weight": B}, {}),
    (
        "model_state_dict.safetensors",
        {
            f"{Q}.dora_layer.lora_A.weight": A,
            f"{Q}.dora_layer.lora_B.weight": B,
            f"{Q}.magnitude_layer.magnitude": M,
        },
        {},
    ),
    ("model.safetensors", {f"model.{Q}.lora_a_linear.weight": A, f"model.{Q}.lora_b_linear.weight": B}, {}),
    (
        "adapter_model.safetensors",
        {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B},
        {"r": 4, "lora_alpha": 8},
    ),
    (
        "x.safetensors",
        {
            "decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight": A,
            "decoder.layers.0.self_attention.linear_proj.adapter.linear_out.weight": B,
        },
        {},
    ),
)
"""An adapter of each format that fits the base, to be spoilt a little."""


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Any, Any]:
    """A file, its tensors and a configuration: anything, or what is nearly sound."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(FILES)), draw(tensors), draw(st.one_of(st.none(), configs))
    file, described, config = draw(st.sampled_from(SOUND))
    described, config = dict(described), dict(config)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        how = draw(st.sampled_from(["drop", "shape", "dtype", "fill", "add", "key", "config"]))
        name = draw(st.sampled_from(sorted(described))) if described else "a"
        shape, dtype, fill = described.get(name, A)
        if how == "drop":
            described.pop(name, None)
        elif how == "add":
            described |= draw(tensors)
        elif how == "key":
            config[draw(st.sampled_from(KEYS))] = draw(values)
        elif how == "config":
            config = draw(configs)
        else:
            shape = draw(shapes) if how == "shape" else shape
            dtype = draw(st.sampled_from(DTYPES)) if how == "dtype" else dtype
            described[name] = (shape, dtype, draw(st.sampled_from([0, "nan"])) if how == "fill" else fill)
    return file, described, config or None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ShardedCheckpoint:
    """Without the name of an architecture: transformers would be asked in a process of its own, time and again."""
    folder = save_model(llama(), tmp_path_factory.mktemp("base") / "base")
    rewrite_json(folder / "config.json", architectures=None, model_type=None)
    return open_checkpoint(folder)


def build(described: Mapping[str, tuple[list[int], torch.dtype, int | str]]) -> dict[str, torch.Tensor]:
    made = {}
    for number, (name, (shape, dtype, fill)) in enumerate(described.items()):
        generator = torch.Generator().manual_seed(number)
        tensor = torch.randn(shape, generator=generator) * (1 if fill == "nan" else float(fill))
        if fill == "nan" and tensor.numel():
            tensor.view(-1)[0] = torch.nan
        made[name] = tensor.to(dtype)
    return made


def write(folder: Path, file: str, described: Any, header: dict[str, str], harm: Any, config: Any) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    made = build(described)
    if file.endswith(".safetensors"):
        data = bytearray(save(made, header))
        if harm is not None:
            kind, at, byte = harm
            at %= max(1, len(data))
            data[at:] = {"flip": bytes([byte]) + data[at + 1 :], "cut": b"", "insert": bytes([byte]) + data[at:]}[kind]
        (folder / file).write_bytes(data)
    elif file.endswith(".npz"):
        arrays = {name.replace("\x00", "_") or "_": value for name, value in made.items()}
        with (folder / file).open("wb") as target:
            np.savez(target, **{name: value.float().numpy() for name, value in arrays.items()})  # type: ignore[arg-type]
    else:
        state: Any = {"finally_mask_dict": made} if "prune" in file else made
        torch.save(state if harm is None else list(made.values()), folder / file)
    if config is not None:
        text = json.dumps(config)
        (folder / "adapter_config.json").write_text(text if harm is None or harm[1] % 2 else text[: len(text) // 2])


def every_tensor(adapter: Adapter) -> Iterator[LazyTensor]:
    for module in adapter.modules:
        found = (module.lora_A, module.lora_B, module.magnitude, module.lora_bias)
        yield from (tensor for tensor in found if tensor is not None)
    yield from (change.tensor for change in adapter.replacements)
    yield from (rows.rows for rows in adapter.token_rows)


def exercise(path: Path, read: ReadOptions, checkpoint: ShardedCheckpoint) -> None:
    """Everything that may meet such files: only errors of ours come out."""
    adapter = read_adapter(path, read)
    for tensor in every_tensor(adapter):
        loaded = tensor.load()
        assert tuple(loaded.shape) == tensor.shape
        assert loaded.dtype == tensor.dtype
    if needs_base(adapter) is None:
        plain(adapter, None)
    plan_merge(checkpoint, adapter)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_only_errors_of_ours(base: ShardedCheckpoint, tmp_path: Path) -> None:
    started, outcomes = time.monotonic(), {"read": 0, "refused": 0}
    folder = tmp_path / "adapter"

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(), metadata, damage, options, st.integers(0, 4))
    def fuzz(case: tuple[str, Any, Any], header: Any, harm: Any, read: ReadOptions, as_a_file: int) -> None:
        file, described, config = case
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(folder, file, described, header, harm, config)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        before, begun = peak_bytes(), time.monotonic()
        try:
            exercise(folder if as_a_file else folder / file, read, base)
            outcomes["read"] += 1
        except DoraServeError:
            outcomes["refused"] += 1
        assert time.monotonic() - begun < LIMIT_SECONDS
        assert peak_bytes() - before <= size + SLACK

    rounds = 0
    while rounds == 0 or time.monotonic() - started < SECONDS:
        seed(rounds + int(os.environ.get("FUZZ_SEED", "0")))(fuzz)()
        rounds += 1
    print(f"{rounds * EXAMPLES} examples: {outcomes}")
    assert outcomes["refused"] > 20
    assert outcomes["read"] > 20


def test_a_bomb_of_zeros_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "adapters.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (100000000, 4), }"
        archive.writestr("model.layers.0.a.lora_a.npy", header.ljust(127) + b"\n" + bytes(400 << 20))
    before = peak_bytes()
    with pytest.raises(AdapterError, match="unpacks to"):
        read_adapter(tmp_path, ReadOptions(lora_alpha="rank"))
    assert peak_bytes() - before < SLACK


def test_a_pattern_that_would_never_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "rank_pattern": {"(a+)+b": 3}}))
    with pytest.raises(AdapterError, match="repeat"):
        read_adapter(tmp_path)
