"""What the commands share: errors into words or JSON, exit codes, one interrupt, and the types of arguments.

Nothing heavy is imported, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_serve.errors import DoraServeError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def run_command(program: str, run: Callable[[], int], *, as_json: bool, when_interrupted: str = "Interrupted.") -> int:
    """Run a command's work and return its exit code: its own, 1 for a DoraServeError, 130 for Ctrl-C or SIGTERM.

    program: what a message to a person begins with. An error goes to stderr in words, or to stdout as one JSON object.
    """
    try:
        with one_interrupt():
            return run()
    except DoraServeError as error:
        print_error(program, error, as_json=as_json)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"\n{when_interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away (`| head`); the interpreter must not complain again while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt, and let no second one break into the clearing up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_error(program: str, error: DoraServeError, *, as_json: bool) -> None:
    if as_json:
        facts = {key: value for key, value in error.facts.items() if key != "report"}
        shown = {"type": type(error).__name__, "message": error.message, "remedy": error.remedy, **facts}
        print(json.dumps({"error": shown, "report": error.facts.get("report")}, indent=2, default=str))
        return
    print(f"{program}: {error}", file=sys.stderr)


def device_argument(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: wanted auto, cpu, cuda or cuda:N")
    return text


def name_argument(text: str) -> str:
    """A folder or a Hub id."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: wanted a folder or a Hub id")
    return text


def path_argument(text: str) -> Path:
    return Path(name_argument(text))
