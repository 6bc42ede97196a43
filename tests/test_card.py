"""Model cards: valid metadata, the proof in them, what somebody wrote kept, and snippets that run as printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from dora_serve.errors import PublishError
from exporters.card import Card, make_card, read_metadata, require_valid
from exporters.card_metadata import base_id, task_of
from exporters.card_section import reproduction

RECORD: dict[str, Any] = {
    "version": "0.1.0",
    "created": "2026-01-02T03:04:05+00:00",
    "command": ["dora-export", "merge", "anna/dates:best", "-o", "out", "--push", "anna/x", "--public", "--json"],
    "exporter": "safetensors",
    "base": {"id": "org/base", "path": None, "revision": "b" * 40, "sha256": {"model.safetensors": "1" * 64}},
    "adapter": {
        "id": "anna/dates",
        "revision": "a" * 40,
        "sha256": {"adapter_model.safetensors": "2" * 64},
        "format": "peft",
        "method": "DoRA",
        "trained_on": "org/base",
    },
    "actions": {"copied": 62, "DoRA": 210},
    "files": {
        "config.json": {"bytes": 2, "sha256": "3" * 64},
        "model.safetensors": {"bytes": 9, "sha256": "4" * 64},
        "tokenizer.json": {"bytes": 9, "sha256": "5" * 64},
    },
    "verification": {
        "passed": True,
        "failures": [],
        "tensors": {
            "tensors": 272,
            "verdicts": {"exact": 272},
            "elements": 1000,
            "differing_elements": 0,
            "largest_error_in_spacings": 0.5,
            "norms_checked": 12,
        },
        "forward": {"ran": False, "reason": "No `room` | for it."},
    },
}
CONFIG = {"architectures": ["LlamaForCausalLM"]}
BASE_CARD = {"license": "other", "license_name": "base-1.0", "license_link": "LICENSE", "language": ["de", "en"]}


def card_of(record: dict[str, Any] = RECORD, existing: str | None = None, **given: Any) -> Card:
    options: dict[str, Any] = {
        "repo_id": "anna/x",
        "revision": None,
        "files": [*record["files"], "README.md"],
        "config": CONFIG,
        "base_card": BASE_CARD,
    }
    return make_card(record, existing=existing, **{**options, **given})


def test_the_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    card = card_of()
    require_valid(card.text)
    path = tmp_path / "README.md"
    path.write_text(card.text)
    assert (
        metadata_load(path)
        == ModelCard(card.text).data.to_dict()
        == {  # type: ignore[no-untyped-call]
            "base_model": "org/base",
            "base_model_relation": "finetune",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            **BASE_CARD,
            "tags": ["dora", "merged", "dora-serve"],
        }
    )
    assert card.notes == ()


@pytest.mark.parametrize(
    ("names", "facts", "wanted"),
    [
        (["model.onnx", "config.json"], {"exporter": "onnx"}, ("finetune", "onnx", ["dora", "merged", "onnx"])),
        (
            ["model.onnx"],
            {"exporter": "onnx", "onnx": {"quantize": "int8"}},
            ("quantized", "onnx", ["dora", "merged", "onnx"]),
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            {"exporter": "convert", "converted_to": "peft"},
            ("adapter", "peft", ["dora"]),
        ),
    ],
)
def test_other_exports(names: list[str], facts: dict[str, Any], wanted: tuple[str, str, list[str]]) -> None:
    record = {**RECORD, **facts, "files": {name: {"bytes": 1, "sha256": None} for name in names}}
    card = card_of(record)
    require_valid(card.text)
    relation, library, tags = wanted
    assert card.metadata["base_model_relation"] == relation
    assert card.metadata["library_name"] == library
    assert card.metadata["tags"] == [*tags, "dora-serve"]


def test_a_local_base_goes_by_what_the_adapter_was_trained_on(tmp_path: Path) -> None:
    local = {"id": "/home/anna/base", "path": "/home/anna/base", "revision": None, "sha256": None}
    record = {**RECORD, "base": local}
    assert base_id(record) == "org/base"
    assert "/home/anna" not in card_of(record).text
    nameless = {**record, "adapter": {**RECORD["adapter"], "trained_on": "/somewhere/else"}}
    card = card_of(nameless, base_card={})
    assert "base_model" not in card.metadata
    assert "base_model_relation" not in card.metadata
    assert [note.split(":")[0] for note in card.notes] == ["The card names no base_model", "The card names no license"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("RobertaForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("WhisperForConditionalGeneration", None),
        (None, None),
    ],
)
def test_the_task_follows_from_the_architecture(name: str | None, task: str | None) -> None:
    assert task_of({"architectures": [name]} if name else {}) == task


def test_the_command_can_be_run_by_others() -> None:
    base, adapter = "org/base@" + "b" * 40, "anna/dates@" + "a" * 40 + ":best"
    assert reproduction(RECORD) == f"dora-export merge {adapter} -o out --base {base}"
    given = {**RECORD, "command": ["dora-export", "merge", "a b", "--base=org/base", "--revision=x", "-o", "out"]}
    assert reproduction(given) == f"dora-export merge 'a b' --base={base} -o out"
    assert reproduction({**RECORD, "command": []}) == (
        f"dora-export merge anna/dates@{'a' * 40} --base {base} --to safetensors -o OUT"
    )


def test_the_card_holds_the_proof_and_says_where_there_is_none() -> None:
    card = card_of().text
    for words in ("272: 272 exact", "0 of 1,000", "`" + "1" * 64 + "`", "`" + "2" * 64 + "`", "`" + "4" * 64 + "`"):
        assert words in card
    assert "Not run" not in card
    assert r"not run. No \`room\` \| for it." in card
    assert "arxiv.org/abs/2402.09353" in card
    assert "**Not verified.**" in card_of({**RECORD, "verification": None}).text
    failed = card_of({**RECORD, "verification": {"passed": False, "failures": ["layer 3 <b>"], "tensors": None}}).text
    assert "**This failed its verification**" in failed
    assert r"layer 3 \<b\>" in failed


def test_onnx_differences_are_there_where_there_is_a_graph() -> None:
    check = {"max_abs": 9.47e-5, "greedy_equal": 8, "provider": "CPUExecutionProvider", "failures": [], "passed": True}
    assert "| max abs | 9.47e-05 |" in card_of({**RECORD, "onnx_check": check}).text
    assert "ONNX against torch" not in card_of().text


# A card that is there

MINE = """---
# I chose these
license: mit
tags:
- poetry
- dora
datasets:
  - anna/poems
---
# My model

It writes poems.
"""


def test_what_somebody_wrote_is_kept(tmp_path: Path) -> None:
    card = card_of(existing=MINE)
    require_valid(card.text)
    assert card.text.startswith("---\n# I chose these\nlicense: mit\n")
    assert "# My model\n\nIt writes poems.\n" in card.text
    metadata = read_metadata(card.text)
    assert metadata["license"] == "mit"
    assert metadata["datasets"] == ["anna/poems"]
    assert metadata["tags"] == ["poetry", "dora", "merged", "dora-serve"]
    assert metadata["base_model"] == "org/base"
    assert card.notes == ("The card says license: mit, and this export other: the card's is kept.",)


def test_the_section_alone_is_brought_up_to_date() -> None:
    first = card_of(existing=MINE).text
    edited = first.replace("It writes poems.", "It writes odes.") + "\n## Thanks\n\nTo all.\n"
    assert card_of(existing=edited).text == edited
    other = {
        **RECORD,
        "created": "2027-01-01T00:00:00+00:00",
        "base": {**RECORD["base"], "id": "org/newer"},
        "adapter": {**RECORD["adapter"], "method": "LoRA"},
    }
    second = card_of(other, existing=edited)
    assert second.text.count("<!-- dora-export: begin") == second.text.count("<!-- dora-export: end") == 1
    assert "It writes odes." in second.text
    assert second.text.endswith("\n## Thanks\n\nTo all.\n")
    assert "2027-01-01" in second.text
    assert "2026-01-02" not in second.text
    metadata = read_metadata(second.text)
    # What we wrote goes with us; what somebody chose stays.
    assert (metadata["base_model"], metadata["license"]) == ("org/newer", "mit")
    assert sorted(metadata["tags"]) == ["dora-serve", "lora", "merged", "poetry"]


def test_a_value_that_somebody_changed_afterwards_is_theirs() -> None:
    first = card_of().text.replace("pipeline_tag: text-generation\n", "pipeline_tag: summarization\n", 1)
    second = card_of(existing=first)
    assert second.metadata["pipeline_tag"] == "summarization"
    assert "the card's is kept" in second.notes[0]


@pytest.mark.parametrize("existing", ["# Bare\n", "", "\n\n", "---\n---\n# Empty\n"])
def test_a_card_without_metadata_gets_some(existing: str) -> None:
    card = card_of(existing=existing)
    require_valid(card.text)
    assert read_metadata(card.text)["base_model"] == "org/base"
    assert existing.strip().removeprefix("---\n---\n") in card.text


def test_line_ends_are_kept() -> None:
    card = card_of(existing=MINE.replace("\n", "\r\n")).text
    assert "\n" not in card.replace("\r\n", "")
    require_valid(card)
    assert card_of(existing=card).text == card


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ("license: [", "no YAML"),
        ("- a list", "wanted keys and values"),
        ("base_model: a b c", "no id"),
        ("base_model_relation: cousin", "wanted one of adapter, merge, quantized, finetune"),
        ("library_name: [x]", "library_name is a list"),
        ("language: [1]", "language is [1]"),
    ],
)
def test_metadata_that_nobody_would_take(front: str, words: str) -> None:
    with pytest.raises(PublishError, match=re.escape(words)):
        require_valid(card_of(existing=f"---\n{front}\n---\n# Mine\n").text)


def test_a_value_cannot_end_the_comment() -> None:
    card = card_of(base_card={"license": "x --> <script>"}).text
    assert "--> <script>" not in card.split("## DoRA")[0].split("<!--")[1]
    assert card_of(existing=card, base_card={"license": "x --> <script>"}).text == card


def test_the_record_of_another_exporter_is_enough() -> None:
    bare = {"exporter": "onnx-adapters", "files": {"model.onnx": {"bytes": 1, "sha256": None}}}
    card = card_of(json.loads(json.dumps(bare)))
    require_valid(card.text)
    assert "as onnx-adapters" in card.text
