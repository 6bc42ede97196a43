"""What an engine over an exported graph has to do, whatever runs the graph: against PEFT's own generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from dora_serve.engine import Request, Sampling
from dora_serve.errors import EngineError
from dora_serve.onnx_engine.engine import OnnxEngine
from tests.cases import quiet

PROMPTS = [np.random.default_rng(length).integers(3, 96, length).tolist() for length in (2, 5, 9, 13)]
NAMES = (None, "lora", "dora")
Generated = Callable[[str | None, list[int], int], list[int]]


def peft_generate(model: Path, adapters: Mapping[str, Path]) -> Generated:
    """transformers' own greedy generate of the base and of PEFT's models, by name, prompt and count."""
    models: dict[str | None, Any] = {}
    with quiet():
        for name in (None, *adapters):
            loaded: Any = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
            models[name] = (PeftModel.from_pretrained(loaded, adapters[name]) if name else loaded).eval()

    def generate(name: str | None, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad(), quiet():
            out = models[name].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
            )
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return generate


def a_batch_of_all_adapters_is_generate_of_each(engine: OnnxEngine, generated: Generated) -> None:
    rows = [(row, name) for row in range(4) for name in NAMES]
    requests = [Request(PROMPTS[row], adapter=name, max_tokens=9 + 2 * row) for row, name in rows]
    # Fewer rows than requests, so that some wait until others end.
    for max_rows in (12, 5, 1):
        for request, done in zip(requests, engine.complete(requests, max_rows=max_rows), strict=True):
            assert done.error is None
            assert list(done.token_ids) == generated(
                request.adapter, list(request.prompt or ()), request.max_tokens or 0
            )
    texts = {done.token_ids for done in engine.complete([Request(PROMPTS[2], adapter=name) for name in NAMES])}
    assert len(texts) == len(NAMES)


def the_same_seed_gives_the_same_text_whatever_runs_beside_it(engine: OnnxEngine, *, same_numbers: bool) -> None:
    """same_numbers: whether the probabilities are the same as well, to the bit."""
    requests = [
        Request(PROMPTS[row % 4], adapter=NAMES[row % 3], sampling=Sampling(temperature=1.0, seed=row), max_tokens=12)
        for row in range(9)
    ]
    together = engine.complete(requests)
    assert len({done.token_ids for done in together}) == 9
    for max_rows, order in ((1, range(9)), (4, reversed(range(9)))):
        chosen = list(order)
        again = engine.complete([requests[row] for row in chosen], max_rows=max_rows)
        assert [done.token_ids for done in again] == [together[row].token_ids for row in chosen]
        if same_numbers:
            assert [done.logprobs for done in again] == [together[row].logprobs for row in chosen]
    (other,) = engine.complete([Request(PROMPTS[0], sampling=Sampling(temperature=1.0, seed=99), max_tokens=12)])
    assert other.token_ids != together[0].token_ids


def events_stream_and_one_request_can_be_cancelled(engine: OnnxEngine) -> None:
    generation = engine.generate(
        [
            Request(PROMPTS[0], max_tokens=30, ignore_eos=True),
            Request(PROMPTS[1], adapter="dora", max_tokens=5, ignore_eos=True),
        ]
    )
    events = [next(generation) for _ in range(4)]
    assert {event.index for event in events} == {0, 1}
    generation.cancel(0)
    ended = {event.index: event.finish_reason for event in generation if event.finish_reason}
    assert ended == {0: "cancelled", 1: "length"}


def adapters_come_go_and_are_replaced_while_requests_run(
    engine: OnnxEngine, lora_file: Path, generated: Generated
) -> None:
    running = engine.generate([Request(PROMPTS[3], adapter="dora", max_tokens=8, ignore_eos=True)])
    tokens = [next(running).token_id for _ in range(3)]
    with pytest.raises(EngineError, match="1 request is using it"):
        engine.pool.unload("dora")
    report = engine.pool.load("dora", lora_file, replace=True)
    assert (report.replaced, report.method, report.rank) == (True, "LoRA", 3)
    tokens += [event.token_id for event in running if event.token_id is not None]
    assert tokens == generated("dora", PROMPTS[3], 8)  # what it began with
    (after,) = engine.complete([Request(PROMPTS[3], adapter="dora", max_tokens=8)])
    assert list(after.token_ids) == generated("lora", PROMPTS[3], 8)
    engine.pool.unload("dora")
    (gone,) = engine.complete([Request(PROMPTS[3], adapter="dora")])
    assert isinstance(gone.error, EngineError)
    assert [(entry.name, entry.method, entry.in_use) for entry in engine.pool.list()] == [("lora", "LoRA", 0)]
