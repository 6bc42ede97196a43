"""A tiny base that speaks in words, adapters on it, and the app launched on it at 127.0.0.1."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.backend import Backend
from app.page import build_page, look
from app.shared import Shared
from tests.cases import adapt, llama, save
from tests.engine_tokenizers import word_tokenizer

WORDS = tuple(
    "the sea wind moon star tide shore sail rope deck crew storm calm north south east west bell fog gull wave salt "
    "net oar mast port hull keel rain cloud light night day sun fish reef buoy".split()
)
CONTEXT = 256
SIZES = {"vocab_size": len(WORDS) + 3, "max_position_embeddings": CONTEXT}
PROMPT = "the sea wind"


def make_folders(root: Path) -> Path:
    """`base`, `lora` and `dora` on it, `other` on another base."""
    base = llama(**SIZES)
    save(base, root / "base")
    word_tokenizer(WORDS).save_pretrained(root / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    adapt(base, root / "adapters" / "lora", target_modules=targets)
    adapt(base, root / "adapters" / "dora", target_modules=targets, use_dora=True, r=2)
    adapt(llama(**SIZES, hidden_size=24, head_dim=12), root / "adapters" / "other", target_modules=["q_proj"])
    return root


@contextmanager
def launched(backend: Backend, root: Path, *, folders: tuple[Path, ...] | None = None) -> Iterator[str]:
    """The app's address while it is up."""
    shared = Shared(backend, root / "uploads", folders if folders is not None else (root / "adapters",))
    page = build_page(shared)
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=free_port(),
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            show_error=True,
            **look(),
        )
        yield url
    finally:
        page.close(verbose=False)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def client(url: str) -> Any:
    from gradio_client import Client

    return Client(url, verbose=False)
