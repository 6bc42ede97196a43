"""Where a base or an adapter lies: a local folder, or a Hub repository fetched into the cache at one commit.

huggingface_hub does the transfers, so its cache, its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT,
HF_TOKEN) and its mirrors work as everywhere.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dora_serve.errors import AdapterError, CheckpointError, DoraServeError, HubError, no_such_path
from dora_serve.hub_errors import no_room, translate
from dora_serve.hub_files import What, choose_files, is_weights, require_plain_names
from dora_serve.progress import Meter, OnProgress, ignore_progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import tqdm

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_SPEC = re.compile(
    rf"(?P<repo_id>{_NAME}/{_NAME})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./+-]*))?(?::(?P<subfolder>[^\\]+))?"
)

Choose: TypeAlias = Callable[[Sequence[str], Callable[[str], str]], Iterable[str]]

# Seconds to wait for the Hub's first answer; huggingface_hub itself would wait for ever.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Located:
    """path: on this machine; in the Hub's cache it is a folder of links. spec: what the user said.

    repo_id, revision: the Hub repository and the commit that lies at `path`; None for a local path.
    """

    path: Path
    spec: str
    repo_id: str | None
    revision: str | None


@dataclass(frozen=True)
class HubSpec:
    """The parts of `user/name[@revision][:folder]`."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True)
class _Snapshot:
    """One commit and the sizes of its files in bytes.

    unreachable: why the Hub was not asked, None where it was. whole: whether `sizes` is all that the commit holds, or
    only what lies in the cache.
    """

    commit: str
    sizes: Mapping[str, int]
    unreachable: Exception | None = None
    whole: bool = True


def locate(spec: str, *, what: What, revision: str | None = None, on_progress: OnProgress = ignore_progress) -> Located:
    """Find a base or an adapter, fetching it from the Hub where it is not on this machine.

    spec: a path that exists here; else a Hub id as `user/name`, `user/name@revision` or `user/name@revision:folder`.
    What begins with `.`, `/` or `~` is only ever a path. revision: a branch, tag or commit, as after the `@`.

    A branch or tag is resolved to a commit first, and that commit is fetched: safetensors, configuration, tokenizer and
    licence, never a pickle. Without a network the commit that the cache knows under that name is used. on_progress is
    called from several threads, one at a time, with the bytes still to be fetched as its total, and not at all where
    everything is cached. A transfer that breaks is taken up again where it was (huggingface_hub tries five times); a
    later call fetches only the files that are not complete.

    Raises CheckpointError or AdapterError (as `what` says) where nothing lies at a path, or `spec` is neither a path
    nor a Hub id; CheckpointError for an index that is corrupt; HubError for all else on the way from the Hub.
    """
    error = CheckpointError if what == "base" else AdapterError
    path = os.path.expanduser(spec)
    if spec and os.path.exists(path):
        if revision is not None:
            raise error(
                f"The {what} {spec!r} is a path on this machine, and those have no revision: got {revision!r}.",
                remedy="Leave the revision away, or move the folder if the Hub's repository is meant.",
                spec=spec,
            )
        return Located(Path(path), spec, None, None)
    if spec.startswith((".", "/", "~")) or Path(spec).is_absolute():
        raise error(no_such_path(f"The {what}", Path(spec)), remedy="Check the path.", spec=spec)
    repository = split_spec(spec, revision)
    if repository is None:
        raise error(
            f"The {what} {spec!r} is not to be found: there is no folder {spec!r} here, and {spec!r} is not a Hub id "
            "(user/name, user/name@revision or user/name@revision:folder).",
            remedy="Check the path, or write the Hub id with its user, as in openai-community/gpt2.",
            spec=spec,
        )
    folder, file = split_file(repository)
    found = fetch(
        spec, folder, lambda names, read: choose_files(names, read, what, folder.repo_id, file=file), on_progress
    )
    return replace(found, path=found.path / file) if file else found


def fetch(spec: str, repository: HubSpec, choose: Choose, on_progress: OnProgress = ignore_progress) -> Located:
    """Bring files of a Hub repository into the cache, as `locate` does.

    choose: from the names in the repository's folder, and a function that reads a small file of it, to those that are
    wanted. Raises HubError, and what `choose` raises.
    """
    try:
        folder, commit = _fetch(repository, choose, on_progress)
    except Exception as problem:
        translated = translate(problem, repo_id=repository.repo_id, revision=repository.revision)
        if translated is None:
            raise
        raise translated from problem
    return Located(folder, spec, repository.repo_id, commit)


def split_file(repository: HubSpec) -> tuple[HubSpec, str | None]:
    """The folder that is meant, and the file of weights in it where one is named."""
    if repository.subfolder is None or not is_weights(repository.subfolder):
        return repository, None
    folder, _, file = repository.subfolder.rpartition("/")
    return replace(repository, subfolder=folder or None), file


def hub_repository(spec: str) -> str | None:
    """The repository (user/name) that `locate` would ask the Hub for, None for a path or what is no such name."""
    if not spec or spec.startswith((".", "/", "~")) or os.path.exists(os.path.expanduser(spec)):
        return None
    repository = split_spec(spec)
    return repository.repo_id if repository else None


def split_spec(spec: str, revision: str | None = None) -> HubSpec | None:
    """The Hub repository that `spec` names, None where it is no such name. Raises HubError for two revisions."""
    match = _HUB_SPEC.fullmatch(spec)
    if match is None:
        return None
    if revision is not None and match["revision"] not in (None, revision):
        raise HubError(
            f"{spec!r} names one revision, and {revision!r} was asked for besides: wanted one of them.",
            remedy="Leave one away.",
            spec=spec,
        )
    repo_id, revision, subfolder = match["repo_id"], match["revision"] or revision, match["subfolder"]
    # The Hub forbids these in names and git in revisions, and both become part of a path in the cache.
    if any(mark in repo_id for mark in ("--", "..")) or ".." in (revision or ""):
        return None
    if subfolder is not None and {"", ".", ".."} & set(subfolder.split("/")):
        return None
    return HubSpec(repo_id, revision, subfolder)


def _fetch(repository: HubSpec, choose: Choose, on_progress: OnProgress) -> tuple[Path, str]:
    """The folder in the cache and its commit, after what it lacks has been fetched."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    snapshot = _look_up(HfApi(library_name="dora-serve"), repository)
    require_plain_names(snapshot.sizes, repository.repo_id)
    try:
        wanted = _wanted(repository, snapshot, choose)
    except DoraServeError:
        if snapshot.whole or snapshot.unreachable is None:
            raise
        raise snapshot.unreachable from None
    cached = {name: try_to_load_from_cache(repository.repo_id, name, revision=snapshot.commit) for name in wanted}
    total = sum(snapshot.sizes[name] for name, found in cached.items() if not isinstance(found, str))
    if snapshot.unreachable is None:
        _require_room(total, repository.repo_id)
    meter = Meter(f"fetching {repository.repo_id}", total, on_progress)
    root = snapshot_download(
        repository.repo_id,
        revision=snapshot.commit,
        allow_patterns=[glob.escape(name) for name in wanted],
        local_files_only=snapshot.unreachable is not None,
        tqdm_class=_bar_class(meter.advance),
    )
    meter.finish()
    return Path(root, repository.subfolder or ""), snapshot.commit


def _look_up(api: HfApi, repository: HubSpec) -> _Snapshot:
    """Ask the Hub which commit is meant and what it holds; the cache, where the Hub does not answer."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionResolutionError

    commit = None
    with contextlib.suppress(RevisionResolutionError):
        commit = api.resolve_revision(repository.repo_id, revision=repository.revision, local_files_only=True).resolved
    try:
        info = api.model_info(repository.repo_id, revision=repository.revision, files_metadata=True, timeout=_PATIENCE)
    except (httpx2.TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        if commit is None or (isinstance(error, HfHubHTTPError) and error.response.status_code < 500):
            raise
        return _look_up_in_cache(repository.repo_id, commit, error)
    if info.sha is None:
        raise HubError(
            f"The Hub did not say which commit of {repository.repo_id!r} is meant.",
            remedy="Check HF_ENDPOINT, if it is set: it must speak the Hub's protocol.",
            repo_id=repository.repo_id,
        )
    if info.sha != commit:
        # Writes the commit down beside the name, for a later run without a network.
        with contextlib.suppress(RevisionResolutionError, httpx2.TransportError, HfHubHTTPError):
            api.resolve_revision(repository.repo_id, revision=repository.revision)
    return _Snapshot(info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})


def _look_up_in_cache(repo_id: str, commit: str, unreachable: Exception) -> _Snapshot:
    """What the commit holds as the cache knows it: the Hub's listing, else the files that lie there."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        listing = {file.path: file.size for file in get_cached_repo_tree(repo_id, revision=commit)}
        return _Snapshot(commit, listing, unreachable)
    except CachedRepoTreeNotFoundError:
        pass  # another program fetched it, file by file
    try:
        # No pattern: the folder, whatever lies in it.
        root = Path(snapshot_download(repo_id, revision=commit, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError:
        raise unreachable from None
    present = {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return _Snapshot(commit, present, unreachable, whole=False)


def _wanted(repository: HubSpec, snapshot: _Snapshot, choose: Choose) -> list[str]:
    """The files to fetch, named from the repository's top."""
    from huggingface_hub import hf_hub_download

    prefix = f"{repository.subfolder}/" if repository.subfolder else ""
    names = [name.removeprefix(prefix) for name in snapshot.sizes if name.startswith(prefix)]

    def read(name: str) -> str:
        path = hf_hub_download(
            repository.repo_id,
            prefix + name,
            revision=snapshot.commit,
            local_files_only=snapshot.unreachable is not None,
            tqdm_class=_bar_class(lambda _: None),
        )
        return Path(path).read_text(encoding="utf-8", errors="replace")

    return [prefix + name for name in dict.fromkeys(choose(names, read))]


def _require_room(total: int, repo_id: str) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if total > free:
        message, remedy = no_room(repo_id, f"got {free / 1e9:.2f} GB free, wanted {total / 1e9:.2f} GB")
        raise HubError(message, remedy=remedy, repo_id=repo_id)


def _bar_class(advance: Callable[[int], None]) -> type[tqdm]:
    """A progress bar that shows nothing and tells `advance` of the bytes that reached the disk."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of a snapshot's three bars this one counts bytes written; the others count bytes received, and files.
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._counts and n:
                advance(int(n))

    return Bar
