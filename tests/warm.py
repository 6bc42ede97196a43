"""One process with everything imported and no threads: it forks a `dora-export` whenever it is asked for one, which
spares each of hundreds of runs the import of torch. Faults are planted at a named system call.

A run that is to fail takes `Fault`s: at the nth call of a function of `os`, before it is carried out, `do`

    kill          SIGKILL to itself
    interrupt     SIGINT to itself, as Ctrl-C sends it
    terminate     SIGTERM to itself
    pause         make `path`, and wait until it is gone
    cut           truncate the file `path` to half of its size
    ENOSPC, ...   the call fails with that error
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

CALLS = (
    *("mkdir", "open", "ftruncate", "preadv", "pwrite", "copy_file_range", "sendfile", "fsync", "fdatasync"),
    *("rename", "unlink", "rmdir", "chmod"),
)
EXCHANGE = "renameat2"
"""Counted like a function of `os`; it is `dora_serve.output._exchange`, since Python has no such function."""


@dataclass(frozen=True)
class Fault:
    """At the nth `call`, from 1 on, `do` something. path: what `do` concerns."""

    call: str
    nth: int
    do: str
    path: str = ""


@dataclass(frozen=True)
class Ended:
    """code: as subprocess has it, negative for a signal. calls: every counted call that was made, in order."""

    code: int
    output: str
    errors: str
    calls: tuple[str, ...]


class Warm:
    """The process. One run at a time; for two at once, take two."""

    def __init__(self, folder: Path) -> None:
        """folder: for what the runs print."""
        folder.mkdir(parents=True)
        self._folder = folder
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=ROOT,
            env={**os.environ, **one_thread},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: Sequence[str | Path],
        *faults: Fault,
        kill_after: float | None = None,
        exchange: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a run. kill_after: seconds until SIGKILL, counted from the fork. exchange: whether the system can
        exchange two folders in one step. environment: what of it is another one; huggingface_hub is not imported
        before the fork, and reads it then."""
        job = {
            "arguments": [str(argument) for argument in arguments],
            "faults": [asdict(fault) for fault in faults],
            "kill_after": kill_after,
            "exchange": exchange,
            "folder": str(self._folder),
            "environment": dict(environment or {}),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def wait(self) -> Ended:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the warm process has died"
        output, errors, calls = ((self._folder / name).read_text() for name in ("output", "errors", "calls"))
        return Ended(int(line), output, errors, tuple(calls.split()))

    def run(self, arguments: Sequence[str | Path], *faults: Fault, **options: Any) -> Ended:
        self.start(arguments, *faults, **options)
        return self.wait()

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    import torch

    import exporters.cli
    import exporters.pipeline
    import exporters.report

    assert torch.get_num_threads() == 1
    assert threading.active_count() == 1
    assert "huggingface_hub.constants" not in sys.modules
    gc.freeze()  # or the first collection in every fork touches, and so copies, all that was imported
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(job, exporters.cli.main)
        if job["kill_after"] is not None:
            time.sleep(job["kill_after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _run(job: dict[str, Any], main: Callable[[Sequence[str]], int]) -> None:
    """In the fork. It leaves through os._exit, so that nothing of the server is run again."""
    code = 70
    try:
        folder = Path(job["folder"])
        os.environ.update(job["environment"])
        for descriptor, name in ((1, "output"), (2, "errors")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
            os.close(file)
        _plant([Fault(**fault) for fault in job["faults"]], folder / "calls", job["exchange"])
        code = main(job["arguments"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _plant(faults: Sequence[Fault], log: Path, exchange: bool) -> None:
    import dora_serve.output

    lock = threading.Lock()
    counts: Counter[str] = Counter()
    # O_APPEND and one write a call: the log is whole up to the moment of a SIGKILL.
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                counts[name] += 1
                due = [fault for fault in faults if fault.call == name and fault.nth == counts[name]]
                write(written, f"{name}\n".encode())
            for fault in due:
                act(fault)
            return function(*args, **kwargs)

        return call

    write, open_file, truncate = os.write, os.open, os.truncate

    def act(fault: Fault) -> None:
        path = Path(fault.path)
        signals = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
        if fault.do in signals:
            os.kill(os.getpid(), signals[fault.do])
        elif fault.do == "pause":
            os.close(open_file(path, os.O_CREAT | os.O_WRONLY))
            while path.exists():
                time.sleep(0.01)
        elif fault.do == "cut":
            truncate(path, path.stat().st_size // 2)
        else:
            number = int(getattr(errno, fault.do))
            raise OSError(number, os.strerror(number))

    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, counted(name, getattr(os, name)))
    one_step = dora_serve.output._exchange if exchange else lambda *_: False
    dora_serve.output._exchange = counted(EXCHANGE, one_step)


if __name__ == "__main__":
    _serve()
