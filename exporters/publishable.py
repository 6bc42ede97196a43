"""Which files of a folder may be published: those that an exporter recorded, the card, licences and pictures.

Everything else is refused rather than left out: what lies in an exported folder and is not of the export was put there
by something that the user may not have noticed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dora_serve.errors import PublishError, no_such_path
from exporters.manifest import CARD_NAME, NO_RECORD, read_record, recorded_files
from exporters.record import RECORD_NAME

Proof: TypeAlias = Literal["verified", "unverified", "failed"]

FAILED_SUFFIX = ".FAILED-VERIFICATION"
_DOCUMENTS = (
    *("*.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", ".gitattributes"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),
)
# By name, in the order in which they are tried: what a file is that was not recorded.
_STRANGERS: Mapping[str, tuple[str, ...]] = {
    "a secret, by its name": (
        *(".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", ".git-credentials"),
        *("token", "token.*", "tokens", "stored_tokens", "*_token", "*_token.*", "credentials*", "secrets*"),
    ),
    "a partial output": ("*.partial*", "*.incomplete", "*.tmp", "*.part", "*.lock", "*.crdownload", "*~", "*.swp"),
}
_CACHES = frozenset({".cache", "__pycache__", ".git", ".locks", ".ipynb_checkpoints", ".huggingface", "wandb", "runs"})
WEIGHTS = (".safetensors", ".onnx", ".onnx.data", ".onnx_data", ".bin", ".data")
_SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bgh[opsur]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{36,}"
    rb"|\bglpat-[\w-]{20,}|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{20,}|\bsk-[A-Za-z0-9_-]{32,}"
)
"""Of Hugging Face, GitHub, GitLab, Amazon, Slack, and of those who begin theirs with sk-; and private keys."""
_MOST_SEARCHED = 64 << 20


def open_export(folder: Path) -> dict[str, Any]:
    """The record of a folder that an exporter wrote.

    Raises PublishError for what is no such folder, or is one that failed or was never finished; CheckpointError for a
    record that is corrupt.
    """
    name = folder.resolve().name
    if not folder.is_dir():
        raise PublishError(no_such_path("The folder", folder), remedy="Check the path.", path=str(folder))
    if name.endswith(FAILED_SUFFIX):
        raise PublishError(
            f"{str(folder)!r} failed its verification: wanted a folder that passed.",
            remedy="It was kept to be looked at. Mend the cause and merge again.",
            path=str(folder),
        )
    if re.match(r"\..*\.(partial-|replaced)", name):
        raise PublishError(
            f"{str(folder)!r} is what a merge that broke off left behind: wanted a whole folder.",
            remedy="Merge again; the next merge to the same place clears it away.",
            path=str(folder),
        )
    record = read_record(folder)
    if record is None:
        raise PublishError(
            f"{str(folder)!r} is not from here ({NO_RECORD}), so nothing says what it holds.",
            remedy="Make it with dora-export merge; any other folder is published with `hf upload`.",
            path=str(folder),
        )
    return record


def proof_of(record: Mapping[str, Any]) -> Proof:
    """What an export's own verification came to."""
    verification = record.get("verification")
    if record.get("failures") or (isinstance(verification, Mapping) and verification.get("passed") is not True):
        return "failed"
    return "verified" if isinstance(verification, Mapping) else "unverified"


def require_proof(folder: Path, record: Mapping[str, Any], *, unverified: bool) -> Proof:
    """Raise PublishError for a folder that is not verified, unless the user said that it need not be."""
    proof = proof_of(record)
    if proof == "verified" or unverified:
        return proof
    got = "failed its verification" if proof == "failed" else "was written without verification"
    raise PublishError(
        f"{str(folder)!r} {got}: wanted one that passed.",
        remedy="Merge it without --no-verify, or say --unverified: then the card says that nothing proves it.",
        path=str(folder),
    )


def files_to_publish(folder: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The files that belong, by their path in the folder. Raises PublishError that names all that do not."""
    recorded = recorded_files(record)
    belonging, strangers = [], {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if (kind := _not_a_file(path)) is not None:
            strangers[ascii(name)[1:-1]] = kind
        elif name in recorded or name in (RECORD_NAME, CARD_NAME):
            belonging.append(name)
        elif (reason := _stranger(path.relative_to(folder))) is not None:
            strangers[name] = reason
        else:
            belonging.append(name)
    if strangers:
        shown = "".join(f"\n  - {name}: {reason}" for name, reason in list(strangers.items())[:12])
        more = f"\n  - and {len(strangers) - 12} more" if len(strangers) > 12 else ""
        raise PublishError(
            f"{str(folder)!r} holds files that are not of the export, and nothing was sent:{shown}{more}\n",
            remedy=f"Move them away. What belongs is what {RECORD_NAME} names, the card, licences and pictures.",
            path=str(folder),
            files=list(strangers),
        )
    return tuple(belonging)


def require_no_secrets(folder: Path, names: tuple[str, ...], token: str | None) -> None:
    """Raise PublishError where a file that is not weights holds an access token or a private key."""
    known = token.encode() if token else None
    for name in names:
        path = folder / name
        if name.endswith(WEIGHTS) or path.stat().st_size > _MOST_SEARCHED:
            continue
        require_no_secret(name, path.read_bytes(), known)


def require_no_secret(name: str, content: bytes, token: bytes | None) -> None:
    """As `require_no_secrets`, of one text."""
    if _SECRETS.search(content) or (token and token in content):
        raise PublishError(
            f"{name!r} holds an access token or a private key, and nothing was sent.",
            remedy="Take it out of the file. If the file was ever shared, revoke what stood in it.",
            name=name,
        )


def _not_a_file(path: Path) -> str | None:
    """What it is, unless it is a file of the folder's own with a name that is text."""
    if path.is_symlink():
        return "a link, to what may lie outside the folder"
    if not path.is_file():
        return "neither a file nor a folder"
    try:
        path.name.encode()
    except UnicodeEncodeError:
        return "a name that is no Unicode text"
    return None


def _stranger(relative: Path) -> str | None:
    """What an unrecorded file is, None where it belongs all the same."""
    if _CACHES & set(relative.parts):
        return "a cache"
    lower = relative.name.lower()
    for reason, patterns in _STRANGERS.items():
        if any(fnmatch.fnmatchcase(lower, pattern) for pattern in patterns):
            return reason
    if any(fnmatch.fnmatchcase(lower, pattern.lower()) for pattern in _DOCUMENTS) and not any(
        part.startswith(".") for part in relative.parts[:-1]
    ):
        return None
    if any(part.startswith(".") for part in relative.parts):
        return "hidden"
    return f"{RECORD_NAME} does not name it"
