"""Headless Chromium, as the system has it: playwright only drives it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


def chromium() -> str:
    """Where it is. `make test` installs it where it can."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "No Chromium on the PATH: apt-get install chromium"
    return found


@contextmanager
def opened(url: str, width: int = 1400, height: int = 900, scheme: Any = "light") -> Iterator[Any]:
    """A page of the app; in the end nothing may have been said on its console, nor fetched from anywhere else."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(60_000)
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "request",
                lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else complaints.append(asked.url),
            )
            page.goto(url)
            page.wait_for_selector("#ds-prompt textarea")
            # The choices are there once the page has asked for the adapters.
            page.wait_for_selector("#ds-columns .token")
            yield page
        finally:
            browser.close()
    assert complaints == []
