"""The pool: adapters come, go, are replaced and pinned, and move between the device, the host's memory and the disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dora_serve.engine import Completion, Engine, Limits, Request
from dora_serve.errors import EngineError
from dora_serve.norm_scale_file import fingerprint, write_norm_scales
from dora_serve.stored_norm_scales import stored_norm_scales
from tests.cases import LINEARS, SIZES, adapt, llama, load, plan, quiet, rewrite_tensors, save
from tests.engine_oracle import Prompt, greedy, peft_model

PROMPT: Prompt = (1, 5, 9, 30)
COUNT = 8
NAMES = ("a", "b", "c", "d")
SIZE: Mapping[str, Any] = {**SIZES, "initializer_range": 0.3}
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class World:
    """root: its folders are the adapters. signatures: what PEFT answers with each of them; None: the base."""

    root: Path
    like: Any
    signatures: Mapping[str | None, tuple[int, ...]]

    def engine(self, *names: str, **options: Any) -> Engine:
        engine = Engine(load(self.root / "base", self.like), **options)
        for name in names:
            engine.pool.load(name, self.root / name)
        return engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four adapters of the same shapes, so that they take the same memory, and a LoRA of another."""
    root = tmp_path_factory.mktemp("pool")
    like = llama(**SIZE)
    save(like, root / "base")
    for number, name in enumerate(NAMES):
        adapt(like, root / name, target_modules=list(LINEARS), lora_alpha=24, use_dora=True)
        rewrite_tensors(root / name / WEIGHTS, lambda tensors, n=number: _turn(tensors, n))
    adapt(like, root / "small", target_modules=["q_proj", "v_proj"], r=2, lora_alpha=24)
    signatures = {
        name: greedy(peft_model(root / "base", None if name is None else root / name, like), PROMPT, COUNT).tokens
        for name in (None, *NAMES, "small")
    }
    assert len(set(signatures.values())) == 6
    return World(root, like, signatures)


def _turn(tensors: dict[str, Any], number: int) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor.roll(3 * number, 0)


def ask(engine: Engine, *names: str | None) -> Sequence[Completion]:
    return engine.complete([Request(PROMPT, adapter=name, max_tokens=COUNT, ignore_eos=True) for name in names])


def tokens(engine: Engine, name: str | None) -> tuple[int, ...]:
    (answer,) = ask(engine, name)
    assert answer.error is None
    return answer.token_ids


def tiers(engine: Engine) -> dict[str, str]:
    return {info.name: info.tier for info in engine.pool.list()}


# Loading and what a load reports


def test_a_load_says_what_it_did(world: World) -> None:
    engine = world.engine()
    report = engine.pool.load("a", world.root / "a")
    tensors = 2 * (16 * 4 * (16 + 16) + 4 * 16 * 4 + 3 * (4 * (16 + 24) * 4) + 2 * 24 * 4 + 16 * 4)
    assert (report.name, report.modules, report.method, report.rank) == ("a", 14, "DoRA", 4)
    assert report.nbytes == tensors, "float32 of A, B and a norm_scale on every module"
    assert report.changes_output
    assert not report.replaced
    assert engine.pool.load("a", world.root / "small", replace=True).replaced
    small = engine.pool.list()[0]
    assert (small.name, small.modules, small.method, small.rank) == ("a", 4, "LoRA", 2)
    assert (small.path, small.format, small.tier) == (world.root / "small", "peft", "device")
    assert small.nbytes == 4 * 2 * (16 + 16) * 4


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_was_never_trained_is_reported(world: World, tmp_path: Path, use_dora: bool) -> None:
    """As PEFT makes it: lora_B is zero, and a magnitude is the norm of the base's row."""
    with quiet():
        config = LoraConfig(r=4, target_modules=list(LINEARS), use_dora=use_dora)
        get_peft_model(llama(**SIZE), config).save_pretrained(tmp_path / "fresh")
    report = world.engine().pool.load("fresh", tmp_path / "fresh")
    assert report.modules == 14
    assert report.changes_output is False


def test_a_load_reports_what_it_is_at(world: World) -> None:
    stages: list[str] = []
    world.engine().pool.load("a", world.root / "a", on_progress=lambda progress: stages.append(progress.stage))
    assert stages == ["loading the adapter 'a'"]


def test_a_path_may_be_a_string(world: World) -> None:
    engine = world.engine()
    engine.pool.load("b", str(world.root / "b"))
    assert tokens(engine, "b") == world.signatures["b"]


def test_list_is_by_name_and_unload_forgets(world: World) -> None:
    engine = world.engine("c", "a", "b")
    assert [info.name for info in engine.pool.list()] == ["a", "b", "c"]
    assert "b" in engine.pool
    engine.pool.unload("b")
    assert "b" not in engine.pool
    assert [info.name for info in engine.pool.list()] == ["a", "c"]
    missing, other = ask(engine, "b", "a")
    (named,) = ask(engine, "base")
    assert str(named.error).endswith("Give None as the adapter for the base.")
    assert isinstance(missing.error, EngineError)
    assert (missing.finish_reason, missing.token_ids) == ("error", ())
    assert "'b'" in str(missing.error)
    assert "a, c" in str(missing.error)
    assert other.token_ids == world.signatures["a"]
    with pytest.raises(EngineError, match="no adapter 'b'"):
        engine.pool.unload("b")
    with pytest.raises(EngineError, match="no adapter 'b'"):
        engine.pool.pin("b")


def test_of_two_loads_of_one_name_at_once_one_fails(world: World) -> None:
    engine = world.engine()

    def attempt(folder: str) -> str | None:
        try:
            engine.pool.load("x", world.root / folder)
        except EngineError:
            return None
        return folder

    with ThreadPoolExecutor(4) as threads:
        loaded = [folder for folder in threads.map(attempt, NAMES) if folder is not None]
    assert len(loaded) == 1
    assert tokens(engine, "x") == world.signatures[loaded[0]]


# Tiers


def test_the_least_recently_used_moves_away_first(world: World) -> None:
    """And whatever tier one comes from, it answers as before."""
    engine = world.engine(*NAMES, device_limits=Limits(count=2), host_limits=Limits(count=1))
    assert tiers(engine) == {"a": "disk", "b": "host", "c": "device", "d": "device"}
    assert tokens(engine, "c") == world.signatures["c"]  # so that d is the least recently used
    assert tokens(engine, "a") == world.signatures["a"]
    assert tiers(engine) == {"a": "device", "b": "disk", "c": "device", "d": "host"}
    assert tokens(engine, "d") == world.signatures["d"]
    assert tiers(engine) == {"a": "device", "b": "disk", "c": "host", "d": "device"}
    for name in (*NAMES, *reversed(NAMES)):
        assert tokens(engine, name) == world.signatures[name]


@pytest.mark.parametrize(
    ("device", "host", "wanted"),
    [
        (2, 1, {"a": "disk", "b": "host", "c": "device", "d": "device"}),
        (3, 0, {"a": "disk", "b": "device", "c": "device", "d": "device"}),
        (1, None, {"a": "host", "b": "host", "c": "host", "d": "device"}),
        (None, None, {"a": "device", "b": "device", "c": "device", "d": "device"}),
    ],
)
def test_limits_in_bytes(world: World, device: int | None, host: int | None, wanted: dict[str, str]) -> None:
    """So many adapters' worth of bytes, less one more: the limit is what they may take, not what they must not."""
    size = world.engine().pool.load("a", world.root / "a").nbytes
    limits = [Limits(nbytes=None if count is None else count * size) for count in (device, host)]
    engine = world.engine(*NAMES, device_limits=limits[0], host_limits=limits[1])
    assert tiers(engine) == wanted
    if device is not None:
        engine = world.engine(device_limits=Limits(nbytes=device * size - 1), host_limits=limits[1])
        for name in NAMES[:device]:
            if device > 1:
                engine.pool.load(name, world.root / name)
            else:
                with pytest.raises(EngineError, match="no room on the device"):
                    engine.pool.load(name, world.root / name)
        assert sum(tier == "device" for tier in tiers(engine).values()) == device - 1


def test_one_that_is_larger_than_the_limit_is_refused(world: World) -> None:
    """Waiting would not help, and so a request does not."""
    engine = world.engine("small", device_limits=Limits(nbytes=1024))
    with pytest.raises(EngineError, match="no room on the device") as caught:
        engine.pool.load("a", world.root / "a")
    assert not caught.value.facts["full"]
    assert tiers(engine) == {"small": "device"}


def test_what_is_pinned_stays(world: World) -> None:
    engine = world.engine("a", device_limits=Limits(count=2), host_limits=Limits(count=0))
    engine.pool.pin("a")
    for name in ("b", "c", "d"):
        engine.pool.load(name, world.root / name)
    assert tiers(engine) == {"a": "device", "b": "disk", "c": "disk", "d": "device"}
    engine.pool.pin("b")  # which brings it from the disk
    assert tiers(engine) == {"a": "device", "b": "device", "c": "disk", "d": "disk"}
    assert [info.name for info in engine.pool.list() if info.pinned] == ["a", "b"]
    before = engine.pool.list()
    with pytest.raises(EngineError, match="in use or pinned are a, b"):
        engine.pool.load("e", world.root / "small")
    with pytest.raises(EngineError, match="in use or pinned are a, b"):
        engine.pool.pin("c")
    (refused,) = ask(engine, "c")
    assert refused.finish_reason == "error"
    assert [(info.name, info.tier, info.pinned, info.in_use) for info in engine.pool.list()] == [
        (info.name, info.tier, info.pinned, 0) for info in before
    ]
    engine.pool.pin("a", False)
    assert tokens(engine, "c") == world.signatures["c"]
    assert tiers(engine) == {"a": "disk", "b": "device", "c": "device", "d": "disk"}
    assert engine.pool.load("b", world.root / "a", replace=True).replaced
    assert [info.name for info in engine.pool.list() if info.pinned] == ["b"], "the name is pinned, not the files"


def test_what_is_in_use_stays(world: World) -> None:
    """A request that finds no room waits for it, and others pass it."""
    engine = world.engine("a", "b", "c", device_limits=Limits(count=1))
    names = ("a", "b", None, "a", "c", "b")
    answers = ask(engine, *names)
    assert [answer.token_ids for answer in answers] == [world.signatures[name] for name in names]
    assert all(answer.error is None for answer in answers)
    with engine.pool.lease("a"):
        with pytest.raises(EngineError, match="in use or pinned are a") as caught:
            engine.pool.load("d", world.root / "d")
        assert caught.value.facts["full"]
        assert tiers(engine)["a"] == "device"
    engine.pool.load("d", world.root / "d")
    assert tiers(engine) == {"a": "host", "b": "host", "c": "host", "d": "device"}


def test_a_thread_does_not_wait_for_what_it_reads_itself(world: World) -> None:
    """A generation that is half read by the thread that asks for another: nobody would ever read on."""
    engine = world.engine("a", "b", device_limits=Limits(count=1))
    half = engine.generate([Request(PROMPT, adapter="a", max_tokens=COUNT, ignore_eos=True)])
    next(half)
    stuck, base = ask(engine, "b", None)
    assert "this same thread has read in part" in str(stuck.error)
    assert base.token_ids == world.signatures[None]
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(ask, engine, "b")  # another thread waits, since this one reads on
        tokens_of_a = [event.token_id for event in half if event.token_id is not None]
        (answer,) = waiting.result(60)
    assert len(tokens_of_a) == COUNT - 1
    assert answer.token_ids == world.signatures["b"]
    assert tokens(engine, "a") == world.signatures["a"]


# Files that change


def _on_disk(world: World, folder: Path) -> Engine:
    """An engine that knows the copy `folder` of the adapter a, and has nothing of it in memory."""
    shutil.copytree(world.root / "a", folder)
    engine = world.engine(device_limits=Limits(count=1), host_limits=Limits(count=0))
    engine.pool.load("mine", folder)
    engine.pool.load("b", world.root / "b")
    assert tiers(engine) == {"b": "device", "mine": "disk"}
    return engine


def test_files_that_changed_are_noticed(world: World, tmp_path: Path) -> None:
    """An answer of another adapter than the one that was loaded would be a wrong answer."""
    engine = _on_disk(world, tmp_path / "mine")
    shutil.copy(world.root / "c" / WEIGHTS, tmp_path / "mine" / WEIGHTS)
    changed, other = ask(engine, "mine", "b")
    assert isinstance(changed.error, EngineError)
    assert "have changed" in str(changed.error)
    assert other.token_ids == world.signatures["b"]
    engine.pool.load("mine", tmp_path / "mine", replace=True)
    assert tokens(engine, "mine") == world.signatures["c"]


def test_files_that_are_gone_are_noticed(world: World, tmp_path: Path) -> None:
    engine = _on_disk(world, tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine")
    gone, other = ask(engine, "mine", "b")
    assert gone.finish_reason == "error"
    assert str(tmp_path / "mine") in str(gone.error)
    assert other.token_ids == world.signatures["b"]
    assert all(info.in_use == 0 for info in engine.pool.list())


def test_files_that_changed_while_they_were_loaded_are_noticed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer saves at the very moment: after the weights were read, and before the load is done."""
    folder = tmp_path / "mine"
    shutil.copytree(world.root / "a", folder)
    engine = world.engine(device_limits=Limits(count=1), host_limits=Limits(count=0))
    probe = engine.pool._probe

    def save_meanwhile(adapter: Any) -> float:
        shutil.copy(world.root / "c" / WEIGHTS, folder / WEIGHTS)
        assert probe is not None
        return probe(adapter)

    monkeypatch.setattr(engine.pool, "_probe", save_meanwhile)
    engine.pool.load("mine", folder)
    assert tokens(engine, "mine") == world.signatures["a"]
    monkeypatch.undo()
    engine.pool.load("b", world.root / "b")
    (answer,) = ask(engine, "mine")
    assert answer.error is not None or answer.token_ids == world.signatures["a"]


# While requests run


def test_a_running_request_keeps_the_adapter_that_was_replaced(world: World) -> None:
    """To its last token; the next one, of the same list, gets the new one."""
    engine = world.engine("a")
    request = Request(PROMPT, adapter="a", max_tokens=COUNT, ignore_eos=True)
    generation = engine.generate([request, request], max_rows=1)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for event in generation:
        if event.token_id is not None:
            seen[event.index].append(event.token_id)
        if event.index == 0 and len(seen[0]) == 3 and event.token_id is not None:
            engine.pool.load("a", world.root / "b", replace=True)
    assert seen == {0: list(world.signatures["a"]), 1: list(world.signatures["b"])}
    assert engine.pool.list()[0].in_use == 0


def test_a_replaced_adapter_that_still_runs_counts_as_in_use(world: World) -> None:
    """As AdapterInfo has it: requests with an earlier one of its name included."""
    engine = world.engine("a")
    generation = engine.generate([Request(PROMPT, adapter="a", max_tokens=COUNT, ignore_eos=True)])
    next(generation)
    engine.pool.load("a", world.root / "b", replace=True)
    assert engine.pool.list()[0].in_use == 1
    generation.close()
    assert engine.pool.list()[0].in_use == 0


def test_one_in_use_is_not_unloaded(world: World) -> None:
    engine = world.engine("a", "b")
    generation = engine.generate([Request(PROMPT, adapter="a", max_tokens=COUNT, ignore_eos=True)] * 2)
    made = [next(generation) for _ in range(3)]
    before = engine.pool.list()
    with pytest.raises(EngineError, match="2 requests are using it") as caught:
        engine.pool.unload("a")
    assert caught.value.facts["in_use"] == 2
    assert engine.pool.list() == before
    engine.pool.unload("b")
    made += list(generation)
    for index in range(2):
        assert tuple(e.token_id for e in made if e.index == index and e.token_id is not None) == world.signatures["a"]
    engine.pool.unload("a")
    assert engine.pool.list() == ()


def test_a_load_that_fails_does_not_touch_what_runs(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.root / "a", tmp_path / "corrupt")
    (tmp_path / "corrupt" / WEIGHTS).write_bytes(b"\xff" * 1000)
    engine = world.engine("a")
    generation = engine.generate([Request(PROMPT, adapter="a", max_tokens=COUNT, ignore_eos=True)])
    made = [next(generation)]
    for name, replace in (("new", False), ("a", True)):
        with pytest.raises(Exception, match=WEIGHTS):
            engine.pool.load(name, tmp_path / "corrupt", replace=replace)
    made += list(generation)
    assert tuple(event.token_id for event in made if event.token_id is not None) == world.signatures["a"]


def test_loading_under_way_holds_nobody_up_and_nothing_is_left(world: World) -> None:
    """Threads that lease, and the device has room for one: each waits no longer than for the lease before."""
    engine = world.engine(*NAMES, device_limits=Limits(count=2), host_limits=Limits(count=1))

    def lease(number: int) -> bool:
        name = NAMES[number % 4]
        try:
            with engine.pool.lease(name) as prepared:
                return prepared.name == name and all(
                    torch.isfinite(one.lora_A).all() for one in prepared.modules.values()
                )
        except EngineError as error:
            return bool(error.facts.get("full"))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lease, range(400)))
    assert all(info.in_use == 0 for info in engine.pool.list())
    found = list(tiers(engine).values())
    assert found.count("device") <= 2
    assert found.count("host") <= 1


def test_room_that_comes_free_while_a_request_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another generation ends between the refusal and the question whether waiting has a point: it had."""
    engine = world.engine("a", "b", device_limits=Limits(count=1))
    acquire, refused = engine.pool.acquire, []

    def acquire_while_another_ends(name: str) -> Any:
        if refused:
            return acquire(name)
        refused.append(name)
        _, release = acquire("a")
        try:
            return acquire(name)
        finally:
            release()

    monkeypatch.setattr(engine.pool, "acquire", acquire_while_another_ends)
    (answer,) = ask(engine, "b")
    assert refused == ["b"]
    assert answer.error is None
    assert answer.token_ids == world.signatures["b"]


def test_norm_scales_beside_an_adapter_are_taken_for_the_base_they_were_made_for_alone(
    world: World, tmp_path: Path
) -> None:
    base = world.root / "base"
    scales = stored_norm_scales(plan(base, world.root / "a"))
    doubled = {name: 2 * scale for name, scale in scales.items()}
    cases = {
        "known": (scales, fingerprint(base)),
        "wrong": (doubled, fingerprint(base)),  # it is believed, so that its being read shows
        "other": (doubled, "0" * 64),
    }
    for name, (values, made_for) in cases.items():
        write_norm_scales(shutil.copytree(world.root / "a", tmp_path / name), values, made_for)
    answers = {}
    engine = Engine(load(base, world.like), files=base)
    for name in cases:
        engine.pool.load(name, tmp_path / name)
        (completion,) = ask(engine, name)
        answers[name] = tuple(completion.token_ids)
    assert answers["known"] == answers["other"] == world.signatures["a"]
    assert answers["wrong"] != world.signatures["a"]
    fresh = world.engine()  # which knows nothing of files
    fresh.pool.load("wrong", tmp_path / "wrong")
    assert tuple(ask(fresh, "wrong")[0].token_ids) == world.signatures["a"]
