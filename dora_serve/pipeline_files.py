"""Whether the files of a pipeline that are no model's are what they were: schedulers, tokenizers, processors, pickles.

Whoever made the folder may have written them anew: libraries put their versions into JSON, under keys that start with
an underscore, and a tokenizer into other files. Texts for people (README, licences) are not judged.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable
from pathlib import Path

from dora_serve.pipeline_folder import INDEX_NAME
from dora_serve.pipeline_plan import PipelinePlan

_FOR_PEOPLE = (".md", ".txt", ".png", ".jpg", ".jpeg", ".webp", ".gif")
_PROSE = "Two cats, café-au-lait & snow-white, sit on the 3rd step;  «über» 猫 🙂 don't they?"


def changed_files(plan: PipelinePlan, merged: Path) -> tuple[str, ...]:
    """What is missing or says otherwise than in the base, in sentences. model_index.json is judged elsewhere."""
    wrong = [
        (source, relative)
        for source, relative in plan.side_files
        if len(relative.parts) > 1 or relative.suffix not in (*_FOR_PEOPLE, "")
        if relative.name != INDEX_NAME and not relative.name.endswith(".md")
        if not _same_contents(source, merged / relative)
    ]
    folders = {relative.parent for _, relative in wrong}
    equal = {folder for folder in folders if _loads_the_same(plan.base.folder / folder, merged / folder)}
    return tuple(_sentences(merged, (relative for _, relative in wrong if relative.parent not in equal)))


def _sentences(merged: Path, wrong: Iterable[Path]) -> Iterable[str]:
    for relative in wrong:
        what = "is not what the base has" if (merged / relative).is_file() else "is in the base, and not in the folder"
        yield f"{relative.as_posix()} {what}."


def _same_contents(one: Path, other: Path) -> bool:
    if not other.is_file():
        return False
    if filecmp.cmp(one, other, shallow=False):
        return True
    if one.suffix != ".json":
        return False
    try:
        wanted, got = (json.loads(path.read_text(encoding="utf-8")) for path in (one, other))
    except (OSError, ValueError, RecursionError):
        return False
    if not (isinstance(wanted, dict) and isinstance(got, dict)):
        return bool(wanted == got)
    # Saving a scheduler writes the defaults of the keys that were not there.
    return all(
        value is None or (key.startswith("_") and key != "_class_name") or got.get(key) == value
        for key, value in wanted.items()
    )


def _loads_the_same(one: Path, other: Path) -> bool:
    """Whether transformers makes the same tokenizer or image processor of both folders. No code of theirs is run."""
    if one.name.startswith("tokenizer"):
        say = _tokenizer
    elif (one / "preprocessor_config.json").is_file():
        say = _image_processor
    else:
        return False
    try:
        return say(one) == say(other)
    except Exception:  # whatever it is, it is no proof
        return False


def _tokenizer(folder: Path) -> object:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = found(_PROSE, padding="max_length", truncation=True, max_length=77)["input_ids"]
    return type(found).__name__, found.get_vocab(), found.model_max_length, ids


def _image_processor(folder: Path) -> object:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
