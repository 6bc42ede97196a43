"""An exported base in ONNX Runtime, with the torch engine's own interface: requests in, events out.

    engine = OnnxEngine.load("exported")
    engine.pool.load("dates", "exported/adapters/dates-dora.onnx_adapter")
    for event in engine.generate([Request("On 3 May"), Request("On 3 May", adapter="dates")]):
        print(event.index, event.text)

A graph that was exported for mixed batches answers all requests of a step in one run, any other in one run for each
adapter among them, and ONNX Runtime GenAI in one run for each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_serve.checkpoint import read_json
from dora_serve.engine.generation import Generation, complete
from dora_serve.engine.loading import load_tokenizer
from dora_serve.engine.prompt_tokens import PromptTokens, context_of, end_tokens
from dora_serve.engine.requests import Completion, Request
from dora_serve.engine.running import Running
from dora_serve.engine.sound import is_whole, require
from dora_serve.errors import EngineError
from dora_serve.onnx_engine.genai_runner import GenaiRunner, is_genai
from dora_serve.onnx_engine.graph import MODEL_FILE
from dora_serve.onnx_engine.ort_runner import OrtRunner
from dora_serve.onnx_engine.pool import OnnxAdapter, OnnxPool
from dora_serve.onnx_engine.runner import Runner
from dora_serve.progress import OnProgress, Progress, ignore_progress

_Rows = tuple[OnnxAdapter | None, ...]


def is_exported(folder: Path) -> bool:
    """Whether a folder holds a graph and no weights of another kind."""
    return (folder / MODEL_FILE).is_file() and not any(folder.glob("*.safetensors"))


class OnnxEngine:
    """tokenizer: None for a folder without one, whose requests are token ids. max_rows: so many requests decode at a
    time. provider: what runs the graph.
    """

    device = torch.device("cpu")  # where logits are looked at; the graph runs where its provider is

    def __init__(self, folder: Path, runner: Runner, tokenizer: Any = None, *, max_rows: int = 16) -> None:
        self.folder, self.tokenizer, self.max_rows = folder, tokenizer, max_rows
        self._runner = runner
        config = read_json(folder)
        context = runner.context or context_of(config.get("text_config")) or context_of(config)
        self._prompts = PromptTokens(tokenizer, runner.vocabulary, context)
        self.end_tokens = end_tokens((read_json(folder, "generation_config.json"), config, tokenizer))
        self.running = Running()
        self.pool = OnnxPool(runner, folder)
        self.closeness = runner.closeness
        """Choices of a token that are closer than this, in logits, are made by a forward of that request alone."""

    @staticmethod
    def load(
        folder: str | Path,
        *,
        device: str | None = None,
        threads: int | None = None,
        max_rows: int = 16,
        on_progress: OnProgress = ignore_progress,
    ) -> OnnxEngine:
        """An engine on a folder that `dora-export merge ... --to onnx-adapters` (or `--to onnx`) made; what was made
        with `--runtime genai` runs in ONNX Runtime GenAI.

        device: "cpu", "cuda" or "cuda:N"; None for the CPU, or what a folder of GenAI was made for. threads: of ONNX
        Runtime, None for its own choice. Raises CheckpointError for what is no exported causal language model,
        UnavailableError for what is missing here.
        """
        place = Path(folder)
        on_progress(Progress("loading the graph", 0, None, ""))
        runner: Runner
        if is_genai(place):
            runner = GenaiRunner(place, device=device, threads=threads)
        else:
            runner = OrtRunner(place, device=device or "cpu", threads=threads)
        return OnnxEngine(place, runner, load_tokenizer(place), max_rows=max_rows)

    @property
    def provider(self) -> str:
        return self._runner.provider

    @property
    def mixed(self) -> bool:
        """Whether one run serves several adapters."""
        return self._runner.mixed

    def generate(self, requests: Sequence[Request], *, max_rows: int | None = None) -> Generation:
        """Answer all requests, at most `max_rows` at a time; iterate over what this returns for the events.

        A request that cannot be answered gets an event with its error, and the others go on. One with a seed gives the
        same text whatever runs beside it, as far as `closeness` reaches.
        """
        requests = (requests,) if isinstance(requests, Request) else tuple(requests)
        if not all(isinstance(request, Request) for request in requests):
            raise EngineError("What is to be generated is not a list of Requests.", remedy="Give Request(...) objects.")
        rows = self.max_rows if max_rows is None else max_rows
        require("max_rows", rows, is_whole(rows) and rows > 0, "a whole number, 1 or more")
        return Generation(self, requests, min(rows, max(1, len(requests))))

    def complete(self, requests: Sequence[Request], *, max_rows: int | None = None) -> tuple[Completion, ...]:
        """Answer all requests and return when the last has ended."""
        return complete(self.generate(requests, max_rows=max_rows))

    # What a generation needs

    def tokenize(self, request: Request) -> list[int]:
        return self._prompts.tokenize(request)

    def room_for(self, request: Request, prompt_tokens: int) -> int:
        return self._prompts.room_for(request, prompt_tokens)

    def token_text(self, token: int) -> str:
        return self._prompts.token_text(token)

    def batch(self, adapters: _Rows) -> tuple[Any, ...]:
        return tuple(None if adapter is None else adapter.ready for adapter in adapters)

    def new_cache(self, rows: int) -> Any:
        return self._runner.new_cache(rows)

    def release_cache(self, cache: Any) -> None:
        """Nothing of it is used again."""

    def forward(self, batch: tuple[Any, ...], tokens: Tensor, cache: Any) -> Tensor:
        """Logits (rows, vocabulary) of the last of tokens (rows, tokens)."""
        return self._runner.forward(batch, tokens, cache)

    def logits_alone(self, adapter: OnnxAdapter | None, tokens: Sequence[int]) -> Tensor:
        """The logits (vocabulary,) after a text, in float32, from a run that has nothing else in it."""
        return self._runner.logits_alone(None if adapter is None else adapter.ready, tokens)
