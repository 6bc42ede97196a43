"""`dora-export onnx-adapter`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from dora_serve.console import name_argument, path_argument, read_options
from exporters.commands.shared import Commands, add_reading_and_json, show_progress


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "onnx-adapter", help="make an adapter file for a base that was exported with --to onnx-adapters"
    )
    parser.add_argument(
        "adapter", type=name_argument, metavar="ADAPTER", help="folder, or Hub id as user/name[@revision][:folder]"
    )
    parser.add_argument(
        "--for",
        dest="exported",
        required=True,
        type=path_argument,
        metavar="EXPORTED_BASE",
        help="the folder that merge --to onnx-adapters made",
    )
    parser.add_argument(
        "-o", "--out", type=path_argument, metavar="FILE", help="default: EXPORTED_BASE/adapters/NAME.onnx_adapter"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, once the new one is complete")
    add_reading_and_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dora_serve.terminal import format_bytes
    from exporters.onnx_adapters.export import add_adapter

    with ExitStack() as stack:
        path, written, facts = add_adapter(
            options.adapter,
            options.exported,
            options.out,
            read=read_options(options),
            command=options.given,
            overwrite=options.overwrite,
            on_progress=show_progress(stack),
        )
    if options.json:
        print(json.dumps({"out": str(path), **facts}, indent=2))
    else:
        low, high = written.ranks
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        print(f"{written.method}, {rank}, {written.slots} slots, {format_bytes(written.bytes)}\nWritten to {path}")
    return 0
