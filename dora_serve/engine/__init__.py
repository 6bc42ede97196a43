"""One base in memory, many LoRA and DoRA adapters hot-swapped on it, in one batch."""

from __future__ import annotations

from dora_serve.engine.engine import Engine
from dora_serve.engine.generation import Generation, complete
from dora_serve.engine.pool import AdapterInfo, AdapterPool, Limits, LoadReport
from dora_serve.engine.requests import Alternative, Completion, Event, Request, Timings
from dora_serve.engine.sampling import Sampling
from dora_serve.engine.score import Score, score

__all__ = [
    "AdapterInfo",
    "AdapterPool",
    "Alternative",
    "Completion",
    "Engine",
    "Event",
    "Generation",
    "Limits",
    "LoadReport",
    "Request",
    "Sampling",
    "Score",
    "Timings",
    "complete",
    "score",
]
