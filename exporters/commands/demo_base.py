"""`dora-export demo-base`."""

from __future__ import annotations

import argparse
import json
import sys

from dora_serve.console import path_argument
from exporters.commands.shared import Commands, add_json


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo-base", help="make a small real base model (SmolLM2-135M-Instruct) from a package"
    )
    parser.add_argument("folder", metavar="DIR", type=path_argument)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dora_serve.demo_base import make_demo_base

    def say(stage: str) -> None:
        if sys.stderr.isatty():
            print(stage, file=sys.stderr)

    folder = make_demo_base(options.folder, on_progress=say)
    print(json.dumps({"folder": str(folder)}) if options.json else f"SmolLM2-135M-Instruct is in {folder}")
    return 0
