"""What a push would do: a folder checked, and compared with what the Hub holds. Nothing is sent from here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dora_serve.checkpoint import read_json
from dora_serve.errors import CheckpointError, HubError, PublishError
from dora_serve.hub import split_spec
from dora_serve.hub_errors import impossible_token
from dora_serve.progress import OnProgress, ignore_progress
from exporters.base_card import base_card_metadata, is_recorded_card
from exporters.card import Card, make_card, require_valid
from exporters.manifest import CARD_NAME, check_hashes, parse_record, recorded_files
from exporters.publishable import (
    WEIGHTS,
    Proof,
    files_to_publish,
    open_export,
    require_no_secret,
    require_no_secrets,
    require_proof,
)
from exporters.push_errors import not_logged_in
from exporters.record import RECORD_NAME, hash_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

State: TypeAlias = Literal["new", "changed", "there", "removed"]


@dataclass(frozen=True)
class PushRequest:
    """token: None for the one that `hf auth login` or HF_TOKEN gives; it is shown and written nowhere.

    public: of a repository that has to be made. revision: a branch, made where it is not there, or refs/pr/N.
    """

    folder: Path
    repo_id: str
    public: bool = False
    revision: str | None = None
    pull_request: bool = False
    unverified: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class CheckedFolder:
    """An export that agrees with its record and holds nothing else. hashes: sha256 of every file to publish but the
    card; sizes: bytes. written_card: README.md where somebody wrote one there, None where it is the base's or absent.
    """

    record: Mapping[str, Any]
    proof: Proof
    hashes: Mapping[str, str]
    sizes: Mapping[str, int]
    written_card: str | None
    base_card: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedFile:
    """state: against what the repository holds; `removed` for what an earlier export left there and this one lacks."""

    name: str
    nbytes: int
    sha256: str
    state: State


@dataclass(frozen=True)
class PushPlan:
    """exists, branch_exists: whether the repository and the branch do. private: of the repository, as it is or would
    be. parent: the commit that the branch is at.
    """

    request: PushRequest
    proof: Proof
    exists: bool
    branch_exists: bool
    private: bool
    parent: str | None
    files: tuple[PlannedFile, ...]
    card: Card
    notes: tuple[str, ...]

    @property
    def to_send(self) -> tuple[PlannedFile, ...]:
        return tuple(file for file in self.files if file.state in ("new", "changed"))

    @property
    def to_remove(self) -> tuple[PlannedFile, ...]:
        return tuple(file for file in self.files if file.state == "removed")

    def to_json(self) -> dict[str, object]:
        return {
            "repo_id": self.request.repo_id,
            "revision": self.request.revision,
            "pull_request": self.request.pull_request,
            "creates": not self.exists,
            "private": self.private,
            "proof": self.proof,
            "bytes_to_send": sum(file.nbytes for file in self.to_send),
            "files": [
                {"name": file.name, "bytes": file.nbytes, "sha256": file.sha256, "state": file.state}
                for file in self.files
            ],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Remote:
    """What the repository holds on the branch. files: by name; empty where there is no repository yet."""

    exists: bool = False
    branch_exists: bool = False
    private: bool | None = None
    commit: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)


# What git allows in no name of a branch (git check-ref-format).
_NO_REF = re.compile(r"[\x00-\x20~^:?*\[\\\x7f]|\.\.|@\{|//|/\.|^[./]|[./]$|\.lock(/|$)|^@$")


def require_target(repo_id: str, *, revision: str | None, pull_request: bool) -> None:
    """Raise HubError for a name that no repository can have, and for what does not go together."""
    named = split_spec(repo_id)
    if named is None or named.revision or named.subfolder:
        raise HubError(
            f"{repo_id!r} is no name of a repository: wanted user/name.",
            remedy="Write user/name; a branch is given with --revision.",
            repo_id=repo_id,
        )
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"The Hub allows no such name as {repo_id!r}.",
            remedy="Write user/name, of letters, digits, dots, - and _; it does not end in .git.",
            repo_id=repo_id,
        ) from error
    if revision is not None and _NO_REF.search(revision):
        raise HubError(
            f"{revision!r} is no name of a branch.",
            remedy="Write letters, digits, dots, -, _ and / between them; of a pull request, refs/pr/N.",
            revision=revision,
        )
    if pull_request and revision is not None:
        raise HubError(
            f"A pull request is against the main branch: got --pr and --revision {revision!r}.",
            remedy="Leave one of them away; to go on with a pull request that is there, say --revision refs/pr/N.",
            repo_id=repo_id,
        )


def token_of(request: PushRequest) -> str | None:
    """The token that a push sends, None where nobody is logged in."""
    from huggingface_hub import get_token

    return request.token or get_token()


def require_login(request: PushRequest) -> None:
    """Raise HubError where no token is at hand, or what is at hand cannot be one."""
    token = token_of(request)
    if not token:
        raise not_logged_in(request.repo_id)
    if not token.isascii():
        raise impossible_token()


def check_folder(request: PushRequest, on_progress: OnProgress = ignore_progress) -> CheckedFolder:
    """Raises PublishError for a folder that must not be published: not of an exporter, unproven, changed since, with
    files that do not belong or a secret in one; CheckpointError for a record that is corrupt.
    """
    folder = request.folder
    record = open_export(folder)
    proof = require_proof(folder, record, unverified=request.unverified)
    names = files_to_publish(folder, record)
    require_no_secrets(folder, names, token_of(request))
    report = check_hashes(folder, record, on_progress)
    if report.missing or report.changed:
        reasons = [reason for reason in report.failures if not reason.startswith(RECORD_NAME)]
        shown = "".join(f"\n  - {reason}" for reason in reasons[:12])
        raise PublishError(
            f"{str(folder)!r} is not what {RECORD_NAME} says was written and verified, and nothing was sent:{shown}\n",
            remedy="Merge again. What was changed on purpose is no longer what was proven.",
            path=str(folder),
            changed=list(report.changed),
            missing=list(report.missing),
        )
    others = [name for name in names if name not in report.hashes and name != CARD_NAME]
    hashes = dict(report.hashes) | hash_files([folder / name for name in others], root=folder)
    written = None
    if CARD_NAME in names and not is_recorded_card(folder, record):
        written = (folder / CARD_NAME).read_bytes().decode("utf-8", errors="replace")
    return CheckedFolder(
        record=record,
        proof=proof,
        hashes=dict(sorted(hashes.items())),
        sizes={name: (folder / name).stat().st_size for name in hashes},
        written_card=written,
        base_card=base_card_metadata(folder, record, request.token),
    )


def compare(request: PushRequest, checked: CheckedFolder, api: HfApi) -> PushPlan:
    """What of the folder the repository lacks, and the card that it would have.

    Raises what huggingface_hub raises where the Hub does not answer; PublishError for a card there that is not sound.
    """
    remote = _look_up(request, api)
    names = (*checked.hashes, CARD_NAME)
    existing = _content(request, api, remote, CARD_NAME)
    card = make_card(
        checked.record,
        repo_id=request.repo_id,
        revision=None if (request.revision or "").startswith("refs/pr/") else request.revision,
        files=names,
        config=read_json(request.folder),
        base_card=checked.base_card,
        existing=existing if existing is not None else checked.written_card,
    )
    require_valid(card.text)
    content = card.text.encode()
    token = token_of(request)
    require_no_secret(CARD_NAME, content, token.encode() if token else None)
    files = [
        PlannedFile(name, checked.sizes[name], digest, _state(remote.files.get(name), digest, request.folder / name))
        for name, digest in checked.hashes.items()
    ]
    digest = hashlib.sha256(content).hexdigest()
    files.append(PlannedFile(CARD_NAME, len(content), digest, _state(remote.files.get(CARD_NAME), digest, content)))
    superseded = _superseded(_content(request, api, remote, RECORD_NAME), remote, names)
    files += [PlannedFile(name, remote.files[name].size, "", "removed") for name in superseded]
    private = not request.public if remote.private is None else remote.private
    notes = [*card.notes, *_notes(request, checked, remote, existing, {*names, *superseded})]
    return PushPlan(
        request=request,
        proof=checked.proof,
        exists=remote.exists,
        branch_exists=remote.branch_exists,
        private=private,
        parent=remote.commit,
        files=tuple(files),
        card=card,
        notes=tuple(notes),
    )


def _look_up(request: PushRequest, api: HfApi) -> _Remote:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(request.repo_id)
    except RepositoryNotFoundError:
        return _Remote()
    commit = info.sha
    if request.revision is not None:
        try:
            commit = api.model_info(request.repo_id, revision=request.revision).sha
        except RevisionNotFoundError:
            # A branch that is made begins where the main one is.
            return _Remote(True, False, info.private, info.sha, _tree(request, api, info.sha))
    return _Remote(True, True, info.private, commit, _tree(request, api, commit))


def _tree(request: PushRequest, api: HfApi, commit: str | None) -> dict[str, RepoFile]:
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(api.list_repo_tree(request.repo_id, recursive=True, revision=commit))
    except EntryNotFoundError:  # a repository without any file
        return {}
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _content(request: PushRequest, api: HfApi, remote: _Remote, name: str) -> str | None:
    """A small file of the repository, None where it is not there."""
    if name not in remote.files:
        return None
    path = api.hf_hub_download(request.repo_id, name, revision=remote.commit)
    return Path(path).read_bytes().decode("utf-8", errors="replace")


def _state(remote: RepoFile | None, sha256: str, content: Path | bytes) -> State:
    if remote is None:
        return "new"
    if remote.lfs is not None:
        return "there" if remote.lfs.sha256 == sha256 else "changed"
    data = content if isinstance(content, bytes) else None
    if isinstance(content, Path) and content.stat().st_size == remote.size:
        data = content.read_bytes()
    if data is None or len(data) != remote.size:
        return "changed"
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return "there" if blob == remote.blob_id else "changed"


def _superseded(record: str | None, remote: _Remote, names: tuple[str, ...]) -> list[str]:
    """What an earlier export put there and this one has not: a shard or an index left behind would still be loaded."""
    if record is None:
        return []
    try:
        earlier = recorded_files(parse_record(record, RECORD_NAME))
    except CheckpointError:
        return []
    return sorted(name for name in earlier if name in remote.files and name not in names)


def _notes(
    request: PushRequest, checked: CheckedFolder, remote: _Remote, existing: str | None, known: set[str]
) -> list[str]:
    notes = []
    if existing is not None and checked.written_card not in (None, existing):
        notes.append(
            "The folder's own README.md is not sent: the repository's is kept, and its section brought up to date."
        )
    added = list(checked.record.get("added") or ())
    if added:
        notes.append(f"Added after the base was verified, and not proven by its card: {', '.join(added[:4])}.")
    others = [name for name in remote.files if name.endswith(WEIGHTS) and name not in known]
    if others:
        notes.append(f"The repository holds other weights, which are left as they are: {', '.join(others[:4])}.")
    if remote.exists and request.public and remote.private:
        notes.append("The repository is private already and stays so; it is opened in its settings.")
    return notes
