"""`dora-export verify`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from dora_serve.console import EXIT_FAILED, name_argument, path_argument, read_options
from exporters.commands.shared import Commands, add_reading_and_json, add_verification, show_progress


def add(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="check a merged folder, whoever made it, against base and adapter")
    parser.add_argument("merged", metavar="MERGED", type=path_argument, help="the merged model's folder")
    parser.add_argument(
        "--adapter", required=True, type=name_argument, help="the adapter that was merged: folder or Hub id"
    )
    parser.add_argument(
        "--base", required=True, type=name_argument, help="the base that it was merged into: folder or Hub id"
    )
    add_verification(parser)
    add_reading_and_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dora_serve.devices import require_device
    from dora_serve.forward_check import ForwardOptions
    from exporters.report import folder_text
    from exporters.sources import open_sources
    from exporters.verify_folder import require_merged_folder, verify_folder

    require_device(options.device)
    require_merged_folder(options.merged, adapter=options.adapter, base=options.base)
    with ExitStack() as stack:
        progress = show_progress(stack)
        sources = open_sources(options.adapter, options.base, read_options(options), progress)
        device = None if options.device == "auto" else options.device
        forward = ForwardOptions(options.reference, options.prompts, device)
        report = verify_folder(options.merged, sources, forward, progress)
    print(json.dumps(report.to_json(), indent=2) if options.json else folder_text(report))
    return 0 if report.passed else EXIT_FAILED
