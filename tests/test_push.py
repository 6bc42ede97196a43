"""`dora-export push` against the loopback Hub, through huggingface_hub as it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dora_serve.errors import HubError
from exporters.push_errors import translate_push
from tests.fake_hub import FakeHub, Fault
from tests.hub_cases import (
    TOKEN,
    Desk,
    Inputs,
    contents,
    desk,
    hub,
    inputs,
    merge,
    merged,
    warm,
)
from tests.warm import ROOT, Warm

__all__ = ["desk", "hub", "inputs", "merged", "warm"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def folder(merged: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be spoilt."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


# What arrives


def test_the_hub_holds_the_folder_byte_for_byte_and_a_card(hub: FakeHub, desk: Desk, merged: Path) -> None:
    done = desk.json("push", merged, "anna/dora")
    assert hub.repositories["anna/dora"].private
    held = dict(hub.files("anna/dora"))
    assert held.pop(".gitattributes")
    card = held.pop("README.md").decode()
    wanted = contents(merged)
    del wanted["README.md"]  # the base's own card, which is not this model's
    assert held == wanted
    assert "| elements that are not the formula rounded once | 0 of" in card
    assert (done["creates"], done["private"], done["proof"]) == (True, True, "verified")
    assert done["url"] == f"{hub.endpoint}/anna/dora"
    assert done["commit"] == hub.repositories["anna/dora"].refs["main"]
    assert {file["name"]: file["sha256"] for file in done["files"] if file["name"] != "README.md"} == {
        name: hashlib.sha256(content).hexdigest() for name, content in wanted.items()
    }
    # One commit beside the one that made the repository: nobody ever sees a half.
    assert len(hub.repositories["anna/dora"].commits) == 2
    assert {request.host for request in hub.requests if request.token == TOKEN} == {"127.0.0.1"}


def test_public_opens_what_it_makes(hub: FakeHub, desk: Desk, merged: Path) -> None:
    assert "(public)" in desk.run("push", merged, "anna/dora", "--public").output
    assert not hub.repositories["anna/dora"].private


def test_the_second_push_sends_nothing(hub: FakeHub, desk: Desk, merged: Path) -> None:
    first = desk.json("push", merged, "anna/dora")
    assert sorted(hub.received) == sorted(map(sha256, shards(merged)))
    hub.received.clear()
    hub.requests.clear()
    second = desk.json("push", merged, "anna/dora")
    assert not hub.received
    assert not [request for request in hub.requests if request.method in ("PUT", "POST")]
    assert second["bytes_to_send"] == 0
    assert {file["state"] for file in second["files"]} == {"there"}
    assert second["commit"] == first["commit"]
    assert "holds all of it already" in desk.run("push", merged, "anna/dora").output


def test_a_dry_run_lists_every_file_and_sends_nothing(hub: FakeHub, desk: Desk, merged: Path) -> None:
    planned = desk.run("push", merged, "anna/dora", "--dry-run").output
    assert "anna/dora would be made, private" in planned
    assert all(sha256(shard) in planned for shard in shards(merged))
    desk.json("push", merged, "anna/dora")
    hub.add("anna/dora", {**hub.files("anna/dora"), "config.json": b"{}"})
    hub.requests.clear()
    planned = desk.json("push", merged, "anna/dora", "--dry-run")
    states = {file["name"]: file["state"] for file in planned["files"]}
    assert states.pop("config.json") == "changed"
    assert set(states.values()) == {"there"}
    assert planned["card"].encode() == hub.files("anna/dora")["README.md"]
    assert not [request for request in hub.requests if request.method in ("PUT", "POST")]


def test_large_files_go_in_parts_where_the_hub_wants_that(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.part_bytes = 1000
    desk.json("push", merged, "anna/dora")
    assert all(hub.files("anna/dora")[shard.name] == shard.read_bytes() for shard in shards(merged))
    assert len([request for request in hub.requests if request.method == "PUT"]) > len(shards(merged))


def test_two_files_of_one_content_arrive_both(hub: FakeHub, desk: Desk, folder: Path) -> None:
    twin = folder / "twin.safetensors"
    shutil.copyfile(shards(folder)[0], twin)
    record = json.loads((folder / "dora_export.json").read_text())
    record["files"][twin.name] = record["files"][shards(folder)[0].name]
    (folder / "dora_export.json").write_text(json.dumps(record))
    desk.json("push", folder, "anna/dora")
    assert hub.files("anna/dora")[twin.name] == twin.read_bytes() == hub.files("anna/dora")[shards(folder)[0].name]
    assert len(hub.received) == len(set(hub.received))


def test_what_an_earlier_export_left_is_taken_away(
    hub: FakeHub, desk: Desk, warm: Warm, merged: Path, inputs: Inputs, tmp_path: Path
) -> None:
    desk.json("push", merged, "anna/dora")
    hub.add("anna/dora", {**hub.files("anna/dora"), "notes.txt": b"of somebody", "old.safetensors": b"theirs"})
    single = Path(shutil.copytree(inputs.base, tmp_path / "single"))
    for path in (*shards(single), single / "model.safetensors.index.json"):
        path.unlink()
    from tests.tiny_models import SIZES, build

    build("AutoModelForCausalLM", "llama", **SIZES).save_pretrained(single)  # type: ignore[operator]
    out = merge(warm, Inputs(single, inputs.adapter), tmp_path / "again")
    done = desk.run("push", out, "anna/dora")
    assert f"{len(shards(merged)) + 1} of an earlier export removed" in done.output
    assert "other weights, which are left as they are: old.safetensors" in done.output
    names = set(hub.files("anna/dora"))
    assert names == {*contents(out), ".gitattributes", "notes.txt", "old.safetensors"}


# Branches and pull requests


def test_a_branch_is_made_and_main_stays(hub: FakeHub, desk: Desk, merged: Path) -> None:
    before = hub.add("anna/dora", {"README.md": b"# Mine\n"}, private=True)
    hub.log_in(TOKEN, "anna")
    desk.json("push", merged, "anna/dora", "--revision", "try/this")
    refs = hub.repositories["anna/dora"].refs
    assert refs["main"] == before
    assert set(contents(merged)) <= set(hub.files("anna/dora", "try/this"))
    assert b'from_pretrained("anna/dora", revision="try/this")' in hub.files("anna/dora", "try/this")["README.md"]


def test_a_pull_request_is_opened_on_somebody_elses_model(hub: FakeHub, desk: Desk, merged: Path) -> None:
    before = hub.add("bert/dora", {"README.md": b"# Theirs\n"})
    done = desk.json("push", merged, "bert/dora", "--pr")
    repository = hub.repositories["bert/dora"]
    assert repository.refs["main"] == before
    assert done["pull_request_url"] == f"{hub.endpoint}/bert/dora/discussions/1"
    assert set(contents(merged)) <= set(hub.files("bert/dora", "refs/pr/1"))
    assert hub.files("bert/dora", "refs/pr/1")["README.md"].startswith(b"---\n")
    repository.writers.add(TOKEN)
    again = desk.json("push", merged, "bert/dora", "--revision", "refs/pr/1")
    assert again["bytes_to_send"] == 0
    assert len(repository.discussions) == 1


def test_what_does_not_go_together(desk: Desk, merged: Path) -> None:
    assert desk.run("push", merged, "anna/dora", "--pr", "--revision", "x").code == 2
    assert "wanted user/name" in desk.error("push", merged, "dora")
    assert "wanted user/name" in desk.error("push", merged, "anna/dora@v1")
    assert "nothing to open a pull request on" in desk.error("push", merged, "anna/absent", "--pr")
    assert "does not end in .git" in desk.error("push", merged, "anna/dora.git")
    for branch in ("a b", "../x", "x..y", "x/", "x.lock", "a~1"):
        assert "no name of a branch" in desk.error("push", merged, "anna/dora", "--revision", branch)
    desk.json("push", merged, "anna/dora")
    assert "refs/pr/7" in desk.error("push", merged, "anna/dora", "--revision", "refs/pr/7")


# Interruptions


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_after_an_interruption_no_finished_file_is_sent_again(
    hub: FakeHub, desk: Desk, merged: Path, end: signal.Signals
) -> None:
    last = sha256(shards(merged)[-1])
    others = sorted(sha256(shard) for shard in shards(merged)[:-1])
    hub.stalled.add(last)
    process = subprocess.Popen(
        [sys.executable, "-m", "exporters.cli", "push", merged, "anna/dora"],
        cwd=ROOT,
        env={**os.environ, **desk.environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert hub.held.wait(120)
    while sorted(hub.received) != others:  # the others are on their way beside it
        assert process.poll() is None
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    desk.said += errors
    if end != signal.SIGKILL:
        assert process.returncode == 130
        assert "what has arrived is not sent again" in errors
    assert set(hub.files("anna/dora")) == {".gitattributes"}
    hub.stalled.clear()
    hub.released.set()
    hub.received.clear()
    desk.json("push", merged, "anna/dora")
    assert hub.received == [last]
    assert all(hub.files("anna/dora")[shard.name] == shard.read_bytes() for shard in shards(merged))


# A Hub in trouble, which is waited for


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /storage", 503),
        Fault("PUT /storage", cut=True),
        Fault("PUT /storage", 500, times=2),
        Fault("POST .*/batch", 502),
        Fault("POST .*/verify", 504),
        Fault("POST .*/preupload", 503),
        Fault("POST .*/commit/", 503),
        Fault("POST .*/commit/", cut=True),
        Fault("POST /api/repos/create", 500),
        Fault("GET /api/models/anna/dora$", 503),
        Fault("POST .*/batch", 429, headers={"Retry-After": "1"}),
        Fault("POST .*/commit/", 429, headers={"Retry-After": "1"}),
        Fault("POST .*/commit/", 429, headers={"RateLimit": '"api";r=0;t=1'}),
        Fault("POST .*/commit/", 412),
        Fault("POST /api/validate-yaml", 404),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.status or 'cut'} {' '.join(fault.headers)}".strip(),
)
def test_what_passes_is_waited_for(hub: FakeHub, desk: Desk, merged: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    ended = desk.run("push", merged, "anna/dora")
    assert (ended.code, ended.errors) == (0, "")
    assert fault.times == 0
    assert all(hub.files("anna/dora")[shard.name] == shard.read_bytes() for shard in shards(merged))
    assert len(hub.received) == len(set(hub.received))


def test_a_pull_request_is_not_opened_twice(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.add("bert/dora", {"README.md": b"# Theirs\n"})
    hub.faults.append(Fault("POST .*/commit/", 503))
    assert "answered 503" in desk.error("push", merged, "bert/dora", "--pr")
    assert desk.json("push", merged, "bert/dora", "--pr")["pull_request_url"]


# Refusals of the Hub


def test_nobody_is_logged_in(hub: FakeHub, desk: Desk, merged: Path) -> None:
    desk.environment["HF_TOKEN"] = ""
    said = desk.error("push", merged, "anna/dora")
    assert "Nobody is logged in" in said
    assert "hf auth login" in said
    assert not hub.requests


def test_a_token_that_is_none(hub: FakeHub, desk: Desk, merged: Path) -> None:
    desk.environment["HF_TOKEN"] = "hf_bäd"
    for command in (("push", merged, "anna/dora"), ("verify", "anna/dora"), ("inspect", "anna/dora")):
        assert "characters that no token has" in desk.error(*command)
    assert not [request for request in hub.requests if request.token]


def test_an_expired_token(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.tokens.clear()
    said = desk.error("push", merged, "anna/dora")
    assert "refused the token" in said
    assert "expired" in said


def test_a_token_that_may_only_read(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.add("bert/dora", {"README.md": b"# Theirs\n"})
    said = desk.error("push", merged, "bert/dora")
    assert "You don't have write access to this repo" in said
    assert "--pr" in said
    said = desk.error("push", merged, "bert/new")
    assert "don't have the rights to create" in said


def test_a_private_repository_of_others_is_not_told_apart(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.add("bert/secret", {"README.md": b"# Theirs\n"}, private=True)
    assert "forbids" in desk.error("push", merged, "bert/secret")


FULL = "Private repository storage limit reached, please upgrade your plan"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST .*/batch", 507, times=9),
        Fault("POST .*/batch", 403, times=9, headers={"X-Error-Message": FULL}),
        Fault("POST .*/batch", 403, times=9, body={"error": FULL}),
        Fault("POST .*/commit/", 402, times=9, body={"error": FULL}),
        Fault("POST .*/batch", 413, times=9),
    ],
    ids=lambda fault: str(fault.status),
)
def test_no_room(hub: FakeHub, desk: Desk, merged: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    said = desk.error("push", merged, "anna/dora")
    assert "no room for 'anna/dora'" in said
    assert "settings/billing" in said
    assert set(hub.files("anna/dora")) == {".gitattributes"}


def test_no_room_for_one_file(hub: FakeHub, desk: Desk, merged: Path) -> None:
    error = {"code": 507, "message": "Storage quota exceeded"}
    refused = {"objects": [{"oid": "0" * 64, "size": 1, "error": error}]}
    hub.faults.append(Fault("POST .*/batch", 200, times=9, body=refused))
    assert "no room for 'anna/dora' in this account (it says: Storage quota exceeded" in desk.error(
        "push", merged, "anna/dora"
    )


def test_a_wait_that_is_too_long_is_told(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/", 429, headers={"Retry-After": "3600"}))
    said = desk.error("push", merged, "anna/dora")
    assert "too many requests" in said
    assert "Wait 3600 seconds" in said


def test_a_hub_that_stays_away(desk: Desk, merged: Path) -> None:
    desk.environment["HF_HUB_OFFLINE"] = "1"
    assert "HF_HUB_OFFLINE" in desk.error("push", merged, "anna/dora")


def test_metadata_that_the_hub_does_not_take(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.faults.append(Fault("POST /api/validate-yaml", 400, body={"errors": [{"message": "license is unknown"}]}))
    assert "license is unknown" in desk.error("push", merged, "anna/dora")
    assert "anna/dora" not in hub.repositories


def test_what_a_server_echoes_is_shown_without_the_token(hub: FakeHub, desk: Desk, merged: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/", 418, body={"error": f"no tea with Bearer {TOKEN}"}))
    assert "no tea with Bearer hf_***" in desk.error("push", merged, "anna/dora")


def test_the_token_is_not_in_what_an_error_came_from() -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    request = httpx2.Request("PUT", "http://127.0.0.1/storage/x", headers={"Authorization": f"Bearer {TOKEN}"})
    response = httpx2.Response(503, request=request)
    try:
        try:
            raise HfHubHTTPError("503", response=response)
        except HfHubHTTPError as error:
            raise RuntimeError("Error while uploading 'x' to the Hub.") from error
    except RuntimeError as error:
        translated = translate_push(error, repo_id="anna/dora", revision=None, token=TOKEN)
    assert isinstance(translated, HubError)
    assert "answered 503" in str(translated)
    assert TOKEN not in repr(request.headers.raw)
    assert translate_push(ValueError("a bug"), repo_id="anna/dora", revision=None, token=TOKEN) is None


# Folders that must not be published


def spoil_weights(folder: Path) -> None:
    path = shards(folder)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


SPOILT = {
    "a flipped bit": (spoil_weights, "sha256 is another"),
    "a file too short": (lambda folder: (folder / "config.json").write_text("{}"), "config.json is not what was"),
    "a file gone": (lambda folder: shards(folder)[1].unlink(), "is not there"),
    "another's weights": (lambda folder: (folder / "extra.safetensors").write_bytes(b"x"), "does not name it"),
    "a cache": (lambda folder: write(folder / ".cache" / "huggingface" / "x.lock"), "a cache"),
    "python's cache": (lambda folder: write(folder / "__pycache__" / "x.pyc"), "a cache"),
    "git's own": (lambda folder: write(folder / ".git" / "config"), "a cache"),
    "the token's file": (lambda folder: write(folder / "token"), "a secret"),
    "an environment": (lambda folder: write(folder / ".env"), "a secret"),
    "a key": (lambda folder: write(folder / "id_rsa"), "a secret"),
    "a partial download": (lambda folder: write(folder / "model.safetensors.incomplete"), "a partial output"),
    "a partial output": (lambda folder: write(folder / ".out.partial-abc" / "config.json"), "hidden"),
    "an optimizer": (lambda folder: write(folder / "optimizer.pt"), "does not name it"),
    "a token in the card": (lambda folder: write(folder / "README.md", f"my token: {TOKEN}"), "access token"),
    "another token in a document": (lambda folder: write(folder / "NOTES.md", "hf_" + "x" * 34), "access token"),
    "somebody's key of GitHub": (lambda folder: write(folder / "NOTICE", "ghp_" + "x" * 36), "access token"),
    "a link": (lambda folder: (folder / "passwords.md").symlink_to("/etc/passwd"), "a link"),
    "a link to a folder": (lambda folder: (folder / "etc.md").symlink_to("/etc"), "a link"),
    "a link in place of a recorded file": (lambda folder: relink(folder / "config.json"), "a link"),
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe.md"), "neither a file nor a folder"),
    "a name that is no text": (lambda folder: write(folder / "a\udcff.md"), "no Unicode text"),
    "a verdict that is none": (lambda folder: judge(folder, "no"), "failed its verification"),
    "a record that climbs": (lambda folder: climb(folder), "is corrupt"),
    "a record that is none": (lambda folder: (folder / "dora_export.json").write_text("[]"), "holds a list"),
    "no record": (lambda folder: (folder / "dora_export.json").unlink(), "not from here"),
}


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def relink(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def judge(folder: Path, passed: object) -> None:
    record = json.loads((folder / "dora_export.json").read_text())
    record["verification"]["passed"] = passed
    (folder / "dora_export.json").write_text(json.dumps(record))


def climb(folder: Path) -> None:
    record = json.loads((folder / "dora_export.json").read_text())
    record["files"]["../secret"] = {"bytes": 1, "sha256": None}
    (folder / "dora_export.json").write_text(json.dumps(record))


@pytest.mark.parametrize("how", SPOILT)
def test_nothing_of_a_folder_that_is_spoilt_is_sent(hub: FakeHub, desk: Desk, folder: Path, how: str) -> None:
    spoil, words = SPOILT[how]
    spoil(folder)
    said = desk.error("push", folder, "anna/dora")
    shutil.rmtree(folder)  # it may hold the token, which the desk looks for
    assert words in said
    assert not hub.requests


def test_a_folder_that_failed_or_was_left_behind(desk: Desk, folder: Path) -> None:
    failed = folder.rename(folder.with_name("out.FAILED-VERIFICATION"))
    assert "failed its verification" in desk.error("push", failed, "anna/dora")
    hidden = failed.rename(failed.with_name(".out.partial-x1y2"))
    assert "broke off" in desk.error("push", hidden, "anna/dora")
    assert "does not exist" in desk.error("push", failed, "anna/dora")


def test_documents_and_pictures_may_be_added(hub: FakeHub, desk: Desk, folder: Path) -> None:
    write(folder / "docs" / "curve.png")
    write(folder / "EVALUATION.md")
    desk.json("push", folder, "anna/dora")
    assert {"docs/curve.png", "EVALUATION.md"} <= set(hub.files("anna/dora"))


def test_adapter_files_that_were_added_are_told(hub: FakeHub, desk: Desk, folder: Path) -> None:
    """As `onnx-adapter` puts them into an exported base and its record."""
    added = folder / "adapters" / "style.onnx_adapter"
    write(added, "an adapter")
    assert "does not name it" in desk.error("push", folder, "anna/dora")
    record = json.loads((folder / "dora_export.json").read_text())
    name = added.relative_to(folder).as_posix()
    record["files"][name] = {"bytes": 10, "sha256": sha256(added)}
    record["added"] = {name: {}}
    (folder / "dora_export.json").write_text(json.dumps(record))
    assert name in desk.json("push", folder, "anna/dora")["notes"][-1]
    assert hub.files("anna/dora")[name] == b"an adapter"
    assert name in desk.json("verify", "anna/dora")["hashes"]["matching"]


@pytest.mark.parametrize(("to", "library"), [("peft", "peft"), ("mlx", "mlx")])
def test_a_converted_adapter_is_published(
    hub: FakeHub, desk: Desk, inputs: Inputs, tmp_path: Path, to: str, library: str
) -> None:
    out = tmp_path / "converted"
    assert desk.run("convert", inputs.adapter, "--to", to, "--base", inputs.base, "-o", out).code == 0
    assert "--unverified" in desk.error("push", out, "anna/adapter")  # a conversion runs no forward
    desk.json("push", out, "anna/adapter", "--unverified")
    card = hub.files("anna/adapter")["README.md"].decode()
    assert "base_model: anna/llama\nbase_model_relation: adapter\n" in card
    assert f"library_name: {library}" in card
    assert desk.json("verify", "anna/adapter")["passed"]
    assert desk.json("inspect", "anna/adapter")["method"] == "DoRA"


def test_an_exported_base_and_its_adapter_files_are_published(
    hub: FakeHub, desk: Desk, warm: Warm, inputs: Inputs, tmp_path: Path
) -> None:
    """With one adapter from the merge and one that was added later; both are there again in a fresh cache."""
    out = merge(warm, inputs, tmp_path / "slots", ["--to", "onnx-adapters"])
    assert desk.run("onnx-adapter", inputs.adapter, "--for", out, "-o", out / "second.onnx_adapter").code == 0
    desk.json("push", out, "anna/slots")
    held = hub.files("anna/slots")
    for name, content in contents(out).items():
        assert name == "README.md" or held[name] == content
    assert len([name for name in held if name.endswith(".onnx_adapter")]) == 2
    desk.environment["HF_HOME"] = str(tmp_path / "fresh")
    assert desk.json("verify", "anna/slots")["passed"]


def test_what_was_not_verified_needs_the_word(
    hub: FakeHub, desk: Desk, warm: Warm, inputs: Inputs, tmp_path: Path
) -> None:
    out = merge(warm, inputs, tmp_path / "out", ["--no-verify"])
    assert "--unverified" in desk.error("push", out, "anna/dora")
    assert not hub.requests
    assert "NOT PROVEN" in desk.run("push", out, "anna/dora", "--unverified").output
    card = hub.files("anna/dora")["README.md"].decode()
    assert "**Not verified.**" in card
    assert "elements that are not" not in card
    assert hub.files("anna/dora")["config.json"] == (out / "config.json").read_bytes()
