"""What a push would do, and what it did, in words."""

from __future__ import annotations

from dora_serve.terminal import format_bytes, format_table
from exporters.hub import Push
from exporters.push_plan import PushPlan

_STATES = {"new": "to be sent", "changed": "to be sent anew", "there": "there already", "removed": "to be removed"}


def plan_text(plan: PushPlan) -> str:
    """Every file with its size, its sha256 and what is there, for --dry-run."""
    rows = [[file.name, format_bytes(file.nbytes), file.sha256, _STATES[file.state]] for file in plan.files]
    lines = [_target(plan), "", format_table(rows, ("file", "size", "sha256", "on the Hub")), "", _amount(plan)]
    return "\n".join([*lines, *_notes(plan), "Nothing was sent (--dry-run)."])


def push_text(done: Push) -> str:
    """What was sent and where it is."""
    plan = done.plan
    lines = [_amount(plan, past=True), *_notes(plan)]
    if done.pull_request:
        return "\n".join([*lines, f"Pull request: {done.pull_request}", f"Commit: {done.commit}"])
    seen = "private" if plan.private else "public"
    if not plan.to_send and not plan.to_remove:
        return "\n".join([*lines, f"{done.url} ({seen}) holds all of it already, at {done.commit}"])
    branch = f", branch {plan.request.revision}" if plan.request.revision else ""
    return "\n".join([*lines, f"Published at {done.url} ({seen}{branch})", f"Commit: {done.commit}"])


def _target(plan: PushPlan) -> str:
    seen = "private" if plan.private else "public"
    name, revision = plan.request.repo_id, plan.request.revision
    if not plan.exists:
        return f"{name} would be made, {seen}" + (f", with the branch {revision}" if revision else "")
    if plan.request.pull_request:
        return f"A pull request would be opened on {name} ({seen})"
    branch = f", branch {revision}" + ("" if plan.branch_exists else ", which would be made") if revision else ""
    return f"{name} is there ({seen}){branch}"


def _amount(plan: PushPlan, *, past: bool = False) -> str:
    sent = sum(file.nbytes for file in plan.to_send)
    there = sum(file.state == "there" for file in plan.files)
    removed = f", {len(plan.to_remove)} of an earlier export removed" if plan.to_remove else ""
    verb = "sent" if past else "to send"
    files = "file" if len(plan.to_send) == 1 else "files"
    return f"{len(plan.to_send)} {files} {verb} ({format_bytes(sent)}), {there} there already{removed}"


def _notes(plan: PushPlan) -> list[str]:
    notes = [f"Note: {note}" for note in plan.notes]
    if plan.proof != "verified":
        how = "failed its verification" if plan.proof == "failed" else "was not verified"
        notes.append(f"NOT PROVEN: this export {how} (--unverified), and the card says so.")
    return notes
