"""What a Hugging Face Space runs (README.md beside this file): the app on a base of the Hub, with the examples."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def arguments() -> list[str]:
    """The command line: every example adapter, those of the default columns first."""
    from app.cli import EXAMPLE_COLUMNS, EXAMPLES

    names = sorted(
        (path.name for path in EXAMPLES.iterdir() if path.is_dir()), key=lambda name: name not in EXAMPLE_COLUMNS
    )
    adapters = [part for name in names for part in ("--adapter", f"{name}={EXAMPLES / name}")]
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    return ["app", os.environ.get("DORA_SERVE_BASE", BASE), *adapters, "--host", "0.0.0.0", "--port", port]


def ensure_home() -> None:
    """Where the user has no home to write to, a temporary one, before anything is imported that keeps a cache there."""
    if not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["HOME"] = tempfile.mkdtemp(prefix="dora-serve-home-")


if __name__ == "__main__":
    ensure_home()
    sys.path[0] = str(ROOT)  # a Space installs the requirements, and not this repository
    from dora_serve.cli import main

    sys.exit(main(arguments()))
