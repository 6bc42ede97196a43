"""Bases that the engine does not serve, requests that fail alone, and leases that are let go of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_serve.engine import Engine, Limits, Request
from dora_serve.errors import CheckpointError, EngineError, UnavailableError
from tests.cases import SIZES, adapt, build, llama, load, rewrite_json, rewrite_tensors, save
from tests.step_recorder import record

GPT_NEO: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 40,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 7,
    "max_position_embeddings": 64,
}
RWKV: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
XLNET: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}


@pytest.mark.parametrize(
    ("model_type", "sizes", "why"),
    [
        ("gpt_neo", GPT_NEO, "local attention"),
        ("rwkv", RWKV, "others than alone"),
        ("bert", SIZES, "others than alone|changes what comes before"),
        ("roberta", {**SIZES, "is_decoder": True}, "others than alone"),
        ("xlnet", XLNET, "others than alone|changes what comes before"),
    ],
)
def test_a_model_that_rows_do_not_fit(model_type: str, sizes: dict[str, Any], why: str) -> None:
    with pytest.raises(UnavailableError, match=f"cannot be served by rows: .*({why})"):
        Engine(build("AutoModelForCausalLM", model_type, **sizes))


def test_a_model_that_raises_in_rows_is_refused_in_its_own_words() -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("one text at a time\nand more")

    model = llama()
    model.model.layers[0].forward = refuse
    with pytest.raises(UnavailableError, match=r"\(NotImplementedError: one text at a time\)"):
        Engine(model)


def test_a_model_in_two_engines() -> None:
    model = llama()
    Engine(model)
    with pytest.raises(EngineError, match="another engine already"):
        Engine(model)


def test_a_base_that_lacks_a_layer(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    rewrite_tensors(base / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors of a LlamaForCausalLM: model.layers.1.mlp.up_proj.weight"
    ):
        Engine.load(base)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "shape", "code", "tokenizer"])
def test_a_base_that_is_damaged(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(llama(), tmp_path / "base")
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    match damage:
        case "truncated":
            weights.write_bytes(whole[: len(whole) // 2])
        case "garbage":
            weights.write_bytes(b"x" * 100)
        case "empty":
            weights.write_bytes(b"")
        case "shape":
            tensors = load_file(weights)
            tensors["model.norm.weight"] = torch.ones(3)
            save_file(tensors, weights, metadata={"format": "pt"})
        case "code":
            rewrite_json(base / "config.json", model_type="nobody", auto_map={"AutoConfig": "code.Config"})
        case "tokenizer":
            (base / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded as a causal language model") as caught:
        Engine.load(base)
    assert len(str(caught.value)) < 800
    assert capsys.readouterr().out == ""


def test_a_base_that_is_a_file_or_an_adapter(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(llama(), tmp_path / "lora", target_modules=["q_proj"])
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(CheckpointError, match="is a file") as caught:
            Engine.load(base / name)
        assert repr(str(base)) in str(caught.value.remedy)
    with pytest.raises(CheckpointError, match="is an adapter"):
        Engine.load(tmp_path / "lora")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    for device in ("mps", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UnavailableError, match=device):
            Engine.load(save(llama(), tmp_path / device), device=device)


@pytest.fixture
def engine_with_huge(tmp_path: Path) -> Engine:
    """With an adapter whose numbers overflow from the first token on."""
    base = save(llama(), tmp_path / "base")
    adapt(load(base, llama()), tmp_path / "huge", target_modules=["o_proj", "down_proj"])
    rewrite_tensors(
        tmp_path / "huge" / "adapter_model.safetensors",
        lambda tensors: [tensor.mul_(1e21) for tensor in tensors.values()],
    )
    engine = Engine(load(base, llama()))
    engine.pool.load("huge", tmp_path / "huge")
    return engine


def test_logits_that_are_no_numbers_end_that_request_alone(engine_with_huge: Engine) -> None:
    engine = engine_with_huge
    plain, bad = engine.complete([Request([1, 2], max_tokens=4), Request([1, 2], adapter="huge", max_tokens=4)])
    assert plain.error is None
    assert bad.finish_reason == "error"
    assert "The adapter 'huge' makes logits that are NaN or infinite" in str(bad.error)
    assert [info.in_use for info in engine.pool.list()] == [0]


def test_a_row_that_was_no_numbers_leaves_none_to_the_next(engine_with_huge: Engine) -> None:
    """Its keys and values are NaN from the second layer on, at more places than the next request fills."""
    engine = engine_with_huge
    short = Request([1, 2], max_tokens=4, ignore_eos=True)
    (wanted,) = engine.complete([short])
    long = Request([1, 2] * 10, adapter="huge", max_tokens=4)
    for requests, rows in (([long, short], 1), ([long, short, short], 2), ([short, long, short], 2)):
        answers = engine.complete(requests, max_rows=rows)
        assert [answer.finish_reason for answer in answers if answer.adapter] == ["error"]
        assert all(answer.token_ids == wanted.token_ids for answer in answers if not answer.adapter)


LONG = [1, 2] * 10


@pytest.fixture
def overflowing(tmp_path: Path) -> tuple[Path, Any]:
    """A base, and beside it an adapter that is sound until its own first token after LONG comes in: then every number
    of that row is NaN, and keys and values with it."""
    base = save(llama(), tmp_path / "base")
    like = load(base, llama())
    adapt(like, tmp_path / "late", target_modules=["embed_tokens"], lora_alpha=64)
    engine = Engine(load(base, like))
    engine.pool.load("late", tmp_path / "late")
    (answer,) = engine.complete([Request(LONG, adapter="late", max_tokens=1, ignore_eos=True)])
    first = answer.token_ids[0]
    assert first not in LONG
    rewrite_tensors(
        tmp_path / "late" / "adapter_model.safetensors",
        lambda tensors: [tensor[:, first].fill_(3e38) for name, tensor in tensors.items() if name.endswith("_A")],
    )
    return base, like


def test_a_row_that_overflows_as_another_ends_leaves_nothing_where_it_was(overflowing: tuple[Path, Any]) -> None:
    """It takes the place of the one that ends, in the very step that makes it NaN; its own place is given to the last
    request."""
    base, like = overflowing
    engine = Engine(load(base, like), max_rows=3)
    engine.pool.load("late", base.parent / "late")
    short = Request([1, 3], max_tokens=4, ignore_eos=True)
    (wanted,) = engine.complete([short])
    ends = Request([1, 2], max_tokens=2, ignore_eos=True)
    stays = Request([1, 2], max_tokens=20, ignore_eos=True)
    answers = engine.complete([ends, stays, Request(LONG, adapter="late"), short, short])
    assert [len(answer.token_ids) for answer in answers] == [2, 20, 1, 4, 4]
    assert "NaN" in str(answers[2].error)
    assert answers[3].token_ids == answers[4].token_ids == wanted.token_ids


def test_a_cache_that_is_used_again_holds_nothing_of_a_loop_that_was_left(overflowing: tuple[Path, Any]) -> None:
    """It is left between the step that made a row NaN and the event that would say so."""
    base, like = overflowing
    engine = Engine(load(base, like), record_steps=record)
    engine.pool.load("late", base.parent / "late")
    short = Request([1, 3], max_tokens=4, ignore_eos=True)
    (wanted,) = engine.complete([short])
    with engine.generate([short, Request(LONG, adapter="late")]) as generation:
        assert [next(generation).index for _ in range(3)] == [0, 1, 0]
    assert [answer.token_ids for answer in engine.complete([short, short])] == [wanted.token_ids] * 2


def test_a_loop_that_is_left_lets_go_at_once(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    engine = Engine(load(base, llama()), device_limits=Limits(count=1))
    for name in ("a", "b"):
        adapt(load(base, llama()), tmp_path / name, target_modules=["q_proj"])
        engine.pool.load(name, tmp_path / name)
    for _ in engine.generate([Request([1, 2], adapter="a")]):
        break
    assert [info.in_use for info in engine.pool.list()] == [0, 0]
    (answer,) = engine.complete([Request([1, 2], adapter="b", max_tokens=2)])
    assert answer.error is None
    with engine.generate([Request([1, 2], adapter="a")]) as generation:
        next(generation)
        assert [info.in_use for info in engine.pool.list()] == [1, 0]
    assert [info.in_use for info in engine.pool.list()] == [0, 0]


def test_what_is_no_list_of_requests() -> None:
    engine = Engine(llama())
    for wrong in ("hello", ["hello"], [None], 5, None):
        with pytest.raises(EngineError, match="not a list of Requests"):
            engine.generate(wrong)  # type: ignore[arg-type]
    for rows in (0, -1, 1.5):
        with pytest.raises(EngineError, match="max_rows"):
            engine.generate([Request([1])], max_rows=rows)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="count"):
        Limits(count=-1)
