"""The metadata of the base's own model card: whose licence and languages hold for what was made of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_serve.errors import PublishError
from exporters.card import read_metadata
from exporters.card_metadata import base_id
from exporters.manifest import CARD_NAME, recorded_files
from exporters.record import hash_files


def base_card_metadata(folder: Path, record: Mapping[str, Any], token: str | None) -> Mapping[str, Any]:
    """Of the card that was copied into the folder, else of the one in the base's folder, else of the Hub's. Empty where
    there is none, or none that can be read.
    """
    copied = recorded_files(record).get(CARD_NAME)
    base = record.get("base")
    path = base.get("path") if isinstance(base, Mapping) else None
    if copied is not None and is_recorded_card(folder, record):
        text = (folder / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    elif isinstance(path, str) and Path(path, CARD_NAME).is_file():
        text = Path(path, CARD_NAME).read_text(encoding="utf-8", errors="replace")
    else:
        text = _on_the_hub(record, token)
    with contextlib.suppress(PublishError):
        return read_metadata(text)
    return {}


def is_recorded_card(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the folder's README.md is the one that an exporter put there, the base's own, and nobody's since."""
    facts = recorded_files(record).get(CARD_NAME)
    path = folder / CARD_NAME
    if facts is None or not path.is_file() or path.stat().st_size != facts.nbytes:
        return False
    return facts.sha256 in (None, hash_files([path])[CARD_NAME])


def _on_the_hub(record: Mapping[str, Any], token: str | None) -> str:
    from huggingface_hub import hf_hub_download

    name, base = base_id(record), record.get("base")
    if name is None:
        return ""
    revision = base.get("revision") if isinstance(base, Mapping) and base.get("id") == name else None
    # Whatever is wrong with it, or on the way to it, is no reason not to publish.
    with contextlib.suppress(Exception):
        return Path(hf_hub_download(name, CARD_NAME, revision=revision, token=token)).read_text(
            encoding="utf-8", errors="replace"
        )
    return ""
