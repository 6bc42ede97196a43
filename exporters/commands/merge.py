"""`dora-export merge`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from dora_serve.console import name_argument, path_argument, read_options
from exporters.commands.shared import Commands, add_reading_and_json, add_verification, show_progress

EXPORTER_NAMES = ("safetensors", "onnx")
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")


def add(commands: Commands) -> None:
    parser = commands.add_parser("merge", help="merge an adapter into its base, verify the result, export it")
    parser.add_argument(
        "adapter", type=name_argument, metavar="ADAPTER", help="folder, or Hub id as user/name[@revision][:folder]"
    )
    parser.add_argument(
        "--base", type=name_argument, help="the base model: folder or Hub id; default: what the adapter names"
    )
    parser.add_argument("--to", choices=EXPORTER_NAMES, default="safetensors", help="what to write (%(default)s)")
    parser.add_argument("-o", "--out", type=path_argument, metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of all floating tensors; default: each tensor's own")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--no-verify", action="store_true", help="write without proof (dora_export.json says so)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is complete")
    parser.add_argument("--keep-failed", action="store_true", help="keep what failed, as OUT.FAILED-VERIFICATION")
    add_verification(parser)
    add_reading_and_json(parser)
    parser.set_defaults(run=run, misused=misused)


def misused(options: argparse.Namespace) -> str | None:
    if options.out is None and not options.dry_run:
        return "give the folder to make with -o OUT, or --dry-run"
    return None


def run(options: argparse.Namespace) -> int:
    from exporters.pipeline import ExportRequest, plan_export, run_export
    from exporters.report import export_text, plan_text

    request = ExportRequest(
        adapter=options.adapter,
        base=options.base,
        out=options.out,
        to=options.to,
        dtype=options.dtype,
        device=options.device,
        verify=not options.no_verify,
        overwrite=options.overwrite,
        keep_failed=options.keep_failed,
        reference=options.reference,
        prompts=options.prompts,
        read=read_options(options),
        command=options.given,
    )
    with ExitStack() as stack:
        progress = show_progress(stack)
        if options.dry_run:
            _, plan = plan_export(request, progress)
            progress.clear()
            print(json.dumps(plan.summary(), indent=2) if options.json else plan_text(plan))
            return 0
        export = run_export(request, progress)
    if options.json:
        print(json.dumps({"out": str(export.out), **export.record}, indent=2))
    else:
        print(export_text(export))
    return 0
