"""What both commands share: exit codes, errors in words and as JSON, and the types of their arguments."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_serve.console import CommandParser, device_argument, name_argument, path_argument, run_command
from dora_serve.errors import AdapterError, VerificationError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("code", [0, 1, 7])
def test_a_commands_own_code_is_kept(code: int) -> None:
    assert run_command("dora-test", lambda: code, as_json=False) == code


def test_an_error_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise AdapterError("It is odd.", remedy="Make it even.")

    assert run_command("dora-test", run, as_json=False) == 1
    assert capsys.readouterr() == ("", "dora-test: It is odd. Make it even.\n")


def test_an_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise VerificationError("It differs.", remedy="Look.", path=Path("x"), report={"passed": False})

    assert run_command("dora-test", run, as_json=True) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    shown = {"type": "VerificationError", "message": "It differs.", "remedy": "Look.", "path": "x"}
    assert json.loads(printed.out) == {"error": shown, "report": {"passed": False}}


def test_a_bug_keeps_its_traceback() -> None:
    def run() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("dora-test", run, as_json=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_ends_it_and_a_second_lets_it_clear_up(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    cleared = []

    def run() -> int:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)
            cleared.append(True)
        return 0

    before = signal.getsignal(number)
    assert run_command("dora-test", run, as_json=False, when_interrupted="Nothing was changed.") == 130
    assert cleared
    assert signal.getsignal(number) == before
    assert capsys.readouterr() == ("", "\nNothing was changed.\n")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    source = (
        "import sys; from dora_serve.console import run_command\n"
        "def run():\n    while True:\n        print('line' * 1000)\n"
        "sys.exit(run_command('dora-test', run, as_json=False))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_full_disk_is_no_traceback_and_what_was_wrong_is_said(as_json: bool) -> None:
    source = (
        "import sys; from dora_serve.console import run_command; from dora_serve.errors import AdapterError\n"
        "def run():\n    raise AdapterError('It is cracked.')\n"
        f"sys.exit(run_command('dora-test', run, as_json={as_json}))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", source], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "dora-test: It is cracked."
    assert "Traceback" not in done.stderr


def test_closed_streams_are_no_obstacle() -> None:
    """`>&- 2>&-`: progress asks stderr whether it is a terminal."""
    source = (
        "import sys; from dora_serve.console import run_command; from dora_serve.terminal import TerminalProgress\n"
        "def run():\n    with TerminalProgress():\n        print('text')\n    return 5\n"
        "sys.exit(run_command('dora-test', run, as_json=False))"
    )
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", source]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 5


def test_arguments() -> None:
    assert [device_argument(text) for text in ("auto", "cpu", "cuda", "cuda:12")] == ["auto", "cpu", "cuda", "cuda:12"]
    assert name_argument("user/name") == "user/name"
    assert path_argument("a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("kind", "text"), [(name_argument, ""), (path_argument, ""), (device_argument, "gpu"), (device_argument, "cuda:x")]
)
def test_arguments_that_are_refused(kind: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="wanted"):
        kind(text)


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser(prog="dora-test")
    parser.add_argument("--version", action="version", version="1")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    melt = commands.add_parser("melt")
    melt.add_argument("what")
    melt.add_argument("--device", type=device_argument)
    melt.add_argument("--json", action="store_true")
    return parser


WRONG = (
    ("--json", "required: COMMAND", "dora-test"),
    ("freeze --json", "invalid choice: 'freeze'", "dora-test"),
    ("melt --json", "required: what", "dora-test melt"),
    ("melt --js", "required: what", "dora-test melt"),
    ("--json melt", "required: what", "dora-test melt"),
    ("melt x --json --device gpu", "'gpu' is no device: wanted auto", "dora-test melt"),
    ("melt x --json --faster", "unrecognized arguments: --faster", "dora-test"),
)


@pytest.mark.parametrize(("line", "message", "program"), WRONG)
def test_wrong_usage_as_json(
    line: str, message: str, program: str, parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(line.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert list(found) == ["error"]
    assert message in found["error"].pop("message")
    assert found["error"] == {"type": "UsageError", "remedy": f"{program} --help"}


@pytest.mark.parametrize(("line", "message", "program"), WRONG)
def test_wrong_usage_in_words(
    line: str, message: str, program: str, parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in line.split() if not word.startswith("--js")]
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"usage: {program} ")
    assert message in printed.err


def test_a_complaint_after_parsing_is_json_as_well(parser: CommandParser, capsys: pytest.CaptureFixture[str]) -> None:
    for line, as_json in (("melt x --json", True), ("melt x", False)):
        parser.parse_args(line.split())
        with pytest.raises(SystemExit):
            parser.error("x does not melt")
        printed = capsys.readouterr()
        assert "x does not melt" in (printed.out if as_json else printed.err)
        assert (printed.err if as_json else printed.out) == ""


def test_an_interrupt_is_told_to_machines_too(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    assert run_command("dora-test", run, as_json=True, when_interrupted="Nothing was changed.") == 130
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == {"type": "Interrupted", "message": "Nothing was changed.", "remedy": None}


@pytest.mark.parametrize("arguments", [["inspect", "/nowhere", "--json"], ["merge", "--json"]])
def test_a_reader_that_went_away_gets_no_traceback(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "exporters.cli", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode in (1, 2)
    assert done.stderr == ""
