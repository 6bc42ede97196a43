"""`dora_export.json`: what was merged into what, by which command, and what the verification found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve import __version__
from dora_serve.adapter import Adapter
from dora_serve.hub import Located
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, Progress, ignore_progress

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORD_NAME = "dora_export.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Provenance:
    """Where the inputs came from. base_hashes is None where nothing read the whole base (an unverified merge)."""

    base: Located
    adapter: Located
    command: tuple[str, ...]
    adapter_hashes: Mapping[str, str]
    base_hashes: Mapping[str, str] | None = None


def hash_files(
    paths: Iterable[Path], on_progress: OnProgress = ignore_progress, *, root: Path | None = None
) -> dict[str, str]:
    """sha256 of each file, by its path from `root`, or by its name alone. Two at a time: hashing leaves the
    interpreter's lock.
    """
    files = list(paths)
    total, done = sum(path.stat().st_size for path in files), 0

    def digest(path: Path) -> str:
        nonlocal done
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
                done += len(chunk)
                on_progress(Progress("hashing", done, total))
        return sha.hexdigest()

    with ThreadPoolExecutor(2) as pool:
        names = (path.relative_to(root).as_posix() if root else path.name for path in files)
        return dict(zip(names, pool.map(digest, files), strict=True))


def safetensors_metadata(plan: MergePlan, provenance: Provenance) -> dict[str, str]:
    """The short form, for the header of every weights file; values are strings, as the format has it."""
    first = next(iter(plan.base.files.values()), None)
    kept = dict(first.metadata) if first else {}
    return {
        **kept,
        "format": kept.get("format", "pt"),
        "dora_serve_version": __version__,
        "merged_base": _label(provenance.base),
        "merged_base_sha256": json.dumps(provenance.base_hashes) if provenance.base_hashes else "not computed",
        "merged_adapter": _label(provenance.adapter),
        "merged_adapter_sha256": json.dumps(dict(provenance.adapter_hashes)),
        "merged_method": plan.adapter.method,
        "merged_dtypes": json.dumps(plan.summary()["dtypes"]),
        "merged_command": " ".join(provenance.command),
    }


def verified_metadata(plan: MergePlan, provenance: Provenance, verdict: str) -> dict[str, str]:
    """The same, with what the verification found."""
    return safetensors_metadata(plan, provenance) | {"merged_verification": verdict}


def record(
    plan: MergePlan | PipelinePlan,
    provenance: Provenance,
    *,
    exporter: str,
    output_hashes: Mapping[str, str] | None,
    sizes: Mapping[str, int],
    verification: Mapping[str, object] | None,
    artifacts: Mapping[str, object],
) -> dict[str, object]:
    """The whole record as plain values."""
    summary = plan.summary()
    return {
        "tool": "dora-serve",
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(provenance.command),
        "exporter": exporter,
        "base": _source(provenance.base, provenance.base_hashes),
        "adapter": {
            **_source(provenance.adapter, provenance.adapter_hashes),
            "format": plan.adapter.format,
            "method": plan.adapter.method,
            "trained_on": plan.adapter.base,
        },
        "dtypes": summary["dtypes"],
        "actions": summary["actions"],
        "quantization": summary["quantization"],
        "config_changes": summary["config_changes"],
        "untied": summary["untied"],
        "notes": summary["notes"],
        "files": {
            name: {"bytes": size, "sha256": output_hashes.get(name) if output_hashes else None}
            for name, size in sizes.items()
        },
        "verification": verification,
        **artifacts,
    }


def adapter_record(
    located: Located,
    adapter: Adapter,
    command: tuple[str, ...],
    adapter_hashes: Mapping[str, str],
    written: DataclassInstance,
    output_hashes: Mapping[str, str],
) -> dict[str, object]:
    """The record of one adapter file for a base that was exported before, as plain values."""
    return {
        "tool": "dora-serve",
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "exporter": "onnx-adapter",
        "adapter": {**_source(located, adapter_hashes), "format": adapter.format, "method": adapter.method},
        "notes": list(adapter.notes),
        "files": dict(output_hashes),
        "onnx_adapter": asdict(written),
    }


def add_to_record(folder: Path, values: Mapping[str, object], file: Path, facts: Mapping[str, object]) -> None:
    """Let the record of a folder, which is `values`, also tell of a file that was added: among its files, and whole in
    `added`. facts: of `adapter_record`.
    """
    name = file.relative_to(folder).as_posix()
    files, added = values.get("files"), values.get("added")
    hashes = facts["files"]
    assert isinstance(files, dict)
    assert isinstance(hashes, dict)
    entry = {"bytes": file.stat().st_size, "sha256": hashes[file.name]}
    others = {key: value for key, value in added.items() if key != name} if isinstance(added, dict) else {}
    fresh = folder / f".{RECORD_NAME}.new"
    changed = {**values, "files": {**files, name: entry}, "added": {**others, name: dict(facts)}}
    fresh.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, folder / RECORD_NAME)


def conversion_record(
    located: Located, adapter: Adapter, to: str, command: tuple[str, ...], notes: Iterable[str], written: Iterable[Path]
) -> dict[str, object]:
    """The record of an adapter in another format, as plain values. written: its files, all in one folder."""
    files = list(written)
    hashes = hash_files(files)
    return {
        "tool": "dora-serve",
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "exporter": "convert",
        "converted_to": to,
        "adapter": {
            **_source(located, hash_files(adapter.files)),
            "format": adapter.format,
            "method": adapter.method,
            "trained_on": adapter.base,
        },
        "notes": list(notes),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": hashes[path.name]} for path in files},
        "verification": None,
    }


def write_record(folder: Path, values: Mapping[str, object]) -> None:
    (folder / RECORD_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _label(located: Located) -> str:
    return f"{located.repo_id}@{located.revision}" if located.repo_id else located.spec


def _source(located: Located, hashes: Mapping[str, str] | None) -> dict[str, object]:
    return {
        "id": located.repo_id or located.spec,
        "path": None if located.repo_id else str(located.path.resolve()),
        "revision": located.revision,
        "sha256": dict(hashes) if hashes else None,
    }
