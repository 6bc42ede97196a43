"""No request is answered by another adapter: 1,000 requests on 12 adapters from several threads, while others load,
unload and replace these, and the tiers have room for half of them.
"""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from dora_serve.engine import Completion, Engine, Generation, Limits, Request
from dora_serve.engine.factors import PreparedAdapter
from dora_serve.errors import EngineError
from tests.cases import LINEARS, SIZES, adapt, llama, load, rewrite_tensors, save
from tests.engine_oracle import Prompt, greedy, peft_model
from tests.step_recorder import record

NAMES = tuple(f"adapter {number}" for number in range(12))
FLEETING = NAMES[9:]
"""These are unloaded now and then; the others are only replaced, so that a request for one is always answered."""
PROMPTS: tuple[Prompt, ...] = ((1, 5, 9), (4, 39, 11, 30, 6, 21, 5, 2), (12,))
COUNT = 6
SIZE: Mapping[str, Any] = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2}


@dataclass(frozen=True)
class World:
    """versions: the two folders of each adapter. signatures: what PEFT answers to a prompt, by folder (None: base)."""

    base: Path
    like: Any
    versions: Mapping[str, tuple[Path, Path]]
    signatures: Mapping[tuple[Path | None, Prompt], tuple[int, ...]]

    def engine(self, **options: Any) -> Engine:
        """Six adapters fit on the device, three more in the host's memory."""
        limits = {"device_limits": Limits(count=6), "host_limits": Limits(count=3)}
        engine = Engine(load(self.base, self.like), max_rows=4, **limits, **options)
        for name in NAMES:
            engine.pool.load(name, self.versions[name][0])
        return engine

    def is_own(self, request: Request, answer: Completion) -> bool:
        """Whether it is the answer of one of the versions of the adapter that was asked for."""
        assert isinstance(request.prompt, tuple)
        folders = (None,) if request.adapter is None else self.versions[request.adapter]
        return answer.token_ids in [self.signatures[folder, request.prompt] for folder in folders]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """24 adapters, half of them DoRA, of different ranks."""
    root = tmp_path_factory.mktemp("isolation")
    model = llama(**SIZE)
    base = save(model, root / "base")
    versions = {name: (root / f"{name} a", root / f"{name} b") for name in NAMES}
    signatures: dict[tuple[Path | None, Prompt], tuple[int, ...]] = {}
    for number, folder in enumerate([None, *(folder for pair in versions.values() for folder in pair)]):
        if folder is not None:
            config = {"r": 4 + number % 5, "lora_alpha": 24, "use_dora": number % 2 == 1}
            adapt(model, folder, target_modules=list(LINEARS), **config)
            rewrite_tensors(folder / "adapter_model.safetensors", lambda tensors, n=number: _turn(tensors, n))
        unmerged = peft_model(base, folder, model)
        for prompt in PROMPTS:
            signatures[folder, prompt] = greedy(unmerged, prompt, COUNT).tokens
    for prompt in PROMPTS:
        assert len({tokens for (_, asked), tokens in signatures.items() if asked == prompt}) == 1 + 2 * len(NAMES)
    return World(base, model, versions, signatures)


def _turn(tensors: dict[str, Any], number: int) -> None:
    """Make another adapter of one: `adapt` draws the same numbers every time."""
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor.roll(5 * number, 0)


@dataclass
class Tally:
    """What happened, counted by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


def ask(world: World, engine: Engine, seed: int, batches: int, tally: Tally) -> None:
    """Batches of ten requests. Only an adapter that is unloaded at times may be missing; nothing else goes wrong."""
    rng = random.Random(seed)
    for _ in range(batches):
        requests = [
            Request(rng.choice(PROMPTS), adapter=rng.choice((None, *NAMES)), max_tokens=COUNT, ignore_eos=True)
            for _ in range(10)
        ]
        for request, answer in zip(requests, engine.complete(requests), strict=True):
            if answer.error is not None:
                assert request.adapter in FLEETING, answer.error
                assert "There is no adapter" in str(answer.error), answer.error
                tally.add("missing")
                continue
            assert world.is_own(request, answer), (request, answer.token_ids)
            tally.add("answered")


def patiently(action: Callable[[], object], stop: threading.Event) -> None:
    """Do it as soon as the device has room."""
    while not stop.is_set():
        try:
            action()
        except EngineError as error:
            if not error.facts.get("full"):
                raise
            stop.wait(0.002)
        else:
            return


def replace(world: World, engine: Engine, tally: Tally, stop: threading.Event) -> None:
    rng = random.Random("replace")
    while not stop.is_set():
        name = rng.choice(NAMES[:9])
        patiently(lambda: engine.pool.load(name, rng.choice(world.versions[name]), replace=True), stop)  # noqa: B023
        tally.add("replaced")


def come_and_go(world: World, engine: Engine, tally: Tally, stop: threading.Event) -> None:
    rng = random.Random("come and go")
    while not stop.is_set():
        name = rng.choice(FLEETING)
        try:
            engine.pool.unload(name)
        except EngineError as error:
            if not error.facts.get("in_use"):
                raise
            tally.add("kept")
            stop.wait(0.001)
            continue
        tally.add("unloaded")
        patiently(lambda: engine.pool.load(name, rng.choice(world.versions[name])), stop)  # noqa: B023


def watch(engine: Engine, tally: Tally, stop: threading.Event) -> None:
    while not stop.wait(0.005):
        infos = engine.pool.list()
        tiers = Counter(info.tier for info in infos)
        resting = [
            info.name for info in infos if info.tier == "host" and not info.in_use
        ]  # the others are on their way
        assert tiers["device"] <= 6, tiers
        assert len(resting) <= 3, tiers
        for tier in tiers:
            tally.add(f"seen on {tier}")


def run(world: World, engine: Engine, seed: int, tally: Tally, batches: Sequence[int] = (13, 13, 12, 12)) -> None:
    """500 requests from four threads, with three others about them."""
    stop = threading.Event()
    with ThreadPoolExecutor(7) as threads:
        about = [
            threads.submit(replace, world, engine, tally, stop),
            threads.submit(come_and_go, world, engine, tally, stop),
            threads.submit(watch, engine, tally, stop),
        ]
        asking = [threads.submit(ask, world, engine, seed + place, count, tally) for place, count in enumerate(batches)]
        try:
            for future in asking:
                future.result(timeout=240)
        finally:
            stop.set()
        for future in about:
            future.result(timeout=60)


def test_every_answer_is_that_of_its_adapter(world: World) -> None:
    """And at the end nothing is held: no lease, no adapter that was replaced, no memory.

    The bound on memory: half of what the second half would add, were an adapter kept for every load of it.
    """
    gc.collect()
    others = [thing for thing in gc.get_objects() if type(thing) is PreparedAdapter]  # of other tests' engines
    engine = world.engine()
    size = max(info.nbytes for info in engine.pool.list())
    process, first, second = psutil.Process(), Tally(), Tally()
    run(world, engine, 100, first)
    gc.collect()
    before = process.memory_info().rss
    run(world, engine, 200, second)
    gc.collect()
    grown = process.memory_info().rss - before
    counts = first.counts + second.counts
    assert counts["answered"] + counts["missing"] == 1000
    assert counts["answered"] > 700
    for what in ("replaced", "unloaded", "kept", "seen on device", "seen on host", "seen on disk"):
        assert counts[what] > 20, counts
    assert [info.name for info in engine.pool.list() if info.in_use] == []
    alive = Counter(type(thing) for thing in gc.get_objects())
    assert alive[PreparedAdapter] - len(others) <= 9, "device and host hold so many"
    assert alive[Generation] == 0
    assert grown < (second.counts["replaced"] + second.counts["unloaded"]) * size / 2


def test_recorded_steps_answer_as_their_adapters_do(world: World) -> None:
    """Rows whose adapters are others at every step of somebody's, each generation with a cache of its own."""
    gc.collect()
    others = [thing for thing in gc.get_objects() if type(thing) is PreparedAdapter]
    engine, tally = world.engine(record_steps=record), Tally()
    run(world, engine, 300, tally, (5, 4, 4, 3))
    assert tally.counts["answered"] + tally.counts["missing"] == 160
    assert tally.counts["answered"] > 120
    assert tally.counts["replaced"] > 20
    assert engine.why_not_recorded is None
    assert engine.replayed_steps > 50
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is PreparedAdapter]
    assert len(alive) - len(others) <= 9, "device and host hold so many"


def test_after_all_that_it_still_answers_as_peft_does(world: World) -> None:
    """One adapter after the other, from whatever tier, and in one batch."""
    engine = world.engine()
    requests = [
        Request(prompt, adapter=name, max_tokens=COUNT, ignore_eos=True) for prompt in PROMPTS for name in NAMES
    ]
    for answers in (engine.complete(requests), [engine.complete([request])[0] for request in requests]):
        for request, answer in zip(requests, answers, strict=True):
            assert answer.token_ids == world.signatures[world.versions[str(request.adapter)][0], request.prompt]
