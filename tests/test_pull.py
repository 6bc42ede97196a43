"""Hub ids wherever a path is taken: merge from the Hub and to it, inspect by ranges, verify what was pushed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_serve.errors import VerificationError
from exporters.report import export_text
from tests.fake_hub import FakeHub
from tests.hub_cases import TOKEN, Desk, Inputs, contents, desk, environment_of, hub, inputs, merged, warm

__all__ = ["desk", "hub", "inputs", "merged", "warm"]


def put(hub: FakeHub, repo_id: str, folder: Path, within: str = "", ref: str = "main") -> str:
    files = {f"{within}{name}": content for name, content in contents(folder).items()}
    return hub.add(repo_id, files, ref=ref)


def served(hub: FakeHub) -> Mapping[str, int]:
    """How often the storage gave each large file, or a part of it."""
    return Counter(
        request.path.rpartition("@")[2]
        for request in hub.requests
        if request.host == "localhost" and request.method == "GET"
    )


# Pull and prove


def test_what_was_pushed_is_pulled_and_proven(hub: FakeHub, desk: Desk, merged: Path, tmp_path: Path) -> None:
    pushed = desk.json("push", merged, "anna/dora")
    desk.environment = environment_of(hub, tmp_path / "another cache")
    found = desk.json("verify", "anna/dora")
    assert (found["passed"], found["revision"]) == (True, pushed["commit"])
    pulled = contents(Path(found["folder"]))
    wanted = contents(merged)
    assert pulled.pop("README.md") != wanted.pop("README.md")
    assert pulled == wanted
    assert sorted(found["hashes"]["matching"]) == sorted(wanted.keys() - {"dora_export.json"})
    assert "Byte for byte what was written" in desk.run("verify", f"anna/dora@{pushed['commit']}").output


def test_the_forward_is_proven_where_base_and_adapter_are_named(
    hub: FakeHub, desk: Desk, merged: Path, inputs: Inputs
) -> None:
    desk.json("push", merged, "anna/dora")
    put(hub, "anna/llama", inputs.base)
    put(hub, "anna/adapter", inputs.adapter)
    found = desk.json("verify", "anna/dora", "--adapter", "anna/adapter", "--base", "anna/llama")
    assert found["passed"]
    assert found["hashes"]["passed"]
    assert found["tensors"]["differing_elements"] == 0
    assert found["forward"]["ran"]
    assert found["forward"]["passed"]
    # The adapter names its base itself.
    assert desk.json("verify", "anna/dora", "--adapter", "anna/adapter")["passed"]


def test_what_was_changed_on_the_hub_is_named(hub: FakeHub, desk: Desk, merged: Path, inputs: Inputs) -> None:
    desk.json("push", merged, "anna/dora")
    files = dict(hub.files("anna/dora"))
    shard = sorted(merged.glob("*.safetensors"))[1].name
    spoilt = bytearray(files[shard])
    spoilt[-1] ^= 1
    hub.add("anna/dora", {**files, shard: bytes(spoilt), "README.md": b"# edited since, which is nobody's business\n"})
    found = desk.json("verify", "anna/dora", code=1)
    assert (found["passed"], found["hashes"]["changed"]) == (False, [shard])
    said = desk.run("verify", "anna/dora", "--adapter", inputs.adapter, "--base", inputs.base)
    assert said.code == 1
    assert f"{shard} is not what was written" in said.output
    del files[shard]
    hub.add("anna/dora", {**files, "more.txt": b"x"})
    found = desk.json("verify", "anna/dora", code=1)
    assert found["hashes"]["missing"] == [shard]


def test_an_unverified_export_has_no_hashes_to_be_held_to(
    hub: FakeHub, desk: Desk, inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    desk.run("merge", inputs.adapter, "--base", inputs.base, "-o", out, "--no-verify")
    desk.json("push", out, "anna/dora", "--unverified")
    found = desk.json("verify", "anna/dora", code=1)
    assert "holds no hashes" in found["failures"][0]
    assert desk.json("verify", "anna/dora", "--adapter", inputs.adapter, "--base", inputs.base, code=1)["forward"][
        "passed"
    ]


def test_a_local_folder_is_held_to_its_hashes_too(desk: Desk, merged: Path, tmp_path: Path) -> None:
    assert desk.json("verify", merged)["passed"]
    spoilt = Path(shutil.copytree(merged, tmp_path / "spoilt"))
    (spoilt / "config.json").write_text("{}")
    assert desk.json("verify", spoilt, code=1)["hashes"]["changed"] == ["config.json"]


def test_what_has_no_record(hub: FakeHub, desk: Desk, inputs: Inputs, merged: Path) -> None:
    assert "so there are no hashes" in desk.error("verify", inputs.base)
    put(hub, "anna/llama", inputs.base)
    assert "so there are no hashes" in desk.error("verify", "anna/llama")
    assert "does not exist" in desk.error("verify", "./nowhere")
    # Somebody else's merge is proven by its tensors.
    files = {name: content for name, content in contents(merged).items() if name != "dora_export.json"}
    hub.add("anna/theirs", files)
    assert desk.json("verify", "anna/theirs", "--adapter", inputs.adapter, "--base", inputs.base)["passed"]


def test_a_record_that_names_what_lies_outside(hub: FakeHub, desk: Desk) -> None:
    record = {"files": {"../../evil": {"bytes": 1, "sha256": None}}}
    hub.add("anna/evil", {"dora_export.json": json.dumps(record).encode()})
    assert "is corrupt" in desk.error("verify", "anna/evil")


# From the Hub


def test_a_merge_fetches_each_shard_once(
    hub: FakeHub, desk: Desk, inputs: Inputs, merged: Path, tmp_path: Path
) -> None:
    hub.log_in(TOKEN, "anna")
    base = put(hub, "anna/llama", inputs.base, ref="v1")
    hub.add("anna/llama", {"config.json": b"{}"})
    adapter = put(hub, "anna/adapters", inputs.adapter, within="best/")
    arguments = ["anna/adapters:best", "--base", "anna/llama@v1"]
    assert desk.run("merge", *arguments, "-o", tmp_path / "out").code == 0
    shards = sorted(path.name for path in inputs.base.glob("*.safetensors"))
    assert served(hub) == {**dict.fromkeys(shards, 1), "best/adapter_model.safetensors": 1}
    assert contents(tmp_path / "out").keys() == contents(merged).keys()
    for shard in shards:
        ours, theirs = load_file(tmp_path / "out" / shard), load_file(merged / shard)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    record = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert (record["base"]["id"], record["base"]["revision"]) == ("anna/llama", base)
    assert (record["adapter"]["id"], record["adapter"]["revision"]) == ("anna/adapters", adapter)
    pushed = desk.json("push", tmp_path / "out", "anna/dora", "--dry-run")
    assert f"dora-export merge anna/adapters@{adapter}:best --base anna/llama@{base} -o " in pushed["card"]
    assert "base_model: anna/llama\n" in pushed["card"]


def test_merge_pushes_in_one(
    hub: FakeHub, desk: Desk, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    done = desk.json("merge", inputs.adapter, "--base", inputs.base, "-o", out, "--push", "anna/dora", "--public")
    assert done["verification"]["passed"]
    assert done["push"]["commit"] == hub.repositories["anna/dora"].refs["main"]
    assert not hub.repositories["anna/dora"].private
    assert desk.json("verify", "anna/dora")["passed"]
    card = hub.files("anna/dora")["README.md"].decode()
    assert f"dora-export merge {inputs.adapter} --base {inputs.base} -o {out}\n" in card
    assert "base_model: anna/llama" in card
    assert "license: cc-by-4.0\nlanguage:\n- de\n- en\n" in card


def test_merge_asks_for_the_right_to_push_before_it_works(
    hub: FakeHub, desk: Desk, inputs: Inputs, tmp_path: Path
) -> None:
    arguments = ["merge", inputs.adapter, "--base", inputs.base, "-o", tmp_path / "out", "--push"]
    assert "wanted user/name" in desk.error(*arguments, "dora")
    hub.tokens.clear()
    assert "refused the token" in desk.error(*arguments, "anna/dora")
    desk.environment["HF_TOKEN"] = ""
    assert "Nobody is logged in" in desk.error(*arguments, "anna/dora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "out", "--public"],
        ["-o", "out", "--pr"],
        ["-o", "out", "--unverified"],
        ["--push", "anna/x", "--no-verify"],
        ["--push", "anna/x", "--pr", "--revision", "y"],
    ],
    ids=" ".join,
)
def test_what_does_not_go_together(desk: Desk, options: list[str]) -> None:
    assert desk.run("merge", "adapter", *options).code == 2


def test_merge_pushes_what_is_not_verified_only_with_the_word(
    hub: FakeHub, desk: Desk, inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["merge", inputs.adapter, "--base", inputs.base, "-o", out, "--push", "anna/dora", "--no-verify"]
    desk.json(*arguments, "--unverified")
    assert "**Not verified.**" in hub.files("anna/dora")["README.md"].decode()
    # What is pushed is hashed all the same, so it can be held to that.
    assert desk.json("verify", "anna/dora")["recorded_proof"] == "unverified"


# Inspection by ranges


def test_an_adapter_is_inspected_without_its_weights(hub: FakeHub, desk: Desk, inputs: Inputs) -> None:
    large = dict(load_file(inputs.adapter / "adapter_model.safetensors"))
    name = next(name for name in large if name.endswith("q_proj.lora_A.weight"))
    saved = inputs.adapter.parent / "large"
    shutil.copytree(inputs.adapter, saved)
    save_file({**large, name: torch.ones(4, 500_000)}, saved / "adapter_model.safetensors")
    commit = put(hub, "anna/large", saved)
    local = desk.json("inspect", saved)
    hub.requests.clear()
    found = desk.json("inspect", "anna/large")
    assert served(hub) == {"adapter_model.safetensors": 1}
    ranges = [request.range for request in hub.requests if request.method == "GET" and "safetensors" in request.path]
    assert set(ranges) == {"bytes=0-65535"}
    assert (found.pop("path"), found.pop("source")) == (None, f"anna/large@{commit}")
    assert "Only the header was read" in found.pop("notes")[-1]
    for key in ("path", "source", "notes"):
        local.pop(key)
    assert found == local
    cache = Path(desk.environment["HF_HOME"])
    assert not list(cache.rglob("*.safetensors"))
    assert max(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 100_000


def test_a_plan_needs_no_weights_of_the_base(hub: FakeHub, desk: Desk, inputs: Inputs) -> None:
    put(hub, "anna/llama", inputs.base)
    put(hub, "anna/adapter", inputs.adapter)
    local = desk.json("inspect", inputs.adapter, "--base", inputs.base)
    hub.requests.clear()
    found = desk.json("inspect", "anna/adapter", "--base", "anna/llama")
    assert found["plan"]["actions"] == local["plan"]["actions"]
    assert found["problems"] == local["problems"] == []
    assert not list(Path(desk.environment["HF_HOME"]).rglob("*.safetensors"))
    assert all(request.range for request in hub.requests if request.host == "localhost")
    # What is in the cache is used.
    assert desk.run("merge", "anna/adapter", "-o", desk.environment["HF_HOME"] + "/out").code == 0
    hub.requests.clear()
    cached = desk.json("inspect", "anna/adapter", "--base", "anna/llama")
    assert not served(hub)
    assert cached["path"] is not None


def test_decomposition_reads_what_it_needs(hub: FakeHub, desk: Desk, inputs: Inputs) -> None:
    put(hub, "anna/llama", inputs.base)
    put(hub, "anna/adapter", inputs.adapter)
    local = desk.json("inspect", inputs.adapter, "--base", inputs.base, "--decompose")
    found = desk.json("inspect", "anna/adapter", "--base", "anna/llama", "--decompose")
    assert found["decomposition"]["modules"] == local["decomposition"]["modules"]


def test_a_file_alone_and_its_scalars(hub: FakeHub, desk: Desk, tmp_path: Path) -> None:
    """kohya's files hold an alpha in each module, which is a value and not in the header."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module in ("lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_proj_in"):
        tensors[f"{module}.lora_down.weight"] = torch.randn(4, 20_000, generator=generator)
        tensors[f"{module}.lora_up.weight"] = torch.randn(320, 4, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "style.safetensors")
    content = (tmp_path / "style.safetensors").read_bytes()
    hub.add("anna/loras", {"style.safetensors": content, "other.safetensors": content, "README.md": b"# Two\n"})
    local = desk.json("inspect", tmp_path / "style.safetensors")
    assert [target["scalings"] for target in local["targets"]] == [{"0.5": 1}] * 2
    hub.requests.clear()
    found = desk.json("inspect", "anna/loras:style.safetensors")
    assert found["targets"] == local["targets"]
    assert "style.safetensors" not in {path.name for path in Path(desk.environment["HF_HOME"]).rglob("*")}
    assert set(served(hub)) == {"style.safetensors"}
    assert all(request.range for request in hub.requests if request.host == "localhost")
    assert "anna/loras:other.safetensors" in desk.error("inspect", "anna/loras")
    assert "lacks absent.safetensors" in desk.error("inspect", "anna/loras:absent.safetensors")


def test_a_server_without_ranges_gives_the_file(hub: FakeHub, desk: Desk, inputs: Inputs) -> None:
    put(hub, "anna/adapter", inputs.adapter)
    hub.ranges = False
    found = desk.json("inspect", "anna/adapter")
    assert found["path"] is not None
    assert not found["notes"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, (50).to_bytes(8, "little") + b"no json" * 20])
def test_a_header_that_is_none(hub: FakeHub, desk: Desk, inputs: Inputs, content: bytes) -> None:
    files = {**contents(inputs.adapter), "adapter_model.safetensors": content}
    hub.add("anna/broken", files)
    said = desk.error("inspect", "anna/broken")
    assert "safetensors" in said
    assert "sound" in said or "bytes" in said


def test_what_the_hub_refuses_is_said(hub: FakeHub, desk: Desk, inputs: Inputs) -> None:
    put(hub, "anna/adapter", inputs.adapter)
    hub.repositories["anna/adapter"].gated = True
    assert "accepted its terms" in desk.error("inspect", "anna/adapter")
    assert "has no model 'anna/absent'" in desk.error("inspect", "anna/absent")


# Verification that fails


def test_merge_pushes_what_failed_only_with_the_word(
    hub: FakeHub, desk: Desk, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, since the fault is planted in the merge; so the push that follows is the command's."""
    from exporters.pipeline import ExportRequest, run_export

    monkeypatch.setattr("dora_serve.merge.norm_scale", lambda magnitude, norms: torch.ones_like(norms))
    out = tmp_path / "out"
    request = ExportRequest(str(inputs.adapter), str(inputs.base), out)
    with pytest.raises(VerificationError):
        run_export(request)
    assert not out.exists()
    export = run_export(replace(request, unproven=True))
    assert export.failures
    assert "FAILED" in export_text(export)
    assert json.loads((out / "dora_export.json").read_text())["failures"] == list(export.failures)
    assert "failed its verification" in desk.error("push", out, "anna/dora")
    assert not hub.requests
    assert (
        "NOT PROVEN: this export failed its verification" in desk.run("push", out, "anna/dora", "--unverified").output
    )
    card = hub.files("anna/dora")["README.md"].decode()
    assert "**This failed its verification**, and was published all the same" in card
    assert "magnitude" in card
    assert desk.json("verify", "anna/dora")["recorded_proof"] == "failed"
