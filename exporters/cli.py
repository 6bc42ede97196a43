"""`dora-export`: the command line. It parses, calls one function, and turns its result or error into words.

Nothing heavy is imported until a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dora_serve import __version__
from dora_serve.console import (
    EXIT_FAILED,
    CommandParser,
    add_reading,
    device_argument,
    name_argument,
    path_argument,
    read_options,
    run_command,
)

EXPORTER_NAMES = ("safetensors", "onnx")
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="dora-export",
        description="Fold a trained LoRA or DoRA adapter into dense weights, prove the result, and export it.",
    )
    parser.add_argument("--version", action="version", version=f"dora-export {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    merge = commands.add_parser("merge", help="merge an adapter into its base, verify the result, export it")
    merge.add_argument(
        "adapter", type=name_argument, metavar="ADAPTER", help="folder, or Hub id as user/name[@revision][:folder]"
    )
    merge.add_argument(
        "--base", type=name_argument, help="the base model: folder or Hub id; default: what the adapter names"
    )
    merge.add_argument("--to", choices=EXPORTER_NAMES, default="safetensors", help="what to write (%(default)s)")
    merge.add_argument("-o", "--out", type=path_argument, metavar="OUT", help="the folder to make")
    merge.add_argument("--dtype", choices=DTYPE_NAMES, help="of all floating tensors; default: each tensor's own")
    merge.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    merge.add_argument("--no-verify", action="store_true", help="write without proof (dora_export.json says so)")
    merge.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is complete")
    merge.add_argument("--keep-failed", action="store_true", help="keep what failed, as OUT.FAILED-VERIFICATION")
    _add_verification(merge)
    _add_reading(merge)
    merge.set_defaults(run=_merge)

    verify = commands.add_parser("verify", help="check a merged folder, whoever made it, against base and adapter")
    verify.add_argument("merged", metavar="MERGED", type=path_argument, help="the merged model's folder")
    verify.add_argument(
        "--adapter", required=True, type=name_argument, help="the adapter that was merged: folder or Hub id"
    )
    verify.add_argument(
        "--base", required=True, type=name_argument, help="the base that it was merged into: folder or Hub id"
    )
    _add_verification(verify)
    _add_reading(verify)
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser("inspect", help="show what an adapter is, and whether it fits a base")
    inspect.add_argument("adapter", type=name_argument, metavar="ADAPTER", help="folder or Hub id")
    inspect.add_argument("--base", type=name_argument, help="folder or Hub id: also show what a merge into it would do")
    inspect.add_argument(
        "--decompose",
        action="store_true",
        help="how far magnitudes and directions move (DoRA paper, 3.2); needs --base",
    )
    inspect.add_argument(
        "--plot", type=path_argument, metavar="FILE", help="draw that into a .png, .svg or .pdf; needs --base"
    )
    _add_reading(inspect)
    inspect.set_defaults(run=_inspect)

    demo = commands.add_parser("demo-base", help="make a small real base model (SmolLM2-135M-Instruct) from a package")
    demo.add_argument("folder", metavar="DIR", type=path_argument)
    demo.add_argument("--json", action="store_true", help="print one JSON object")
    demo.set_defaults(run=_demo_base)
    return parser


def _add_verification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference", choices=("native", "peft"), default="native", help="whose unmerged forward is the measure"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, or .jsonl with a prompt each")
    parser.add_argument(
        "--device", type=device_argument, default="auto", help="auto, cpu, cuda, cuda:N (auto: verify on a GPU if any)"
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(given)
    options.given = ("dora-export", *given)
    if options.command == "merge" and options.out is None and not options.dry_run:
        parser.error("merge: give the folder to make with -o OUT, or --dry-run")
    if options.command == "inspect" and options.base is None and (options.decompose or options.plot):
        parser.error("inspect: what an adapter changes is told against a base: name it with --base")
    return run_command(
        "dora-export",
        lambda: int(options.run(options)),
        as_json=options.json,
        when_interrupted="Interrupted: nothing was written, and nothing was changed.",
    )


def _progress(stack: ExitStack) -> Any:
    from dora_serve.terminal import TerminalProgress

    return stack.enter_context(TerminalProgress())


def _merge(options: argparse.Namespace) -> int:
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
        progress = _progress(stack)
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


def _verify(options: argparse.Namespace) -> int:
    from dora_serve.devices import require_device
    from dora_serve.forward_check import ForwardOptions
    from exporters.report import folder_text
    from exporters.sources import open_sources
    from exporters.verify_folder import require_merged_folder, verify_folder

    require_device(options.device)
    require_merged_folder(options.merged, adapter=options.adapter, base=options.base)
    with ExitStack() as stack:
        progress = _progress(stack)
        sources = open_sources(options.adapter, options.base, read_options(options), progress)
        device = None if options.device == "auto" else options.device
        forward = ForwardOptions(options.reference, options.prompts, device)
        report = verify_folder(options.merged, sources, forward, progress)
    print(json.dumps(report.to_json(), indent=2) if options.json else folder_text(report))
    return 0 if report.passed else EXIT_FAILED


def _inspect(options: argparse.Namespace) -> int:
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
            _progress(stack),
            with_decomposition=options.decompose or options.plot is not None,
        )
        if options.plot is not None and inspection.decomposition is not None:
            save_plot({inspection.path.name: inspection.decomposition}, options.plot)
    print(json.dumps(inspection.to_json(), indent=2) if options.json else inspection_text(inspection))
    return 0 if not inspection.problems else EXIT_FAILED


def _demo_base(options: argparse.Namespace) -> int:
    from dora_serve.demo_base import make_demo_base

    def say(stage: str) -> None:
        if sys.stderr.isatty():
            print(stage, file=sys.stderr)

    folder = make_demo_base(options.folder, on_progress=say)
    print(json.dumps({"folder": str(folder)}) if options.json else f"SmolLM2-135M-Instruct is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
