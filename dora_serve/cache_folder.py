"""Where what this project has made and could make again is kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$DORA_SERVE_CACHE, else $XDG_CACHE_HOME/dora-serve, else ~/.cache/dora-serve; it need not be there yet."""
    own = os.environ.get("DORA_SERVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dora-serve"
