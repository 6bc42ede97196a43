"""A Hugging Face Space, as app/README.md says to make one: its own folder, no arguments, and no home to write to."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.app_cases import client, free_port

ROOT = Path(__file__).parent.parent
QUESTION = "To JSON (what, date, time): The chess match is at 1pm on 2 October 2025."


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("space")
    for part in ("app", "dora_serve", "exporters", "examples"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    shutil.copy(ROOT / "app" / "README.md", folder)
    shutil.copy(ROOT / "app" / "requirements.txt", folder)
    (entry,) = re.findall("^app_file: (.+)$", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    port = str(free_port())
    homes = ("DORA_SERVE_CACHE", "XDG_CACHE_HOME", "HF_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in homes}
    environment |= {"HOME": "/proc/none", "GRADIO_SERVER_PORT": port, "DORA_SERVE_BASE": str(smollm2)}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, entry], cwd=folder, env=environment, stdout=out, stderr=out)
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                if "is served at" in log.read_text():
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    assert "Traceback" not in log.read_text()


def test_it_serves_the_example_adapters(url: str) -> None:
    assert httpx.get(url).status_code == 200
    one = client(url)
    names = [row["name"] for row in one.predict(api_name="/adapters")]
    assert names == sorted(path.name for path in (ROOT / "examples" / "adapters").iterdir() if path.is_dir())
    answers = one.predict(QUESTION, ["base", "dates-dora"], max_tokens=24, api_name="/generate")
    assert '"2025-10-02"' in answers[1]["text"]
    assert answers[0]["text"] != answers[1]["text"]
