"""What several commands have in common: their options, and the progress on a terminal."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from dora_serve.console import CommandParser, add_reading, device_argument

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


def add_verification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference", choices=("native", "peft"), default="native", help="whose unmerged forward is the measure"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, or .jsonl with a prompt each")
    parser.add_argument(
        "--device", type=device_argument, default="auto", help="auto, cpu, cuda, cuda:N (auto: verify on a GPU if any)"
    )


def add_base_choice(parser: argparse.ArgumentParser) -> None:
    """What concerns an adapter that was trained on a quantized base."""
    parser.add_argument(
        "--base-quantization",
        metavar="KIND",
        help="how the training quantized the base on loading it: nf4, nf4-double, fp4, int8, ... (docs/quantized.md)",
    )
    parser.add_argument(
        "--merge-into",
        choices=("dequantized", "original"),
        help="the weights that the training saw, or the base's own in full precision",
    )


def add_reading_and_json(parser: argparse.ArgumentParser) -> None:
    add_reading(parser)
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show_progress(stack: ExitStack) -> Any:
    from dora_serve.terminal import TerminalProgress

    return stack.enter_context(TerminalProgress())
