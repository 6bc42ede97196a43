"""All or nothing: an output folder appears complete and flushed, under its final name, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dora_serve.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A hidden sibling of `target` to write into; it becomes `target` when the block ends without an exception.

    It is locked while it is written, so that the next run can tell what a killed one left and clear it away. On any
    exception, Ctrl-C included, it is removed and `target` is as it was. Of two runs that make the same `target` at a
    time the first to end wins, and the other raises; with `overwrite` the last one wins.

    Raises OutputError: `target` exists and `overwrite` is false, it is or holds one of `inputs`, the parent cannot be
    written, or the disk is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    _require_apart(target, inputs, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(target)
        if os.path.lexists(target) and not overwrite:
            raise _exists(target, "exists")
        folder, lock = _make_hidden(target)
    except OSError as error:
        raise _output_error(target, error) from error
    try:
        yield folder
        _flush(folder)
        _place(folder, target, overwrite)
    except OSError as error:
        if error.errno is None:  # not the system's: some library's own
            raise
        raise _output_error(target, error) from error
    finally:
        # Whatever is left under the hidden name is a failed run's, or what --overwrite took the place of.
        _remove(folder)
        os.close(lock)


@contextlib.contextmanager
def new_file(
    target: Path, *, overwrite: bool = False, inputs: Sequence[Path] = (), beside: Sequence[str] = ()
) -> Iterator[Path]:
    """A path in a hidden folder beside `target` to write to; the file becomes `target` when the block ends without an
    exception, after files of the names `beside` that were written next to it. On any exception nothing is left.

    Raises OutputError as `new_folder` does.
    """
    target = Path(os.path.abspath(target.expanduser()))
    for path in inputs:
        if os.path.realpath(path) == os.path.realpath(target):
            raise OutputError(
                f"The output {str(target)!r} is an input.", remedy="Give another place with -o.", path=str(target)
            )
    if target.is_dir():
        raise OutputError(f"The output {str(target)!r} is a folder, wanted a file.", remedy="Name the file to write.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(target)
        if os.path.lexists(target) and not overwrite:
            raise _exists(target, "exists")
        folder, lock = _make_hidden(target)
    except OSError as error:
        raise _output_error(target, error) from error
    try:
        yield folder / target.name
        _flush(folder)
        for name in (*beside, target.name):
            os.replace(folder / name, target.with_name(name))
    except OSError as error:
        if error.errno is None:
            raise
        raise _output_error(target, error) from error
    finally:
        _remove(folder)
        os.close(lock)


def require_space(folder: Path, nbytes: int) -> None:
    """Raise OutputError where the disk of `folder` has less than `nbytes` left."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"The disk of {str(folder.parent)!r} has {free:,} bytes left, and the output takes {nbytes:,}.",
            remedy="Free some space, or give a place on another disk with -o.",
            free=free,
            needed=nbytes,
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _aside(target: Path) -> Path:
    """Where the old `target` is for a moment, where two folders cannot be exchanged in one step."""
    return target.with_name(f".{target.name}.replaced")


def _make_hidden(target: Path) -> tuple[Path, int]:
    """A hidden sibling, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        # Another run that starts now may clear the folder away before it is locked.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is cleared away either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                folder.chmod(0o755 & ~_umask())
                return folder, lock
            os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_free(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError, as `new_folder` will, where `target` exists: before long work that it is to hold."""
    target = Path(os.path.abspath(target.expanduser()))
    if os.path.lexists(target) and not overwrite:
        raise _exists(target, "exists")


def _require_apart(target: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    real = Path(os.path.realpath(target))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if real == source or real in source.parents or source in real.parents:
            raise OutputError(
                f"The output {str(target)!r} and the input {str(path)!r} are one folder, or one holds the other.",
                remedy="Give another place with -o: inputs are never written to.",
                path=str(target),
            )
    here = Path.cwd()
    if overwrite and target.exists() and (real == here or real in here.parents or real == Path.home()):
        raise OutputError(
            f"The output {str(target)!r} is, or holds, the folder that you are in or your home; it is not replaced.",
            remedy="Give another place with -o.",
            path=str(target),
        )


def _clear_stale(target: Path) -> None:
    """Remove what killed runs left beside `target`: folders of its hidden name that nobody holds the lock of.

    Where one was killed between the two steps of `_exchange_in_steps`, the old folder comes back.
    """
    if os.path.lexists(_aside(target)):
        if os.path.lexists(target):
            _aside(target).rename(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        else:
            _aside(target).rename(target)
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(descriptor)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _place(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename `folder` to `target`; one that exists is exchanged for it in one step where the system can."""
    if overwrite and os.path.lexists(target):
        if not _exchange(folder, target):
            _exchange_in_steps(folder, target)
    else:
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _exists(target, "was made by something else in the meantime") from error
            raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """renameat2(RENAME_EXCHANGE), which Python does not offer; False where this system does not either."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(done == 0)


def _exchange_in_steps(folder: Path, target: Path) -> None:
    aside = _aside(target)
    target.rename(aside)
    try:
        folder.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(folder)


def _exists(target: Path, how: str) -> OutputError:
    return OutputError(
        f"The output {str(target)!r} {how}.",
        remedy="Say --overwrite to replace it, or give another place with -o.",
        path=str(target),
    )


def _output_error(target: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full: {str(target)!r} was not written, and nothing is left of it.",
            remedy="Free some space, or give a place on another disk with -o.",
            path=str(target),
        )
    # Not every error is about the output itself: a file to be copied into it may be unreadable.
    about = error.filename if isinstance(error.filename, str) and _prefix(target) not in error.filename else None
    return OutputError(
        f"{str(target)!r} cannot be written: {error.strerror or error}{f': {about!r}' if about else ''}.",
        remedy="Give a place that you may write to with -o.",
        path=str(target),
    )
