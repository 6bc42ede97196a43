"""`dora-export push`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve.console import name_argument, path_argument
from exporters.commands.shared import Commands, add_json, show_progress

if TYPE_CHECKING:
    from exporters.push_plan import PushRequest


def add(commands: Commands) -> None:
    parser = commands.add_parser("push", help="publish an exported folder on the Hub, with a card that proves it")
    parser.add_argument("folder", metavar="FOLDER", type=path_argument, help="what merge wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", type=name_argument, help="user/name; made where it is not there")
    parser.add_argument("--dry-run", action="store_true", help="list every file and what is there, and send nothing")
    add_publishing(parser)
    add_json(parser)
    parser.set_defaults(run=run, when_interrupted=lambda _: INTERRUPTED, misused=misused)


INTERRUPTED = "Interrupted: nothing was committed. Run the same command again: what has arrived is not sent again."


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """What `merge --push` takes as well."""
    parser.add_argument("--public", action="store_true", help="make the repository public; default: private")
    parser.add_argument(
        "--revision", type=name_argument, metavar="BRANCH", help="commit to it; made where it is missing"
    )
    parser.add_argument("--pr", action="store_true", help="open a pull request")
    parser.add_argument(
        "--unverified", action="store_true", help="publish what no verification proves; the card says so"
    )


def misused(options: argparse.Namespace) -> str | None:
    if options.pr and options.revision is not None:
        return "a pull request is against the main branch: give --pr or --revision, not both"
    return None


def request_of(options: argparse.Namespace, folder: Path, repo_id: str) -> PushRequest:
    """What `add_publishing`'s options ask for."""
    from exporters.push_plan import PushRequest

    return PushRequest(
        folder=folder,
        repo_id=repo_id,
        public=options.public,
        revision=options.revision,
        pull_request=options.pr,
        unverified=options.unverified,
    )


def run(options: argparse.Namespace) -> int:
    from exporters.hub import plan_push, push
    from exporters.push_report import plan_text, push_text

    request = request_of(options, options.folder, options.repo_id)
    with ExitStack() as stack:
        progress = show_progress(stack)
        if options.dry_run:
            plan = plan_push(request, progress)
            progress.clear()
            print(json.dumps({**plan.to_json(), "card": plan.card.text}, indent=2) if options.json else plan_text(plan))
            return 0
        done = push(request, progress)
    print(json.dumps(done.to_json(), indent=2) if options.json else push_text(done))
    return 0
