"""The options of `merge --to onnx-adapters`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporters.onnx_adapters.options import SlotOptions

_FLAGS = ("slots", "mixed_batches", "slot_rank", "slot_inputs")


def add(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for --to onnx-adapters: the base once, with slots, and the adapter as a file")
    group.add_argument(
        "--slots",
        choices=("layers", "all", "adapter"),
        help="what gets one: the linear layers, also embeddings and heads, or only what this adapter changes (layers)",
    )
    group.add_argument(
        "--mixed-batches", action="store_true", help="let each row of a batch choose its adapter, by adapter_ids"
    )
    group.add_argument(
        "--slot-inputs",
        action="store_true",
        help="tensors without default values, for runtimes that feed no input that has one (onnxruntime-node)",
    )
    group.add_argument(
        "--slot-rank", type=_rank, metavar="N", help="fix the rank of every slot; default: each adapter's own"
    )


def misused(options: argparse.Namespace) -> str | None:
    given = [name for name in _FLAGS if getattr(options, name)]
    if given and options.to != "onnx-adapters":
        return f"--{given[0].replace('_', '-')} says how to export with --to onnx-adapters"
    if options.runtime == "genai" and (options.mixed_batches or options.slot_inputs):
        flag = "--mixed-batches" if options.mixed_batches else "--slot-inputs"
        return f"{flag} is not for --runtime genai, which swaps one adapter for a whole run by its own means"
    return None


def slot_options(options: argparse.Namespace) -> SlotOptions:
    from exporters.onnx_adapters.options import SlotOptions

    return SlotOptions(options.slots or "layers", options.mixed_batches, options.slot_rank, options.slot_inputs)


def _rank(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no rank: a whole number, 1 or more")
    return int(text)
