"""Bases and adapters from the Hub, through huggingface_hub as it is, each run in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dora_serve import hub as hub_module
from dora_serve.errors import AdapterError, CheckpointError, HubError
from dora_serve.hub import Located, hub_repository, locate
from dora_serve.hub_errors import translate
from dora_serve.hub_files import choose_shards, choose_side_files, choose_weights
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent
TOKEN = "hf_thisisatokenandmustnotleak"

BASE = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "LICENSE": b"Apache-2.0",
    "README.md": b"# a model",
    "config.json": b"{}",
    "generation_config.json": b'{"max_length": 5}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b'{"tokenizer": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
}
NOT_WANTED = {
    "model.fp16.safetensors": b"half" * 1000,
    "consolidated.safetensors": b"vendor" * 1000,
    "pytorch_model.bin": b"pickle" * 1000,
    "pytorch_model.bin.index.json": b"{}",
    "training_args.pt": b"pickle",
    "tf_model.h5": b"keras",
    "flax_model.msgpack": b"flax",
    "model.Q4_1.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
}

CLIENT = """
import json, sys
from dora_serve.errors import DoraServeError
from dora_serve.hub import locate
reports = []
try:
    found = locate(sys.argv[1], on_progress=reports.append, **json.loads(sys.argv[2]))
    answer = {"path": str(found.path), "repo_id": found.repo_id, "revision": found.revision}
except DoraServeError as error:
    answer = {"error": type(error).__name__, "text": str(error), "facts": repr(error.facts)}
answer["progress"] = [[report.stage, report.done, report.total] for report in reports]
print(json.dumps(answer))
"""


class Client:
    """Calls `locate` in a new process, whose Hub and cache are these."""

    def __init__(self, endpoint: str, cache: Path) -> None:
        self.cache = cache
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "*", "no_proxy": "*"}
        self.stderr = ""

    def start(self, spec: str, what: str = "base", revision: str | None = None) -> subprocess.Popen[str]:
        options = json.dumps({"what": what, "revision": revision})
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, spec, options],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, spec: str, what: str = "base", revision: str | None = None) -> SimpleNamespace:
        process = self.start(spec, what, revision)
        stdout, self.stderr = process.communicate()
        assert process.returncode == 0, self.stderr
        assert TOKEN not in stdout + self.stderr
        return SimpleNamespace(**json.loads(stdout))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub().running() as running:
        yield running


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    return Client(hub.endpoint, tmp_path / "cache")


def contents(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What is fetched


def test_a_base_comes_with_all_that_belongs_to_it_and_nothing_else(hub: FakeHub, client: Client) -> None:
    commit = hub.add("anna/model", {**BASE, **NOT_WANTED})
    found = client("anna/model")
    wanted = {name: content for name, content in BASE.items() if name != ".gitattributes"}
    assert contents(found.path) == wanted
    assert (found.repo_id, found.revision) == ("anna/model", commit)
    assert hub.fetched() == sorted(wanted)
    assert client.stderr == ""


def test_of_a_sharded_base_only_the_shards_that_the_index_names(hub: FakeHub, client: Client) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
        ).encode(),
        names[0]: b"one" * 100,
        names[1]: b"two" * 100,
    }
    hub.add("anna/model", {**files, "consolidated.safetensors": b"x", "model-00003-of-00003.safetensors": b"old"})
    assert contents(client("anna/model").path) == files


def test_an_adapter_comes_without_what_the_trainer_left_beside_it(hub: FakeHub, client: Client) -> None:
    files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"adapter",
        "tokenizer.json": b"{}",
        "special_tokens_map.json": b"{}",
        "README.md": b"# adapter",
    }
    junk = {
        "trainer_state.json": b"{}",
        "training_args.bin": b"pickle",
        "optimizer.pt": b"pickle",
        "model.safetensors": b"merged",
        "checkpoint-500/adapter_model.safetensors": b"older",
    }
    hub.add("anna/adapter", {**files, **junk})
    assert contents(client("anna/adapter", "adapter").path) == files


def test_a_folder_within_a_repository(hub: FakeHub, client: Client) -> None:
    files = {"unet/config.json": b"{}", "unet/diffusion_pytorch_model.safetensors": b"unet"}
    commit = hub.add("anna/pipeline", {**files, **BASE, "vae/config.json": b"{}"})
    for spec in ("anna/pipeline:unet", "anna/pipeline@main:unet"):
        found = client(spec)
        assert contents(found.path) == {name.removeprefix("unet/"): content for name, content in files.items()}
        assert found.revision == commit


# Which revision


def test_a_revision_is_pinned_to_its_commit(hub: FakeHub, client: Client) -> None:
    first = hub.add("anna/model", BASE, ref="v1")
    second = hub.add("anna/model", {**BASE, "model.safetensors": b"newer"})
    newest = client("anna/model")
    assert newest.revision == second
    assert contents(newest.path)["model.safetensors"] == b"newer"
    for found in (client("anna/model@v1"), client("anna/model", revision="v1"), client(f"anna/model@{first}")):
        assert found.revision == first
        assert contents(found.path)["model.safetensors"] == BASE["model.safetensors"]
    third = hub.add("anna/model", {**BASE, "model.safetensors": b"newest"})
    assert client("anna/model").revision == third


def test_two_revisions_at_once_are_refused(client: Client) -> None:
    assert "names one revision" in client("anna/model@v1", revision="v2").text


def test_the_second_call_fetches_nothing(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE)
    first = client("anna/model")
    hub.fetched()
    second = client("anna/model")
    assert hub.fetched() == []
    assert (second.path, second.revision, second.progress) == (first.path, first.revision, [])


# Without a network


@pytest.mark.parametrize("away", ["closed port", "HF_HUB_OFFLINE", "503"])
def test_the_cache_serves_where_the_hub_does_not(hub: FakeHub, client: Client, away: str) -> None:
    hub.add("anna/model", BASE, ref="v1")
    commit = hub.add("anna/model", {**BASE, "README.md": b"newer"})
    paths = [client(spec).path for spec in ("anna/model", "anna/model@v1")]
    hub.add("anna/model", {**BASE, "README.md": b"newest"})
    cut_off(hub, client, away)
    assert [client(spec).path for spec in ("anna/model", "anna/model@v1")] == paths
    assert client(f"anna/model@{commit}").revision == commit
    assert client.stderr == ""


@pytest.mark.parametrize("away", ["closed port", "HF_HUB_OFFLINE", "503"])
@pytest.mark.parametrize("spec", ["anna/model", f"anna/model@{'0' * 40}"])
def test_without_hub_and_cache_the_error_says_so(hub: FakeHub, client: Client, away: str, spec: str) -> None:
    hub.add("anna/model", BASE)
    cut_off(hub, client, away)
    found = client(spec)
    assert found.error == "HubError"
    wanted = {
        "closed port": ("no folder 'anna/model' here", "cannot be reached", "give a folder on this machine"),
        "HF_HUB_OFFLINE": ("no folder 'anna/model' here", "Unset HF_HUB_OFFLINE"),
        "503": ("answered 503", "Try again later"),
    }
    assert all(words in found.text for words in wanted[away])
    assert "\n" not in found.text
    assert client.stderr == ""


def cut_off(hub: FakeHub, client: Client, how: str) -> None:
    if how == "503":
        hub.status = 503
    elif how == "HF_HUB_OFFLINE":
        client.environment["HF_HUB_OFFLINE"] = "1"
    else:
        client.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the port of "discard", which nothing serves


FILE_BY_FILE = """
import sys
from huggingface_hub import hf_hub_download
for name in sys.argv[1:]:
    hf_hub_download("anna/model", name)
"""


def test_a_cache_that_another_program_filled_serves_as_well(hub: FakeHub, client: Client) -> None:
    commit = hub.add("anna/model", BASE)
    names = ["config.json", "model.safetensors"]
    command = [sys.executable, "-c", FILE_BY_FILE, *names]
    subprocess.run(command, check=True, env=client.environment, capture_output=True)
    cut_off(hub, client, "HF_HUB_OFFLINE")
    found = client("anna/model")
    assert found.revision == commit
    assert contents(found.path) == {name: BASE[name] for name in names}


def test_a_cache_without_the_weights_is_no_model(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE)
    subprocess.run(
        [sys.executable, "-c", FILE_BY_FILE, "config.json"], check=True, env=client.environment, capture_output=True
    )
    cut_off(hub, client, "HF_HUB_OFFLINE")
    assert "does not hold it whole" in client("anna/model").text


# Transfers that break


def test_a_transfer_that_breaks_goes_on_where_it_was(hub: FakeHub, client: Client) -> None:
    content = bytes(range(256)) * 100_000
    hub.add("anna/model", {**BASE, "model.safetensors": content})
    hub.cuts["model.safetensors"] = [15_000_000]
    found = client("anna/model")
    assert contents(found.path)["model.safetensors"] == content
    ranges = [request.range for request in hub.requests if request.host == "localhost" and request.method == "GET"]
    assert ranges[0] is None
    # huggingface_hub writes in pieces of 10 MiB; what came of an unfinished one is asked for again.
    assert ranges[1:] == ["bytes=10485760-"]
    assert [report[1] for report in found.progress] == sorted(report[1] for report in found.progress)


def test_after_a_transfer_that_failed_only_the_rest_is_fetched(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE)
    hub.cuts["model.safetensors"] = [100] * 6
    failed = client("anna/model")
    assert failed.error == "HubError"
    assert "same command again" in failed.text
    snapshots = client.cache / "hub" / "models--anna--model" / "snapshots"
    assert not list(snapshots.rglob("model.safetensors"))
    done = {path.name for path in snapshots.rglob("*")}
    hub.fetched()
    found = client("anna/model")
    assert contents(found.path)["model.safetensors"] == BASE["model.safetensors"]
    assert "model.safetensors" in (again := hub.fetched())
    assert not done & set(again)


def test_a_killed_download_leaves_nothing_that_looks_whole(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE)
    hub.holds["model.safetensors"] = 3000
    process = client.start("anna/model")
    assert hub.held.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((client.cache / "hub").rglob("model.safetensors"))
    hub.holds.clear()
    hub.released.set()
    assert contents(client("anna/model").path)["model.safetensors"] == BASE["model.safetensors"]


def test_progress_counts_the_bytes_to_fetch(hub: FakeHub, client: Client) -> None:
    files = {**BASE, "model.safetensors": b"0123456789" * 3_000_000}
    hub.add("anna/model", files)
    total = sum(len(content) for name, content in files.items() if name != ".gitattributes")
    progress = client("anna/model").progress
    assert {(stage, whole) for stage, _, whole in progress} == {("fetching anna/model", total)}
    counts = [done for _, done, _ in progress]
    assert len(counts) > 3
    assert counts == sorted(counts)
    assert counts[-1] == total


# Refusals


def test_a_token_reaches_the_hub_and_nothing_else(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE, private=True)
    hub.repositories["anna/model"].members.add(TOKEN)
    hub.tokens.add(TOKEN)
    unknown = client("anna/model")
    assert unknown.error == "HubError"
    assert "hf auth login" in unknown.text
    client.environment["HF_TOKEN"] = TOKEN
    assert contents(client("anna/model").path)["model.safetensors"] == BASE["model.safetensors"]
    hosts = {request.host for request in hub.requests if request.token == TOKEN}
    assert hosts == {"127.0.0.1"}
    assert {request.host for request in hub.requests} == {"127.0.0.1", "localhost"}


@pytest.mark.parametrize("logged_in", [False, True])
def test_a_gated_model(hub: FakeHub, client: Client, logged_in: bool) -> None:
    hub.add("anna/model", BASE, gated=True)
    if logged_in:
        hub.tokens.add(TOKEN)
        client.environment["HF_TOKEN"] = TOKEN
    found = client("anna/model")
    assert found.error == "HubError"
    assert "accepted its terms" in found.text
    assert f"{hub.endpoint}/anna/model" in found.text
    assert "hf auth login" in found.text


def test_a_stale_token(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE)
    client.environment["HF_TOKEN"] = TOKEN
    assert "refused the token" in client("anna/model").text


@pytest.mark.parametrize("logged_in", [False, True])
def test_no_such_model(hub: FakeHub, client: Client, logged_in: bool) -> None:
    if logged_in:
        hub.tokens.add(TOKEN)
        client.environment["HF_TOKEN"] = TOKEN
    found = client("anna/modle")
    assert found.error == "HubError"
    assert "no folder 'anna/modle' here, and the Hub has no model 'anna/modle'" in found.text


def test_no_such_revision(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE)
    assert "'anna/model' has no revision 'v9'" in client("anna/model@v9").text


def test_no_such_folder_within(hub: FakeHub, client: Client) -> None:
    hub.add("anna/model", BASE)
    assert "got nothing, wanted model.safetensors" in client("anna/model:unet").text


@pytest.mark.parametrize(("status", "words"), [(403, "forbids"), (429, "too many requests"), (418, "answered 418")])
def test_other_answers(hub: FakeHub, client: Client, status: int, words: str) -> None:
    hub.status = status
    assert words in client("anna/model").text


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_pickles_are_named_and_not_fetched(hub: FakeHub, client: Client, what: str) -> None:
    hub.add("anna/model", {"config.json": b"{}", "pytorch_model.bin": b"pickle", "adapter_model.bin": b"pickle"})
    found = client("anna/model", what)
    assert found.error == "HubError"
    assert "pickles only (adapter_model.bin, pytorch_model.bin)" in found.text
    assert hub.fetched() == []


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "C:\\evil.json"]
)
def test_names_that_climb_are_refused(hub: FakeHub, client: Client, name: str) -> None:
    hub.add("anna/model", {**BASE, name: b"evil"})
    found = client("anna/model")
    assert found.error == "HubError"
    assert "outside its folder" in found.text
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b'{"weight_map": {"a": "../../evil.safetensors"}}', "not beside it: ../../evil.safetensors"),
        (b'{"weight_map": {"a": "absent.safetensors"}}', "not beside it: absent.safetensors"),
        (b'{"weight_map": ["a"]}', "corrupt"),
        (b"not json \xff", "corrupt"),
        (b"[" * 100_000, "corrupt"),
    ],
)
def test_an_index_that_cannot_be_followed(hub: FakeHub, client: Client, index: bytes, words: str) -> None:
    hub.add("anna/model", {"config.json": b"{}", "model.safetensors.index.json": index})
    found = client("anna/model")
    assert found.error == "CheckpointError"
    assert words in found.text


# Paths


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "anna" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("anna/model", what="base") == Located(Path("anna/model"), "anna/model", None, None)
    assert locate("~/anna", what="adapter").path == tmp_path / "anna"
    assert locate(".", what="base").path == Path(".")
    with pytest.raises(CheckpointError, match="no revision"):
        locate("anna/model", what="base", revision="v1")


@pytest.mark.parametrize("spec", ["./model", "../model", "/nowhere/model", "~/model", "~nobody/model"])
def test_what_looks_like_a_path_is_one(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(spec, what="base")
    with pytest.raises(AdapterError, match="does not exist"):
        locate(spec, what="adapter")


@pytest.mark.parametrize(
    "spec",
    [
        *("", "model", "a/b/c", "anna/", "anna/mo del", "anna/--model", "anna/mo--del", "anna/mo..del"),
        *("anna/model@", "anna/model@../../x", "anna/model@-x", "anna/model@a b", "anna/model:", "anna/model:../x"),
        *(
            "anna/model:/x",
            "anna/model:a//b",
            "anna/model:a\\b",
            "anna/model@v1@v2",
            "https://huggingface.co/anna/model",
        ),
    ],
)
def test_neither_a_path_nor_a_hub_id(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder .* here, and .* is not a Hub id") as caught:
        locate(spec, what="base")
    assert "openai-community/gpt2" in str(caught.value)


# The parts by themselves


@pytest.mark.parametrize(
    ("spec", "repository"),
    [
        ("user/name", "user/name"),
        ("user/name@main:folder/in.it", "user/name"),
        *((spec, None) for spec in ("", "name", "a/b/c", "./a/b", "/a/b", "~/a", "here/model", "a--b/c", "a/b@..")),
    ],
)
def test_which_repository_a_name_is_of(
    spec: str, repository: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/model").mkdir(parents=True)
    assert hub_repository(spec) == repository


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors"),
        (["model.safetensors.index.json", "model-1.safetensors"], "model.safetensors.index.json"),
        (["diffusion_pytorch_model.safetensors", "other.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["only.safetensors", "adapter_model.safetensors"], "only.safetensors"),
        (["odd.safetensors.index.json", "odd-1.safetensors", "odd-2.safetensors"], "odd.safetensors.index.json"),
    ],
)
def test_which_weights_of_a_base(names: list[str], weights: str) -> None:
    assert choose_weights(names, "base", "anna/model") == weights


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "got nothing"),
        (["sub/model.safetensors"], "got nothing"),
        (["one.safetensors", "two.safetensors"], "got one.safetensors, two.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "This is an adapter"),
        (["model.bin"], "pickles only"),
    ],
)
def test_no_telling_which_weights(names: list[str], words: str) -> None:
    with pytest.raises(HubError) as caught:
        choose_weights(names, "base", "anna/model")
    assert words in str(caught.value)


def test_shards_are_each_named_once() -> None:
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}})
    assert choose_shards(index, ["1.safetensors", "2.safetensors"], "anna/model") == ["1.safetensors", "2.safetensors"]


def test_side_files_come_from_the_top_and_the_templates() -> None:
    names = ["config.json", "modeling_x.py", "deeper/config.json", ".hidden.json", "additional_chat_templates/a.jinja"]
    assert choose_side_files(names, "base") == ["config.json", "modeling_x.py", "additional_chat_templates/a.jinja"]


def test_a_disk_without_room_is_seen_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    hub_module._require_room(10**9, "anna/model")
    with pytest.raises(HubError, match=r"got 1.00 GB free, wanted 2.00 GB.*HF_HOME"):
        hub_module._require_room(2 * 10**9, "anna/model")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_during_the_download(number: int) -> None:
    translated = translate(OSError(number, os.strerror(number)), repo_id="anna/model", revision=None)
    assert translated is not None
    assert "no room for 'anna/model'" in str(translated)


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    assert translate(ValueError("a bug"), repo_id="anna/model", revision=None) is None
    assert translate(HubError("ours"), repo_id="anna/model", revision=None) is None
