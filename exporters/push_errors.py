"""What the Hub's refusals of a push mean to a user, and what mends them.

Of a request nothing gets into a message, since its headers hold the token; what the server says is shown without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dora_serve.errors import HubError
from dora_serve.hub_errors import translate

if TYPE_CHECKING:
    import httpx2

NOTHING_SENT_TWICE = "Run the same command again: what has arrived is not sent again."
LOGIN = "run `hf auth login` (or set HF_TOKEN) with a token that may write"
_NO_ROOM = re.compile(r"storage|quota|no space|space left|limit reached|exceed|your plan|billing", re.IGNORECASE)
_LFS_REFUSAL = re.compile(r"LFS batch API returned errors:\n.*?: `(.*)", re.DOTALL)


def retry_after(error: Exception) -> float | None:
    """Seconds after which a request may be made again, None where that would not help."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (409, 412):  # somebody committed in between
            return 0.0
        if status == 429 or (status >= 500 and status not in (501, 507)):
            return _stated_delay(error.response.headers)
        return None
    return 0.0 if isinstance(error, httpx2.TransportError) else None


def translate_push(error: BaseException, *, repo_id: str, revision: str | None, token: str | None) -> HubError | None:
    """The HubError for what stopped a push, None where it is none of the Hub's or the network's. No token is in it,
    nor in what it was raised from.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for link in _chain(error):
        _forget_token(link)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE forbids asking the Hub.", remedy="Unset it to push.", repo_id=repo_id)
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError):
            message, remedy = _refusal(link, repo_id, revision, token)
            return HubError(message, remedy=remedy, repo_id=repo_id, status=link.response.status_code)
        refused = _LFS_REFUSAL.match(str(link)) if isinstance(link, ValueError) else None
        if refused:
            words = redact(" ".join(refused[1].split()), token)
            return _no_room(repo_id, words) if _NO_ROOM.search(words) else _said(repo_id, words)
        found = translate(link, repo_id=repo_id, revision=revision) if isinstance(link, Exception) else None
        if found is not None:
            return HubError(f"The push to {repo_id!r} broke off. {_short(link, token)}", remedy=NOTHING_SENT_TWICE)
        if type(link).__module__.startswith("hf_xet"):
            return HubError(
                f"The Hub's storage (Xet) did not take the files of {repo_id!r}: {_short(link, token)}",
                remedy=f"{NOTHING_SENT_TWICE} Where Xet cannot be reached, HF_HUB_DISABLE_XET=1 sends them over HTTP.",
                repo_id=repo_id,
            )
    return None


def not_logged_in(repo_id: str) -> HubError:
    return HubError(
        f"Nobody is logged in here, and a push to {repo_id!r} needs a token.",
        remedy=f"Make one at https://huggingface.co/settings/tokens, then {LOGIN}.",
        repo_id=repo_id,
    )


def redact(text: str, token: str | None) -> str:
    """The text without the token, or what has the form of one."""
    if token:
        text = text.replace(token, "hf_***")
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)


def _refusal(error: Exception, repo_id: str, revision: str | None, token: str | None) -> tuple[str, str]:
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status, headers = error.response.status_code, error.response.headers
    said = headers.get("X-Error-Message") or error.server_message or ""
    words = redact(" ".join(said.split()), token).rstrip(".")
    quoted = f" (it says: {words})" if words else ""
    owner = repo_id.partition("/")[0]
    if words.startswith("Invalid credentials") or (status == 401 and not isinstance(error, errors.GatedRepoError)):
        if words.startswith("Invalid credentials") or "token" in words.lower():
            return "The Hub refused the token that this machine sent.", f"It may have expired or been revoked: {LOGIN}."
        return (
            f"The Hub has no {repo_id!r} that this account may write to{quoted}.",
            f"Check the name; {LOGIN}.",
        )
    if status in (402, 413, 507) or (status == 403 and _NO_ROOM.search(words)):
        room = _no_room(repo_id, words)
        return room.message, room.remedy or ""
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The Hub's {repo_id!r} has no branch {revision!r}.", "Give a branch, or refs/pr/N of a pull request."
    if status == 403:
        return (
            f"The Hub forbids this machine's account to write to {repo_id!r}{quoted}.",
            "Use a name of your own or of an organization that you may write for, or say --pr to offer it to "
            f"{owner!r} as a pull request. A token that may only read is refused as well: {LOGIN}.",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"The Hub has no {repo_id!r} that this machine's account may see{quoted}.", f"Check the name; {LOGIN}."
    if status in (409, 412):
        return (
            f"Somebody else writes to {repo_id!r} at the same time{quoted}.",
            f"Wait until they are done. {NOTHING_SENT_TWICE}",
        )
    if status == 429:
        delay = _stated_delay(headers)
        wait = f"Wait {delay:.0f} seconds, as it asks." if delay else "Wait some minutes."
        return f"The Hub gets too many requests from this account{quoted}.", f"{wait} {NOTHING_SENT_TWICE}"
    if status >= 500:
        return (
            f"The Hub answered {status} in the push to {repo_id!r}{quoted}.",
            f"Wait a little. {NOTHING_SENT_TWICE}",
        )
    return f"The Hub answered {status} to the push of {repo_id!r}{quoted}.", "Check the name and the account's rights."


def _no_room(repo_id: str, words: str) -> HubError:
    quoted = f" (it says: {words})" if words else ""
    return HubError(
        f"The Hub has no room for {repo_id!r} in this account{quoted}.",
        remedy="Delete what is not needed, push to another account, or enlarge its storage at "
        f"https://huggingface.co/settings/billing. {NOTHING_SENT_TWICE}",
        repo_id=repo_id,
    )


def _said(repo_id: str, words: str) -> HubError:
    return HubError(f"The Hub's storage refused files of {repo_id!r}: {words}.", remedy=NOTHING_SENT_TWICE)


def _stated_delay(headers: Mapping[str, str]) -> float:
    """Of Retry-After in seconds, or of the Hub's RateLimit header (`"api";r=0;t=55`); 0 where neither says."""
    text = headers.get("Retry-After") or ""
    if text.strip().isdigit():
        return float(text)
    limit = re.search(r";\s*t=(\d+)", headers.get("ratelimit") or headers.get("RateLimit") or "")
    return float(limit[1]) if limit else 0.0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, each once."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def request_of(error: BaseException) -> httpx2.Request | None:
    """The request that an error came of, where it keeps one."""
    return getattr(getattr(error, "response", None), "_request", None) or getattr(error, "_request", None)


def _forget_token(error: BaseException) -> None:
    """An error keeps the request that it came of, and the request its headers."""
    request = request_of(error)
    if request is not None:
        request.headers.pop("authorization", None)


def _short(error: BaseException, token: str | None) -> str:
    lines = str(error).strip().splitlines()
    return redact(f"{lines[0] if lines else type(error).__name__}".rstrip("."), token) + "."
