"""What the commands share: errors into words or JSON, exit codes, one interrupt, and the types of arguments.

Nothing heavy is imported, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dora_serve.errors import DoraServeError

if TYPE_CHECKING:
    from dora_serve.formats import ReadOptions

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class CommandParser(argparse.ArgumentParser):
    """Its complaints are one JSON object on stdout where `--json` was asked for; it exits with 2 all the same.

    Its subparsers are of this class as well; `parse_args` is called on the outermost.
    """

    indent: int | None = 2
    """Of that JSON; None puts it on one line."""

    _as_json: bool | None = None

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        # argparse takes abbreviations.
        self._as_json = any(len(text) > 2 and "--json".startswith(text) for text in given)
        try:
            return super().parse_args(given, namespace)
        except _WrongUsage as wrong:
            wrong.parser._refuse(wrong.message, as_json=self._as_json)

    def of(self, command: str) -> CommandParser:
        """The parser of a command, to complain of what was parsed: its usage is shown, and its help is the remedy."""
        commands = next(action.choices for action in self._actions if isinstance(action.choices, dict))
        subparser: CommandParser = commands[command]
        subparser._as_json = self._as_json
        return subparser

    def error(self, message: str) -> NoReturn:
        if self._as_json is None:  # a subparser is shown only what follows its name
            raise _WrongUsage(self, message)
        self._refuse(message, as_json=self._as_json)

    def _refuse(self, message: str, *, as_json: bool) -> NoReturn:
        if not as_json:
            super().error(message)
        shown = {"type": "UsageError", "message": message, "remedy": f"{self.prog} --help"}
        _print_json({"error": shown}, self.indent)
        sys.exit(EXIT_USAGE)


class _WrongUsage(Exception):
    def __init__(self, parser: CommandParser, message: str) -> None:
        super().__init__(message)
        self.parser, self.message = parser, message


def run_command(
    program: str,
    run: Callable[[], int],
    *,
    as_json: bool,
    when_interrupted: str = "Interrupted.",
    indent: int | None = 2,
) -> int:
    """Run a command's work and return its exit code: its own, 1 for a DoraServeError, 130 for Ctrl-C or SIGTERM.

    program: what a message to a person begins with. An error goes to stderr in words, or to stdout as one JSON object,
    on one line where indent is None.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this: what is printed goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to end
    interrupted = threading.Event()
    try:
        with one_interrupt(interrupted):
            code = run()
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        _print_no_more()
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        if interrupted.is_set() or isinstance(error, KeyboardInterrupt):
            # Whatever came of it: an import that is broken off may raise something else.
            print(f"\n{when_interrupted}", file=sys.stderr)
            if as_json:
                shown = {"type": "Interrupted", "message": when_interrupted, "remedy": None}
                _print_json({"error": shown, "report": None}, indent)
            return EXIT_INTERRUPTED
        if isinstance(error, DoraServeError):
            print_error(program, error, as_json=as_json, indent=indent)
            return EXIT_FAILED
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _say_full(program, error)
            return EXIT_FAILED
        raise


@contextmanager
def one_interrupt(fired: threading.Event | None = None) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt, and let no second one break into the clearing up.

    fired: is set by then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        if fired is not None:
            fired.set()
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_full(program: str, error: OSError) -> None:
    print(f"{program}: what was to be printed cannot be written: {error.strerror}.", file=sys.stderr)
    _print_no_more()


def print_error(program: str, error: DoraServeError, *, as_json: bool, indent: int | None = 2) -> None:
    if as_json:
        facts = {key: value for key, value in error.facts.items() if key != "report"}
        shown = {"type": type(error).__name__, "message": error.message, "remedy": error.remedy, **facts}
        try:
            _print_json({"error": shown, "report": error.facts.get("report")}, indent)
        except OSError as full:  # what was wrong is said all the same
            _say_full(program, full)
            print(f"{program}: {error}", file=sys.stderr)
        return
    print(f"{program}: {error}", file=sys.stderr)


def _print_json(value: object, indent: int | None) -> None:
    try:
        print(json.dumps(value, indent=indent, default=str), flush=True)
    except BrokenPipeError:
        _print_no_more()


def _print_no_more() -> None:
    """The reader of a pipe went away (`| head`), or a disk is full; the interpreter must not complain again while it
    closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


FORMAT_NAMES = (
    *("torchtune", "peft", "nvlabs", "vl-bart", "mlx", "adalora", "dynamic", "tensorrt-llm", "bayesian"),
    *("fsdp-qlora", "megatron", "ai-toolkit", "diffusers", "onetrainer", "kohya"),
)
"""Those of `dora_serve.formats`, which is not imported before a command runs."""

_OTHER_NAMES = {"lycoris": "kohya"}
"""What else a format may be called: LyCORIS writes kohya's names."""


OF_READING = (
    *("format", "lora_alpha", "magnitudes", "norm_eps"),
    *("allow_missing_magnitudes", "allow_pickle", "ignore_config"),
)
"""What `add_reading` adds; each is None, False or empty where it was not said."""


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What a user may allow a reader of adapters, and tell it; `read_options` takes it up."""
    named = ", ".join(FORMAT_NAMES)
    parser.add_argument(
        "--format",
        type=lambda text: _OTHER_NAMES.get(text, text),
        choices=FORMAT_NAMES,
        metavar="NAME",
        help=f"{named} (lycoris is kohya); default: look",
    )
    parser.add_argument(
        "--lora-alpha",
        type=lambda text: text if text == "rank" else _positive(text, "a positive number, or rank"),
        metavar="ALPHA",
        help="where the adapter's files do not hold it; `rank` for a scale of 1",
    )
    parser.add_argument(
        "--magnitudes",
        choices=("norm", "norm-scale"),
        help="what they are: m, the norm of a weight, or m / ||V|| already (TensorRT-LLM)",
    )
    parser.add_argument(
        "--norm-eps",
        type=lambda text: _positive(text, "0 or a positive number", or_zero=True),
        metavar="EPS",
        help="what the trainer added to the norm, where it is unsaid",
    )
    parser.add_argument(
        "--allow-missing-magnitudes",
        action="store_true",
        help="modules without a magnitude are plain LoRA, though others of their kind have one",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read a .bin adapter, as weights only")
    parser.add_argument(
        "--ignore-config", action="append", default=[], metavar="KEY", help="a key known not to change the weights"
    )


def read_options(options: argparse.Namespace) -> ReadOptions:
    from dora_serve.formats import ReadOptions

    return ReadOptions(
        allow_pickle=options.allow_pickle,
        ignore_config=frozenset(options.ignore_config),
        format=options.format,
        lora_alpha=options.lora_alpha,
        magnitudes=options.magnitudes,
        norm_eps=options.norm_eps,
        allow_missing_magnitudes=options.allow_missing_magnitudes,
    )


def number_argument(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def _positive(text: str, wanted: str, *, or_zero: bool = False) -> float:
    value = number_argument(text)
    if value < 0 or (value == 0 and not or_zero):
        raise argparse.ArgumentTypeError(f"{text!r} is not what is wanted: {wanted}")
    return value


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
