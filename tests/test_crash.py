"""All or nothing: whatever ends a merge, the output is whole or absent, the inputs are as they were, and the next run
succeeds. Killed at random moments and before every system call that changes the disk; interrupted; out of space; with
inputs that fail; and beside another merge into the same output.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.synthetic import Sizes, write_adapter, write_base
from dora_serve.errors import OutputError
from dora_serve.output import new_folder
from tests.warm import EXCHANGE, Ended, Fault, Warm

SIZES = Sizes(hidden=512, intermediate=1024, key_value=256, vocabulary=8000, layers=6)
KILLS = 35
"""Runs killed at random, for each of a new output and one that is replaced."""
OLD = {"config.json": b"{}", "model.safetensors": b"the one before", "deep/er/vocab.txt": b"a b"}


@dataclass(frozen=True)
class World:
    """Inputs, what a merge of them makes, and where the tests have it written. digests: of every input file."""

    base: Path
    adapter: Path
    out: Path
    digests: Mapping[Path, str]
    warm: Warm
    second: Warm

    def arguments(self, *more: str, base: Path | None = None, out: Path | None = None) -> list[str | Path]:
        base, out = base or self.base, out or self.out
        return ["merge", self.adapter, "--base", base, "-o", out, "--no-verify", *more]


def _digests(*folders: Path) -> dict[Path, str]:
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _contents(folder: Path) -> dict[str, bytes | dict[str, object]]:
    """Every file: its bytes, but the record without the time it was made."""
    found: dict[str, bytes | dict[str, object]] = {}
    for path in folder.rglob("*"):
        if path.name == "dora_export.json":
            found[path.name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "created"}
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _write_old(folder: Path) -> None:
    for name, contents in OLD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)


def _beside(out: Path) -> list[str]:
    """What lies in the folder of `out`, but for itself."""
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def _remove_all(out: Path) -> None:
    for path in out.parent.iterdir():
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("crash")
    base, adapter, out = root / "base", root / "adapter", root / "outputs" / "merged"
    write_base(base, SIZES, shards=3)
    write_adapter(adapter, base, SIZES, rank=4)
    out.parent.mkdir()
    warm, second = Warm(root / "warm"), Warm(root / "second")
    yield World(base, adapter, out, _digests(base, adapter), warm, second)
    warm.close()
    second.close()


@pytest.fixture(autouse=True)
def clean(world: World) -> Iterator[None]:
    """Every test starts with no output; after it the inputs are what they were."""
    _remove_all(world.out)
    yield
    assert _digests(world.base, world.adapter) == world.digests


Reference = dict[str, bytes | dict[str, object]]


def _merged(world: World, *more: str) -> tuple[Reference, Ended]:
    """What an undisturbed run writes, and the run. It is taken away again."""
    ended = world.warm.run(world.arguments(*more))
    assert (ended.code, ended.errors) == (0, "")
    contents = _contents(world.out)
    assert {"config.json", "model.safetensors.index.json", "dora_export.json"} < contents.keys()
    assert sum(name.endswith(".safetensors") for name in contents) == 3
    _remove_all(world.out)
    return contents, ended


def _state(world: World, reference: Reference, old: Mapping[str, bytes] | None = None) -> str:
    """What a killed run left, checked to be one of the states that may be."""
    hidden = _beside(world.out)
    assert all(name.startswith(".merged.") for name in hidden), hidden
    if not world.out.exists():
        assert old is None, "the folder to be replaced is gone"
        return "partial" if hidden else "absent"
    contents = _contents(world.out)
    if old is not None and contents == old:
        return "partial" if hidden else "absent"
    assert contents == reference
    return "placed and not cleared" if hidden else "placed"


def _next_run_succeeds(world: World, reference: Reference, *more: str) -> None:
    if not more and world.out.exists():
        ended = world.warm.run(world.arguments())
        assert ended.code == 1
        assert "exists" in ended.errors
    else:
        ended = world.warm.run(world.arguments(*more))
        assert (ended.code, ended.errors) == (0, "")
    assert _contents(world.out) == reference
    assert _beside(world.out) == []


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_random_moments(world: World, overwrite: bool) -> None:
    """SIGKILL at a random moment of a run, until enough have hit, and enough of those between first byte and rename.

    How long a run takes is learnt on the way: a kill that came too late makes the next ones sooner.
    """
    more = ["--overwrite"] if overwrite else []
    old: Mapping[str, bytes] | None = OLD if overwrite else None
    reference, _ = _merged(world, *more)
    generator = random.Random(f"kill {overwrite}")
    longest = 0.1
    states: Counter[str] = Counter()
    while states.total() < KILLS or states["partial"] < KILLS // 3:
        _remove_all(world.out)
        if overwrite:
            _write_old(world.out)
        ended = world.warm.run(world.arguments(*more), kill_after=generator.uniform(0, longest))
        if ended.code == 0:
            assert _state(world, reference) == "placed"
            longest *= 0.9
            continue
        assert ended.code == -9
        longest *= 1.04
        states[_state(world, reference, old)] += 1
        assert states.total() < 20 * KILLS
        _next_run_succeeds(world, reference, *more)
        assert _digests(world.base, world.adapter) == world.digests


PHASES = {
    "making the hidden folder": ("mkdir", "chmod"),
    "reading": ("preadv",),
    "writing": ("ftruncate", "pwrite", "copy_file_range", "sendfile"),
    "flushing": ("fsync", "fdatasync"),
    "placing": ("rename", EXCHANGE),
    "clearing the old": ("unlink", "rmdir"),
}


@pytest.mark.parametrize("mode", ["new", "overwrite", "overwrite in two steps"])
def test_killed_before_every_step(world: World, mode: str) -> None:
    """SIGKILL before each call that makes, flushes, renames or removes something, and before some that write."""
    more = [] if mode == "new" else ["--overwrite"]
    exchange = mode != "overwrite in two steps"
    old: Mapping[str, bytes] | None = None if mode == "new" else OLD
    reference, _ = _merged(world, *more)

    def prepare() -> None:
        _remove_all(world.out)
        if old is not None:
            _write_old(world.out)

    prepare()
    made = Counter(world.warm.run(world.arguments(*more), exchange=exchange).calls)
    generator = random.Random(mode)
    killed: Counter[str] = Counter()
    states: Counter[str] = Counter()
    for phase, calls in PHASES.items():
        for call in calls:
            many = phase in ("reading", "writing")
            chosen = range(1, made[call] + 1)
            for nth in generator.sample(chosen, min(len(chosen), 4)) if many else chosen:
                prepare()
                ended = world.warm.run(world.arguments(*more), Fault(call, nth, "kill"), exchange=exchange)
                if ended.code == 0:  # an fdatasync more or less, as the writing goes
                    assert _state(world, reference) == "placed"
                    continue
                assert ended.code == -9
                killed[phase] += 1
                if not world.out.exists() and old is not None:
                    _brought_back(world, killed)
                states[_state(world, reference, old)] += 1
                _next_run_succeeds(world, reference, *more)
    wanted = PHASES.keys() - ({"clearing the old"} if mode == "new" else set())
    assert wanted <= killed.keys(), killed
    assert states.keys() >= {"partial", "placed" if mode == "new" else "placed and not cleared"}, states
    assert (killed["brought back"] > 0) == (mode == "overwrite in two steps")


def _brought_back(world: World, killed: Counter[str]) -> None:
    """Without an exchange there is a moment with neither folder in place: the next run, whatever it is for, brings the
    old one back before it does anything else."""
    ended = world.warm.run(world.arguments())
    assert ended.code == 1
    assert "exists" in ended.errors
    assert _contents(world.out) == OLD
    killed["brought back"] += 1


def _assert_nothing_left(world: World, old: Mapping[str, bytes] | None = None) -> None:
    assert _beside(world.out) == []
    assert (_contents(world.out) if world.out.exists() else None) == old


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("sent", ["interrupt", "terminate"])
@pytest.mark.parametrize("call", ["mkdir", "pwrite", "copy_file_range", "fsync", "rename"])
def test_interrupted(world: World, call: str, sent: str, overwrite: bool) -> None:
    more = ["--overwrite"] if overwrite else []
    old: Mapping[str, bytes] | None = OLD if overwrite else None
    if overwrite:
        _write_old(world.out)
    nth = 2 if call == "mkdir" else 1  # the first makes the hidden folder, the second what is in it
    ended = world.warm.run(world.arguments(*more), Fault(call, nth, sent))
    assert ended.code == 130
    assert "nterrupted" in ended.errors
    assert "Traceback" not in ended.errors
    assert ended.output == ""
    _assert_nothing_left(world, old)


def _assert_failed(ended: Ended, *words: str) -> None:
    """A failure said in one paragraph, with the words."""
    assert ended.code == 1
    assert ended.output == ""
    assert ended.errors.startswith("dora-export: ")
    assert ended.errors.count("\n") == 1, ended.errors
    for word in words:
        assert word in ended.errors


WRITES = [(call, "ENOSPC") for call in ("ftruncate", "pwrite", "copy_file_range", "sendfile", "fsync", "rename")]
WRITES += [("pwrite", "EDQUOT"), ("pwrite", "EIO"), ("pwrite", "EROFS"), ("fsync", "EIO"), ("rename", "EIO")]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(("call", "error"), WRITES)
def test_the_disk_fails_in_the_middle(world: World, call: str, error: str, overwrite: bool) -> None:
    if overwrite:
        _write_old(world.out)
    ended = world.warm.run(world.arguments(*["--overwrite"] * overwrite), Fault(call, 2, error))
    about_space = error in ("ENOSPC", "EDQUOT")
    _assert_failed(ended, str(world.out), "The disk is full" if about_space else os.strerror(getattr(errno, error)))
    _assert_nothing_left(world, OLD if overwrite else None)


def test_a_disk_without_the_room_is_refused_before_the_first_byte(world: World, small_disk: SmallDisk) -> None:
    ended = world.warm.run(world.arguments(out=small_disk.mount(half_of(world)) / "merged"))
    _assert_failed(ended, "bytes left", "the output takes")
    assert "pwrite" not in ended.calls
    assert list(small_disk.folder.iterdir()) == []


def test_a_disk_that_becomes_full(world: World, small_disk: SmallDisk) -> None:
    """Enough for the tensors, so that it begins, but not for their headers."""
    needed = 2 * SIZES.parameters
    ended = world.warm.run(world.arguments(out=small_disk.mount(needed + 16384) / "merged"))
    _assert_failed(ended, "The disk is full")
    assert "pwrite" in ended.calls
    assert list(small_disk.folder.iterdir()) == []


def half_of(world: World) -> int:
    return sum(path.stat().st_size for path in world.base.iterdir()) // 2


@dataclass
class SmallDisk:
    """A file system of a size to be chosen."""

    folder: Path
    mounted: bool = False

    def mount(self, nbytes: int) -> Path:
        options = ["-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(self.folder)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this user may not mount, so no disk is really full: {done.stderr.strip()}")
        self.mounted = True
        return self.folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    disk.folder.mkdir()
    yield disk
    if disk.mounted:
        subprocess.run(["umount", str(disk.folder)], check=True)


@pytest.mark.parametrize(("call", "nth"), [("preadv", 1), ("preadv", 9), ("copy_file_range", 1)])
def test_an_input_that_cannot_be_read(world: World, call: str, nth: int) -> None:
    """The adapter is read first, in one go, then the base's tensors."""
    ended = world.warm.run(world.arguments(), Fault(call, nth, "EIO"))
    _assert_failed(ended, "cannot be read", os.strerror(5), ".safetensors")
    _assert_nothing_left(world)


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range"])
def test_a_shard_that_is_cut_while_it_is_read(world: World, tmp_path: Path, call: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    for shard in sorted(base.glob("*.safetensors")):
        whole = shard.read_bytes()
        ended = world.warm.run(world.arguments(base=base), Fault(call, 1, "cut", str(shard)))
        _assert_failed(ended, str(shard), "ended")
        _assert_nothing_left(world)
        shard.write_bytes(whole)


def test_a_shard_that_is_no_file(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    shard.mkdir()
    _assert_failed(world.warm.run(world.arguments(base=base)), str(shard), os.strerror(21))
    _assert_nothing_left(world)


def test_an_error_about_another_file_names_it(tmp_path: Path) -> None:
    """A tokenizer that this user may not read is no fault of the output's place."""
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "tokenizer.json"))
    with pytest.raises(OutputError, match=r"Permission denied: '.*/tokenizer\.json'"), new_folder(tmp_path / "out"):
        raise denied
    assert list(tmp_path.iterdir()) == []


def test_a_librarys_own_error_is_passed_on(tmp_path: Path) -> None:
    """transformers raises a plain OSError, with words and without a number, for whatever it cannot load."""
    with pytest.raises(OSError, match=r"^no such model$"), new_folder(tmp_path / "out"):
        raise OSError("no such model")
    assert list(tmp_path.iterdir()) == []


# Two at once


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_another_merge_ends_first(world: World, tmp_path: Path, overwrite: bool) -> None:
    """A second run begins and ends while the first is in the middle: it leaves the first's hidden folder alone."""
    more = ["--overwrite"] if overwrite else []
    reference, _ = _merged(world, *more)
    paused = tmp_path / "paused"
    world.warm.start(world.arguments(*more), Fault("pwrite", 5, "pause", str(paused)))
    while not paused.exists():
        pass
    assert len(_beside(world.out)) == 1
    between = world.second.run(world.arguments(*more))
    assert (between.code, between.errors) == (0, "")
    assert len(_beside(world.out)) == 1
    assert _contents(world.out) == reference
    placed = world.out.stat().st_ino
    paused.unlink()
    ended = world.warm.wait()
    if overwrite:
        assert (ended.code, ended.errors) == (0, "")
    else:
        _assert_failed(ended, str(world.out), "in the meantime", "--overwrite")
    assert (world.out.stat().st_ino == placed) == (not overwrite)
    assert _contents(world.out) == reference
    assert _beside(world.out) == []


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_two_merges_at_once(world: World, overwrite: bool) -> None:
    """Never a mixture, never both lost; whoever fails says why."""
    more = ["--overwrite"] if overwrite else []
    reference, _ = _merged(world, *more)
    for _ in range(10):
        _remove_all(world.out)
        for warm in (world.warm, world.second):
            warm.start(world.arguments(*more))
        both = [warm.wait() for warm in (world.warm, world.second)]
        assert 0 in [ended.code for ended in both]
        for ended in both:
            if ended.code:
                _assert_failed(ended, str(world.out), "--overwrite")
        assert _contents(world.out) == reference
        assert _beside(world.out) == []


def test_a_merge_that_begins_while_a_killed_ones_folder_is_cleared(world: World) -> None:
    """Killed runs leave hidden folders; two runs clear them away at a time, and both find their own untouched."""
    reference, _ = _merged(world)
    for number in range(3):
        assert world.warm.run(world.arguments(), Fault("pwrite", number + 1, "kill")).code == -9
    assert len(_beside(world.out)) == 1  # each run clears away what the one before it left
    for warm in (world.warm, world.second):
        warm.start(world.arguments())
    codes = [warm.wait().code for warm in (world.warm, world.second)]
    assert 0 in codes
    assert _contents(world.out) == reference
    assert _beside(world.out) == []
