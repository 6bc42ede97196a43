"""Fetch what was published, and prove that it is what was written: every file against the hash in its record."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dora_serve.errors import CheckpointError, HubError, no_such_path
from dora_serve.hub import fetch, hub_repository, split_spec
from dora_serve.hub_files import choose_files
from dora_serve.progress import OnProgress, ignore_progress
from exporters.manifest import (
    CARD_NAME,
    NO_RECORD,
    HashReport,
    check_hashes,
    parse_record,
    read_record,
    recorded_files,
)
from exporters.publishable import Proof, proof_of
from exporters.record import RECORD_NAME


@dataclass(frozen=True)
class Pulled:
    """folder: on this machine, in the Hub's cache for a repository. repo_id, revision: None for a local folder.
    record: None where dora-export did not write it.
    """

    folder: Path
    repo_id: str | None
    revision: str | None
    record: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.repo_id else str(self.folder)


@dataclass(frozen=True)
class PulledReport:
    """hashes: of what was pulled, against its record. proof: what the record says of the export's own verification."""

    pulled: Pulled
    hashes: HashReport
    proof: Proof

    def to_json(self) -> dict[str, object]:
        return {
            "source": self.pulled.name,
            "folder": str(self.pulled.folder),
            "repo_id": self.pulled.repo_id,
            "revision": self.pulled.revision,
            "recorded_proof": self.proof,
            "hashes": self.hashes.to_json(),
        }


def pull(spec: str, on_progress: OnProgress = ignore_progress, *, any_model: bool = False) -> Pulled:
    """A folder of this machine, or of a Hub repository the files that its record names.

    any_model: without a record take the files of a model, whoever made it. Raises CheckpointError where there is no
    folder or the record is corrupt, HubError where the repository cannot be had or is no export.
    """
    repository = split_spec(spec) if hub_repository(spec) is not None else None
    if repository is None:
        folder = Path(spec).expanduser()
        if not folder.exists():
            raise CheckpointError(
                no_such_path("The merged folder", folder),
                remedy="Check the path, or write a Hub id as user/name.",
                path=str(folder),
            )
        return Pulled(folder, None, None, read_record(folder) if folder.is_dir() else None)

    def choose(names: Sequence[str], read: Callable[[str], str]) -> list[str]:
        if RECORD_NAME in names:
            listed = recorded_files(parse_record(read(RECORD_NAME), f"{spec}: {RECORD_NAME}"))
            # A file that is missing is told with the others, not by the download.
            return [name for name in dict.fromkeys([RECORD_NAME, *listed, CARD_NAME]) if name in names]
        if any_model:
            return choose_files(names, read, "base", repository.repo_id)
        raise HubError(
            f"The Hub's {spec!r} is not from here ({NO_RECORD}), so there are no hashes to hold it to.",
            remedy="Say which --adapter was merged into which --base: that proves any merged model.",
            repo_id=repository.repo_id,
        )

    found = fetch(spec, repository, choose, on_progress)
    return Pulled(found.path, found.repo_id, found.revision, read_record(found.path))


def check_pulled(pulled: Pulled, on_progress: OnProgress = ignore_progress) -> PulledReport:
    """Hash every file. Raises CheckpointError where there is no record to hold it to."""
    if pulled.record is None:
        raise CheckpointError(
            f"{pulled.name!r} is not from here ({NO_RECORD}), so there are no hashes to hold it to.",
            remedy="Say which --adapter was merged into which --base: that proves any merged model.",
            path=str(pulled.folder),
        )
    names = [path.relative_to(pulled.folder).as_posix() for path in pulled.folder.rglob("*") if path.is_file()]
    return PulledReport(
        pulled, check_hashes(pulled.folder, pulled.record, on_progress, names=names), proof_of(pulled.record)
    )


@contextlib.contextmanager
def without_links(pulled: Pulled) -> Iterator[Path]:
    """The folder with files in place of the cache's links: ONNX Runtime follows none from a graph to its weights."""
    if pulled.repo_id is None or not any(pulled.folder.glob("*.onnx")):
        yield pulled.folder
        return
    with TemporaryDirectory(prefix=".dora-export-", dir=pulled.folder.parent) as scratch:
        for path in pulled.folder.rglob("*"):
            if path.is_file():
                target = Path(scratch, path.relative_to(pulled.folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path.resolve(), target)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, target)
        yield Path(scratch)
