"""`dora-export merge` from end to end on a tiny model: what is written, what is said, and the exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dora_serve import __version__
from exporters.cli import main
from tests.faults import World, llama, read_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A sharded bfloat16 Llama, a DoRA on all its linears, and what PEFT makes of the two in float64."""
    return llama(tmp_path_factory.mktemp("cli"), "dora", torch.bfloat16, use_dora=True)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command sets a handler for SIGTERM in its process, which here is the tests'."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def merge(world: World, *more: str | Path) -> list[str]:
    return [str(part) for part in ("merge", world.adapter, "--base", world.base, *more)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "dora_export.json").read_text())
    return values


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def verified(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A verified merge by the command itself, and what it printed through pipes."""
    out = tmp_path_factory.mktemp("verified") / "merged"
    command = [sys.executable, "-m", "exporters.cli", *merge(world, "-o", out)]
    return out, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


Verified = tuple[Path, subprocess.CompletedProcess[str]]


def test_merges_as_peft_does(world: World, verified: Verified) -> None:
    out, done = verified
    assert done.returncode == 0, done.stderr
    assert same(read_folder(out), read_folder(world.merged))
    assert not same(read_folder(out), read_folder(world.base))


def test_says_what_it_did_and_is_quiet_where_there_is_no_terminal(verified: Verified) -> None:
    out, done = verified
    assert done.stderr == ""
    assert "14 DoRA" in done.stdout
    assert "Verified" in done.stdout
    assert done.stdout.rstrip().endswith(f"Written to {out}")
    assert "\r" not in done.stdout


def test_keeps_the_bases_layout(world: World, verified: Verified) -> None:
    out, _ = verified
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in world.base.iterdir()} | {"dora_export.json"}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    index, base_index = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (out, world.base)
    )
    assert index["weight_map"] == base_index["weight_map"]
    for name in ("config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (world.base / name).read_bytes()


def test_the_record_says_what_was_merged_and_how_it_was_verified(world: World, verified: Verified) -> None:
    out, _ = verified
    values = record(out)
    shards = sorted(world.base.glob("*.safetensors"))
    assert values["tool"] == "dora-serve"
    assert values["version"] == __version__
    assert values["command"] == ["dora-export", *merge(world, "-o", out)]
    assert values["exporter"] == "safetensors"
    assert values["base"]["path"] == str(world.base)
    assert values["base"]["sha256"] == {path.name: sha256(path) for path in shards}
    assert values["adapter"]["path"] == str(world.adapter)
    assert (values["adapter"]["format"], values["adapter"]["method"]) == ("peft", "DoRA")
    adapter_files = ("adapter_model.safetensors", "adapter_config.json")
    assert values["adapter"]["sha256"] == {name: sha256(world.adapter / name) for name in adapter_files}
    count = len(read_folder(world.base))
    assert values["dtypes"] == {"BF16": count}
    assert values["actions"] == {"DoRA": 14, "copied": count - 14}
    others = sorted(path for path in out.iterdir() if path.name != "dora_export.json")
    assert values["files"] == {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in others}
    found = values["verification"]
    assert found["passed"] is True
    assert found["failures"] == []
    assert found["forward"]["ran"] is True
    assert found["tensors"]["differing_elements"] == 0


def test_the_header_of_every_shard_says_the_same_in_short(world: World, verified: Verified) -> None:
    out, _ = verified
    shards = sorted(out.glob("*.safetensors"))
    for path in shards:
        found = metadata(path)
        assert found["format"] == "pt"
        assert found["dora_serve_version"] == __version__
        assert found["merged_base"] == str(world.base)
        assert found["merged_adapter"] == str(world.adapter)
        assert json.loads(found["merged_base_sha256"]) == record(out)["base"]["sha256"]
        assert json.loads(found["merged_adapter_sha256"]) == record(out)["adapter"]["sha256"]
        assert found["merged_method"] == "DoRA"
        assert json.loads(found["merged_dtypes"]) == record(out)["dtypes"]
        assert found["merged_command"] == " ".join(["dora-export", *merge(world, "-o", out)])
        assert found["merged_verification"].startswith("passed: 0 of ")
        assert "pending" not in json.dumps(found)


def test_without_verification_the_record_says_so(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], verified: Verified
) -> None:
    out = tmp_path / "merged"
    assert main(merge(world, "-o", out, "--no-verify")) == 0
    assert "NOT VERIFIED" in capsys.readouterr().out
    values = record(out)
    assert values["verification"] is None
    assert values["base"]["sha256"] is None
    assert values["adapter"]["sha256"] == record(verified[0])["adapter"]["sha256"]
    assert {file["sha256"] for file in values["files"].values()} == {None}
    for path in out.glob("*.safetensors"):
        assert metadata(path)["merged_base_sha256"] == "not computed"
        assert "merged_verification" not in metadata(path)
    assert same(read_folder(out), read_folder(verified[0]))


def test_json_is_one_object(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(merge(world, "-o", out, "--json")) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out) == {"out": str(out), **record(out)}


@pytest.mark.parametrize("where", [(), ("-o", "merged")], ids=["no output named", "an output named"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(merge(world, "--dry-run", *where)) == 0
    text = capsys.readouterr()
    assert "DoRA" in text.out
    assert text.err == ""
    assert main(merge(world, "--dry-run", "--json", *where)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["actions"]["DoRA"] == 14
    assert plan["base"] == str(world.base)
    assert sum(plan["files"].values()) == plan["tensors"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_finds_what_a_merge_would(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = llama(tmp_path, "other", torch.bfloat16, sizes={"hidden_size": 32, "intermediate_size": 64})
    for more in (("--dry-run",), ("-o", str(tmp_path / "merged"))):
        assert main(["merge", str(world.adapter), "--base", str(other.base), *more]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "does not fit" in printed.err
    assert not (tmp_path / "merged").exists()


def test_another_dtype(world: World, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert main(merge(world, "-o", out, "--dtype", "float32", "--no-verify")) == 0
    wide, narrow = read_folder(out), read_folder(world.merged)
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    # float32 keeps what the rounding to bfloat16 takes away, and no more: half a spacing, 2**-8 of the value.
    for name, tensor in wide.items():
        assert torch.allclose(tensor, narrow[name].float(), rtol=2**-8, atol=0)
    assert any(not torch.equal(tensor, narrow[name].float()) for name, tensor in wide.items())
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert record(out)["dtypes"] == {"F32": len(wide)}


@pytest.fixture
def wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that drops every magnitude."""
    monkeypatch.setattr("dora_serve.merge.norm_scale", lambda magnitude, norms: torch.ones_like(norms))


@pytest.mark.usefixtures("wrong_merge")
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "overwrite"])
def test_nothing_that_failed_is_kept(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], replaced: bool
) -> None:
    out = tmp_path / "merged"
    if replaced:
        out.mkdir()
        (out / "config.json").write_text("old")
    assert main(merge(world, "-o", out, *["--overwrite"] * replaced)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "failed its verification" in printed.err
    assert "magnitude" in printed.err
    assert "--keep-failed" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] * replaced
    assert not replaced or (out / "config.json").read_text() == "old"


@pytest.mark.usefixtures("wrong_merge")
def test_what_failed_is_kept_under_another_name_where_that_is_asked_for(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    for _ in range(2):  # the second takes the place of the first
        assert main(merge(world, "-o", out, "--keep-failed")) == 1
        assert "merged.FAILED-VERIFICATION" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["merged.FAILED-VERIFICATION"]
    kept = tmp_path / "merged.FAILED-VERIFICATION"
    assert read_folder(kept).keys() == read_folder(world.merged).keys()
    assert not same(read_folder(kept), read_folder(world.merged))
    assert not (kept / "dora_export.json").exists()
    for path in kept.glob("*.safetensors"):
        assert "passed" not in metadata(path).get("merged_verification", "")


@pytest.mark.usefixtures("wrong_merge")
def test_a_failure_in_json(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(merge(world, "-o", tmp_path / "merged", "--json")) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert found["error"]["type"] == "VerificationError"
    assert found["report"]["passed"] is False
    assert found["error"]["failures"] == found["report"]["failures"] != []


def test_an_existing_output_is_refused_and_replaced_on_request(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(merge(world, "-o", out, "--no-verify")) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert main(merge(world, "-o", out, "--no-verify", "--overwrite")) == 0
    assert not (out / "notes.txt").exists()
    assert same(read_folder(out), read_folder(world.merged))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("where", ["base", "adapter", "base/merged", "."])
def test_an_output_that_is_holds_or_lies_in_an_input_is_refused(
    world: World, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    before = {path: sha256(path) for path in world.root.rglob("*") if path.is_file()}
    assert main(merge(world, "-o", world.root / where, "--no-verify", "--overwrite")) == 1
    assert "one holds the other" in capsys.readouterr().err
    assert {path: sha256(path) for path in world.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("missing", ["adapter", "base"])
def test_a_path_that_is_not_there(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, as_json: bool
) -> None:
    paths = {"adapter": world.adapter, "base": world.base, missing: tmp_path / "nowhere"}
    arguments = ["merge", str(paths["adapter"]), "--base", str(paths["base"]), "-o", str(tmp_path / "merged")]
    assert main([*arguments, *["--json"] * as_json]) == 1
    printed = capsys.readouterr()
    said, silent = (printed.out, printed.err) if as_json else (printed.err, printed.out)
    assert silent == ""
    assert str(tmp_path / "nowhere") in (json.loads(said)["error"]["message"] if as_json else said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["merge"],
        ["merge", "adapter"],
        ["merge", "adapter", "-o", "out", "--to", "gguf"],
        ["merge", "adapter", "-o", "out", "--dtype", "int8"],
        ["merge", "adapter", "-o", "out", "--merge-faster"],
        ["verify", "merged", "--base", "base"],
        ["unmerge", "adapter"],
    ],
    ids=" ".join,
)
def test_wrong_usage(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: dora-export" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--json"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["type"] == "UsageError"
    assert printed.err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [["--no-verify", "-o", "merged"], ["--dry-run"]], ids=["no-verify", "dry-run"])
def test_transformers_is_imported_only_to_verify(world: World, tmp_path: Path, more: list[str]) -> None:
    code = (
        "import sys; from exporters.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'transformers', 'peft', 'onnx', 'onnxruntime', 'gradio'}; "
        "print(sorted(heavy & sys.modules.keys())); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *merge(world, *more)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_base_is_the_one_that_the_adapter_names(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((world.adapter / "adapter_config.json").read_text())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes((world.adapter / "adapter_model.safetensors").read_bytes())
    arguments = ["merge", str(adapter), "-o", str(tmp_path / "merged"), "--no-verify"]
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert main(arguments) == 1
    assert "--base" in capsys.readouterr().err
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(world.base)}))
    assert main(arguments) == 0
    assert same(read_folder(tmp_path / "merged"), read_folder(world.merged))
