"""Bad input through the command: a paragraph that says what was got, what was wanted and what to do, and exit code 1.

Nothing is left behind and no input is touched, whatever is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.errors import DoraServeError
from exporters.cli import main
from tests.cases import adapt, ask_here, build, llama, load, plan, read_tensors, rewrite_json, rewrite_tensors, save

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, CONFIG, MODEL = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class World:
    """A sharded base, the same in one file, a DoRA on it, and where the output is to go; all below `root`."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def sharded(self) -> Path:
        return self.root / "sharded"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def merge(self, **paths: Path | str) -> list[str]:
        """The command line: base, adapter and out may be others."""
        own: dict[str, Path | str] = {"adapter": self.adapter, "base": self.base, "out": self.out, **paths}
        return ["merge", str(own["adapter"]), "--base", str(own["base"]), "-o", str(own["out"])]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("sound"))
    model = llama()
    save(model, world.base)
    save(model, world.sharded, max_shard_size="4KB")
    adapt(load(world.base, model), world.adapter, target_modules=["q_proj", "down_proj"], use_dora=True)
    return world


@pytest.fixture
def world(sound: World, tmp_path: Path) -> World:
    """A copy of the sound one, to be spoiled."""
    shutil.copytree(sound.root, tmp_path / "world")
    return World(tmp_path / "world")


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command sets a handler for SIGTERM in its process, which here is the tests'."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def state(root: Path) -> dict[str, str]:
    """Every path below `root`, hidden ones too, with what it is or holds."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink():
                found[str(path.relative_to(root))] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path.relative_to(root))] = "folder"
    return found


def refused(arguments: list[str], world: World, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command twice, for a person and with --json; returns the message, after all that holds of every one."""
    before = state(world.root)
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dora-export: ")
    assert "Traceback" not in said.err
    lines = said.err.rstrip("\n").split("\n")
    # One paragraph; a list of problems has lines of its own.
    assert not [line for line in lines if not line.strip()]
    assert len([line for line in lines if not line.startswith("  - ")]) <= 2
    assert main([*arguments, "--json"]) == 1
    told = capsys.readouterr()
    assert told.err == ""
    error = json.loads(told.out)["error"]
    assert error["type"].endswith("Error")
    assert error["message"]
    assert error["remedy"], error["message"]
    assert state(world.root) == before
    return said.err


Spoil = Callable[[World], object]


def empty(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def nest(folder: Path, name: str) -> None:
    inner = folder.rename(folder.with_name(name))
    folder.mkdir()
    inner.rename(folder / name)


def turn_into_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def turn_into_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def header(path: Path, table: object, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file from its parts."""
    text = table if isinstance(table, bytes) else dump(table)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


FILES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: path.write_bytes(b""), "it is 0 bytes long, wanted at least 8"),
    "noise": (lambda path: path.write_bytes(bytes(range(1, 200))), "claim a header of"),
    "a header of 10^18 bytes": (
        lambda path: path.write_bytes(struct.pack("<Q", 10**18) + path.read_bytes()[8:]),
        "claim a header of 1000000000000000000 bytes, wanted at most",
    ),
    "a header that is no JSON": (lambda path: header(path, b"{'name': 1}"), "its header is not JSON"),
    "a header that is no text": (lambda path: header(path, b'{"\xff\xfe": 1}'), "its header is not JSON"),
    "a header that is a list": (lambda path: header(path, []), "its header is a list, wanted a JSON object"),
    "a header without end": (lambda path: header(path, b"[" * 100_000), "its header is not JSON"),
    "metadata that are none": (lambda path: header(path, {"__metadata__": [1]}), "its metadata is not an object"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-64]), "the file is truncated"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0" * 8), "the file is too long"),
    "overlapping": (
        lambda path: header(path, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "'b' starts at byte",
    ),
    "a hole": (lambda path: header(path, {"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "'b' starts at byte"),
    "the same name twice": (
        lambda path: header(path, b'{"a": %b, "a": %b}' % (dump(entry(0, 8)), dump(entry(8, 16))), bytes(16)),
        "'a' starts at byte",
    ),
    "before the data": (lambda path: header(path, {"a": entry(-8, 0)}, b""), "entry of 'a' is malformed"),
    "no offsets": (lambda path: header(path, {"a": {"dtype": "F32", "shape": [1]}}), "entry of 'a' is malformed"),
    "backwards": (lambda path: header(path, {"a": entry(8, 0, [2])}, bytes(8)), "'a' is F32 \\[2\\] and lies in -8"),
    "a dtype of its own": (lambda path: header(path, {"a": entry(0, 4, dtype="F33")}, bytes(4)), "the dtype 'F33'"),
    "another shape": (
        lambda path: header(path, {"a": entry(0, 8, [2**40, 2**40])}, bytes(8)),
        "lies in 8 bytes, wanted 4835703278458516698824704 bytes",
    ),
    "a shape of words": (lambda path: header(path, {"a": entry(0, 8, ["2"])}, bytes(8)), "is malformed"),  # type: ignore[list-item]
    "a link to itself": (turn_into_a_loop, "cannot be read"),
}


@pytest.mark.parametrize("side", ["base", "adapter"])
@pytest.mark.parametrize("fault", FILES)
def test_a_weights_file_that_is_not_sound(
    fault: str, side: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = FILES[fault]
    path = world.base / MODEL if side == "base" else world.adapter / WEIGHTS
    spoil(path)
    said = refused(world.merge(), world, capsys)
    if fault == "a link to itself":
        assert str(path.parent) in said  # it is no file, so the folder is said to have none
        return
    assert re.search(reason, said), said
    assert str(path) in said


CONFIGS: Mapping[str, bytes] = {
    "no JSON": b"{r: 4}",
    "no text": '{"größe": 1}'.encode("latin-1"),
    "nothing": b"",
    "a list": b'["LORA"]',
    "a number": b"4",
    "without end": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("side", ["base", "adapter"])
@pytest.mark.parametrize("fault", CONFIGS)
def test_a_configuration_that_is_not_sound(
    fault: str, side: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world.base / "config.json" if side == "base" else world.adapter / CONFIG
    path.write_bytes(CONFIGS[fault])
    said = refused(world.merge(), world, capsys)
    assert str(path) in said
    assert re.search(r"cannot be read as JSON|holds a (list|int), wanted", said), said


def pop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda held: [held.pop(name) for name in names]


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda held: held.update({name: value})


def in_adapter(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    return lambda world: rewrite_tensors(world.adapter / WEIGHTS, change)


def in_config(**changes: object) -> Spoil:
    return lambda world: rewrite_json(world.adapter / CONFIG, **changes)


ADAPTERS: Mapping[str, tuple[Spoil, str]] = {
    "no A": (in_adapter(pop(f"{Q0}.lora_A.weight")), "has B, magnitude, lora_A is missing"),
    "no B": (in_adapter(pop(f"{Q0}.lora_B.weight")), "has A, magnitude, lora_B is missing"),
    "no magnitude": (in_adapter(pop(f"{Q0}.lora_magnitude_vector")), "lora_magnitude_vector is missing"),
    "a NaN": (in_adapter(lambda held: held[f"{Q0}.lora_B.weight"][3].fill_(float("nan"))), r"NaN or infinite.*4 of 64"),
    "one dimension": (in_adapter(put(f"{Q0}.lora_A.weight", torch.ones(64))), "ZeRO-3 or FSDP"),
    "an unknown tensor": (
        in_adapter(put(f"{Q0}.lora_C.weight", torch.ones(2))),
        r"not understood: .*lora_C",
    ),
    "a tensor of no module": (in_adapter(put("base_model.model.spare.weight", torch.ones(2))), "'spare.weight'"),
    "integers": (
        in_adapter(put(f"{Q0}.lora_A.weight", torch.ones(4, 16, dtype=torch.int8))),
        "not understood: .* int8",
    ),
    "no tensors": (lambda world: save_file({}, world.adapter / WEIGHTS), "holds no tensors"),
    "rank 0": (in_config(r=0), "r = 0, wanted a positive whole number"),
    "rank of another": (in_config(r=8), "says rank 8"),
    "alpha NaN": (in_config(lora_alpha=float("nan")), "lora_alpha = nan, wanted a number"),
    "alpha infinite": (in_config(lora_alpha=float("inf")), "lora_alpha = inf, wanted a number"),
    "alpha a word": (in_config(lora_alpha="much"), "lora_alpha = 'much', wanted a number"),
    "rows without tensors": (in_config(trainable_token_indices=[1]), "holds no trained token rows"),
    "no method": (in_config(peft_type=None), "peft_type None, wanted 'LORA'"),
    "another method": (in_config(peft_type="IA3"), "peft_type 'IA3', wanted 'LORA'"),
    "activated": (in_config(alora_invocation_tokens=[3]), "cannot be merged: alora_invocation_tokens"),
    "unknown key": (in_config(use_next_years=True), "use_next_years=True"),
    "DoRA not said": (in_config(use_dora=False), "use_dora is false"),
    "no configuration": (lambda world: (world.adapter / CONFIG).unlink(), "has no adapter_config.json"),
    "no weights": (lambda world: (world.adapter / WEIGHTS).unlink(), "a configuration and no weights"),
    "nothing in the folder": (
        lambda world: empty(world.adapter),
        "got nothing, wanted a folder with adapter_config.json",
    ),
    "no folder": (lambda world: shutil.rmtree(world.adapter), "does not exist"),
    "a file": (
        lambda world: turn_into_a_file(world.adapter),
        "holds no adapter that is known here",
    ),
    "of a trainer's checkpoints": (
        lambda world: nest(world.adapter, "checkpoint-5"),
        "Give one of the folders in it that hold an adapter: '.*checkpoint-5'",
    ),
    "of other modules": (
        lambda world: rewrite_tensors(world.adapter / WEIGHTS, lambda held: rename(held, "q_proj", "query_proj")),
        "model.layers.0.self_attn.query_proj.weight.*nearest names there are model.layers.0.self_attn.q_proj.weight",
    ),
    "of another size": (
        lambda world: adapt(llama(hidden_size=32, head_dim=16), world.adapter, target_modules=["q_proj"]),
        r"lora_A \[4, 32\] and lora_B \[32, 4\] for a base weight of \[16, 16\], wanted lora_A \[4, 16\]",
    ),
}


def rename(held: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in held if old in name]:
        held[name.replace(old, new)] = held.pop(name)


@pytest.mark.parametrize("fault", ADAPTERS)
def test_an_adapter_that_cannot_be_meant(fault: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, reason = ADAPTERS[fault]
    spoil(world)
    said = refused(world.merge(), world, capsys)
    assert re.search(reason, said), said


class Bomb:
    """A pickle that runs a command as it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_a_pickle_is_not_opened_unless_asked_and_never_runs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.adapter / WEIGHTS).unlink()
    trace = world.root / "ran"
    (world.adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb(trace)}, protocol=2))
    assert "a pickle, which can run code" in refused(world.merge(), world, capsys)
    said = refused([*world.merge(), "--allow-pickle"], world, capsys)
    assert "cannot be read as weights only" in said
    assert not trace.exists()


def test_an_allowed_pickle_that_holds_something_else(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.adapter / WEIGHTS).unlink()
    torch.save([1, 2, 3], world.adapter / "adapter_model.bin")
    assert "holds a list, wanted a dictionary of tensors" in refused([*world.merge(), "--allow-pickle"], world, capsys)


GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}


def only_pickles(world: World) -> None:
    torch.save(load_file(world.base / MODEL), world.base / "pytorch_model.bin")
    (world.base / MODEL).unlink()


def of_integers(world: World) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite_tensors(world.base / MODEL, lambda held: held.update({name: held[name].to(torch.int8)}))


def fill(name: str, value: float) -> Spoil:
    return lambda world: rewrite_tensors(world.base / MODEL, lambda held: held[name][3].fill_(value))


BASES: Mapping[str, tuple[Spoil, str]] = {
    "no folder": (lambda world: shutil.rmtree(world.base), "does not exist"),
    "an empty folder": (lambda world: empty(world.base), "got an empty folder, wanted"),
    "a file": (lambda world: turn_into_a_file(world.base), "a file, wanted a folder"),
    "a pickle": (only_pickles, "Pickles are not read"),
    "an adapter": (
        lambda world: shutil.copytree(world.adapter, empty(world.base), dirs_exist_ok=True),
        "This is an adapter, not a base model",
    ),
    "other names": (
        lambda world: save(build("AutoModelForCausalLM", "gpt2", **GPT2), empty(world.base)),
        "no tensor 'model.layers.0.self_attn.q_proj.weight' in the base",
    ),
    "another size": (
        lambda world: save(llama(hidden_size=32, head_dim=16), empty(world.base)),
        r"for a base weight of \[32, 32\]",
    ),
    "fewer layers": (
        lambda world: save(llama(num_hidden_layers=1), empty(world.base)),
        "model.layers.1.self_attn.q_proj",
    ),
    "quantized": (
        lambda world: rewrite_json(world.base / "config.json", quantization_config={"quant_method": "aqlm"}),
        r"is quantized with aqlm",
    ),
    "integers": (of_integers, "dtype int8, wanted float64, float32, bfloat16 or float16"),
    "a NaN where it is adapted": (
        fill("model.layers.0.mlp.down_proj.weight", float("nan")),
        "is zero or not finite",
    ),
}


@pytest.mark.parametrize("fault", BASES)
def test_a_base_that_cannot_be_meant(fault: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, reason = BASES[fault]
    spoil(world)
    said = refused(world.merge(), world, capsys)
    assert re.search(reason, said), said


def test_base_and_adapter_exchanged(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(world.merge(base=world.adapter, adapter=world.base), world, capsys)
    assert "holds no adapter" in said
    assert "model.safetensors" in said


def test_the_base_that_the_adapter_names_is_gone(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --base, the adapter's own word is taken: another machine's path, or nothing at all."""
    arguments = ["merge", str(world.adapter), "-o", str(world.out)]
    rewrite_json(world.adapter / CONFIG, base_model_name_or_path="/home/someone/models/llama")
    assert "/home/someone/models/llama" in refused(arguments, world, capsys)
    rewrite_json(world.adapter / CONFIG, base_model_name_or_path=None)
    assert "--base" in refused(arguments, world, capsys)


# Anything at all

JUNK: tuple[object, ...] = (None, True, False, 0, -1, 3, 10**400, 1e308, "", "x", "q_proj", [], [1], ["a"], [["a"]])
JUNK += ({}, {"a": 1}, {"a": [1]}, {"": {}}, [None], {"model.embed_tokens": "x"}, [[0, 1]], {"q_proj": 10**400})


def keys_of(name: str) -> list[str]:
    from peft import LoraConfig

    if name == CONFIG:
        return sorted(LoraConfig().to_dict())
    words = "architectures model_type vocab_size tie_word_embeddings text_config quantization_config id2label dtype"
    return [*words.split(), "torch_dtype", "num_hidden_layers", "scale_decoder_outputs"]


@pytest.mark.parametrize("name", [CONFIG, "config.json"])
def test_junk_in_a_configuration_is_an_error_of_ours_or_none(name: str, world: World) -> None:
    """Every key that is read, with a value of every kind: no traceback, whatever it is."""
    adapt(llama(), world.adapter, target_modules=["q_proj", "embed_tokens"], trainable_token_indices={"lm_head": [3]})
    path = world.adapter / name if name == CONFIG else world.base / name
    sound = path.read_text()
    kinds = set()
    for key in keys_of(name):
        for value in JUNK:
            path.write_text(json.dumps(json.loads(sound) | {key: value}))
            try:
                plan(world.base, world.adapter)
                kinds.add("planned")
            except DoraServeError as error:
                kinds.add(type(error).__name__ if str(error) else "nothing")
    wanted = {"planned", "AdapterError", "UnmergeableError"} if name == CONFIG else {"planned", "CheckpointError"}
    assert wanted <= kinds
    assert "nothing" not in kinds


@pytest.mark.parametrize("file", ["adapter", "base", "index"])
def test_bytes_gone_wrong_are_an_error_of_ours_or_none(file: str, world: World) -> None:
    """A header, or an index, with a byte exchanged, left out or put in, at 400 seeded places."""
    random = Random(5)
    base = world.sharded if file == "index" else world.base
    path = {"adapter": world.adapter / WEIGHTS, "base": world.base / MODEL, "index": world.sharded / INDEX}[file]
    sound = path.read_bytes()
    first = 0 if file == "index" else 8
    length = len(sound) if file == "index" else struct.unpack("<Q", sound[:8])[0]
    refusals = 0
    for _ in range(400):
        at = first + random.randrange(length)
        byte = random.choice(
            [b"", bytes([random.randrange(256)]), sound[at : at + 1] + random.choice(b'0"{}[],:.-').to_bytes()]
        )
        text = sound[first:at] + byte + sound[at + 1 : first + length]
        prefix = b"" if file == "index" else struct.pack("<Q", len(text))
        path.write_bytes(prefix + text + sound[first + length :])
        try:
            plan(base, world.adapter)
        except DoraServeError:
            refusals += 1
    assert refusals > 300


# Indexes


def index_of(world: World) -> dict[str, Any]:
    return dict(json.loads((world.sharded / INDEX).read_text()))


def place(world: World, name: object) -> None:
    """Let the index put its first tensor into a file of this name."""
    table = index_of(world)
    table["weight_map"][sorted(table["weight_map"])[0]] = name
    (world.sharded / INDEX).write_text(json.dumps(table))


CLIMBING = (
    *("../stolen.safetensors", "/etc/stolen.safetensors", "a/b.safetensors", "..\\stolen.safetensors"),
    *("C:\\stolen.safetensors", "..", ".", "", "a\0b.safetensors", "model.bin", 7, None, ["x"]),
)


@pytest.mark.parametrize("name", CLIMBING, ids=repr)
def test_an_index_that_leads_elsewhere(name: object, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.ones(1)}, world.root / "stolen.safetensors")
    place(world, name)
    said = refused(world.merge(base=world.sharded), world, capsys)
    assert INDEX in said
    assert "wanted" in said


INDEXES: Mapping[str, tuple[Spoil, str]] = {
    "a shard that is not there": (lambda world: sorted(world.sharded.glob("*-of-*"))[1].unlink(), "cannot be read"),
    "a shard of another save": (
        lambda world: shutil.copyfile(sorted(world.sharded.glob("*-of-*"))[0], sorted(world.sharded.glob("*-of-*"))[1]),
        "disagrees with its files",
    ),
    "a tensor in two shards": (
        lambda world: rewrite_tensors(
            sorted(world.sharded.glob("*-of-*"))[1],
            lambda held: held.update(load_file(sorted(world.sharded.glob("*-of-*"))[0])),
        ),
        "the index puts it in",
    ),
    "no map": (lambda world: (world.sharded / INDEX).write_text('{"metadata": {}}'), "has no weight_map"),
    "an empty map": (lambda world: (world.sharded / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
    "a list": (lambda world: (world.sharded / INDEX).write_text("[]"), "holds a list, wanted"),
    "no JSON": (lambda world: (world.sharded / INDEX).write_text("{"), "cannot be read as JSON"),
    "two indexes": (
        lambda world: (
            shutil.copyfile(world.sharded / INDEX, world.sharded / "a.safetensors.index.json"),
            (world.sharded / INDEX).rename(world.sharded / "b.safetensors.index.json"),
        ),
        "has 2 indexes",
    ),
}


@pytest.mark.parametrize("fault", INDEXES)
def test_an_index_that_is_not_sound(fault: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, reason = INDEXES[fault]
    spoil(world)
    said = refused(world.merge(base=world.sharded), world, capsys)
    assert re.search(reason, said), said


# Outputs


def test_an_output_that_exists(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.out.mkdir()
    (world.out / "mine").write_text("precious")
    assert "--overwrite" in refused(world.merge(), world, capsys)
    (world.root / "file").write_text("precious")
    assert "exists" in refused(world.merge(out=world.root / "file"), world, capsys)
    (world.root / "link").symlink_to(world.root / "nowhere")
    assert "exists" in refused(world.merge(out=world.root / "link"), world, capsys)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["base", "base/inside", "adapter", "adapter/merged", ".", "linked"])
def test_an_output_that_is_an_input(
    where: str, overwrite: bool, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.root / "linked").symlink_to(world.base)
    arguments = world.merge(out=world.root / where) + ["--overwrite"] * overwrite
    assert "inputs are never written to" in refused(arguments, world, capsys)


@pytest.mark.parametrize("where", ["/proc/no/out", "/dev/null/out"])
def test_an_output_that_cannot_be_written(where: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(world.merge(out=where), world, capsys)
    assert where in said
    assert "-o" in said


def test_a_failed_overwrite_leaves_what_was_there(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.out.mkdir()
    (world.out / "mine").write_text("precious")
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite_tensors(world.base / MODEL, lambda held: held[name].fill_(float("inf")))
    refused([*world.merge(), "--overwrite"], world, capsys)
    assert (world.out / "mine").read_text() == "precious"


# Names


def test_a_name_that_is_neither_a_path_nor_of_the_hub(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a Hub id" in refused(world.merge(base="my model"), world, capsys)
    assert "not a Hub id" in refused(world.merge(adapter="a/b/c/d"), world, capsys)


@pytest.mark.parametrize("side", ["base", "adapter"])
def test_a_hub_id_without_a_network(side: str, world: World) -> None:
    """In a process of its own, since huggingface_hub reads its settings once."""
    before = state(world.root)
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(world.root / "cache")}
    arguments = world.merge(**{side: "someone/some-model"})
    done = subprocess.run(
        [sys.executable, "-m", "exporters.cli", *arguments],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "someone/some-model" in done.stderr
    assert "Traceback" not in done.stderr
    assert "HF_HUB_OFFLINE forbids asking" in done.stderr
    assert {name: value for name, value in state(world.root).items() if not name.startswith("cache")} == before


def test_any_name_that_a_file_system_allows(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ein ordner mit ümläuten 模型 'und' \"anführung\""
    shutil.copytree(world.root, folder)
    odd = World(folder)
    assert main([*odd.merge(out=folder / "aus gabe; $(x)"), "--no-verify"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*world.merge(), "--no-verify"]) == 0
    wanted, got = read_tensors(world.out), read_tensors(folder / "aus gabe; $(x)")
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["melt"],
        ["merge"],
        ["merge", "adapter", "--base", "base"],
        ["merge", "adapter", "-o", "out", "--dtype", "int8"],
        ["merge", "adapter", "-o", "out", "--to", "gguf"],
        ["merge", "adapter", "-o", "out", "--reference", "mine"],
        ["verify", "merged", "--base", "base"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_device_that_is_not_here(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda:99" in refused([*world.merge(), "--device", "cuda:99"], world, capsys)


# The other commands


@pytest.mark.parametrize("fault", ["truncated", "a header of 10^18 bytes", "zero bytes"])
def test_the_other_commands_meet_the_same(fault: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, reason = FILES[fault]
    shutil.copytree(world.base, world.root / "merged")
    for path in (world.adapter / WEIGHTS, world.base / MODEL):
        sound = path.read_bytes()
        spoil(path)
        for command in (
            ["inspect", str(world.adapter), "--base", str(world.base)],
            ["merge", str(world.adapter), "--base", str(world.base), "--dry-run"],
            ["verify", str(world.root / "merged"), "--adapter", str(world.adapter), "--base", str(world.base)],
        ):
            assert re.search(reason, refused(command, world, capsys))
        path.write_bytes(sound)


def verify_line(world: World, merged: Path) -> list[str]:
    return ["verify", str(merged), "--adapter", str(world.adapter), "--base", str(world.base)]


def test_verify_of_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nowhere' does not exist" in refused(verify_line(world, Path("nowhere")), world, capsys)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", ["", CONFIG, WEIGHTS])
def test_verify_of_an_adapter(name: str, pickled: bool, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    given = world.adapter / name
    if pickled:  # a trainer's checkpoint, which verify is told of before it reads the one that --adapter names
        torch.save({}, world.adapter / "adapter_model.bin")
        torch.save({}, world.adapter / "training_args.bin")
    said = refused(verify_line(world, given), world, capsys)
    assert f"'{given}' is {'a file of an adapter' if name else 'an adapter'}, wanted the folder of a merged" in said
    assert f"dora-export merge {world.adapter} --base {world.base} -o OUT" in said
    assert "give the model that it was trained on" not in said


@pytest.mark.parametrize("name", [MODEL, "config.json"])
def test_verify_of_a_file(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*world.merge(), "--no-verify"]) == 0
    capsys.readouterr()
    said = refused(verify_line(world, world.out / name), world, capsys)
    assert f"'{world.out / name}' is a file, wanted the folder of a merged model" in said
    command = " ".join(["dora-export", *verify_line(world, world.out)])
    assert command in said
    assert main(command.split()[1:]) == 0


def test_verify_of_a_file_beside_no_model(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.root / "notes.txt").write_text("x")
    assert "Name the folder: dora-export verify MERGED --" in refused(
        verify_line(world, world.root / "notes.txt"), world, capsys
    )


def test_verify_of_a_model_beside_the_adapters_configuration(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """It is read as a model; transformers, though, takes such a folder for an adapter and does not load it."""
    assert main([*world.merge(), "--no-verify"]) == 0
    shutil.copyfile(world.adapter / CONFIG, world.out / CONFIG)
    assert main(verify_line(world, world.out)) == 1
    said = capsys.readouterr().out
    assert "21 exact" in said
    assert "transformers cannot load" in said


def test_inspect_and_a_dry_run_show_every_problem(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(world.base)
    save(llama(hidden_size=32, head_dim=16), world.base)
    before = state(world.root)
    assert main(["inspect", str(world.adapter), "--base", str(world.base), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 4
    dry = ["merge", str(world.adapter), "--base", str(world.base), "--dry-run", "--json"]
    assert main(dry) == 1
    assert len(json.loads(capsys.readouterr().out)["error"]["problems"]) == 4
    assert state(world.root) == before
