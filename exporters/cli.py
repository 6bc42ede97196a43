"""`dora-export`: the command line. A command parses, calls one function, and turns its result or error into words.

Nothing heavy is imported until a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dora_serve import __version__
from dora_serve.console import EXIT_INTERRUPTED, CommandParser, run_command
from exporters.commands import convert, demo_base, inspect, merge, onnx_adapter, push, verify


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="dora-export",
        description="Fold a trained LoRA or DoRA adapter into dense weights, prove the result, and export it.",
    )
    parser.add_argument("--version", action="version", version=f"dora-export {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    merge.add(commands)
    onnx_adapter.add(commands)
    verify.add(commands)
    inspect.add(commands)
    convert.add(commands)
    push.add(commands)
    demo_base.add(commands)
    parser.set_defaults(
        misused=lambda _: None,
        when_interrupted=lambda _: "Interrupted: nothing was written, and nothing was changed.",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(given)
    options.given = ("dora-export", *given)
    misused = options.misused(options)
    if misused is not None:
        parser.of(options.command).error(misused)
    return run_command(
        "dora-export",
        lambda: int(options.run(options)),
        as_json=options.json,
        when_interrupted=options.when_interrupted(options),
    )


def program() -> NoReturn:
    """What the installed command runs: `main`, and then no waiting for transfers that Ctrl-C gave up."""
    code = main()
    if code == EXIT_INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the interpreter would wait for the threads of huggingface_hub, and they for the network
    sys.exit(code)


if __name__ == "__main__":
    program()
