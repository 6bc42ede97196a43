"""`dora-serve app` without arguments, in a real browser: the embedded base, its example adapters, one click."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app_cases import free_port
from tests.browser import opened

ROOT = Path(__file__).parent.parent
QUESTION = "To JSON (what, date, time): The chess match is at 1pm on 2 October 2025."
DEFAULT = ["base", "dates-lora", "dates-dora"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[str]:
    cache = tmp_path_factory.mktemp("cache")
    (cache / "smollm2-135m").symlink_to(smollm2)  # what it would make itself, in a minute
    port = free_port()
    command = [sys.executable, "-m", "dora_serve.cli", "app", "--port", str(port)]
    environment = os.environ | {"DORA_SERVE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    log = (cache / "log").open("w+")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None, (cache / "log").read_text()
            try:
                httpx.get(f"{address}config", timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield address
        assert "Traceback" not in (cache / "log").read_text()
    finally:
        process.terminate()
        code = process.wait(30)
        log.close()
    assert code == 130
    assert f"smollm2-135m is served at {address}" in (cache / "log").read_text()


def _ask(page: Any, prompt: str) -> list[list[str]]:
    """Type, run, and look at the answers as they grow until all have ended."""
    page.fill("#ds-prompt textarea", prompt)
    page.click("#ds-run")
    # What is there until then are the answers to the question before.
    page.wait_for_function(
        """prompt => {
             const columns = [...document.querySelectorAll('.ds-column[data-finish]')];
             const asked = column => [...column.querySelectorAll('.ds-user')].pop()?.innerText;
             return columns.length && columns.every(column => asked(column) === prompt);
           }""",
        arg=prompt,
    )
    looks: list[list[str]] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = page.evaluate(
            """() => [...document.querySelectorAll('.ds-column[data-finish]')].map(
                 c => [c.dataset.finish, c.querySelector('.ds-answer').innerText])"""
        )
        texts = [text for _, text in state]
        if texts and (not looks or looks[-1] != texts):
            looks.append(texts)
        if state and all(finish != "running" for finish, _ in state):
            return looks
        time.sleep(0.05)
    raise AssertionError(looks)


def _screenshot(page: Any, name: str, folder: Path) -> None:
    """For the eye. Those of the documents: SCREENSHOTS=docs/images make test PYTEST=tests/test_app_browser.py"""
    page.wait_for_timeout(500)
    page.screenshot(path=Path(os.environ.get("SCREENSHOTS", folder)) / f"{name}.png")


def test_one_click_streams_three_columns_and_a_vote_is_counted(url: str, tmp_path: Path) -> None:
    with opened(url) as page:
        assert [token.inner_text().strip() for token in page.query_selector_all("#ds-columns .token")] == DEFAULT
        looks = _ask(page, QUESTION)
        names = [name.inner_text() for name in page.query_selector_all(".ds-name")]
        assert names == DEFAULT
        assert len(set(looks[-1])) == 3
        assert json.loads(looks[-1][2])["date"] == "2025-10-02"
        # All three were under way at once.
        assert [
            look for look in looks if all(look) and all(len(a) < len(b) for a, b in zip(look, looks[-1], strict=True))
        ]
        for place in range(3):
            stats = page.inner_text(f"#ds-slot-{place} .ds-stats")
            assert "tokens/s" in stats
            assert "first token" in stats

        page.click("text=Differences from the base")
        page.wait_for_selector("#ds-slot-2 .ds-diff")
        assert page.query_selector("#ds-slot-0 .ds-diff") is None
        page.click("text=Surprise of the base")
        page.wait_for_selector("#ds-slot-2 .ds-token")
        assert page.inner_text("#ds-slot-2 .ds-answer") == looks[-1][2]

        page.click("#ds-vote-2")
        page.wait_for_selector("#ds-tally .ds-count")
        assert "1 of 1" in page.inner_text("#ds-tally .ds-count")
        saved = {}
        for kind in ("CSV", "JSON"):
            with page.expect_download() as download:
                page.click(f"text=Votes as {kind}")
            saved[kind] = tmp_path / f"votes.{kind.lower()}"
            download.value.save_as(saved[kind])
        assert [vote["winner"] for vote in json.loads(saved["JSON"].read_text())["votes"]] == ["dates-dora"]
        assert next(csv.DictReader(saved["CSV"].open()))["winner"] == "dates-dora"


def test_blind_columns_have_no_names_until_the_vote(url: str) -> None:
    with opened(url) as page:
        page.check("#ds-blind input")
        _ask(page, QUESTION)
        names = [name.inner_text() for name in page.query_selector_all(".ds-name")]
        assert names == ["Column A", "Column B", "Column C"]
        slots = page.inner_text("#ds-slots")
        assert not [word for word in ("LoRA", "DoRA", "rank", "control") if word in slots]
        page.click("#ds-vote-tie")
        page.wait_for_selector("#ds-tally .ds-count")
        shown = sorted(name.inner_text() for name in page.query_selector_all(".ds-name"))
        assert shown == sorted(DEFAULT)
        assert "tie" in page.inner_text("#ds-tally")


def test_a_column_is_stopped_and_asked_again(url: str) -> None:
    with opened(url) as page:
        page.fill("#ds-prompt textarea", "Tell me a long story about the sea.")
        page.click("#ds-run")
        page.wait_for_function("document.querySelector('#ds-slot-0 .ds-answer')?.innerText.length > 5")
        page.click("#ds-slot-0 >> text=Stop")
        page.wait_for_selector("#ds-slot-0 [data-finish=cancelled]")
        page.click("#ds-stop-all")
        page.wait_for_function("!document.querySelector('.ds-column[data-finish=running]')")
        page.click("#ds-slot-0 >> text=Again")
        page.wait_for_selector("#ds-slot-0 [data-finish=running]")
        page.click("#ds-slot-0 >> text=Stop")
        page.wait_for_selector("#ds-slot-0 [data-finish=cancelled]")


def test_a_chat_goes_on_in_each_column_and_an_answer_is_copied(url: str) -> None:
    """The second answers stand below each column's own first ones; Copy takes the last answer, over HTTPS and HTTP."""
    with opened(url) as page:
        first = _ask(page, QUESTION)[-1]
        second = _ask(page, "To JSON (what, date, time): concert on 06/12/2024 at 10:46 am")[-1]
        assert [past.inner_text() for past in page.query_selector_all(".ds-past")] == first
        assert first != second
        assert [len(page.query_selector_all(f"#ds-slot-{place} .ds-user")) for place in range(3)] == [2, 2, 2]

        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        for place, remote in ((2, False), (0, True)):
            if remote:
                page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
            page.click(f"#ds-slot-{place} >> text=Copy")
            page.wait_for_timeout(300)
            page.fill("#ds-prompt textarea", "")
            page.focus("#ds-prompt textarea")
            page.keyboard.press("Control+V")
            assert page.input_value("#ds-prompt textarea") == second[place]

        page.click("text=Chat, system prompt and sampling")
        page.click("text=New conversation")
        page.wait_for_function("!document.querySelector('.ds-past, .ds-user')")


def test_an_adapter_is_uploaded_used_and_removed_without_a_restart(url: str, tmp_path: Path) -> None:
    archive = tmp_path / "mine.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            packed.write(ROOT / "examples" / "adapters" / "style-dora" / name, name)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"no zip")
    with opened(url) as page:
        page.click("button[role=tab]:has-text('Adapters')")
        page.wait_for_selector("#ds-table >> text=style-lora")
        page.set_input_files("#ds-files input[type=file]", broken)
        page.wait_for_selector("#ds-files >> text=broken")
        page.click("#ds-add")
        page.wait_for_selector("#ds-adapters-said >> text=cannot be unpacked")
        page.click("#ds-files [aria-label='Clear']")
        page.set_input_files("#ds-files input[type=file]", archive)
        page.wait_for_selector("#ds-files >> text=mine")
        page.click("#ds-add")
        page.wait_for_selector("#ds-adapters-said >> text=Added mine: DoRA of rank 4")
        page.wait_for_selector("#ds-table >> text=mine")

        page.click("button[role=tab]:has-text('Compare')")
        page.click("#ds-columns input")
        page.click("[role=option]:has-text('mine')")
        page.keyboard.press("Escape")
        (*_, mine) = _ask(page, "Explain photosynthesis.")[-1]
        assert mine.startswith("Log: ")

        page.click("button[role=tab]:has-text('Adapters')")
        page.click("#ds-chosen input")
        page.click("[role=option]:has-text('mine')")
        page.click("#ds-remove")
        page.wait_for_selector("#ds-adapters-said >> text=Removed mine")
        page.wait_for_function("!document.querySelector('#ds-table').innerText.includes('mine')")
        assert "mine" not in page.inner_text("#ds-columns")


def test_the_analysis_is_drawn(url: str, tmp_path: Path) -> None:
    with opened(url) as page:
        page.click("button[role=tab]:has-text('Inspect')")
        page.click("#ds-analyse")
        page.wait_for_selector("#ds-picture .ds-picture svg")
        page.mouse.move(0, 0)
        assert "correlation" in page.text_content("#ds-picture")
        _screenshot(page, "inspect", tmp_path)

        page.click("button[role=tab]:has-text('Compare')")
        page.click("text=Surprise of the base")
        _ask(page, "To JSON (what, date, time): concert on 06/12/2024 at 10:46 am")
        page.wait_for_selector("#ds-slot-2 .ds-token")
        _screenshot(page, "compare", tmp_path)


def test_an_adapter_is_merged_and_its_proof_is_shown(url: str) -> None:
    with opened(url) as page:
        page.click("button[role=tab]:has-text('Export')")
        page.click("#ds-merge")
        page.wait_for_selector("#ds-report >> text=Verified: the merged model is the unmerged one", timeout=240_000)
        assert "272 exact" in page.inner_text("#ds-report")
        with page.expect_download() as download:
            page.click("#ds-export-download")
        with zipfile.ZipFile(download.value.path()) as archive:
            assert "dates-dora-safetensors/model.safetensors" in archive.namelist()


MARKS = {
    "Compare": "#ds-run",
    "Adapters": "#ds-add",
    "Inspect": "#ds-analyse",
    "Prompt sets": "#ds-set-run",
    "Export": "#ds-merge",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(url: str, width: int, scheme: str) -> None:
    with opened(url, width, 844, scheme) as page:
        for tab in MARKS:
            if page.query_selector(f"button[role=tab]:visible:has-text('{tab}')"):
                page.click(f"button[role=tab]:visible:has-text('{tab}')")
            else:  # what does not fit beside the others
                page.click(".overflow-menu > button")
                page.click(f".overflow-dropdown button:has-text('{tab}')")
            page.wait_for_selector(f"{MARKS[tab]}:visible")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
