"""`dora-export convert`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from dora_serve.console import device_argument, name_argument, path_argument, read_options
from exporters.commands.shared import Commands, add_reading_and_json, show_progress

TARGET_NAMES = ("peft", "mlx", "kohya", "vllm", "lora")


def add(commands: Commands) -> None:
    parser = commands.add_parser("convert", help="write an adapter in another format, or as the nearest plain LoRA")
    parser.add_argument("adapter", type=name_argument, metavar="ADAPTER", help="folder, file or Hub id")
    parser.add_argument(
        "--to",
        choices=TARGET_NAMES,
        required=True,
        help="vllm: peft with norm scales; lora: a plain LoRA, and what it loses",
    )
    parser.add_argument("--rank", type=rank_argument, metavar="R", help="of --to lora")
    parser.add_argument("--base", type=name_argument, help="folder or Hub id; needed where only it tells what is meant")
    parser.add_argument("-o", "--out", type=path_argument, metavar="OUT", help="the folder to make")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is complete")
    parser.add_argument("--prompts", type=path_argument, metavar="FILE", help="of --to lora: what to compare logits on")
    parser.add_argument("--device", type=device_argument, default="auto", help="auto, cpu, cuda, cuda:N")
    add_reading_and_json(parser)
    parser.set_defaults(run=run, misused=misused)


def rank_argument(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no rank: wanted a whole number from 1 on")
    return int(text)


def misused(options: argparse.Namespace) -> str | None:
    if options.out is None and not options.dry_run:
        return "give the folder to make with -o OUT, or --dry-run"
    if (options.to == "lora") != (options.rank is not None):
        return "--rank R goes with --to lora, and --to lora with --rank R"
    return None


def run(options: argparse.Namespace) -> int:
    from dora_serve.devices import require_device
    from dora_serve.output import require_free
    from exporters.convert.report import conversion_json, conversion_text
    from exporters.convert.run import ConvertRequest, convert, write_conversion

    require_device(options.device)
    if not options.dry_run:
        require_free(options.out, overwrite=options.overwrite)
    request = ConvertRequest(
        adapter=options.adapter,
        to=options.to,
        base=options.base,
        rank=options.rank,
        read=read_options(options),
        prompts=options.prompts,
        device=None if options.device == "auto" else options.device,
    )
    with ExitStack() as stack:
        conversion = convert(request, show_progress(stack))
    if not options.json:
        print(conversion_text(conversion), flush=True)
    out = None
    if not options.dry_run:
        written = write_conversion(conversion, options.out, overwrite=options.overwrite, command=options.given)
        out = str(written)
    if options.json:
        print(json.dumps(conversion_json(conversion, out), indent=2))
    else:
        print("Nothing was written." if out is None else f"Written to {out}")
    return 0
