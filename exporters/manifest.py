"""What `dora_export.json` says of a folder's files, and whether the files still agree with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_serve.checkpoint import read_json
from dora_serve.errors import CheckpointError
from dora_serve.progress import OnProgress, ignore_progress
from exporters.record import RECORD_NAME, hash_files

CARD_NAME = "README.md"
"""Written anew for the Hub and by people afterwards, so it is not held to its hash."""

NO_RECORD = f"dora-export wrote no {RECORD_NAME} into it"


@dataclass(frozen=True)
class FileFacts:
    """sha256: None where the folder was written without verification."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class HashReport:
    """Of a folder against its record. hashes: sha256 by file, as it is now. matching: files with the recorded hash.
    unproven: of the recorded size, without a recorded hash. extra: files that the record does not name, which is no
    failure.
    """

    folder: Path
    hashes: Mapping[str, str]
    matching: tuple[str, ...]
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    unproven: tuple[str, ...]
    extra: tuple[str, ...]
    nbytes: int

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        found = [f"{name} is not there." for name in self.missing]
        found += [f"{name} is not what was written: its size or sha256 is another." for name in self.changed]
        if self.unproven:
            found.append(
                f"{RECORD_NAME} holds no hashes of {len(self.unproven)} files: the folder was written without "
                "verification."
            )
        return tuple(found)

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "matching": list(self.matching),
            "changed": list(self.changed),
            "missing": list(self.missing),
            "unproven": list(self.unproven),
            "extra": list(self.extra),
            "bytes": self.nbytes,
        }


def read_record(folder: Path) -> dict[str, Any] | None:
    """The contents of `dora_export.json`, None where there is none. Raises CheckpointError where it is corrupt."""
    if not (folder / RECORD_NAME).is_file():
        return None
    record = read_json(folder, RECORD_NAME)
    recorded_files(record, str(folder / RECORD_NAME))
    return record


def parse_record(text: str, source: str) -> dict[str, Any]:
    """As `read_record`, of a record that is no file in a folder. source: what to call it."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(source) from error
    if not isinstance(record, dict):
        raise _corrupt(source)
    recorded_files(record, source)
    return record


def recorded_files(record: Mapping[str, Any], source: str = RECORD_NAME) -> dict[str, FileFacts]:
    """The files that a record names, by their path in the folder, itself not among them.

    Raises CheckpointError for a record that is corrupt, or that names a file outside its folder.
    """
    try:
        files = {
            name: FileFacts(int(facts["bytes"]), str(facts["sha256"]) if facts["sha256"] else None)
            for name, facts in record["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _corrupt(source) from error
    for name in files:
        if not name or ".." in re.split(r"[/\\]", name) or name.startswith(("/", "\\")) or ":" in name:
            raise _corrupt(source)
    return files


def check_hashes(
    folder: Path, record: Mapping[str, Any], on_progress: OnProgress = ignore_progress, *, names: Sequence[str] = ()
) -> HashReport:
    """Hash every recorded file of the folder. names: what lies in the folder besides, for `extra`."""
    recorded = recorded_files(record)
    judged = {name: facts for name, facts in recorded.items() if name != CARD_NAME}
    present = {name: facts for name, facts in judged.items() if (folder / name).is_file()}
    hashes = hash_files([folder / name for name in present], on_progress, root=folder)
    sound, changed, unproven = [], [], []
    for name, facts in present.items():
        if (folder / name).stat().st_size != facts.nbytes or (facts.sha256 and hashes[name] != facts.sha256):
            changed.append(name)
        elif facts.sha256:
            sound.append(name)
        else:
            unproven.append(name)
    return HashReport(
        folder=folder,
        hashes=hashes,
        matching=tuple(sound),
        changed=tuple(changed),
        missing=tuple(name for name in judged if name not in present),
        unproven=tuple(unproven),
        extra=tuple(sorted(name for name in names if name not in {*recorded, RECORD_NAME, CARD_NAME})),
        nbytes=sum(facts.nbytes for facts in present.values()),
    )


def _corrupt(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source!r} is corrupt: wanted JSON whose `files` are names within the folder with bytes and sha256.",
        remedy="Write the folder again with dora-export merge.",
        path=source,
    )
