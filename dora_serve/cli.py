"""`dora-serve`: the command line of the engine. It parses, runs one batch, and prints what came out.

Nothing heavy is imported until a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_serve import __version__
from dora_serve.console import (
    EXIT_FAILED,
    OF_READING,
    CommandParser,
    add_reading,
    device_argument,
    name_argument,
    path_argument,
    read_options,
    run_command,
)

if TYPE_CHECKING:
    from dora_serve.engine import Completion, LoadReport, Request

DTYPE_NAMES = ("float32", "bfloat16", "float16")
BASE_COLUMN = "base"
MAX_RANK = 256
"""Of the adapters of `generate`, where nothing is said."""


class LineParser(CommandParser):
    """Its complaints are lines, as all that is printed with --json is."""

    indent = None


def build_parser() -> CommandParser:
    parser = LineParser(
        prog="dora-serve", description="Serve many LoRA and DoRA adapters on one base model, in one batch."
    )
    parser.add_argument("--version", action="version", version=f"dora-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="continue one prompt with the base and with every adapter given, in one batch"
    )
    generate.add_argument(
        "base",
        type=name_argument,
        metavar="BASE",
        help="folder, or Hub id as user/name[@revision]; or a folder of dora-export merge --to onnx-adapters",
    )
    generate.add_argument(
        "--adapter",
        type=_adapter,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter, from a folder or a Hub id (for a graph, an .onnx_adapter file); may be said many times",
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the base's chat template")
    generate.add_argument("--system", metavar="TEXT", help="the system message that goes before it; implies --chat")
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N", help="at most so many (%(default)s)")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (%(default)s)"
    )
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--top-k", type=int, default=0, metavar="K")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (%(default)s)")
    generate.add_argument("--dtype", choices=DTYPE_NAMES, help="of the base; default: the checkpoint's own")
    generate.add_argument(
        "--device", type=device_argument, default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)"
    )
    generate.add_argument("--max-rank", type=int, metavar="R", help=f"refuse larger adapters ({MAX_RANK})")
    add_reading(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object a line: a column each")
    generate.set_defaults(run=_generate)
    _add_app(commands)
    _add_vllm(commands)
    return parser


def _add_app(commands: Any) -> None:
    app = commands.add_parser("app", help="a page in the browser: one prompt, the base and its adapters side by side")
    app.add_argument(
        "base",
        type=name_argument,
        nargs="?",
        metavar="BASE",
        help="folder or Hub id; default: a small one from a package, with the example adapters; of --server: its name",
    )
    app.add_argument(
        "--adapter", type=_adapter, action="append", default=[], metavar="NAME=PATH", help="loaded from the start"
    )
    app.add_argument(
        "--onnx",
        type=path_argument,
        metavar="FOLDER",
        help="also columns of an exported base (dora-export merge --to onnx-adapters), in ONNX Runtime",
    )
    app.add_argument("--server", metavar="URL", help="decode on an OpenAI-compatible server, such as vLLM, not here")
    app.add_argument(
        "--folder", type=path_argument, action="append", default=[], help="adapters may be added from below it"
    )
    app.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    app.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    app.add_argument("--auth", type=_auth, metavar="USER:PASSWORD", help="ask for these before anything is shown")
    app.add_argument("--share", action="store_true", help="a public address, through Gradio's servers; off by default")
    app.add_argument("--device", type=device_argument, default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    app.set_defaults(run=_app, json=False)


def _add_vllm(commands: Any) -> None:
    vllm = commands.add_parser(
        "vllm",
        help="start vLLM's server with LoRA and DoRA adapters, set up for them",
        epilog="What follows `--` is handed to vLLM as it is: -- --port 8001 --tensor-parallel-size 2",
    )
    vllm.add_argument("base", type=name_argument, metavar="BASE", help="folder, or Hub id as user/name[@revision]")
    vllm.add_argument(
        "--adapter",
        type=_adapter,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter, from a folder, a file or a Hub id; may be said many times",
    )
    vllm.add_argument(
        "--runtime-loading",
        action="store_true",
        help="let clients load and unload adapters over HTTP: whoever reaches the server can have it read files",
    )
    vllm.add_argument("--max-rank", type=int, metavar="R", help="of adapters that are loaded later; default: as these")
    vllm.add_argument("--max-loras", type=int, metavar="N", help="adapters in one batch; default: as many as these")
    vllm.add_argument("--dry-run", action="store_true", help="print the command, and do not run it")
    add_reading(vllm)
    vllm.set_defaults(run=_vllm, json=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    parser = build_parser()
    given, after = _split(list(sys.argv[1:] if arguments is None else arguments))
    options = parser.parse_args(given)
    command = parser.of(options.command)
    if after and options.command != "vllm":
        command.error("it takes nothing after --")
    options.extra = after
    names = [name for name, _ in options.adapter]
    for name in names:
        if names.count(name) > 1:
            command.error(f"two adapters are called {name!r}")
    return run_command("dora-serve", lambda: int(options.run(options, command)), as_json=options.json, indent=None)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what after it."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _adapter(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=PATH")
    if name == BASE_COLUMN:
        raise argparse.ArgumentTypeError(f"{BASE_COLUMN!r} is the base's own name: call the adapter something else")
    return name, path


def _auth(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("it is no USER:PASSWORD")
    return user, password


def _app(options: argparse.Namespace, parser: CommandParser) -> int:
    # By name: the app stands on this package, and never the other way round.
    return int(importlib.import_module("app.cli").run(options))


def _vllm(options: argparse.Namespace, parser: CommandParser) -> int:
    from dora_serve.terminal import TerminalProgress
    from dora_serve.vllm_plugin.command import plan_launch

    _require_counts(options, parser, "max_rank", "max_loras")
    with TerminalProgress() as progress:
        launch = plan_launch(
            options.base,
            options.adapter,
            runtime_loading=options.runtime_loading,
            max_rank=options.max_rank,
            max_loras=options.max_loras,
            read=read_options(options),
            extra=options.extra,
            on_progress=progress,
        )
    words = [f"{name}={value}" for name, value in launch.environment.items()]
    print(shlex.join([*words, *launch.arguments]), flush=True)
    if not options.dry_run:
        launch.run()
    return 0


def _require_counts(options: argparse.Namespace, parser: CommandParser, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: wanted a whole number from 1 on")


def _require_none_of_torch(options: argparse.Namespace, parser: CommandParser) -> None:
    """A graph has its dtype, and its adapter files were read when they were made."""
    for name in ("dtype", "max_rank", *OF_READING):
        value = getattr(options, name)
        if value is not None and value is not False and value != []:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is of a base that torch runs; a graph and its files have their own")


def _generate(options: argparse.Namespace, parser: CommandParser) -> int:
    import torch

    from dora_serve.engine import Engine, complete
    from dora_serve.engine.scale_cache import default_folder
    from dora_serve.errors import EngineError
    from dora_serve.hub import locate
    from dora_serve.onnx_engine.engine import OnnxEngine, is_exported
    from dora_serve.terminal import TerminalProgress

    if not options.prompt:
        parser.error("--prompt is empty")
    _require_counts(options, parser, "max_rank")
    exported = is_exported(Path(options.base))
    if exported:
        _require_none_of_torch(options, parser)
    requests = [_request(options, name) for name in (None, *(name for name, _ in options.adapter))]
    try:
        requests[0].require_sound()
    except EngineError as error:
        parser.error(error.message)
    read = read_options(options)
    with ExitStack() as stack:
        progress = stack.enter_context(TerminalProgress())
        device = None if options.device == "auto" else options.device
        engine: Engine | OnnxEngine
        paths: dict[str, str | Path] = dict(options.adapter)
        if exported:
            engine = OnnxEngine.load(options.base, device=device, max_rows=len(requests), on_progress=progress)
        else:
            # Before the base: a slip in a path is said before gigabytes are read.
            paths = {name: locate(path, what="adapter", on_progress=progress).path for name, path in options.adapter}
            engine = Engine.load(
                options.base,
                dtype=getattr(torch, options.dtype) if options.dtype else None,
                device=device,
                max_rows=len(requests),
                max_rank=MAX_RANK if options.max_rank is None else options.max_rank,
                scale_cache=default_folder(),
                on_progress=progress,
            )
        reports = {
            name: engine.pool.load(name, path, options=read, on_progress=progress) for name, path in paths.items()
        }
        completions = complete(engine.generate(requests), on_progress=progress)
    for completion in completions:
        report = reports.get(completion.adapter or "")
        print(json.dumps(_column(completion)) if options.json else _shown(completion, report))
    return EXIT_FAILED if any(completion.error for completion in completions) else 0


def _request(options: argparse.Namespace, adapter: str | None) -> Request:
    from dora_serve.engine import Request, Sampling

    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    chat = options.chat or options.system is not None
    system = [{"role": "system", "content": options.system}] if options.system is not None else []
    return Request(
        prompt=None if chat else options.prompt,
        messages=[*system, {"role": "user", "content": options.prompt}] if chat else None,
        adapter=adapter,
        sampling=sampling,
        max_tokens=options.max_tokens,
        stop=tuple(options.stop),
    )


def _column(completion: Completion) -> dict[str, Any]:
    """One line of --json."""
    timings, error = completion.timings, completion.error
    column: dict[str, Any] = {
        "adapter": completion.adapter or BASE_COLUMN,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "timings": timings
        and {
            "waiting_s": timings.waiting,
            "first_token_s": timings.first_token,
            "decoding_s": timings.decoding,
            "prompt_tokens": timings.prompt_tokens,
            "tokens": timings.tokens,
            "tokens_per_s": timings.tokens_per_second,
        },
    }
    if error is not None:
        column["error"] = {"type": type(error).__name__, "message": error.message, "remedy": error.remedy}
    return column


def _shown(completion: Completion, report: LoadReport | None) -> str:
    """A column for a person: whose it is, how it went, and the text."""
    timings = completion.timings
    facts = [report.method, f"rank {report.rank}", f"{report.modules} modules"] if report else []
    if report and report.changes_output is False:
        facts.append("CHANGES NOTHING")
    if timings and completion.error is None:
        rate = timings.tokens_per_second
        facts.append(f"{timings.tokens} tokens" + (f", {rate:.1f} a second" if rate else ""))
        facts.append({"stop": "ended by itself", "length": "cut off"}.get(completion.finish_reason, ""))
    head = f"{completion.adapter or BASE_COLUMN} ({', '.join(filter(None, facts))})" if facts else BASE_COLUMN
    body = completion.text if completion.error is None else f"error: {completion.error}"
    return f"--- {head}\n{body}\n"


if __name__ == "__main__":
    sys.exit(main())
