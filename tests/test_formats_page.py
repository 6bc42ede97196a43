"""docs/formats.md and the command line know the formats that are read."""

from __future__ import annotations

import re
from pathlib import Path

from dora_serve.console import FORMAT_NAMES
from dora_serve.formats import FORMATS
from exporters.commands.convert import TARGET_NAMES
from exporters.convert.run import LORA, TARGETS, VLLM

PAGE = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")


def test_the_page_and_the_option_list_every_format() -> None:
    assert set(re.findall(r"^\| `([a-z][\w-]*)` \|", PAGE, re.MULTILINE)) == set(FORMATS)
    assert list(FORMAT_NAMES) == list(FORMATS)


def test_the_command_offers_every_target() -> None:
    assert list(TARGET_NAMES) == [*TARGETS, VLLM, LORA]
