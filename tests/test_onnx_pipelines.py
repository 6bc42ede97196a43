"""`merge --to onnx` of a diffusers pipeline against diffusers' own models, and faults planted in the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dora_serve.formats import ReadOptions
from dora_serve.pipeline_plan import PipelinePlan
from exporters.cli import main
from exporters.onnx.check.whole import check_whole
from exporters.parts import write_plan
from exporters.sources import open_sources, plan_sources
from tests.cases import noise, rewrite_json, rewrite_tensors
from tests.pipelines import ATTENTION, CLIP, flux, load, save_adapter, sdxl


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with `sdxl` and `dora`, on its denoiser and text encoders; and the pipeline that was trained."""
    root = tmp_path_factory.mktemp("pipelines")
    sdxl(root / "sdxl")
    text = {"text_encoder": CLIP, "text_encoder_2": [*CLIP, "text_projection"]}
    targets = {"unet": [*ATTENTION, "conv1", "ff.net.2"], **text}
    return root, save_adapter(root / "sdxl", root / "dora", targets, use_dora=True)[1]


@pytest.fixture(scope="module")
def root(trained: tuple[Path, Any]) -> Path:
    """The folder, with `onnx` in it, the merge."""
    root = trained[0]
    assert main(["merge", *given(root), "--to", "onnx", "-o", str(root / "onnx")]) == 0
    return root


def given(root: Path) -> list[str]:
    return [str(root / "dora" / "pytorch_lora_weights.safetensors"), "--base", str(root / "sdxl")]


def run(folder: Path, **inputs: Any) -> Mapping[str, torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {name: np.asarray(value) for name, value in inputs.items()}
    values = session.run(None, feed)
    return {each.name: torch.from_numpy(value) for each, value in zip(session.get_outputs(), values, strict=True)}


def test_the_graphs_are_what_diffusers_computes_unmerged(root: Path, trained: tuple[Path, Any]) -> None:
    """Another batch, height, width and length of text than those that were traced."""
    pipeline = trained[1]
    latents, time = noise(3, 4, 12, 20), torch.tensor(301.0)
    text, pooled, sizes = noise(3, 7, 24), noise(3, 8), torch.full((3, 6), 64.0)
    ids = torch.tensor([[1, 5, 9, 3, 7, 7, 12, 2], [4, 39, 11, 30, 6, 21, 5, 2]])
    with torch.no_grad():
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        wanted = pipeline.unet(latents, time, encoder_hidden_states=text, added_cond_kwargs=conditions).sample
        base = load(root / "sdxl").unet(latents, time, encoder_hidden_states=text, added_cond_kwargs=conditions).sample
        states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        projected = pipeline.text_encoder_2(ids).text_embeds
        picture = pipeline.vae.decode(latents).sample
        parameters = pipeline.vae.encode(picture).latent_dist.parameters
    got = run(
        root / "onnx" / "unet",
        sample=latents,
        timestep=time,
        encoder_hidden_states=text,
        text_embeds=pooled,
        time_ids=sizes,
    )["out_sample"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert (got - base).abs().max() > 1e-2
    first = run(root / "onnx" / "text_encoder", input_ids=ids)
    for layer, state in enumerate(states):
        torch.testing.assert_close(first[f"hidden_states.{layer}"], state, rtol=1e-4, atol=1e-5)
    second = run(root / "onnx" / "text_encoder_2", input_ids=ids)
    torch.testing.assert_close(second["text_embeds"], projected, rtol=1e-4, atol=1e-5)
    decoded = run(root / "onnx" / "vae_decoder", latent_sample=latents)["sample"]
    torch.testing.assert_close(decoded, picture, rtol=1e-4, atol=1e-5)
    encoded = run(root / "onnx" / "vae_encoder", sample=picture)["latent_parameters"]
    torch.testing.assert_close(encoded, parameters, rtol=1e-4, atol=1e-4)
    record = json.loads((root / "onnx" / "dora_export.json").read_text())
    assert {one["folder"]: one["passed"] for one in record["onnx_check"]} == dict.fromkeys(
        ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder"), True
    )
    assert not list((root / "onnx").rglob("*.safetensors"))
    assert (root / "onnx" / "scheduler" / "scheduler_config.json").is_file()


def test_verify_passes_it_and_fails_one_whose_adapter_was_left_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graphs of an adapter that does nothing in the place of one, of all of them, and of none."""
    asked = ["--adapter", *given(root), "--json"]
    assert main(["verify", str(root / "onnx"), *asked]) == 0
    capsys.readouterr()
    from exporters.onnx.components import export_pipeline
    from exporters.onnx.options import OnnxOptions

    (tmp_path / "bare").mkdir()
    names = ("text_encoder", "text_encoder_2", "unet", "vae")
    export_pipeline(root / "sdxl", tmp_path / "bare", names, OnnxOptions())
    for part in ("unet", "text_encoder_2"):
        wrong = shutil.copytree(root / "onnx", tmp_path / f"wrong-{part}")
        shutil.rmtree(wrong / part)
        shutil.copytree(tmp_path / "bare" / part, wrong / part)
        assert main(["verify", str(wrong), *asked]) == 1
        failures = json.loads(capsys.readouterr().out)["failures"]
        assert any(failure.startswith(f"{part}: ") and "differs from torch" in failure for failure in failures)
        assert any("do not equal the checkpoint's" in failure for failure in failures)
        assert not any(failure.startswith("vae") for failure in failures)
    missing = shutil.copytree(root / "onnx", tmp_path / "missing")
    for part in ("text_encoder", "vae_encoder", "scheduler"):
        shutil.rmtree(missing / part)
    assert main(["verify", str(missing), *asked]) == 1
    failures = json.loads(capsys.readouterr().out)["failures"]
    assert [failure.partition(":")[0].partition("/")[0] for failure in failures] == ["text_encoder", "vae", "scheduler"]


def change_scheduler(folder: Path) -> None:
    rewrite_json(folder / "scheduler" / "scheduler_config.json", beta_start=0.5)


def zero_the_vae(folder: Path) -> None:
    """Of a folder that has the VAE as its graphs and as safetensors."""
    for part in ("vae_encoder", "vae_decoder"):
        shutil.rmtree(folder / part)

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    rewrite_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", zero)


FAULTS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a component whose name starts another's": (
        lambda folder: shutil.rmtree(folder / "text_encoder"),
        "text_encoder: the adapter changes it, and the folder has no graph of it.",
    ),
    "half of the VAE": (
        lambda folder: shutil.rmtree(folder / "vae_encoder"),
        "vae: vae_encoder/model.onnx is not there.",
    ),
    "all of the VAE": (
        lambda folder: [shutil.rmtree(folder / part) for part in ("vae_encoder", "vae_decoder")],
        "vae: the base has it, and the folder has no graph of it.",
    ),
    "zeros": (zero_the_vae, "vae: "),
    "no configuration": (lambda folder: (folder / "unet" / "config.json").unlink(), "unet: config.json is not there."),
    "another configuration": (
        lambda folder: rewrite_json(folder / "vae_decoder" / "config.json", scaling_factor=9.0),
        "vae_decoder: config.json says scaling_factor = 9.0",
    ),
    "no scheduler": (
        lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler/scheduler_config.json is in the base, and not in the folder.",
    ),
    "another scheduler": (change_scheduler, "scheduler/scheduler_config.json is not what the base has."),
    "another class": (
        lambda folder: rewrite_json(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        "model_index.json says scheduler",
    ),
}


@pytest.fixture(scope="module")
def planned(root: Path) -> tuple[Path, PipelinePlan]:
    """A merge, and its plan."""
    adapter, _, base = given(root)
    plan = plan_sources(open_sources(adapter, base, ReadOptions()))
    assert isinstance(plan, PipelinePlan)
    (root / "merged").mkdir()
    write_plan(plan, root / "merged", lambda part: {})
    return root / "merged", plan


def test_a_whole_pipeline_is_whole(root: Path, planned: tuple[Path, PipelinePlan], tmp_path: Path) -> None:
    """As it was written, and with the VAE as safetensors, where it could not be traced."""
    folder = shutil.copytree(root / "onnx", tmp_path / "onnx")
    assert check_whole(folder, *planned) == ()
    for part in ("vae_encoder", "vae_decoder"):
        shutil.rmtree(folder / part)
    shutil.copytree(root / "sdxl" / "vae", folder / "vae")
    assert check_whole(folder, *planned) == ()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_or_other(fault: str, root: Path, planned: tuple[Path, PipelinePlan], tmp_path: Path) -> None:
    plant, said = FAULTS[fault]
    folder = shutil.copytree(root / "onnx", tmp_path / "onnx")
    if fault == "zeros":
        shutil.copytree(root / "sdxl" / "vae", folder / "vae")
    plant(folder)
    failures = check_whole(folder, *planned)
    assert failures
    assert all(failure.startswith(said) for failure in failures)


def test_a_component_of_pickles_is_copied(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(root / "sdxl", tmp_path / "sdxl")
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    asked = [given(root)[0], "--base", str(base)]
    assert main(["merge", *asked, "--to", "onnx", "-o", str(tmp_path / "onnx")]) == 0
    copied = tmp_path / "onnx" / "vae" / "diffusion_pytorch_model.bin"
    assert copied.read_bytes() == b"not even a pickle"
    copied.unlink()
    assert main(["verify", str(tmp_path / "onnx"), "--adapter", *asked]) == 1
    assert "vae/diffusion_pytorch_model.bin is in the base, and not in the folder." in capsys.readouterr().out


def test_flux_and_what_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux(tmp_path / "flux")
    file, trained = save_adapter(tmp_path / "flux", tmp_path / "lora", {"transformer": ATTENTION})
    merge = ["merge", str(file), "--base", str(tmp_path / "flux"), "-o", str(tmp_path / "onnx")]
    assert main([*merge, "--to", "onnx", "--runtime", "genai"]) == 1
    assert "language models" in capsys.readouterr().err
    assert main([*merge, "--to", "onnx", "--max-kl", "1"]) == 1
    assert main([*merge, "--to", "nf4"]) == 1
    assert "safetensors or ONNX" in capsys.readouterr().err
    assert main([*merge, "--to", "onnx", "--dry-run", "--provider", "cuda", "--onnx-dtype", "float16"]) == 0
    shown = capsys.readouterr().out
    assert "vae_encoder, vae_decoder" in shown
    assert "float16" in shown
    assert ("The graphs are for CUDA" in shown) == (not torch.cuda.is_available())
    assert "memory of the verification" in shown
    assert ".safetensors" not in shown.partition("what happens")[2]
    assert main([*merge, "--to", "onnx"]) == 0
    inputs: dict[str, Any] = {"hidden_states": noise(2, 9, 4), "encoder_hidden_states": noise(2, 6, 24)}
    inputs |= {"pooled_projections": noise(2, 16), "timestep": torch.tensor([0.3, 0.7])}
    inputs |= {"img_ids": torch.arange(27.0).reshape(9, 3), "txt_ids": torch.zeros(6, 3)}
    with torch.no_grad():
        wanted = trained.transformer(**inputs).sample
    got = run(tmp_path / "onnx" / "transformer", **inputs)["out_hidden_states"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=3e-5 * float(wanted.abs().max()))
