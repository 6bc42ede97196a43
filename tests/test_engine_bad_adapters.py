"""Adapters that cannot be served are refused with the reason, and a load that fails changes nothing."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_serve.engine import Engine, Limits, Request
from dora_serve.errors import AdapterError, DoraServeError, EngineError, PlanError
from tests.cases import adapt, llama, load, read_tensors, rewrite_json, rewrite_tensors, save

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class World:
    """root: the base, and of every kind of adapter a folder."""

    root: Path
    like: Any


CONFIGS: Mapping[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "token_rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    "rank_9": {"target_modules": ["q_proj"], "r": 9},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("bad")
    like = llama(attention_bias=True)
    save(like, root / "base")
    for name, config in CONFIGS.items():
        adapt(like, root / name, **config)
    adapt(llama(attention_bias=True, hidden_size=32), root / "other_size", target_modules=["q_proj", "down_proj"])
    adapt(llama(attention_bias=True, num_hidden_layers=3), root / "other_depth", target_modules=["q_proj"])
    return World(root, like)


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder / WEIGHTS, change)


def _fill(name: str, value: float) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors[name].view(-1)[3].fill_(value))


def _cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def _cancel_a_row(folder: Path) -> None:
    """W + s B A is zero in one row: there s B A is -W, with the base's row as one row of A."""
    row = read_tensors(folder.parent / "base")["model.layers.0.self_attn.q_proj.weight"][2]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q0}.lora_A.weight"][0] = row
        tensors[f"{Q0}.lora_B.weight"][2] = torch.tensor([-1.0, 0, 0, 0])

    rewrite_json(folder / CONFIG, lora_alpha=4)
    rewrite_tensors(folder / WEIGHTS, change)


def _no_magnitudes(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "magnitude" in name]:
        del tensors[name]


@dataclass(frozen=True)
class Bad:
    """kind: which of the folders is spoiled, and by what. said: what the error says, among more."""

    name: str
    kind: str
    error: type[DoraServeError]
    said: str
    spoil: Callable[[Path], object] = lambda _: None

    def __str__(self) -> str:
        return self.name


BAD = (
    Bad("no files", "dora", AdapterError, "bad", lambda folder: (shutil.rmtree(folder), folder.mkdir())),
    Bad("no folder", "dora", DoraServeError, "does not exist", shutil.rmtree),
    Bad("garbage", "dora", AdapterError, WEIGHTS, lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 999)),
    Bad("empty file", "dora", AdapterError, WEIGHTS, lambda folder: (folder / WEIGHTS).write_bytes(b"")),
    Bad("huge header", "dora", AdapterError, WEIGHTS, lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60))),
    Bad("truncated", "dora", AdapterError, WEIGHTS, _cut),
    Bad("no json", "dora", AdapterError, CONFIG, lambda folder: (folder / CONFIG).write_text("{")),
    Bad("other json", "dora", AdapterError, CONFIG, lambda folder: (folder / CONFIG).write_text(json.dumps([1]))),
    Bad("unknown method", "dora", AdapterError, "IA3", lambda folder: rewrite_json(folder / CONFIG, peft_type="IA3")),
    Bad("NaN in A", "dora", AdapterError, "lora_A", _fill(f"{Q0}.lora_A.weight", torch.nan)),
    Bad("infinite B", "dora", AdapterError, "lora_B", _fill(f"{Q0}.lora_B.weight", torch.inf)),
    Bad("NaN magnitude", "dora", AdapterError, "magnitude", _fill(f"{Q0}.lora_magnitude_vector", torch.nan)),
    Bad("a tensor is missing", "dora", AdapterError, "q_proj", _tensors(lambda t: t.pop(f"{Q0}.lora_B.weight"))),
    Bad("DoRA without magnitudes", "dora", AdapterError, "magnitude", _tensors(_no_magnitudes)),
    Bad("a row that cancels", "dora", PlanError, "layers.0.self_attn.q_proj", _cancel_a_row),
    Bad("another size", "other_size", PlanError, "another size"),
    Bad("more layers", "other_depth", PlanError, "layers.2.self_attn.q_proj"),
    Bad("a rank above the limit", "rank_9", PlanError, "rank 9"),
    Bad("a saved head", "saved_head", PlanError, "lm_head.weight: got a whole trained tensor"),
    Bad("a saved norm", "norms", PlanError, "norm.weight: got a whole trained tensor"),
    Bad("token rows", "token_rows", PlanError, "embed_tokens: got trained token rows"),
    Bad("trained biases", "biases", PlanError, "q_proj.bias: got a trained bias"),
    Bad("parameters", "parameters", PlanError, "up_proj: got LoRA on a parameter"),
)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_adapter_changes_nothing(bad: Bad, world: World, tmp_path: Path) -> None:
    """Whether it comes under a new name or is to replace one, and although it would have pushed others out."""
    shutil.copytree(world.root / bad.kind, tmp_path / "bad")
    shutil.copytree(world.root / "base", tmp_path / "base")
    bad.spoil(tmp_path / "bad")
    engine = Engine(load(tmp_path / "base", world.like), max_rank=8, device_limits=Limits(count=1))
    engine.pool.load("good", world.root / "dora")
    before, answer = engine.pool.list(), _answer(engine)
    for name, replace in (("bad", False), ("bad", True), ("good", True)):
        with pytest.raises(bad.error, match=re.escape(bad.said)) as caught:
            engine.pool.load(name, tmp_path / "bad", replace=replace)
        assert caught.value.remedy
    assert engine.pool.list() == before
    assert _answer(engine) == answer
    assert _answer(engine, None) != answer


@pytest.mark.parametrize(
    ("name", "said"), [("", "cannot be called"), ("base", "the base's name"), ("good", "an adapter 'good' already")]
)
def test_a_name_that_cannot_be_had(world: World, name: str, said: str) -> None:
    engine = Engine(load(world.root / "base", world.like))
    engine.pool.load("good", world.root / "dora")
    before = engine.pool.list()
    with pytest.raises(EngineError, match=said):
        engine.pool.load(name, world.root / "rank_9")
    assert engine.pool.list() == before


def test_all_that_is_wrong_is_said_at_once(world: World, tmp_path: Path) -> None:
    """Not the first of it."""
    engine = Engine(load(world.root / "base", world.like))
    with pytest.raises(PlanError) as caught:
        engine.pool.load("bad", world.root / "other_size")
    assert len(caught.value.problems) == 4
    adapt(world.like, tmp_path / "both", target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    with pytest.raises(PlanError) as caught:
        engine.pool.load("bad", tmp_path / "both")
    assert len(caught.value.problems) == 6, "the head and, as PEFT goes by the end of a name, all five norms"


def test_a_saved_embedding_that_is_the_bases_own_is_no_change(world: World, tmp_path: Path) -> None:
    """PEFT saves it along with an adapter on it; were it another one, that would be a trained tensor."""
    adapt(world.like, tmp_path / "saved", target_modules=["embed_tokens"], saving={"save_embedding_layers": True})
    tensors = read_tensors(tmp_path / "saved")
    name = next(name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    engine = Engine(load(world.root / "base", world.like))
    assert engine.pool.load("saved", tmp_path / "saved").modules == 1
    rewrite_tensors(tmp_path / "saved" / WEIGHTS, lambda tensors: tensors[name][3].add_(0.01))
    with pytest.raises(PlanError, match=r"embed_tokens\.weight: got a whole trained tensor"):
        engine.pool.load("trained", tmp_path / "saved")


def _answer(engine: Engine, adapter: str | None = "good") -> tuple[float, ...]:
    request = Request((1, 5, 9, 30), adapter=adapter, max_tokens=6, ignore_eos=True)
    return engine.complete([request])[0].logprobs
