"""Publish an exported folder as a Hub repository: checked first, every file once, one commit.

Nothing is sent before the folder's hashes have been compared with its record and its files with what belongs, and
nothing that the repository holds already is sent at all. The card is made for the repository and is not written into
the folder, whose hashes stay true.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dora_serve.errors import HubError, PublishError
from dora_serve.progress import OnProgress, Progress, ignore_progress
from exporters.hub_upload import Destination, Upload, commit, quiet_hub
from exporters.manifest import CARD_NAME
from exporters.push_errors import request_of, retry_after, translate_push
from exporters.push_plan import PushPlan, PushRequest, check_folder, compare, require_login, require_target, token_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_Result = TypeVar("_Result")

_TRIES = 5
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 600.0
"""Seconds. What the Hub asks for beyond that is told to the user instead."""


@dataclass(frozen=True)
class Push:
    """What was done. commit: the one that holds the export now. pull_request: its address, where one was opened."""

    plan: PushPlan
    url: str
    commit: str
    commit_url: str
    pull_request: str | None

    def to_json(self) -> dict[str, object]:
        return {
            **self.plan.to_json(),
            "url": self.url,
            "commit": self.commit,
            "commit_url": self.commit_url,
            "pull_request_url": self.pull_request,
        }


def plan_push(request: PushRequest, on_progress: OnProgress = ignore_progress) -> PushPlan:
    """Everything before the first byte is sent. Raises PublishError, CheckpointError and HubError, as `push` does."""
    require_target(request.repo_id, revision=request.revision, pull_request=request.pull_request)
    checked = check_folder(request, on_progress)
    api = _api(request)
    return _patiently(request, lambda: compare(request, checked, api), on_progress)


def push(request: PushRequest, on_progress: OnProgress = ignore_progress) -> Push:
    """Plan, make the repository where it is not there, upload what it lacks, and commit all of it at once.

    A server that is busy is asked again, after the time that it names. Until the commit nothing can be seen in the
    repository, and what has arrived is not sent again by the next push.

    Raises PublishError for a folder that must not be published, CheckpointError for a record that is corrupt, HubError
    for whatever the Hub refuses.
    """
    require_target(request.repo_id, revision=request.revision, pull_request=request.pull_request)
    require_login(request)
    checked = check_folder(request, on_progress)
    api = _api(request)
    # The comparison is made anew on every try: whatever arrived at the last one is not sent again.
    return _patiently(request, lambda: _carry_out(api, compare(request, checked, api), on_progress), on_progress)


def require_writable(request: PushRequest, on_progress: OnProgress = ignore_progress) -> None:
    """Raise HubError for what is known to stop a push before there is a folder: no token, or one that is refused."""
    require_target(request.repo_id, revision=request.revision, pull_request=request.pull_request)
    require_login(request)
    api = _api(request)

    def look() -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            api.model_info(request.repo_id)
        except RepositoryNotFoundError:
            if request.pull_request:
                raise

    _patiently(request, look, on_progress)


def _carry_out(api: HfApi, plan: PushPlan, on_progress: OnProgress) -> Push:
    request = plan.request
    url = f"{api.endpoint}/{request.repo_id}"
    if plan.to_send:
        _validate_on_the_hub(plan.card.text)
    if not plan.exists:
        if request.pull_request:
            raise HubError(
                f"There is no {request.repo_id!r} on the Hub that this account may see, so there is nothing to open a "
                "pull request on.",
                remedy="Check the name, or leave --pr away to make it.",
                repo_id=request.repo_id,
            )
        api.create_repo(request.repo_id, private=plan.private, exist_ok=True)
    if request.revision is not None and not plan.branch_exists:
        if request.revision.startswith("refs/"):
            raise HubError(
                f"The Hub's {request.repo_id!r} has no {request.revision!r}.",
                remedy="Check the number of the pull request, or say --pr to open one.",
                repo_id=request.repo_id,
            )
        api.create_branch(request.repo_id, branch=request.revision, exist_ok=True)
    if not plan.to_send and not plan.to_remove:
        assert plan.parent is not None
        return Push(plan, url, plan.parent, f"{url}/commit/{plan.parent}", None)
    uploads = [
        Upload(
            file.name,
            plan.card.text.encode() if file.name == CARD_NAME else request.folder / file.name,
            file.nbytes,
            file.sha256,
        )
        for file in plan.to_send
    ]
    made = commit(
        api,
        Destination(request.repo_id, request.revision, request.pull_request, plan.parent),
        uploads,
        [file.name for file in plan.to_remove],
        _message(plan),
        f"By dora-export push; {plan.proof}.",
        on_progress,
    )
    return Push(plan, url, made.oid, made.commit_url, made.pr_url)


def _message(plan: PushPlan) -> str:
    names = [file.name for file in plan.to_send]
    if names == [CARD_NAME]:
        return "Bring the model card up to date"
    return "Publish a verified export" if plan.proof == "verified" else "Publish an export that is not verified"


def _api(request: PushRequest) -> HfApi:
    from huggingface_hub import HfApi

    class Api(HfApi):
        """create_commit asks for this where a server may not offer it; `_validate_on_the_hub` has done it by then."""

        def _validate_yaml(self, content: str, **_: Any) -> None:
            pass

    return Api(token=request.token, library_name="dora-serve")


def _validate_on_the_hub(card: str) -> None:
    """Have the server judge the card's metadata, where it does that. Raises PublishError where it does not like it."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    try:
        ModelCard(card).validate()
    except ValueError as error:
        raise PublishError(
            f"The Hub does not accept the metadata of the model card: {' '.join(str(error).split())[:500]}",
            remedy="Mend the part of README.md between the lines of ---, or take it out.",
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404, 405, 501):
            raise


def _patiently(request: PushRequest, work: Callable[[], _Result], on_progress: OnProgress) -> _Result:
    """Do it, again where the Hub is busy, and say in words why it cannot be done."""
    attempt = 0
    while True:
        attempt += 1
        try:
            with quiet_hub():
                return work()
        except Exception as error:
            wait = _wait(error, attempt, request)
            if wait is None:
                translated = translate_push(
                    error, repo_id=request.repo_id, revision=request.revision, token=token_of(request)
                )
                if translated is None:
                    raise
                raise translated from error
        on_progress(Progress(f"the Hub is busy: waiting {wait:.0f} s to go on with {request.repo_id}", 0, None, ""))
        time.sleep(wait)


def _wait(error: Exception, attempt: int, request: PushRequest) -> float | None:
    """Seconds until the next try, None where there is to be none."""
    asked = retry_after(error)
    if asked is None or attempt >= _TRIES or asked > _LONGEST_WAIT or not _only_once(error):
        return None
    if request.pull_request and not _certainly_not_done(error):
        return None  # a commit whose answer was lost has opened one already
    return asked + 1 if asked else _FIRST_WAIT * 2 ** (attempt - 1)


def _only_once(error: Exception) -> bool:
    """Whether huggingface_hub made the request only once; uploads, and what leads to them, it repeats by itself."""
    path = _path_of(error)
    return path.startswith("/api/") and "/preupload/" not in path


def _certainly_not_done(error: Exception) -> bool:
    status = error.response.status_code if hasattr(error, "response") else None
    return status == 429 or "/commit/" not in _path_of(error)


def _path_of(error: Exception) -> str:
    request = request_of(error)
    return str(request.url.path) if request is not None else ""
