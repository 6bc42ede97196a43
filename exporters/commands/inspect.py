"""`dora-export inspect`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

from dora_serve.console import EXIT_FAILED, name_argument, path_argument, read_options
from exporters.commands.shared import Commands, add_reading_and_json, show_progress


def add(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="show what an adapter is, and whether it fits a base")
    parser.add_argument("adapter", type=name_argument, metavar="ADAPTER", help="folder or Hub id")
    parser.add_argument("--base", type=name_argument, help="folder or Hub id: also show what a merge into it would do")
    parser.add_argument(
        "--decompose",
        action="store_true",
        help="how far magnitudes and directions move (DoRA paper, 3.2); needs --base",
    )
    parser.add_argument(
        "--plot", type=path_argument, metavar="FILE", help="draw that into a .png, .svg or .pdf; needs --base"
    )
    add_reading_and_json(parser)
    parser.set_defaults(run=run, misused=misused)


def misused(options: argparse.Namespace) -> str | None:
    if options.base is None and (options.decompose or options.plot):
        return "what an adapter changes is told against a base: name it with --base"
    return None


def run(options: argparse.Namespace) -> int:
    from dora_serve.decomposition_plot import require_drawing, save_plot
    from exporters.inspect import inspect
    from exporters.report import inspection_text

    with ExitStack() as stack:
        if options.plot is not None:
            require_drawing(options.plot)
        inspection = inspect(
            options.adapter,
            options.base,
            read_options(options),
            show_progress(stack),
            with_decomposition=options.decompose or options.plot is not None,
        )
        if options.plot is not None and inspection.decomposition is not None:
            save_plot({Path(inspection.source).name: inspection.decomposition}, options.plot)
    print(json.dumps(inspection.to_json(), indent=2) if options.json else inspection_text(inspection))
    return 0 if not inspection.problems else EXIT_FAILED
