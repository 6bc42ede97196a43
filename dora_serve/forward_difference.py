"""Two adapters of one base, run unmerged on the same inputs: how far the second's logits are from the first's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_serve.adapter import Adapter
from dora_serve.checkpoint import open_checkpoint, read_json
from dora_serve.comparison import Comparison, compare
from dora_serve.errors import DoraServeError, in_a_line
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.prompts import Sample, make_samples, read_prompts
from dora_serve.quantized.view import dense_view
from dora_serve.quiet import quiet_transformers
from dora_serve.reference import attach_adapter
from dora_serve.reference_load import from_tensors


@dataclass(frozen=True)
class Difference:
    """other: the second adapter against the first; base: the base alone against it. why_not: a sentence, where the
    models could not be run; both are None then. inputs: what they were run on.
    """

    other: Comparison | None = None
    base: Comparison | None = None
    inputs: str = ""
    why_not: str | None = None


def compare_adapters(
    base: Path,
    first: Adapter,
    second: Adapter,
    *,
    prompts: Path | None = None,
    device: str | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Difference:
    """Run a base of transformers in float32, with either adapter and with none. Memory: the model and its logits.

    Raises DoraServeError for prompts that cannot be read; what else stops it is in the result.
    """
    chosen = read_prompts(prompts) if prompts is not None else None
    try:
        with quiet_transformers(), torch.inference_mode():
            return _compare(base, (first, second), chosen, device or "cpu", on_progress)
    except DoraServeError as error:
        return Difference(why_not=error.message)
    except Exception as error:  # other people's models raise what they like
        return Difference(why_not=in_a_line(error))


def _compare(
    base: Path, adapters: Sequence[Adapter], prompts: tuple[str, ...] | None, device: str, on_progress: OnProgress
) -> Difference:
    import transformers

    named = read_json(base).get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    known = getattr(transformers, architecture, None)
    if known is None:
        return Difference(why_not=f"the base names no architecture of transformers ({architecture or 'none at all'}).")
    stored = dense_view(open_checkpoint(base))
    if stored.quantization is not None:
        model, _ = from_tensors(known, stored, torch.float32)
    else:
        model = known.from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    model = model.to(device).eval()
    made = make_samples(model, base, prompts, [])
    causal = any(sample.grows == "input_ids" for sample in made.samples)
    steps = 3 * len(made.samples)

    def tick(done: int) -> None:
        on_progress(Progress("comparing the forward", done, steps, "forwards"))

    wanted = []
    with attach_adapter(model, adapters[0]):
        for number, sample in enumerate(made.samples):
            wanted.append(_logits(model, sample))
            tick(number + 1)

    def runs(offset: int) -> Iterator[tuple[Sample, Tensor, Tensor]]:
        for number, (sample, logits) in enumerate(zip(made.samples, wanted, strict=True)):
            yield sample, logits, _logits(model, sample)
            tick(offset + number + 1)

    alone = compare(runs(len(wanted)), causal=causal)
    with attach_adapter(model, adapters[1]):
        other = compare(runs(2 * len(wanted)), causal=causal)
    return Difference(other, alone, made.description)


def _logits(model: Any, sample: Sample) -> Tensor:
    """(positions, classes) on the CPU."""
    output = model(**{name: value.to(model.device) for name, value in sample.inputs.items()})
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value.flatten(0, -2).cpu()
    first: Tensor = output[0]
    return first.flatten(0, -2).cpu()
