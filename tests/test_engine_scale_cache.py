"""Norm scales that are kept: what was loaded before answers as PEFT does, and nothing is taken for another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_serve.engine import Engine, Request, factors
from dora_serve.engine.scale_cache import ScaleCache
from tests.cases import LINEARS, SIZES, adapt, llama, rewrite_tensors, save
from tests.engine_oracle import Prompt, greedy, peft_model

PROMPT: Prompt = (1, 5, 9, 30)
COUNT = 12
SIZE: Mapping[str, Any] = {**SIZES, "initializer_range": 0.3}


@dataclass
class World:
    """A base and a DoRA in folders of their own, and how often scales were computed."""

    root: Path
    computed: list[int]

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def answers(self, **options: Any) -> tuple[int, ...]:
        """The greedy tokens of a new engine, and a load that computed or did not."""
        engine = Engine.load(self.root / "base", scale_cache=self.cache, **options)
        engine.pool.load("dora", self.root / "dora")
        (answer,) = engine.complete([Request(PROMPT, adapter="dora", max_tokens=COUNT, ignore_eos=True)])
        return answer.token_ids

    def wanted(self) -> tuple[int, ...]:
        return greedy(peft_model(self.root / "base", self.root / "dora", llama(**SIZE)), PROMPT, COUNT).tokens

    def took_them(self) -> bool:
        """Whether a load takes what is kept; it answers as PEFT does either way."""
        before = len(self.computed)
        assert self.answers() == self.wanted()
        return len(self.computed) == before


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    model = llama(**SIZE)
    save(model, tmp_path / "base")
    adapt(model, tmp_path / "dora", target_modules=list(LINEARS), lora_alpha=24, use_dora=True)
    computed: list[int] = []
    compute = factors._norm_scales_of_one_shape

    def counted(*given: Any) -> Any:
        computed.append(1)
        return compute(*given)

    monkeypatch.setattr(factors, "_norm_scales_of_one_shape", counted)
    return World(tmp_path, computed)


def test_what_was_computed_once_is_taken(world: World) -> None:
    assert not world.took_them()
    assert world.took_them()
    (path,) = world.cache.iterdir()
    weights = load_file(world.root / "dora" / "adapter_model.safetensors")
    rows = sum(len(tensor) for name, tensor in weights.items() if "magnitude" in name)
    assert path.stat().st_size == 32 + 4 * rows


def test_another_adapter_or_base_has_its_own(world: World) -> None:
    def turn(tensors: dict[str, torch.Tensor], what: str) -> None:
        for name in [name for name in tensors if what in name]:
            tensors[name] = tensors[name].roll(1, 0)

    weights = world.root / "dora" / "adapter_model.safetensors"
    config = world.root / "dora" / "adapter_config.json"
    assert not world.took_them()
    for part in ("lora_A", "lora_B", "magnitude"):
        rewrite_tensors(weights, lambda tensors, part=part: turn(tensors, part))
        assert not world.took_them(), part
        assert world.took_them()
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 8}))
    assert not world.took_them()
    rewrite_tensors(world.root / "base" / "model.safetensors", lambda tensors: turn(tensors, "q_proj"))
    assert not world.took_them()
    os.utime(world.root / "base" / "model.safetensors", ns=(1, 1))  # a change that no sample would show
    assert not world.took_them()
    before = len(world.computed)
    world.answers(dtype=torch.bfloat16)
    assert len(world.computed) > before
    assert world.took_them()


def test_the_same_bytes_in_another_dtype_have_their_own(world: World) -> None:
    """A file whose header alone says otherwise: float16 read as bfloat16 is another adapter."""

    def turn(tensors: dict[str, torch.Tensor], label: Callable[[torch.Tensor], torch.Tensor]) -> None:
        tensors.update({name: label(tensor) for name, tensor in tensors.items() if "lora_A" in name})

    weights = world.root / "dora" / "adapter_model.safetensors"
    rewrite_tensors(weights, lambda tensors: turn(tensors, torch.Tensor.half))
    assert not world.took_them()
    rewrite_tensors(weights, lambda tensors: turn(tensors, lambda tensor: tensor.view(torch.bfloat16)))
    assert not world.took_them()
    assert world.took_them()


def test_every_tensor_is_known_by_its_dtype_and_shape(tmp_path: Path) -> None:
    cache = ScaleCache(tmp_path, lambda: "base")
    values = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    alike = [values, values.view(torch.bfloat16), values.reshape(3, 2), values.flatten()]
    assert len({cache.key([("layer", [tensor])]) for tensor in alike}) == len(alike)
    assert cache.key([("layer", [values])]) == cache.key([("layer", [values.clone()])])


@pytest.mark.parametrize("damage", ["bit", "short", "long", "empty", "folder"])
def test_a_damaged_file_says_nothing(world: World, damage: str) -> None:
    assert not world.took_them()
    (path,) = world.cache.iterdir()
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        data[100] ^= 1
        path.write_bytes({"bit": data, "short": data[:-4], "long": data + b"\0\0\0\0", "empty": b""}[damage])
    assert not world.took_them()
    assert world.took_them() == (damage != "folder")
    assert not [left for left in world.cache.iterdir() if left.name.startswith(".")]


def test_a_cache_that_cannot_be_written_is_no_obstacle(world: World) -> None:
    world.cache.write_text("a file")
    assert not world.took_them()
    assert not world.took_them()


def test_the_folder_may_be_a_string(world: World) -> None:
    engine = Engine.load(world.root / "base", scale_cache=str(world.cache))
    engine.pool.load("dora", world.root / "dora")
    assert len(list(world.cache.iterdir())) == 1


def test_without_a_folder_nothing_is_written(world: World) -> None:
    engine = Engine.load(world.root / "base")
    engine.pool.load("dora", world.root / "dora")
    assert engine.base.kept is None
    assert sorted(path.name for path in world.root.iterdir()) == ["base", "dora"]


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = ScaleCache(tmp_path / "cache", lambda: "base", most_bytes=300)
    like = {"x": (torch.float32, 16)}
    for number, key in enumerate("abc"):
        cache.put(key, {"x": torch.full((16,), float(number))})
        os.utime(tmp_path / "cache" / key, ns=(number + 1, number + 1))
    assert torch.equal(cache.get("a", like)["x"], torch.zeros(16))  # and is the one that was used last
    cache.put("d", {"x": torch.full((16,), 3.0)})
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["a", "c", "d"]
    assert cache.get("b", like) == {}
