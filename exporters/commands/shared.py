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


def add_reading_and_json(parser: argparse.ArgumentParser) -> None:
    add_reading(parser)
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show_progress(stack: ExitStack) -> Any:
    from dora_serve.terminal import TerminalProgress

    return stack.enter_context(TerminalProgress())
