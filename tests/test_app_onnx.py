"""Columns of an exported graph beside the engine's own, in the app."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from app.cli import prepare
from app.onnx_backend import MARK
from app.run import Run
from dora_serve.cli import build_parser
from dora_serve.engine import Request
from dora_serve.errors import EngineError
from dora_serve.formats import read_adapter
from dora_serve.progress import ignore_progress
from exporters.onnx.export import export_onnx
from exporters.onnx_adapters.adapter_file import open_slotted, write_adapter
from exporters.onnx_adapters.export import put_slots
from exporters.onnx_adapters.options import SlotOptions
from tests.app_cases import PROMPT, client, launched, make_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, adapters on it, and `graph`, its export with `lora` and `dora`."""
    root = make_folders(tmp_path_factory.mktemp("beside"))
    (root / "graph" / "adapters").mkdir(parents=True)
    put_slots(export_onnx(root / "base", root / "graph").path, None, SlotOptions(mixed=True))
    for path in (root / "base").iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, root / "graph" / path.name)
    base = open_slotted(root / "graph")
    for name in ("lora", "dora"):
        adapter = read_adapter(root / "adapters" / name)
        write_adapter(adapter, base, root / "graph" / "adapters" / f"{name}.onnx_adapter")
    return root


def test_graph_and_engine_answer_side_by_side(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path))
    given = ["app", str(folders / "base"), "--adapter", f"dora={folders / 'adapters' / 'dora'}"]
    options = build_parser().parse_args([*given, "--onnx", str(folders / "graph")])
    shared = prepare(options, ignore_progress)
    columns = ["base", "dora", f"base{MARK}", f"dora{MARK}", f"lora{MARK}"]
    assert shared.columns() == columns
    requests = [Request(PROMPT, adapter=None if name == "base" else name, max_tokens=12) for name in columns]
    *_, last = Run(shared.backend, requests).looks()
    texts = {name: answer.token_ids for name, answer in zip(columns, last, strict=True)}
    assert texts["base"] == texts[f"base{MARK}"] != texts["dora"] == texts[f"dora{MARK}"]
    assert texts[f"lora{MARK}"] not in (texts["base"], texts["dora"])

    assert "LoRA of rank 4" in shared.backend.load(f"more{MARK}", folders / "graph" / "adapters" / "lora.onnx_adapter")
    shared.backend.unload(f"more{MARK}")
    for refused in (
        lambda: shared.backend.unload(f"base{MARK}"),
        lambda: shared.backend.paths(f"dora{MARK}"),
        lambda: shared.backend.load(f"more{MARK}", folders / "adapters" / "lora"),
    ):
        with pytest.raises(EngineError):
            refused()
    with launched(shared.backend, folders) as url:
        answers = client(url).predict(PROMPT, ["base", f"dora{MARK}"], api_name="/generate")
    assert len({answer["text"] for answer in answers}) == 2


def test_one_stream_of_two_can_be_cancelled(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path))
    options = build_parser().parse_args(["app", str(folders / "base"), "--onnx", str(folders / "graph")])
    backend = prepare(options, ignore_progress).backend
    requests = [Request(PROMPT, adapter=f"dora{MARK}", max_tokens=200, ignore_eos=True), Request(PROMPT, max_tokens=4)]
    stream = backend.stream(requests)
    ended = {}
    for event in stream:
        if event.index == 0 and event.token_id is not None and 0 not in ended:
            stream.cancel(0)
        if event.finish_reason is not None:
            ended[event.index] = event.finish_reason
    assert ended[0] == "cancelled"
    assert ended[1] in ("length", "stop")
