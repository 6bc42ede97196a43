"""`dora-export merge`."""

from __future__ import annotations

import argparse
import json
import shlex
from contextlib import ExitStack
from pathlib import Path

from dora_serve.console import EXIT_FAILED, name_argument, path_argument, read_options
from exporters.commands import onnx, push, slots
from exporters.commands.shared import Commands, add_base_choice, add_reading_and_json, add_verification, show_progress

EXPORTER_NAMES = ("safetensors", "onnx", "onnx-adapters", "nf4", "nf4-double")
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
    parser.add_argument(
        "-o",
        "--out",
        type=path_argument,
        metavar="OUT",
        help="the folder to make; with --push, REPO_ID's name",
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of all floating tensors; default: each tensor's own")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--no-verify", action="store_true", help="write without proof (dora_export.json says so)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is complete")
    parser.add_argument("--keep-failed", action="store_true", help="keep what failed, as OUT.FAILED-VERIFICATION")
    parser.add_argument("--push", type=name_argument, metavar="REPO_ID", help="publish what was made, as push does")
    push.add_publishing(parser)
    onnx.add(parser)
    slots.add(parser)
    add_base_choice(parser)
    add_verification(parser)
    add_reading_and_json(parser)
    parser.set_defaults(run=run, misused=misused, when_interrupted=_when_interrupted)


def misused(options: argparse.Namespace) -> str | None:
    if wrong := slots.misused(options) or onnx.misused(options):
        return wrong
    if options.push is None:
        if options.public or options.pr or options.unverified or options.revision is not None:
            return "--public, --pr, --revision and --unverified are about --push REPO_ID"
        if options.out is None and not options.dry_run:
            return "give the folder to make with -o OUT, or --dry-run"
        return None
    if options.no_verify and not options.unverified:
        return "--no-verify with --push would publish what nothing proves: leave it away, or say --unverified too"
    return push.misused(options)


def _when_interrupted(options: argparse.Namespace) -> str:
    if options.push is None:
        return "Interrupted: nothing was written, and nothing was changed."
    out = shlex.quote(str(_out(options)))
    return (
        "Interrupted: nothing was committed on the Hub. Where the merge was done already, its folder is whole: "
        f"dora-export push {out} {shlex.quote(options.push)} goes on."
    )


def _out(options: argparse.Namespace) -> Path | None:
    return Path(options.push.rpartition("/")[2]) if options.push and options.out is None else options.out


def run(options: argparse.Namespace) -> int:
    from dora_serve.quantized.base import BaseChoice
    from exporters.hub import push as publish
    from exporters.hub import require_writable
    from exporters.pipeline import ExportRequest, plan_only, run_export
    from exporters.push_report import push_text
    from exporters.registry import ExportOptions
    from exporters.report import export_text, plan_text

    request = ExportRequest(
        adapter=options.adapter,
        base=options.base,
        out=_out(options),
        base_choice=BaseChoice(options.base_quantization, options.merge_into),
        to=options.to,
        dtype=options.dtype,
        device=options.device,
        verify=not options.no_verify,
        overwrite=options.overwrite,
        keep_failed=options.keep_failed,
        unproven=options.unverified,
        hash_output=options.push is not None,
        reference=options.reference,
        prompts=options.prompts,
        read=read_options(options),
        options=ExportOptions(onnx.onnx_options(options), options.max_kl, slots.slot_options(options)),
        command=options.given,
    )
    with ExitStack() as stack:
        progress = show_progress(stack)
        if options.dry_run:
            foreseen = plan_only(request, progress)
            progress.clear()
            print(json.dumps(foreseen.to_json(), indent=2) if options.json else plan_text(foreseen))
            return 0
        out = _out(options)
        publication = push.request_of(options, out, options.push) if options.push and out else None
        if publication is not None:
            require_writable(publication, progress)
        export = run_export(request, progress)
        if publication is not None:
            progress.clear()
            if not options.json:
                print(export_text(export), flush=True)  # whatever comes of the push, the folder is there
            published = publish(publication, progress)
    if options.json:
        shown = {"push": published.to_json()} if publication else {}
        print(json.dumps({"out": str(export.out), **export.record, **shown}, indent=2))
    else:
        print(push_text(published) if publication else export_text(export))
    return EXIT_FAILED if export.failures else 0
