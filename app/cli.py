"""`dora-serve app`: make the backend, build the page, serve it until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from app.shared import Shared
from dora_serve.cache_folder import cache_folder
from dora_serve.errors import DoraServeError, UnavailableError
from dora_serve.progress import OnProgress

if TYPE_CHECKING:
    from app.backend import Backend

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "adapters"
EXAMPLE_COLUMNS = ("base", "dates-lora", "dates-dora")


def run(options: argparse.Namespace) -> int:
    """Serve the page as the command line says, until KeyboardInterrupt."""
    from dora_serve.terminal import TerminalProgress

    require_gradio()
    if options.port is not None:
        _require_free(options.host, options.port)
    with TerminalProgress() as progress:
        shared = prepare(options, progress)
    try:
        serve(shared, options)
    finally:
        shutil.rmtree(shared.uploads, ignore_errors=True)
    return 0


def prepare(options: argparse.Namespace, progress: OnProgress) -> Shared:
    """Load the base and the adapters, or reach the server. The folder of uploads is made, for the caller to remove."""
    given = [(name, path) for name, path in options.adapter]
    backend: Backend
    if options.server is not None:
        from app.server_backend import ServerBackend

        backend = ServerBackend(options.server, base=options.base, api_key=os.environ.get("OPENAI_API_KEY"))
    else:
        backend, examples = _engine(options, progress)
        given = given or examples
    if options.onnx is not None:
        backend, files = _with_onnx(backend, options, progress)
        given = [*given, *files]
    for name, path in given:
        backend.load(name, path)
    folders = [Path(path).absolute().parent for _, path in given if Path(path).exists()]
    folders = [*dict.fromkeys([*(folder.absolute() for folder in options.folder), *folders])]
    uploads = Path(tempfile.mkdtemp(prefix="uploads-", dir=_cache()))  # another app may stand on the same cache
    chosen = ("base", *(name for name, _ in options.adapter[:3])) if options.adapter else EXAMPLE_COLUMNS
    return Shared(backend, uploads, tuple(folders), chosen)


def serve(shared: Shared, options: argparse.Namespace) -> None:
    """Launch, say where, and stay until it is interrupted (KeyboardInterrupt)."""
    from app.page import build_page, look

    auth = options.auth
    page = build_page(shared)
    try:
        _, local, shared_at = page.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            auth=[auth] if auth else None,
            max_file_size="1gb",
            ssr_mode=False,
            show_error=True,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,  # Gradio's own wait would swallow Ctrl-C
            **look(),
        )
        for address in filter(None, (local, shared_at)):
            print(f"{shared.backend.label} is served at {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except ValueError as error:  # Gradio has asked the page of itself, and a proxy or nobody has answered
        raise UnavailableError(
            f"The page is up, and this machine does not reach it at {options.host}: {error}",
            remedy="Where a proxy is set, take it off for this machine: export NO_PROXY=localhost,127.0.0.1",
        ) from error
    finally:
        page.close(verbose=False)


def _require_free(host: str, port: int) -> None:
    """Raise UnavailableError where nothing can listen at this address."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise UnavailableError(
            f"The page cannot be served at {host}:{port}: {error}.", remedy="Choose another --port."
        ) from error


def require_gradio() -> None:
    """Raise UnavailableError where the extra is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise UnavailableError(
            "The app needs gradio, which is not installed.", remedy="pip install 'dora-serve[app]'"
        ) from error
    if int(gradio.__version__.partition(".")[0]) < 6:
        raise UnavailableError(
            f"gradio {gradio.__version__} is installed, wanted 6 or newer.", remedy="pip install 'dora-serve[app]'"
        )


def _engine(options: argparse.Namespace, progress: OnProgress) -> tuple[Backend, list[tuple[str, str]]]:
    """The engine on the base that is named, or on the embedded one with its example adapters."""
    from app.engine_backend import EngineBackend
    from dora_serve.engine import Engine
    from dora_serve.engine.scale_cache import default_folder

    base, examples = options.base, []
    if base is None:
        from dora_serve.demo_base import make_demo_base

        base = str(make_demo_base(_cache() / "smollm2-135m"))
        if not options.adapter and EXAMPLES.is_dir():
            examples = [(path.name, str(path)) for path in sorted(EXAMPLES.iterdir()) if path.is_dir()]
    device = None if options.device == "auto" else options.device
    engine = Engine.load(base, device=device, scale_cache=default_folder(), on_progress=progress)
    return EngineBackend(engine, base), examples


def _with_onnx(
    backend: Backend, options: argparse.Namespace, progress: OnProgress
) -> tuple[Backend, list[tuple[str, str]]]:
    """The exported graph beside what there is, and the adapter files that lie in its folder."""
    from app.onnx_backend import MARK, WithOnnx
    from dora_serve.onnx_engine.engine import OnnxEngine

    device = None if options.device == "auto" else options.device
    engine = OnnxEngine.load(options.onnx, device=device, on_progress=progress)
    files = sorted((options.onnx / "adapters").glob("*.onnx_adapter"))
    return WithOnnx(backend, engine), [(f"{path.stem}{MARK}", str(path)) for path in files]


def _cache() -> Path:
    """The folder where what this app makes for itself is kept."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DoraServeError(
            f"{str(folder)!r} cannot be made: {error.strerror}.", remedy="Set DORA_SERVE_CACHE to a folder of your own."
        ) from error
    return folder
