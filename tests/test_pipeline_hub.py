"""A diffusers pipeline by its Hub id: what of its repository is fetched, merged and looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dora_serve.errors import CheckpointError, HubError
from dora_serve.hub_files import choose_files
from tests.fake_hub import FakeHub
from tests.hub_cases import contents
from tests.pipelines import ATTENTION, CLIP, save_adapter, sdxl

ROOT = Path(__file__).parent.parent
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "image_encoder": [None, None],
}
SHARDS = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
NAMES = [
    "README.md",
    "LICENSE.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "transformer/config.json",
    *(f"transformer/{shard}" for shard in SHARDS),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
]
LEFT = [
    "flux1-dev.safetensors",
    "ae.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/openvino_model.xml",
    "text_encoder_of_another/model.safetensors",
    "transformer/deeper/model.safetensors",
]


def texts(index: Any = INDEX) -> Mapping[str, str]:
    shards = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})
    return {
        "model_index.json": index if isinstance(index, str) else json.dumps(index),
        "transformer/diffusion_pytorch_model.safetensors.index.json": shards,
    }


def test_the_components_are_chosen_and_no_copy_of_the_whole() -> None:
    chosen = choose_files([*NAMES, *LEFT], texts().__getitem__, "base", "anna/flux")
    assert sorted(chosen) == sorted(NAMES)


def test_a_component_of_pickles_and_an_index_that_is_none_are_refused() -> None:
    names = [name.replace("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin") for name in NAMES]
    with pytest.raises(HubError, match="anna/flux:text_encoder"):
        choose_files(names, texts().__getitem__, "base", "anna/flux")
    for index in ("[1]", "{", "3"):
        with pytest.raises(CheckpointError, match=r"model_index\.json"):
            choose_files(NAMES, texts(index).__getitem__, "base", "anna/flux")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub().running() as running:
        yield running


def run(hub: FakeHub, cache: Path, *words: str | Path) -> dict[str, Any]:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "NO_PROXY": "*", "no_proxy": "*"}
    program = "import sys; from exporters.cli import program; sys.exit(program())"
    arguments = [sys.executable, "-c", program, *map(str, words), "--json"]
    ended = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def test_a_pipeline_of_the_hub_is_looked_at_and_merged(hub: FakeHub, tmp_path: Path) -> None:
    base = sdxl(tmp_path / "base")
    file, _ = save_adapter(base, tmp_path / "adapter", {"unet": ATTENTION, "text_encoder": CLIP})
    junk = {"sd_xl_base.safetensors": b"x" * 1000, "unet/diffusion_pytorch_model.fp16.safetensors": b"x"}
    hub.add("anna/sdxl", {**contents(base), **junk})
    inspected = run(hub, tmp_path / "cache", "inspect", file, "--base", "anna/sdxl")
    assert inspected["format"] == "diffusers"
    hub.fetched()
    out = tmp_path / "merged"
    run(hub, tmp_path / "cache", "merge", file, "--base", "anna/sdxl", "-o", out, "--no-verify")
    fetched = [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert not {name for name in fetched if "fp16" in name or name.startswith("sd_xl")}
    run(hub, tmp_path / "cache", "merge", file, "--base", base, "-o", tmp_path / "here", "--no-verify")
    for path in sorted((tmp_path / "here").glob("*/*.safetensors")):
        ours = load_file(out / path.relative_to(tmp_path / "here"))
        theirs = load_file(path)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours)
    assert (out / "model_index.json").is_file()
