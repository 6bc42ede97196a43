"""The cache of traced graphs: what comes out of it is what a trace gives, byte for byte, and nothing spoils it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from exporters.onnx import graph_cache
from exporters.onnx.check.answers import token_inputs
from exporters.onnx.check.check import check_onnx
from exporters.onnx.export import OnnxExport, export_onnx
from exporters.onnx.options import OnnxOptions
from exporters.onnx.skeleton import Skeleton
from tests.onnx_models import GROUPED, MODELS, PROMPTS, save

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(MODELS["qwen2"](), tmp_path / "model")


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of tracing: the same empty folder of graphs each time, and a line for each time."""
    told: list[str] = []

    def trace(folder: Path, architecture: str, *_: Any) -> Skeleton:
        told.append(architecture)
        return Skeleton({"model.onnx": b""}, (), (), 0, {})

    monkeypatch.setattr("exporters.onnx.export._trace", trace)
    return told


def another(model: Path, folder: Path) -> Path:
    """The same configuration with other weights, as the next adapter's merge leaves it."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def export(model: Path, out: Path, cache: Path | None, **options: Any) -> OnnxExport:
    out.mkdir()
    return export_onnx(model, out, OnnxOptions(cache=cache, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_next_adapter_gets_what_a_trace_would_give(model: Path, tmp_path: Path, quantize: str | None) -> None:
    cache, second = tmp_path / "cache", another(model, tmp_path / "second")
    assert export(model, tmp_path / "first_onnx", cache, quantize=quantize).traced
    cached = export(second, tmp_path / "cached", cache, quantize=quantize)
    traced = export(second, tmp_path / "traced", None, quantize=quantize)
    assert (cached.traced, traced.traced) == (False, True)
    assert contents(tmp_path / "cached") == contents(tmp_path / "traced")
    assert contents(tmp_path / "cached")["model.onnx.data"] != contents(tmp_path / "first_onnx")["model.onnx.data"]
    if quantize is None:
        assert check_onnx(cached.folder, second, token_inputs(PROMPTS)).failures == ()


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 0.5},
        {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
        {"max_position_embeddings": 65},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_configuration_is_another_graph(
    model: Path, tmp_path: Path, change: dict[str, Any], traces: list[str]
) -> None:
    cache = tmp_path / "cache"
    export(model, tmp_path / "first", cache)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    assert export(model, tmp_path / "second", cache).traced
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16", "_name_or_path": "here"}))
    assert not export(model, tmp_path / "third", cache).traced
    assert len(traces) == 2


def test_a_head_that_was_untied_is_another_graph(model: Path, tmp_path: Path) -> None:
    """As a merge unties it: the configuration says so, and the head has a tensor of its own."""
    cache = tmp_path / "cache"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(model / "model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, model / "model.safetensors")
    tied = export(model, tmp_path / "tied", cache)
    (model / "config.json").write_text(json.dumps(config))
    save_file({**weights, "lm_head.weight": head}, model / "model.safetensors")
    untied = export(model, tmp_path / "untied", cache)
    assert tied.traced
    assert untied.traced
    assert untied.bytes - tied.bytes > head.nbytes / 2
    assert check_onnx(untied.folder, model, token_inputs(PROMPTS)).failures == ()


def test_options_and_versions_are_in_the_key(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    export(model, tmp_path / "0", cache)
    assert export(model, tmp_path / "1", cache, opset=20).traced
    assert export(model, tmp_path / "2", cache, dtype="float16").traced
    assert not export(model, tmp_path / "3", cache).traced
    monkeypatch.setattr("exporters.onnx.export.version", lambda name: "99")
    assert export(model, tmp_path / "4", cache).traced


@pytest.mark.parametrize("spoil", [b"", b"no graph", None], ids=["empty", "other", "cut"])
def test_a_spoilt_entry_is_thrown_away(model: Path, tmp_path: Path, spoil: bytes | None, traces: list[str]) -> None:
    cache = tmp_path / "cache"
    export(model, tmp_path / "first", cache)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-7] if spoil is None else spoil)
    assert export(model, tmp_path / "second", cache).traced
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(model: Path, tmp_path: Path, traces: list[str]) -> None:
    (tmp_path / "file").write_text("")
    made = export(model, tmp_path / "onnx", tmp_path / "file" / "cache")
    assert made.traced


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    for number in range(4):
        graph_cache.keep(tmp_path, f"k{number}", bytes(1000), max_bytes=1 << 20)
        os.utime(tmp_path / f"k{number}.graph", (number, number))
    assert graph_cache.fetch(tmp_path, "k0") == bytes(1000)  # used again
    graph_cache.keep(tmp_path, "k4", bytes(1000), max_bytes=3 * 1064)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["k0", "k3", "k4"]


def test_many_at_a_time_read_whole_entries(tmp_path: Path) -> None:
    payloads = [bytes([number]) * 200_000 for number in range(8)]

    def work(number: int) -> bool:
        graph_cache.keep(tmp_path, "k", payloads[number % 8])
        return graph_cache.fetch(tmp_path, "k") in payloads

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert [path.name for path in tmp_path.iterdir()] == ["k.graph"]


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", "/a")
    assert graph_cache.default_cache() == Path("/a/onnx")
    monkeypatch.delenv("DORA_SERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert graph_cache.default_cache() == Path("/b/dora-serve/onnx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert graph_cache.default_cache() == Path("/c/.cache/dora-serve/onnx")


@pytest.fixture(scope="module")
def peak() -> Callable[[Path, Path], int]:
    def measure(model: Path, out: Path) -> int:
        """Bytes that an export in a process of its own takes at most, traced anew."""
        out.mkdir()
        source = (
            "import resource, sys; from pathlib import Path\n"
            "from exporters.onnx.export import export_onnx\n"
            "from exporters.onnx.options import OnnxOptions\n"
            "export_onnx(Path(sys.argv[1]), Path(sys.argv[2]), OnnxOptions(cache=None))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", source, model, out], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return int(done.stdout.split()[-1]) * 1024

    return measure


def test_memory_does_not_grow_with_the_model(tmp_path: Path, peak: Callable[[Path, Path], int]) -> None:
    """300 MB of weights, of which one matrix has 8, against some kilobytes: both take what torch and onnx take."""
    sizes = {**GROUPED, "num_hidden_layers": 1, "hidden_size": 2048, "intermediate_size": 8192}
    large = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    large.save_pretrained(tmp_path / "large")
    small = save(MODELS["qwen2"](), tmp_path / "small")
    del large
    grown = peak(tmp_path / "large", tmp_path / "large_onnx") - peak(small, tmp_path / "small_onnx")
    assert (tmp_path / "large_onnx" / "model.onnx.data").stat().st_size > 200 << 20
    assert grown < 120 << 20
