"""`dora-export verify`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from dora_serve.console import EXIT_FAILED, name_argument, read_options
from exporters.commands import onnx
from exporters.commands.shared import Commands, add_base_choice, add_reading_and_json, add_verification, show_progress


def add(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="check a merged model, whoever made it, against base and adapter")
    parser.add_argument(
        "merged",
        metavar="MERGED",
        type=name_argument,
        help="folder or Hub id; without --adapter its files are held to the hashes of its dora_export.json",
    )
    parser.add_argument("--adapter", type=name_argument, help="the adapter that was merged: folder or Hub id")
    parser.add_argument(
        "--base", type=name_argument, help="the base that it was merged into; default: what the adapter names"
    )
    add_base_choice(parser)
    onnx.add_judging(parser)
    add_verification(parser)
    add_reading_and_json(parser)
    parser.set_defaults(run=run, misused=misused)


def misused(options: argparse.Namespace) -> str | None:
    if options.base is not None and options.adapter is None:
        return "name the adapter too with --adapter, or leave --base away to check the hashes alone"
    return None


def run(options: argparse.Namespace) -> int:
    from exporters.pull import check_pulled, pull
    from exporters.report import pulled_text

    if options.adapter is not None:
        return _against_its_sources(options)
    with ExitStack() as stack:
        progress = show_progress(stack)
        report = check_pulled(pull(options.merged, progress), progress)
    if options.json:
        hashes = report.hashes
        shown = {"passed": hashes.passed, "failures": list(hashes.failures), **report.to_json()}
        print(json.dumps(shown, indent=2))
    else:
        print(pulled_text(report))
    return 0 if report.hashes.passed else EXIT_FAILED


def _against_its_sources(options: argparse.Namespace) -> int:
    """Every tensor and the forward; of what was pulled from the Hub the hashes as well, where there are any."""
    from dora_serve.devices import require_device
    from dora_serve.forward_report import ForwardOptions
    from dora_serve.quantized.base import BaseChoice
    from exporters.onnx.options import OnnxOptions
    from exporters.pull import check_pulled, pull, without_links
    from exporters.registry import ExportOptions
    from exporters.report import folder_text, pulled_text
    from exporters.sources import open_sources
    from exporters.verify_folder import require_merged_folder, verify_folder

    require_device(options.device)
    with ExitStack() as stack:
        progress = show_progress(stack)
        choice = BaseChoice(options.base_quantization, options.merge_into)
        pulled = pull(options.merged, progress, any_model=True)
        require_merged_folder(pulled.folder, adapter=options.adapter, base=options.base or "BASE")
        held = check_pulled(pulled, progress) if pulled.repo_id and pulled.record else None
        sources = open_sources(options.adapter, options.base, read_options(options), progress, choice)
        device = None if options.device == "auto" else options.device
        forward = ForwardOptions(options.reference, options.prompts, device)
        judged = ExportOptions(OnnxOptions(genai_python=options.genai_python), options.max_kl)
        folder = stack.enter_context(without_links(pulled))
        report = verify_folder(folder, sources, forward, progress, export=judged)
    passed = report.passed and (held is None or held.hashes.passed)
    if options.json:
        values = report.to_json()
        if held is not None:
            failures = [*held.hashes.failures, *report.failures]
            values = {**values, **held.to_json(), "passed": passed, "failures": failures}
        print(json.dumps(values, indent=2))
    else:
        print("\n\n".join(([pulled_text(held)] if held else []) + [folder_text(report)]))
    return 0 if passed else EXIT_FAILED
