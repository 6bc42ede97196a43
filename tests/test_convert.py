"""Conversion between formats: exact to the bit there and back, read by the other trainer's own code, and refused where
the meaning would not survive; and the nearest plain LoRA, with its loss told first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.errors import DoraServeError, OutputError, UnmergeableError
from dora_serve.formats import read_adapter
from dora_serve.low_rank import low_rank
from exporters.cli import main
from exporters.convert.run import Conversion, ConvertRequest, convert, write_conversion
from tests.cases import (
    adapt,
    build,
    distance,
    llama,
    load,
    logits,
    merge_to,
    noise,
    read_tensors,
    save,
    tokens,
    unmerged,
)
from tests.families import GPT2
from tests.test_format_kohya import Convolutions
from tests.test_format_kohya import train as train_lycoris
from tests.test_format_mlx import TOLERANCE, their_logits
from tests.test_format_mlx import train as train_mlx
from tests.test_format_nvlabs import write as write_nvlabs
from tests.test_format_trainers import qwen, write_fsdp

TARGETS = ["q_proj", "k_proj", "down_proj"]


def run(adapter: Path, to: str, out: Path, **request: Any) -> Conversion:
    conversion = convert(ConvertRequest(str(adapter), to, **request))
    write_conversion(conversion, out)
    return conversion


def meaning(folder: Path) -> dict[str, tuple[float, Tensor, Tensor, Tensor | None]]:
    """By module: scaling, lora_A, lora_B, magnitude, as our reader of that format has them."""
    return {
        module.module: (
            module.scaling,
            module.lora_A.load(),
            module.lora_B.load(),
            module.magnitude.load() if module.magnitude is not None else None,
        )
        for module in read_adapter(folder).modules
    }


@pytest.mark.parametrize("config", [{"lora_bias": True, "use_rslora": True}, {"use_dora": True}])
def test_gpt2_keeps_its_names(config: dict[str, Any], tmp_path: Path) -> None:
    """`transformer.` is a module there, and in the files of pipelines the part that a name is in."""
    start = build("AutoModelForCausalLM", "gpt2", **GPT2)
    base = save(start, tmp_path / "base")
    adapt(load(base, start), tmp_path / "adapter", target_modules=["c_attn", "c_fc"], **config)
    for request in ({}, {"base": str(base)}):
        out = tmp_path / f"peft {len(request)}"
        run(tmp_path / "adapter", "peft", out, **request)
        ours, theirs = (
            logits(unmerged(base, folder, start, torch.float64), tokens(start))
            for folder in (out, tmp_path / "adapter")
        )
        assert torch.equal(ours, theirs)
    if "use_dora" in config:
        run(tmp_path / "adapter", "kohya", tmp_path / "kohya")
        run(tmp_path / "kohya", "peft", tmp_path / "back", base=str(base))
        back = logits(unmerged(base, tmp_path / "back", start, torch.float64), tokens(start))
        assert torch.equal(back, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("to", ["peft", "mlx", "kohya"])
def test_there_and_back_is_exact_to_the_bit(tmp_path: Path, to: str, dora: bool, dtype: torch.dtype) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    adapt(start, tmp_path / "adapter", target_modules=TARGETS, use_dora=dora, dtype=dtype)
    run(tmp_path / "adapter", to, tmp_path / "there")
    if to == "kohya":
        assert read_adapter(tmp_path / "there").format == "kohya"
        with pytest.raises(DoraServeError, match="--base"):
            convert(ConvertRequest(str(tmp_path / "there"), "peft"))
    run(tmp_path / "there", "peft", tmp_path / "back", base=str(base))
    first, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    modes = {path.stat().st_mode for path in (tmp_path / "back").iterdir()}
    assert len(modes) == 1
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert last[name].dtype == tensor.dtype
        assert torch.equal(last[name], tensor), name
    assert {name: part[0] for name, part in meaning(tmp_path / "back").items()} == {
        name: part[0] for name, part in meaning(tmp_path / "adapter").items()
    }


def test_ranks_and_alphas_of_modules_survive_in_peft_and_kohya(tmp_path: Path) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.k_proj": 6}, "alpha_pattern": {"down_proj": 3}}
    adapt(start, tmp_path / "adapter", target_modules=TARGETS, use_dora=True, use_rslora=True, **patterns)
    run(tmp_path / "adapter", "kohya", tmp_path / "there")
    run(tmp_path / "there", "peft", tmp_path / "back", base=str(base))
    first, last = meaning(tmp_path / "adapter"), meaning(tmp_path / "back")
    assert len({part[0] for part in first.values()}) > 2
    assert {name: (part[0], part[1].shape) for name, part in first.items()} == {
        name: (part[0], part[1].shape) for name, part in last.items()
    }
    truth = logits(unmerged(base, tmp_path / "adapter", start, torch.float64), tokens(start))
    assert torch.equal(logits(unmerged(base, tmp_path / "back", start, torch.float64), tokens(start)), truth)
    with pytest.raises(UnmergeableError, match="one for all modules"):
        convert(ConvertRequest(str(tmp_path / "adapter"), "mlx"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_runs_what_mlx_trained(tmp_path: Path, kind: str) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    model = train_mlx(base, tmp_path / "adapter", kind)
    run(tmp_path / "adapter", "peft", tmp_path / "peft")
    theirs = their_logits(model, tokens(start)).double().flatten()
    ours = logits(unmerged(base, tmp_path / "peft", start, torch.float32), tokens(start))
    assert distance(ours, theirs) <= TOLERANCE
    assert distance(logits(load(base, start), tokens(start)), theirs) > 100 * TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_runs_what_peft_trained(tmp_path: Path, dora: bool) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    saving = {"save_embedding_layers": False}
    adapt(start, tmp_path / "adapter", target_modules=[*TARGETS, "lm_head"], use_dora=dora, saving=saving)
    run(tmp_path / "adapter", "mlx", tmp_path / "mlx")
    model, _ = load_model(base)
    theirs = their_logits(load_adapters(model, str(tmp_path / "mlx")), tokens(start)).double().flatten()
    ours = logits(unmerged(base, tmp_path / "adapter", start, torch.float32), tokens(start))
    assert distance(ours, theirs) <= TOLERANCE


def test_peft_runs_what_nvlabs_trained(tmp_path: Path) -> None:
    """Modules with a magnitude alone become DoRA with factors of zeros."""
    start = llama()
    base = save(start, tmp_path / "base")
    wanted = write_nvlabs(base, tmp_path / "adapter")
    run(tmp_path / "adapter", "peft", tmp_path / "peft", base=str(base))
    model = unmerged(base, tmp_path / "peft", start, torch.float64)
    exact = load(base, start, torch.float64)
    parameters = dict(exact.named_parameters())
    with torch.no_grad():
        for name, weight in wanted.items():
            parameters[name].copy_(weight)
    assert distance(logits(model, tokens(start)), logits(exact, tokens(start))) < 1e-9


@pytest.mark.parametrize("on_output", [True, False])
def test_peft_runs_what_lycoris_trained(tmp_path: Path, on_output: bool) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    file = tmp_path / "adapter" / "x.safetensors"
    trained = train_lycoris(start, file, targets=["LlamaAttention"], dora_wd=True, wd_on_output=on_output)
    if not on_output:
        with pytest.raises(UnmergeableError, match="each input's"):
            run(file, "peft", tmp_path / "peft", base=str(base))
        return
    conversion = run(file, "peft", tmp_path / "peft", base=str(base))
    assert any("rounded to float32" in note for note in conversion.notes)
    ours = logits(unmerged(base, tmp_path / "peft", start, torch.float32), tokens(start))
    assert distance(ours, logits(trained, tokens(start))) <= TOLERANCE


def test_convolutions_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    start = Convolutions()
    base = save(start, tmp_path / "base")
    model = adapt(start, tmp_path / "adapter", target_modules=["down", "same", "up"], use_dora=True)
    run(tmp_path / "adapter", "kohya", tmp_path / "there", base=str(base))
    run(tmp_path / "there", "peft", tmp_path / "back", base=str(base))
    first, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in last.items()}
    assert all(torch.equal(last[name], value) for name, value in first.items())
    merge_to(base, tmp_path / "there", tmp_path / "merged")
    start.load_state_dict(read_tensors(tmp_path / "merged"))
    x = noise(2, 6, 5, 5)
    with torch.no_grad():
        assert torch.allclose(start(x), model(x), rtol=0, atol=5e-6)


def test_copies_of_embeddings_beside_their_adapters_keep_peft_s_names(tmp_path: Path) -> None:
    """PEFT and vLLM pass over `base_layer` of an adapted embedding; vLLM refuses the file for `lm_head.weight`."""
    adapt(llama(), tmp_path / "adapter", target_modules=["lm_head"], saving={"save_embedding_layers": True})
    run(tmp_path / "adapter", "peft", tmp_path / "out")
    was, now = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert "base_model.model.lm_head.base_layer.weight" in was
    assert now.keys() == was.keys()


def test_a_bias_that_fsdp_qlora_scales_becomes_a_trained_one(tmp_path: Path) -> None:
    start = qwen()
    base = save(start, tmp_path / "base")
    wanted = write_fsdp(base, tmp_path / "adapter")
    run(tmp_path / "adapter", "peft", tmp_path / "peft", base=str(base))
    merge_to(base, tmp_path / "peft", tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    for name, weight in wanted.items():
        assert torch.equal(merged[name], weight.float()), name


def embedding_of_mlx(root: Path) -> ConvertRequest:
    base = save(llama(), root / "base")
    train_mlx(base, root / "adapter", "dora", keys=["model.embed_tokens"])
    return ConvertRequest(str(root / "adapter"), "peft", base=str(base))


def tied_embedding_of_mlx(root: Path) -> ConvertRequest:
    base = save(llama(tie_word_embeddings=True), root / "base")
    train_mlx(base, root / "adapter", "lora", keys=["model.embed_tokens"])
    return ConvertRequest(str(root / "adapter"), "peft", base=str(base))


def several_components(root: Path) -> ConvertRequest:
    names = ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight")
    names += ("lora_te_b.lora_down.weight", "lora_te_b.lora_up.weight")
    save_file({name: torch.ones(2, 2) for name in names}, root / "x.safetensors")
    return ConvertRequest(str(root / "x.safetensors"), "peft")


def saved_head(root: Path) -> ConvertRequest:
    adapt(llama(), root / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    return ConvertRequest(str(root / "adapter"), "mlx")


def embedding_to_kohya(root: Path) -> ConvertRequest:
    adapt(llama(), root / "adapter", target_modules=["embed_tokens"], saving={"save_embedding_layers": False})
    return ConvertRequest(str(root / "adapter"), "kohya")


REFUSED: Mapping[str, tuple[Callable[[Path], ConvertRequest], str]] = {
    "an embedding of mlx, whose norms are the tokens'": (embedding_of_mlx, "each token's"),
    "an embedding of mlx that is tied": (tied_embedding_of_mlx, "shares its update"),
    "several parts of a pipeline": (several_components, "text_encoder, unet"),
    "a saved head in mlx": (saved_head, "a whole trained tensor"),
    "an embedding with kohya's names": (embedding_to_kohya, "an embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_survive_is_refused(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    request = make(tmp_path)
    with pytest.raises(UnmergeableError, match=message):
        convert(request)


# The nearest plain LoRA


def test_low_rank_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(4)
    for shape in ((30, 50), (50, 30), (1100, 1200)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64) @ torch.diag(
            torch.logspace(0, -4, shape[1], dtype=torch.float64)
        )
        found = low_rank(matrix, 5)
        best = torch.linalg.svdvals(matrix)[5:].square().sum().sqrt()
        rest = (matrix - found.lora_B.double() @ found.lora_A.double()).norm()
        assert found.error == pytest.approx(float(rest), rel=1e-9)
        # Factors of float32, and beyond 1024 the randomized space: both cost less than this.
        assert float(best) <= found.error * (1 + 1e-9)
        assert found.error <= float(best) * (1.001 if min(shape) > 1024 else 1 + 1e-6)


def test_a_dora_as_plain_lora_and_what_it_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    adapt(start, tmp_path / "adapter", target_modules=TARGETS, use_dora=True)
    exact = logits(unmerged(base, tmp_path / "adapter", start, torch.float32), tokens(start))
    errors, moved = [], []
    for rank in (1, 4, 16):
        out = tmp_path / f"rank {rank}"
        arguments = ["convert", str(tmp_path / "adapter"), "--to", "lora", "--rank", str(rank), "--base", str(base)]
        assert main([*arguments, "-o", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["approximation"]
        assert all(loss["rank"] <= rank for loss in told["modules"])
        errors.append(max(loss["of_update"] for loss in told["modules"]))
        moved.append(told["logits"]["rms"])
        config = json.loads((out / "adapter_config.json").read_text())
        assert not config["use_dora"]
        ours = logits(unmerged(base, out, start, torch.float32), tokens(start))
        assert distance(ours, exact) < distance(logits(load(base, start), tokens(start)), exact)
    assert errors[0] > errors[1] > errors[2]
    assert moved[0] > moved[1] > moved[2]
    # Of 16 x 16 and 16 x 24 matrices rank 16 is all: what is left over is the rounding of float32 factors.
    assert errors[2] < 1e-6
    assert moved[2] < 1e-5


def test_the_loss_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    arguments = ["convert", str(tmp_path / "adapter"), "--to", "lora", "--rank", "2", "--base", str(base)]
    assert main([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "is lost: median" in text
    assert "Logits on" in text
    assert text.rstrip().endswith("Nothing was written.")
    (tmp_path / "taken").mkdir()
    assert main([*arguments, "-o", str(tmp_path / "taken")]) == 1  # and before anything is computed
    printed = capsys.readouterr()
    assert not printed.out
    assert "--overwrite" in printed.err

    def full(*_: object, **__: object) -> None:
        raise OutputError("The disk is full.")

    monkeypatch.setattr("exporters.convert.run.write_conversion", full)
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 1
    assert "is lost: median" in capsys.readouterr().out


def test_a_plain_lora_of_no_higher_rank_stays_as_it_is(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    conversion = run(tmp_path / "adapter", "lora", tmp_path / "out", base=str(base), rank=4)
    assert conversion.approximation is not None
    assert {loss.of_update for loss in conversion.approximation.modules} == {0.0}
    first, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert all(torch.equal(last[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    "arguments", [["--to", "lora"], ["--to", "peft", "--rank", "3"], ["--to", "gguf"], ["--to", "lora", "--rank", "0"]]
)
def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path), *arguments, "-o", str(tmp_path / "out")])
    assert stop.value.code == 2
