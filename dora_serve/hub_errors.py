"""What huggingface_hub's errors mean to a user, and what mends them.

Nothing of a request gets into a message: its headers hold the token.
"""

from __future__ import annotations

import errno

from dora_serve.errors import HubError

_LOGIN = "run `hf auth login` (or set HF_TOKEN) and try again"
_AGAIN = "Run the same command again: files that are complete are kept."


def translate(error: Exception, *, repo_id: str, revision: str | None) -> HubError | None:
    """The HubError for an error of huggingface_hub or of the system below it, None where it is not one of theirs."""
    import httpx2
    from huggingface_hub import errors

    found: tuple[str, str] | None = None
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return translate(error.__cause__, repo_id=repo_id, revision=revision)
    if isinstance(error, errors.RevisionNotFoundError):
        found = (
            f"The Hub's {repo_id!r} has no revision {revision!r}.",
            "Check the branch, tag or commit; without one, the newest is taken.",
        )
    elif isinstance(error, errors.HfHubHTTPError):
        found = _refusal(error, repo_id)
    elif isinstance(error, errors.LocalEntryNotFoundError):
        found = f"The Hub cannot be reached, and only a part of {repo_id!r} is in its cache here.", _AGAIN
    elif isinstance(error, errors.OfflineModeIsEnabled):
        found = (
            f"There is no folder {repo_id!r} here, the Hub's cache does not hold it whole, and HF_HUB_OFFLINE forbids "
            "asking the Hub.",
            "Unset HF_HUB_OFFLINE, or give a folder on this machine.",
        )
    elif isinstance(error, UnicodeEncodeError):  # of the header that would hold the token
        return impossible_token()
    elif isinstance(error, httpx2.TransportError):
        found = (
            f"There is no folder {repo_id!r} here, the Hub's cache does not hold it whole, and the Hub cannot be "
            f"reached ({_reason(error)}).",
            f"Check the network. {_AGAIN} Without a network, give a folder on this machine.",
        )
    elif isinstance(error, errors.HFValidationError):
        found = f"The Hub allows no such name as {repo_id!r}.", "Write user/name."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        found = no_room(repo_id, _reason(error))
    elif isinstance(error, OSError):
        found = f"{repo_id!r} could not be brought into the Hub's cache here ({_reason(error)}).", _AGAIN
    if found is None:
        return None
    return HubError(found[0], remedy=found[1], repo_id=repo_id, revision=revision)


def impossible_token() -> HubError:
    return HubError(
        "The token that this machine holds for the Hub has characters that no token has.",
        remedy="Run `hf auth login` (or set HF_TOKEN) and try again.",
    )


def no_room(repo_id: str, detail: str) -> tuple[str, str]:
    """Message and remedy for a full disk."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"The disk has no room for {repo_id!r} in the Hub's cache at {HF_HUB_CACHE!r}: {detail}.",
        "Free some space, or set HF_HOME to a folder on a larger disk.",
    )


def _refusal(error: Exception, repo_id: str) -> tuple[str, str]:
    """The Hub answered, and the answer was no."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    assert isinstance(error, errors.HfHubHTTPError)
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        site = ENDPOINT.split("://")[0] + "://" + ENDPOINT.split("://")[-1].rpartition("@")[2]
        return (
            f"The Hub gives {repo_id!r} only to those who accepted its terms; this machine's account has not, or is "
            "not logged in.",
            f"Accept them at {site}/{repo_id}, then {_LOGIN}.",
        )
    if error.response.headers.get("X-Error-Message") == "Invalid credentials in Authorization header":
        return "The Hub refused the token that this machine sent.", f"It may have expired: {_LOGIN}."
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"There is no folder {repo_id!r} here, and the Hub has no model {repo_id!r} that this machine may see.",
            f"Check the spelling. If it is private, {_LOGIN}.",
        )
    if status == 403:
        return f"The Hub forbids this machine's account to read {repo_id!r}.", f"Ask its owner, then {_LOGIN}."
    if status == 429:
        return "The Hub gets too many requests from here.", f"Wait some minutes, or {_LOGIN}."
    return f"The Hub answered {status} for {repo_id!r}.", "Try again later, or give a folder on this machine."


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
