"""A pipeline's folder as a base: one adapter file for several components, against diffusers and PEFT themselves."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from dora_serve.denoiser_inputs import denoiser_samples, nested
from dora_serve.errors import CheckpointError, DoraServeError, PlanError, VerificationError
from dora_serve.formats import ReadOptions
from dora_serve.forward_report import ForwardOptions
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.verify import VerifyReport
from exporters.pipeline import Export, ExportRequest, run_export
from exporters.report import folder_text
from exporters.safetensors import write_model
from exporters.sources import open_sources
from exporters.verify_folder import FolderReport, verify_folder
from tests.cases import ask_here, distance, quiet, rewrite_json, rewrite_tensors, train
from tests.pipelines import ATTENTION, CLIP, flux, load, outputs, save_adapter, sdxl

EVERYTHING = {"unet": [*ATTENTION, "conv1", "conv_shortcut", "proj_in", "ff.net.2"]} | {
    "text_encoder": CLIP,
    "text_encoder_2": [*CLIP, "text_projection"],
}


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


@pytest.fixture(scope="module")
def sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def flux_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux(tmp_path_factory.mktemp("flux") / "base")


@pytest.fixture(scope="module")
def sdxl_dora(sdxl_base: Path) -> tuple[Path, Mapping[str, Tensor]]:
    """The file, and what the trained pipeline gives."""
    file, trained = save_adapter(sdxl_base, sdxl_base.parent / "dora", EVERYTHING, use_dora=True)
    return file, outputs(trained)


def export(base: Path, adapter: Path, out: Path, **options: Any) -> Export:
    return run_export(ExportRequest(str(adapter), str(base), out, **options))


def check_is_unmerged(base: Path, truth: Mapping[str, Tensor], merged: Path, adapted: set[str]) -> None:
    """Each component gives what the unmerged one does, as exactly as float32 weights can say it."""
    start, own = outputs(load(base)), outputs(load(base), torch.float32)
    got = outputs(load(merged))
    for name, wanted in truth.items():
        # What computing in float32 costs the base is the measure of what rounding its weights to float32 does.
        own_error = distance(own[name], start[name])
        assert distance(got[name], wanted) <= 4 * own_error
        assert (distance(start[name], wanted) > 1000 * own_error) == (name in adapted)


def check_report(made: Export, adapted: set[str]) -> None:
    report: Any = made.verification
    assert set(report.adapted) == adapted
    assert report.exact
    for name in adapted:
        forward = report.components[name].forward
        assert forward.ran, forward.reason
        assert forward.passed
        assert not forward.changes_nothing
        assert not any("did not run" in note for note in forward.notes)
    kinds = {name: report.components[name].forward.output for name in adapted}
    assert all(kind == ("hidden states" if name.startswith("text") else "output") for name, kind in kinds.items())


def test_a_dora_on_three_components_of_sdxl(
    sdxl_base: Path, sdxl_dora: tuple[Path, Mapping[str, Tensor]], tmp_path: Path
) -> None:
    file, truth = sdxl_dora
    made = export(sdxl_base, file, tmp_path / "out")
    check_report(made, set(EVERYTHING))
    check_is_unmerged(sdxl_base, truth, tmp_path / "out", set(EVERYTHING))
    # The rest of the pipeline is what it was.
    before = {path.relative_to(sdxl_base) for path in sdxl_base.rglob("*")}
    after = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert after == before | {Path("dora_export.json")}
    for path in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        assert (sdxl_base / path).read_bytes() == (tmp_path / "out" / path).read_bytes()
    kept = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(value, kept[name])
        for name, value in load_file(sdxl_base / "vae" / "diffusion_pytorch_model.safetensors").items()
    )
    record = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert "unet/diffusion_pytorch_model.safetensors" in record["base"]["sha256"]
    assert record["verification"]["passed"]
    assert record["files"]["text_encoder_2/model.safetensors"]["sha256"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_flux(flux_base: Path, use_dora: bool, tmp_path: Path) -> None:
    targets = {"transformer": [*ATTENTION, "add_q_proj", "proj_mlp", "proj_out"], "text_encoder": CLIP}
    adapter, trained = save_adapter(flux_base, tmp_path / "adapter", targets, use_dora=use_dora)
    truth = outputs(trained)
    check_report(export(flux_base, adapter, tmp_path / "out"), set(targets))
    check_is_unmerged(flux_base, truth, tmp_path / "out", set(targets))
    # diffusers' own way to load the file gives the same, but for the magnitudes of text encoders, which 0.42.1 drops.
    loaded = load(flux_base)
    loaded.load_lora_weights(adapter)
    theirs = outputs(loaded)
    assert torch.equal(theirs["transformer"], truth["transformer"])
    assert torch.equal(theirs["text_encoder"], truth["text_encoder"]) == (not use_dora)


@pytest.fixture(scope="module")
def sdxl_lora(sdxl_base: Path) -> Path:
    """On the UNet alone, and so quick."""
    return save_adapter(sdxl_base, sdxl_base.parent / "lora", {"unet": ["to_q", "conv1"]})[0]


def verified(base: Path, adapter: Path, merged: Path) -> FolderReport:
    sources = open_sources(str(adapter), str(base), ReadOptions())
    return verify_folder(merged, sources, ForwardOptions())


def test_what_diffusers_fused_is_verified(sdxl_base: Path, sdxl_lora: Path, tmp_path: Path) -> None:
    pipeline = load(sdxl_base)
    pipeline.load_lora_weights(sdxl_lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    report = verified(sdxl_base, sdxl_lora, tmp_path / "fused")
    assert report.passed, report.to_json()["failures"]

    def spoil(tensors: dict[str, Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[0] += 1

    rewrite_tensors(tmp_path / "fused" / "vae" / "diffusion_pytorch_model.safetensors", spoil)
    rewrite_json(tmp_path / "fused" / "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    report = verified(sdxl_base, sdxl_lora, tmp_path / "fused")
    assert not report.passed
    failures = report.model.failures
    assert any(failure.startswith("vae: ") for failure in failures)
    assert any("model_index.json says unet" in failure for failure in failures)
    assert "FAILED" in folder_text(report)
    assert not verified(sdxl_base, sdxl_lora, sdxl_base).passed


def test_what_fails_leaves_nothing(
    sdxl_base: Path, sdxl_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte of the UNet goes wrong: the pipeline, whose other components are sound, does not appear."""
    from exporters import parts

    def faulty(plan: Any, folder: Path, **rest: Any) -> Any:
        report = write_model(plan, folder, **rest)
        if folder.name == "unet":
            path = folder / "diffusion_pytorch_model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        return report

    monkeypatch.setattr(parts, "write_model", faulty)
    with pytest.raises(VerificationError, match="unet: "):
        export(sdxl_base, sdxl_lora, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_component_as_a_base(sdxl_base: Path, tmp_path: Path) -> None:
    """PEFT's own folder of an adapter on the UNet fits the pipeline, and the UNet's folder by itself."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(sdxl_base / "unet")
    with quiet():
        model = train(get_peft_model(unet, LoraConfig(r=2, target_modules=["to_k", "conv2"], use_dora=True)))
        model.save_pretrained(tmp_path / "adapter")
    alone = export(sdxl_base / "unet", tmp_path / "adapter", tmp_path / "alone")
    assert isinstance(alone.verification, VerifyReport)
    assert alone.verification.forward is not None
    assert alone.verification.forward.ran, alone.verification.forward.reason
    assert alone.verification.forward.architecture == "UNet2DConditionModel"
    whole = export(sdxl_base, tmp_path / "adapter", tmp_path / "whole", verify=False)
    name = "diffusion_pytorch_model.safetensors"
    one, other = load_file(tmp_path / "alone" / name), load_file(tmp_path / "whole" / "unet" / name)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert isinstance(whole.plan, PipelinePlan)
    assert whole.plan.adapted == ("unet",)


def test_all_components_are_cast(sdxl_base: Path, sdxl_lora: Path, tmp_path: Path) -> None:
    export(sdxl_base, sdxl_lora, tmp_path / "out", dtype="bfloat16")
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (tmp_path / "out" / name).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} <= {torch.bfloat16, torch.int64}
    assert "dtype" not in json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert next(load(tmp_path / "out").unet.parameters()).shape


def test_what_a_pipeline_cannot_be(sdxl_base: Path, flux_base: Path, sdxl_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"does not fit the pipeline") as caught:
        export(flux_base, sdxl_lora, tmp_path / "out")
    assert all(problem.subject.startswith("transformer: down_blocks") for problem in caught.value.problems[:2])
    with pytest.raises(DoraServeError, match="safetensors or ONNX"):
        export(sdxl_base, sdxl_lora, tmp_path / "out", to="nf4")
    with pytest.raises(DoraServeError, match="--reference peft"):
        export(sdxl_base, sdxl_lora, tmp_path / "out", reference="peft")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model_index.json").write_text('{"unet": ["diffusers", "X"], "../vae": ["a", "b"]}')
    with pytest.raises(CheckpointError, match="no component with safetensors"):
        export(tmp_path / "empty", sdxl_lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickles_are_copied_unread_and_not_merged_into(sdxl_base: Path, sdxl_lora: Path, tmp_path: Path) -> None:
    shutil.copytree(sdxl_base, tmp_path / "base")
    for name in ("vae", "unet"):
        (file,) = (tmp_path / "base" / name).glob("*.safetensors")
        file.unlink()
        file.with_suffix(".bin").write_bytes(b"not even a pickle")
        if name == "vae":
            made = export(tmp_path / "base", sdxl_lora, tmp_path / "out")
            assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.bin").read_bytes() == b"not even a pickle"
            assert any("vae" in note and "not read" in note for note in made.plan.notes)
    with pytest.raises(PlanError, match="weights of unet that are pickles"):
        export(tmp_path / "base", sdxl_lora, tmp_path / "out2")


def test_the_files_beside_the_models_are_verified(sdxl_base: Path, sdxl_lora: Path, tmp_path: Path) -> None:
    """A tokenizer that transformers saves in other files is the same; one of another vocabulary is not."""
    base, merged = shutil.copytree(sdxl_base, tmp_path / "base"), tmp_path / "merged"
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters), "ca", "cat</w>"]
    tokenizer = base / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    rewrite_json(base / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    export(base, sdxl_lora, merged, verify=False)
    again = transformers.AutoTokenizer.from_pretrained(tokenizer)
    shutil.rmtree(merged / "tokenizer")
    again.save_pretrained(merged / "tokenizer")
    assert not (merged / "tokenizer" / "merges.txt").exists()
    rewrite_json(merged / "scheduler" / "scheduler_config.json", _diffusers_version="0.0.1")
    report = verified(base, sdxl_lora, merged)
    assert report.passed, report.to_json()["failures"]
    saved = json.loads((merged / "tokenizer" / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= {"a": saved["model"]["vocab"]["b"], "b": saved["model"]["vocab"]["a"]}
    (merged / "tokenizer" / "tokenizer.json").write_text(json.dumps(saved))
    (merged / "scheduler" / "scheduler_config.json").unlink()
    (merged / "vae" / "config.json").unlink()
    failures = "\n".join(verified(base, sdxl_lora, merged).model.failures)
    assert "tokenizer/merges.txt is in the base, and not in the folder." in failures
    assert "scheduler/scheduler_config.json is in the base, and not in the folder." in failures
    assert "vae: config.json is not there" in failures


@pytest.mark.parametrize(
    ("gone", "lacks"),
    {
        "text_encoder/model.safetensors": "weights",
        "unet/config.json": "config.json",
        "vae": "weights and config.json",
    }.items(),
)
def test_a_base_that_is_not_whole_is_refused(
    gone: str, lacks: str, sdxl_base: Path, sdxl_lora: Path, tmp_path: Path
) -> None:
    """As an interrupted download leaves it."""
    shutil.copytree(sdxl_base, tmp_path / "base")
    path = tmp_path / "base" / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    name = gone.partition("/")[0]
    with pytest.raises(CheckpointError, match=rf"{name}/ \(\w+\) lacks {lacks}\.") as caught:
        export(tmp_path / "base", sdxl_lora, tmp_path / "out")
    assert f"--include '{name}/*'" in str(caught.value.remedy)
    assert not (tmp_path / "out").exists()


def test_what_a_pipeline_need_not_have(sdxl_base: Path, sdxl_lora: Path, tmp_path: Path) -> None:
    """What is null, has no weights, or is a class that nobody knows here."""
    shutil.copytree(sdxl_base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    absent = {"vae": [None, None], "safety_checker": [None, None], "mel": ["audio_diffusion", "Mel"]}
    absent |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    rewrite_json(tmp_path / "base" / "model_index.json", **absent, tokenizer=["transformers", "CLIPTokenizer"])
    made = export(tmp_path / "base", sdxl_lora, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["vae"] == [None, None]
    assert made.verification is not None
    assert made.verification.passed
    assert [note for note in made.plan.notes if "no such folder" in note] == [
        "mel: model_index.json names it, and the base has no such folder."
    ]


DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1.5": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 8, "attention_head_dim": 2, "num_attention_heads": None},
    ),
    "Stable Diffusion 3": (
        "SD3Transformer2DModel",
        {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 8},
    ),
    "PixArt": ("PixArtTransformer2DModel", {"caption_channels": 16, "cross_attention_dim": 16, "out_channels": 8}),
    "VAE": ("AutoencoderKL", {"norm_num_groups": 2, "block_out_channels": (4,), "latent_channels": 4}),
}
SMALL = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2}
SMALL |= {"attention_head_dim": 8, "patch_size": 2, "layers_per_block": 1}
SMALL |= {"block_out_channels": (4, 8), "norm_num_groups": 2}
SMALL |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
SMALL |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_runs_on_what_is_made_up_for_it(name: str) -> None:
    kind: Any = getattr(diffusers, DENOISERS[name][0])
    known = inspect.signature(kind.__init__).parameters
    sizes = {} if name == "VAE" else {key: value for key, value in SMALL.items() if key in known}
    model = kind(**{**sizes, **DENOISERS[name][1]}).eval()
    outputs = []
    for sample in denoiser_samples(model).samples:
        with torch.no_grad():
            outputs.append(model(**nested(sample.inputs)).sample)
    assert all(bool(torch.isfinite(output).all()) for output in outputs)
    assert not torch.equal(outputs[0], outputs[1])
