"""What the tabs have in common: the backend, the browsers' desks, and where adapters may be read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.backend import BASE, Backend
from app.desk import MOST_COLUMNS, Desks
from dora_serve.errors import AdapterError, DoraServeError
from dora_serve.hub import hub_repository

MOST_NAME = 64
"""Characters of an adapter's name."""


@dataclass(frozen=True)
class Shared:
    """uploads: where uploaded adapters are put. folders: adapters on this machine are read below these alone.

    chosen: the columns of a fresh page, as far as they are loaded. exports: of an adapter's name and an exporter, where
    the adapter that was exported had come from.
    """

    backend: Backend
    uploads: Path
    folders: tuple[Path, ...] = ()
    chosen: tuple[str, ...] = ()
    desks: Desks = field(default_factory=Desks)
    exports: dict[tuple[str, str], str] = field(default_factory=dict)

    def columns(self) -> list[str]:
        """The base, and every adapter that is loaded."""
        return [BASE, *(row.name for row in self.backend.adapters())]

    def first_columns(self, columns: Sequence[str]) -> list[str]:
        """Of these, what a fresh page compares: one column alone is no comparison."""
        chosen = [name for name in self.chosen if name in columns]
        return chosen[:MOST_COLUMNS] if len(chosen) > 1 else list(columns)[:3]

    def source(self, text: str) -> str | Path:
        """What a person typed: a Hub id, or a path, which has to lie in one of the folders.

        Raises AdapterError for one that does not.
        """
        text = text.strip()
        if not self.backend.confined:
            return text
        if not text:
            raise AdapterError("No adapter is named.", remedy="Give a folder, a Hub id, or files.")
        try:
            if not Path(text).exists() and hub_repository(text) is not None:
                return text
            path = Path(os.path.realpath(os.path.expanduser(text)))
        except (OSError, ValueError) as error:  # far too long, or with a null byte
            raise AdapterError(f"{text[:100]!r} is no path: {error}.", remedy="Give a folder or a Hub id.") from error
        if not any(path.is_relative_to(os.path.realpath(folder)) for folder in self.folders):
            allowed = ", ".join(repr(str(folder)) for folder in self.folders) or "none"
            raise AdapterError(
                f"{text!r} is in no folder that this page may read (these: {allowed}).",
                remedy="Start `dora-serve app` with --folder, or upload the files.",
            )
        return path

    def discard(self, source: str | Path) -> None:
        """Remove an uploaded adapter's folder; what lies elsewhere is not ours."""
        folder = Path(source)
        if folder.parent == self.uploads:
            shutil.rmtree(folder, ignore_errors=True)

    def loaded_from(self, name: str) -> str | None:
        """Where the adapter of that name came from, None where there is none."""
        return next((row.source for row in self.backend.adapters() if row.name == name), None)


def require_name(name: str) -> str:
    """The name that a person gave an adapter. Raises DoraServeError for one that no page can show as it is: too long,
    or with characters that cannot be seen or turn what stands beside them."""
    if len(name) > MOST_NAME or not name.isprintable():
        raise DoraServeError(
            f"An adapter cannot be called {name[:MOST_NAME]!r}{'…' if len(name) > MOST_NAME else ''}.",
            remedy=f"Give it a name of {MOST_NAME} visible characters at most.",
        )
    return name


def name_for(source: str | Path) -> str:
    """A name for an adapter that got none: the last part of where it comes from."""
    last = re.split(r"[/:]", str(source).split("@")[0].rstrip("/"))[-1]
    return re.sub(r"[^\w.-]+", "-", last).strip("-")[:MOST_NAME] or "adapter"
