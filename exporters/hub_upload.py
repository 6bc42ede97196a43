"""Bytes into a Hub repository, through huggingface_hub as it is: whole files once, in one commit at the end.

Large files go over the Hub's Xet storage where the server offers it, else over git LFS. Both keep what has arrived
before there is a commit, so a push that broke off sends no finished file again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dora_serve.progress import Meter, OnProgress

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

_Result = TypeVar("_Result")
_GRACE = 2.0
"""Seconds that an interrupted upload has to end in."""


@dataclass(frozen=True)
class Upload:
    """path: of the file, or its content. sha256: of it, as it was checked."""

    name: str
    content: Path | bytes
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Destination:
    """revision: a branch or refs/pr/N, None for the default branch. parent: the commit that the branch is at."""

    repo_id: str
    revision: str | None
    pull_request: bool
    parent: str | None


def commit(
    api: HfApi,
    destination: Destination,
    uploads: Sequence[Upload],
    deletions: Sequence[str],
    message: str,
    description: str,
    on_progress: OnProgress,
) -> CommitInfo:
    """Upload and commit. Raises what huggingface_hub raises; nothing is visible before the commit."""
    from huggingface_hub import CommitOperationDelete

    stop = threading.Event()
    total = sum(upload.nbytes for upload in uploads)
    meter = Meter(f"uploading to {destination.repo_id}", total, on_progress)
    with contextlib.ExitStack() as files:
        over_xet = _offers_xet(api, destination)
        operations = {
            upload.name: _by_path(upload) if over_xet else _counted(upload, files, meter, stop) for upload in uploads
        }
        # One of each content: an operation's file is read from one thread alone.
        distinct = {upload.sha256: operations[upload.name] for upload in uploads}

        def send() -> CommitInfo:
            with quiet_hub():
                api.preupload_lfs_files(
                    destination.repo_id,
                    distinct.values(),
                    revision=destination.revision,
                    create_pr=destination.pull_request,
                    free_memory=False,
                )
                return api.create_commit(
                    destination.repo_id,
                    [*operations.values(), *(CommitOperationDelete(name) for name in deletions)],
                    commit_message=message,
                    commit_description=description,
                    revision=destination.revision,
                    create_pr=destination.pull_request,
                    parent_commit=destination.parent,
                )

        info = _interruptible(send, stop)
        meter.finish()
        return info


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub's bars and warnings off the terminal: what they say comes as progress or as an error."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown, verbosity = not are_progress_bars_disabled(), get_verbosity()
    set_verbosity(max(verbosity, logging.ERROR))
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


def _offers_xet(api: HfApi, destination: Destination) -> bool:
    """Whether large files may go over Xet: huggingface_hub would try nothing else where hf_xet is installed.

    The answer holds a token for the storage, which is not looked at.
    """
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.constants import HF_HUB_DISABLE_XET
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
        return False
    revision = (destination.revision or "main").replace("/", "%2F")
    answer = get_session().get(
        f"{api.endpoint}/api/models/{destination.repo_id}/xet-write-token/{revision}",
        headers=build_hf_headers(token=api.token),
        params={"create_pr": "1"} if destination.pull_request else None,
    )
    if answer.status_code in (401, 403, 429, 500, 502, 503, 504):
        hf_raise_for_status(answer)
    return answer.status_code == 200 and "X-Xet-Cas-Url" in answer.headers


def _by_path(upload: Upload) -> CommitOperationAdd:
    """An operation that huggingface_hub opens the file of, as Xet wants it."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(upload.name, upload.content)
    operation.upload_info.sha256 = bytes.fromhex(upload.sha256)  # or it would be read once more
    return operation


def _counted(upload: Upload, files: contextlib.ExitStack, meter: Meter, stop: threading.Event) -> CommitOperationAdd:
    """An operation whose file tells how far it has been read: huggingface_hub sends an open file over HTTP."""
    operation = _by_path(upload)
    if isinstance(upload.content, Path):
        operation.path_or_fileobj = files.enter_context(_CountedFile(upload.content, meter, stop))
    return operation


class _CountedFile(io.BufferedReader):
    """A file that reports its reads, backwards too where a transfer starts over, and ends when it is told to."""

    def __init__(self, path: Path, meter: Meter, stop: threading.Event) -> None:
        super().__init__(io.FileIO(path))
        self._meter, self._stop, self._counted = meter, stop, 0

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stop.is_set():
            raise UploadStopped("the upload was given up")
        data = super().read(size)
        position = self.tell()
        self._meter.advance(position - self._counted)
        self._counted = position
        return data


class UploadStopped(Exception):
    """In the threads of an upload that nobody waits for any more."""


def _interruptible(work: Callable[[], _Result], stop: threading.Event) -> _Result:
    """Run in another thread, so that Ctrl-C need not wait for the files under way."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="hub-upload")
    thread.start()
    try:
        thread.join()
    except BaseException:
        stop.set()
        thread.join(_GRACE)
        raise
    if errors:
        raise errors[0]
    return results[0]
