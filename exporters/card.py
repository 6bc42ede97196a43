"""Model cards: one that proves an export, or the section of it in a card that somebody wrote.

A card that exists is kept. Only what stands between the markers is ours, and of the metadata what was not there before
or still has the value that we gave it, which the first marker remembers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_serve.errors import PublishError
from exporters.card_metadata import RELATIONS, metadata_of
from exporters.card_section import section_of
from exporters.card_snippets import Published

END = "<!-- dora-export: end -->"
_SECTION = re.compile(r"<!-- dora-export: begin( \{.*?\})? -->\n.*?<!-- dora-export: end -->", re.DOTALL)
_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Card:
    """text: all of README.md. metadata: at its head. notes: what a user should be told."""

    text: str
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]


def make_card(
    record: Mapping[str, Any],
    *,
    repo_id: str,
    revision: str | None,
    files: Sequence[str],
    config: Mapping[str, Any],
    base_card: Mapping[str, Any],
    existing: str | None,
) -> Card:
    """The card of an export in a repository.

    record: the contents of dora_export.json. config: of config.json. base_card: the metadata of the base's card.
    existing: the card that is there, which is kept.

    Raises PublishError where the existing one has no sound metadata.
    """
    ours = metadata_of(record, config, base_card)
    published = Published(
        repo_id=repo_id,
        revision=revision,
        files=files,
        config=config,
        pipeline_tag=ours.get("pipeline_tag"),
        base=ours.get("base_model"),
        onnx_inputs=_graph_inputs(record.get("onnx")),
    )
    remembered = json.dumps(ours).replace(">", "\\u003e")  # or a value could end the comment
    begin = f"<!-- dora-export: begin {remembered} -->"
    section = f"{begin}\n{section_of(record, published)}\n{END}"
    notes = _notes(ours)
    if existing is None or not existing.strip():
        text = f"---\n{_yaml(ours)}---\n\n# {repo_id.rpartition('/')[2]}\n\n{section}\n"
        return Card(text, ours, notes)
    ending = "\r\n" if "\r\n" in existing else "\n"
    text, metadata, kept = _updated(existing.replace("\r\n", "\n"), ours, section)
    return Card(text.replace("\n", ending), metadata, (*notes, *kept))


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata at the head of a card, empty where there is none. Raises PublishError where it is no YAML object."""
    import yaml

    front = _FRONT.match(card.replace("\r\n", "\n"))
    if front is None:
        return {}
    try:
        found = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise _unsound(f"it is no YAML ({problem})") from error
    if not isinstance(found, dict | None):
        raise _unsound(f"it is a {type(found).__name__}, wanted keys and values")
    return found or {}


def require_valid(card: str) -> None:
    """Raise PublishError where huggingface_hub, or the Hub, would not take the card's metadata.

    huggingface_hub parses it as it does before an upload; of the Hub's own rules those are held that can be known
    without it: the types of the fields, the form of ids, and the relations that there are.
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception as error:  # yaml's own kinds, ValueError, TypeError
        raise _unsound(" ".join(str(error).split())) from error
    problems = []
    for key in ("license", "library_name", "pipeline_tag", "license_name", "license_link"):
        if key in data and not isinstance(data[key], str if key != "license" else (str, list)):
            problems.append(f"{key} is a {type(data[key]).__name__}, wanted text")
    for key in ("tags", "language", "base_model"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            problems.append(f"{key} is {values!r}, wanted text or a list of texts")
        elif key == "base_model":
            listed = values if isinstance(values, list) else [values]
            problems += [f"base_model {name!r} is no id" for name in listed if not _MODEL_ID.fullmatch(name)]
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        problems.append(f"base_model_relation is {data['base_model_relation']!r}, wanted one of {', '.join(RELATIONS)}")
    if problems:
        raise _unsound("; ".join(problems))


def _updated(existing: str, ours: Mapping[str, Any], section: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The card with our section in its place, its metadata, and what was left as it is against ours."""
    metadata = read_metadata(existing)
    before = _remembered(existing)
    wanted, notes = dict(metadata), []
    for key, value in ours.items():
        if key == "tags":
            had = metadata.get("tags") or []
            had = list(had) if isinstance(had, list) else [had]
            dropped = set(before.get("tags") or ()) - set(value)
            wanted["tags"] = [*(tag for tag in had if tag not in dropped), *(tag for tag in value if tag not in had)]
        elif metadata.get(key) in (None, before.get(key)):
            wanted[key] = value
        elif metadata[key] not in (value, [value]):
            notes.append(f"The card says {key}: {metadata[key]}, and this export {value}: the card's is kept.")
    for key in before.keys() - ours.keys():
        if key != "tags" and metadata.get(key) == before[key]:
            del wanted[key]
    text = _with_metadata(existing, metadata, wanted)
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1), wanted, tuple(notes)
    return f"{text.rstrip()}\n\n{section}\n", wanted, tuple(notes)


def _with_metadata(card: str, metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The card with other metadata. The lines of a key that stays are left alone, comments and all."""
    import yaml

    if wanted == metadata:
        return card
    front = _FRONT.match(card)
    if front is None:
        return f"---\n{_yaml(wanted)}---\n\n{card.lstrip()}"
    block = front[1]
    for key, value in metadata.items():
        if wanted.get(key) != value:
            block = re.sub(rf"^{re.escape(str(key))}[ \t]*:.*\n(?:[ \t-].*\n|\n)*", "", block, flags=re.MULTILINE)
    block += _yaml({key: value for key, value in wanted.items() if metadata.get(key) != value})
    try:
        faithful = yaml.safe_load(block) == dict(wanted)
    except yaml.YAMLError:
        faithful = False
    if not faithful:  # an odd way to write a key: the values matter more than the comments
        block = _yaml(wanted)
    return f"---\n{block}---\n{card[front.end() :]}"


def _remembered(card: str) -> dict[str, Any]:
    """The metadata that we gave the card last time, as the first marker remembers it."""
    found = _SECTION.search(card)
    try:
        value = json.loads(found[1]) if found and found[1] else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)) if values else ""


def _graph_inputs(onnx: object) -> tuple[str, ...]:
    """Of a model that is one graph; empty for one of several, and where the record does not say."""
    graphs = onnx.get("graphs") if isinstance(onnx, Mapping) else None
    return tuple(graphs[0].get("inputs") or ()) if isinstance(graphs, list) and len(graphs) == 1 else ()


def _notes(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if "base_model" not in metadata:
        notes.append("The card names no base_model: the base was a local folder, and no Hub id of it is known.")
    if "license" not in metadata:
        notes.append("The card names no license: the base's card has none, or cannot be read.")
    return tuple(notes)


def _unsound(got: str) -> PublishError:
    return PublishError(
        f"The metadata of the model card would not be accepted: {got}.",
        remedy="Mend the part of README.md between the lines of ---, or take it out.",
    )
