"""One base model in memory, and the adapters of its pool on it, any of them in one batch.

    engine = Engine.load("base")
    engine.pool.load("dates", "examples/adapters/dates-dora")
    for event in engine.generate([Request("On 3 May"), Request("On 3 May", adapter="dates")]):
        print(event.index, event.text)

Prompts are filled in one by one, then all rows decode together. Forwards of several threads take turns.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_serve.engine.adapted_linear import AdaptedLinear, Batch, BatchOfNow, Layers, put_layers
from dora_serve.engine.base_layers import dense_matrix, is_supported
from dora_serve.engine.cache import RowCache, step_mask
from dora_serve.engine.factors import Base, PreparedAdapter
from dora_serve.engine.generation import Generation, complete
from dora_serve.engine.known_scales import fingerprint_of
from dora_serve.engine.loading import load_base
from dora_serve.engine.pool import AdapterPool, Limits
from dora_serve.engine.probe import Probe
from dora_serve.engine.prompt_tokens import PromptTokens, context_of, end_tokens
from dora_serve.engine.requests import Completion, Request
from dora_serve.engine.running import Running
from dora_serve.engine.scale_cache import ScaleCache, identity, stamps
from dora_serve.engine.self_check import close_enough, require_batchable, require_same_alone
from dora_serve.engine.sound import is_whole, require
from dora_serve.engine.step_graphs import FixedCache, Recorder, StepGraphs, cuda_recorder, power_of_two
from dora_serve.errors import EngineError
from dora_serve.module_names import ModuleNames
from dora_serve.ops import squared_row_norms
from dora_serve.progress import OnProgress, ignore_progress


class Engine:
    """model: a causal language model of transformers, whose layers are replaced by ones that can add adapters.

    tokenizer: None for a model that is given token ids and asked for them. max_rows: so many requests decode at a time.
    device_limits, host_limits: of the pool's tiers, no limit by default. max_rank: larger adapters are refused.
    files: what the model was loaded from, so that norm scales beside an adapter may be taken for it. scale_cache: a
    folder where the norm scales of its DoRAs are kept, so that one that was loaded before loads as a LoRA does.
    record_steps: decoding steps as CUDA graphs, where the model is on a CUDA device; what cannot be recorded decodes
    without (`why_not_recorded`). A Recorder of one's own in its place is used on any device.

    Raises UnavailableError for an architecture whose attention cannot be batched here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_rows: int = 16,
        max_rank: int = 256,
        device_limits: Limits | None = None,
        host_limits: Limits | None = None,
        label: str = "this base",
        files: Path | None = None,
        scale_cache: str | Path | None = None,
        record_steps: bool | Recorder = True,
    ) -> None:
        self.model, self.tokenizer, self.max_rows = model.eval(), tokenizer, max_rows
        self.config = model.config.get_text_config()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype: torch.dtype = model.dtype
        require_batchable(model, self.config)
        if any(isinstance(module, AdaptedLinear) for module in model.modules()):
            raise EngineError(
                "This model is in another engine already.", remedy="Use that engine, or load the model again."
            )
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._lock = threading.RLock()
        self.running = Running()
        self._now = BatchOfNow()
        self._graphs: StepGraphs | None = None
        self._squared_norms: dict[str, Tensor] = {}
        names = ModuleNames(model)
        self._layers: Mapping[str, nn.Module] = _layers(model)
        put_layers(model, self._layers, self._now)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        require_same_alone(model, lambda tokens, cache: self.forward(None, tokens, cache), self.vocabulary, self.device)
        self._prompts = PromptTokens(tokenizer, self.vocabulary, context_of(self.config))
        self.end_tokens = end_tokens((getattr(model, "generation_config", None), model.config, tokenizer))
        fingerprint = cache(partial(fingerprint_of, files))
        kept = None
        if scale_cache is not None and files is not None:
            kept = ScaleCache(
                Path(scale_cache), cache(partial(identity, stamps(files), fingerprint, self._layers, self.device))
            )
        self._graphs = self._step_graphs(record_steps)
        self._spare: FixedCache | None = None
        self.base = Base(label, names, self._layers, self._squared_norm, fingerprint, kept)
        self.probe = Probe(self._layers, self._find_reached).changes
        self.pool = AdapterPool(
            self.base,
            self.device,
            max_rank=max_rank,
            device_limits=device_limits,
            host_limits=host_limits,
            probe=self.probe,
        )

    @staticmethod
    def load(
        base: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        on_progress: OnProgress = ignore_progress,
        **options: Any,
    ) -> Engine:
        """An engine on a local folder or a Hub id (user/name[@revision]), through transformers.

        dtype: None for the checkpoint's own. device: None for the GPU where there is one. options: Engine's.
        Raises CheckpointError, HubError, UnavailableError for a base that cannot be had or is no language model.
        """
        loaded = load_base(base, dtype, device, on_progress)
        return Engine(loaded.model, loaded.tokenizer, label=loaded.label, files=loaded.path, **options)

    def generate(self, requests: Sequence[Request], *, max_rows: int | None = None) -> Generation:
        """Answer all requests, at most `max_rows` at a time; iterate over what this returns for the events.

        A request that cannot be answered gets an event with its error, and the others go on.
        """
        requests = (requests,) if isinstance(requests, Request) else requests
        requests = tuple(requests) if isinstance(requests, Iterable) else (requests,)
        if not all(isinstance(request, Request) for request in requests):
            raise EngineError("What is to be generated is not a list of Requests.", remedy="Give Request(...) objects.")
        rows = self.max_rows if max_rows is None else max_rows
        require("max_rows", rows, is_whole(rows) and rows > 0, "a whole number, 1 or more")
        return Generation(self, requests, min(rows, max(1, len(requests))))

    def complete(self, requests: Sequence[Request], *, max_rows: int | None = None) -> tuple[Completion, ...]:
        """Answer all requests and return when the last has ended."""
        return complete(self.generate(requests, max_rows=max_rows))

    # What a generation needs

    def tokenize(self, request: Request, *, special: bool = True) -> list[int]:
        """As PromptTokens has it."""
        return self._prompts.tokenize(request, special=special)

    def room_for(self, request: Request, prompt_tokens: int) -> int:
        """As PromptTokens has it."""
        return self._prompts.room_for(request, prompt_tokens)

    @property
    def context(self) -> int | None:
        """How many tokens a text can have, None where the configuration does not say."""
        return self._prompts.context

    def token_text(self, token: int) -> str:
        """A token by itself, special tokens by name."""
        return self._prompts.token_text(token)

    def batch(self, adapters: tuple[PreparedAdapter | None, ...]) -> Batch:
        """What `forward` is told of its rows."""
        return Batch(adapters, by_row=self.by_row)

    def new_cache(self, rows: int) -> RowCache:
        if self._graphs is None or self._graphs.why_not is not None:
            return RowCache(rows)
        with self._lock:
            spare = self._spare
            if spare is not None and spare.rows >= rows:
                self._spare = None
                return spare
        return FixedCache(power_of_two(rows), self.device)

    @property
    def replayed_steps(self) -> int:
        """Decoding steps that were recordings, so far."""
        return 0 if self._graphs is None else self._graphs.replayed

    def release_cache(self, cache: RowCache) -> None:
        """Keep the largest with its recordings, which hold for its own memory alone; none for more than max_rows."""
        if not isinstance(cache, FixedCache) or self._graphs is None:
            return
        with self._lock:
            if self._graphs.why_not is not None:
                self._spare = None
            elif cache.rows <= power_of_two(self.max_rows) and (self._spare is None or self._spare.rows < cache.rows):
                self._spare = cache

    @property
    def why_not_recorded(self) -> str | None:
        """Why decoding steps are not recorded, None where they are."""
        return "it was not wanted, or the device has no graphs" if self._graphs is None else self._graphs.why_not

    def forward(
        self, batch: Batch | None, tokens: Tensor, cache: RowCache | None = None, *, last: bool = False
    ) -> Tensor:
        """Logits (rows, tokens, vocabulary), of the `last` place alone if the model can; with a cache, of that place,
        (rows, vocabulary)."""
        if self._graphs is None or not isinstance(cache, FixedCache) or cache.filling is not None:
            return self._forward(batch, tokens, cache, last=last)
        batch = batch or self.batch((None,) * len(tokens))
        with self._lock:
            return self._graphs.forward(batch, tokens, cache, lambda: self._forward(batch, tokens, cache))

    def _forward(
        self, batch: Layers | None, tokens: Tensor, cache: RowCache | None, *, last: bool = False, whole: bool = False
    ) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": cache is not None}
        if cache is None or cache.filling is not None:
            inputs["attention_mask"] = torch.ones_like(tokens)
        else:
            inputs["attention_mask"] = step_mask(cache, self.config, self.device, self.dtype, whole=whole)
        if "position_ids" in self._accepts and cache is not None:
            filled = cache.filling is not None
            places = torch.arange(tokens.shape[1], device=self.device)[None] if filled else cache.places[:, None]
            inputs["position_ids"] = places
        if cache is not None:
            inputs["past_key_values"] = cache.layers
        if (last or cache is not None) and "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1
        logits = self._run(batch, inputs)
        return logits if cache is None else logits[:, -1]

    def forward_in_pieces(self, batch: Batch, tokens: Tensor, size: int) -> Iterator[Tensor]:
        """The logits of all places, (rows, at most `size`, vocabulary) at a time, so that not all are held at once."""
        if tokens.shape[1] <= size:
            yield self.forward(batch, tokens)
            return
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for start in range(0, tokens.shape[1], size):
            piece = tokens[:, start : start + size]
            stop = start + piece.shape[1]
            inputs: dict[str, Any] = {"input_ids": piece, "use_cache": True, "past_key_values": cache}
            inputs["attention_mask"] = torch.ones_like(tokens[:, :stop])
            if "position_ids" in self._accepts:
                inputs["position_ids"] = torch.arange(start, stop, device=self.device)[None]
            yield self._run(batch, inputs)

    def _run(self, batch: Layers | None, inputs: Mapping[str, Any]) -> Tensor:
        """The model's logits, with the adapters of the batch on its layers."""
        rows, places = inputs["input_ids"].shape
        with self._lock, torch.inference_mode():
            self._now.batch = None if isinstance(batch, Batch) and not batch.adapters else batch
            self._now.shape = (rows, places)
            try:
                logits: Tensor = self.model(**inputs).logits
            finally:
                self._now.batch = None
        return logits

    @property
    def closeness(self) -> float:
        """Choices of a token that are closer than this, in logits, are made by a forward of that request alone.

        A row's numbers depend a little on how many rows there are, since a library picks its kernels by that: in
        float32 by some 1e-5, so that this is far more, and one token in a thousand is so close. In 16 bits a forward
        alone would be wanted at every tenth token; oneDNN's bfloat16, on a CPU, does not depend on the rows at all, and
        neither do the adapters' factors if each row has its own.
        """
        return 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.0

    def logits_alone(self, adapter: PreparedAdapter | None, tokens: Sequence[int]) -> Tensor:
        """The logits (vocabulary,) after a text, in float32, from a forward that has nothing else in it."""
        return self.forward(self.batch((adapter,)), torch.tensor([tokens], device=self.device), last=True)[
            0, -1
        ].float()

    @property
    def by_row(self) -> bool:
        """Whether batches hold each row's own factors: in 16 bits, a row's numbers are then the same in any of them."""
        return self.dtype not in (torch.float32, torch.float64)

    def _step_graphs(self, wanted: bool | Recorder) -> StepGraphs | None:
        if isinstance(wanted, bool):
            if not wanted or self.device.type != "cuda":
                return None
            wanted = cuda_recorder(self.device)
        return StepGraphs(
            wanted,
            lambda batch, tokens, cache: self._forward(batch, tokens, cache, whole=True),
            embeddings=[name for name, layer in self._layers.items() if isinstance(layer, nn.Embedding)],
            close_enough=close_enough(self.model),
        )

    def _squared_norm(self, layer: str) -> Tensor:
        if layer not in self._squared_norms:
            self._squared_norms[layer] = squared_row_norms(dense_matrix(self._layers[layer]))
        return self._squared_norms[layer]

    def _find_reached(self) -> frozenset[str]:
        """The layers that a forward runs: not those of a tower for pictures, say, or of a head that is not used."""
        reached: set[str] = set()
        hooks = [
            self.model.get_submodule(name).register_forward_hook(lambda *_, name=name: reached.add(name))
            for name in self._layers
        ]
        try:
            self.forward(None, torch.tensor([[0, 1]], device=self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return frozenset(reached)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers that adapters can be put on, by name. Not an expert's own: it is given some tokens of every row."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and is_supported(module) and not re.search(r"\.experts\.\d+\.", name)
    }
