"""The part of a model card that says what was merged into what, how to do it again, and what proves it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dora_serve.hub import split_spec
from exporters.card_metadata import is_adapter
from exporters.card_snippets import Published, snippets
from exporters.manifest import CARD_NAME, recorded_files
from exporters.publishable import proof_of

_MOST_HASHES = 20
_DORA = """@inproceedings{liu2024dora,
  title     = {{DoRA}: Weight-Decomposed Low-Rank Adaptation},
  author    = {Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and Wang, Yu-Chiang Frank and
               Cheng, Kwang-Ting and Chen, Min-Hung},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2402.09353}
}"""
_LORA = """@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and
               Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://arxiv.org/abs/2106.09685}
}"""
# Of `merge`, and of no use to who does it again: what says where to publish, and how to print. With what follows it.
_NOT_REPEATED: Mapping[str, int] = {
    "--push": 1,
    "--revision": 1,
    "--public": 0,
    "--pr": 0,
    "--unverified": 0,
    "--json": 0,
    "--overwrite": 0,
}


def section_of(record: Mapping[str, Any], published: Published) -> str:
    """Markdown, without the markers around it."""
    method = _field(record.get("adapter"), "method")
    parts = [f"## {_title(record)}", _provenance(record), _reproduction(record), _proof(record)]
    onnx = record.get("onnx_check")
    if isinstance(onnx, Mapping):
        parts.append(f"### ONNX against torch\n\n{_onnx_table(onnx)}")
    code = snippets(published)
    if code:
        shown = (f"With {library}:\n\n```python\n{text}\n```" for library, text in code.items())
        parts.append("### Use\n\n" + "\n\n".join(shown))
    parts.append(_files(record))
    parts.append("### Citation\n\n```bibtex\n" + (_LORA if method == "LoRA" else _DORA) + "\n```")
    return "\n\n".join(parts)


def reproduction(record: Mapping[str, Any]) -> str | None:
    """The command that makes the folder again, with what lies on the Hub pinned to its commit."""
    command = [str(part) for part in record.get("command") or ()]
    base, adapter = record.get("base"), record.get("adapter")
    if not command:
        if not _field(adapter, "id") or not _field(base, "id"):
            return None
        command = ["dora-export", "merge", _field(adapter, "id"), "--base", _field(base, "id")]
        command += ["--to", str(record.get("exporter")), "-o", "OUT"]
    kept, skip = [], 0
    for part in command:
        name, _, value = part.partition("=")
        if skip:
            skip -= 1
        elif name in _NOT_REPEATED:
            skip = 0 if value else _NOT_REPEATED[name]
        else:
            kept.append(_pinned(part, base, adapter))
    if not any(part == "--base" or part.startswith("--base=") for part in kept) and _field(base, "revision"):
        kept += ["--base", f"{_field(base, 'id')}@{_field(base, 'revision')}"]
    return shlex.join(kept)


def _pinned(part: str, *sources: object) -> str:
    """An argument that is a Hub id of one of the sources, with the commit that was used."""
    option, equals, value = part.partition("=") if part.startswith("--") else ("", "", part)
    named = split_spec(value)
    for source in sources:
        if named is not None and _field(source, "revision") and named.repo_id == _field(source, "id"):
            folder = f":{named.subfolder}" if named.subfolder else ""
            return f"{option}{equals}{named.repo_id}@{_field(source, 'revision')}{folder}"
    return part


def _title(record: Mapping[str, Any]) -> str:
    method = _field(record.get("adapter"), "method") or "Adapter"
    if is_adapter(record):
        return f"{method} adapter, as {record.get('converted_to')} writes it"
    exporter = {"safetensors": "", "onnx": ", as ONNX"}.get(str(record.get("exporter")), f", as {record['exporter']}")
    return f"{method} merged into its base{exporter}"


def _provenance(record: Mapping[str, Any]) -> str:
    rows = []
    for role in ("base", "adapter"):
        source = record.get(role)
        if not isinstance(source, Mapping):
            continue
        what = f" ({_field(source, 'method')}, {_field(source, 'format')})" if source.get("method") else ""
        hashes = source.get("sha256") or {}
        shown = "<br>".join(f"{_code(name)} {_code(value)}" for name, value in list(hashes.items())[:_MOST_HASHES])
        more = f"<br>and {len(hashes) - _MOST_HASHES} more" if len(hashes) > _MOST_HASHES else ""
        rows.append([role + what, _named(source), _code(source.get("revision") or ""), shown + more or "not computed"])
    text = _table(("", "model", "revision", "sha256"), rows)
    actions = record.get("actions")
    if isinstance(actions, Mapping) and actions:
        counted = ", ".join(f"{count} {action}" for action, count in actions.items())
        text += f"\n\nTensors: {counted}. Made by dora-serve {record.get('version')} on {record.get('created')}."
    return text


def _named(source: Mapping[str, Any]) -> str:
    """A link for the Hub's, and of a path only its last part: where it lay on a machine concerns nobody."""
    name = _field(source, "id")
    if source.get("revision"):
        return f"[{_text(name)}](https://huggingface.co/{name}/tree/{source['revision']})"
    trained_on = f", trained on {_code(source['trained_on'])}" if source.get("trained_on") else ""
    return f"{_code(PurePath(name).name)} (a local folder{trained_on})"


def _reproduction(record: Mapping[str, Any]) -> str:
    command = reproduction(record)
    head = "### Made with\n\n"
    return f"{head}```sh\n{command}\n```" if command else head + "By hand, from Python: no command was recorded."


def _proof(record: Mapping[str, Any]) -> str:
    head = "### Verification\n\n"
    verification = record.get("verification")
    proof = proof_of(record)
    if not isinstance(verification, Mapping):
        failures = "".join(f"\n- {_text(failure)}" for failure in record.get("failures") or ())
        if failures:
            return f"{head}**This failed its verification**, and was published all the same:\n{failures}"
        what = (
            "this adapter is the one it was made of" if is_adapter(record) else "these weights equal the unmerged model"
        )
        return f"{head}**Not verified.** Nothing here shows that {what}."
    text = ""
    if proof == "failed":
        reasons = dict.fromkeys([*(verification.get("failures") or ()), *(record.get("failures") or ())])
        listed = "".join(f"\n- {_text(reason)}" for reason in list(reasons)[:20])
        text = f"**This failed its verification**, and was published all the same:\n{listed}\n\n"
    tables = [table for table in (_tensor_table(verification), _forward_table(verification)) if table]
    return head + text + "\n\n".join(tables)


def _tensor_table(verification: Mapping[str, Any]) -> str:
    tensors = verification.get("tensors")
    if not isinstance(tensors, Mapping):
        return ""
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in (tensors.get("verdicts") or {}).items())
    rows = [
        ["tensors", f"{tensors.get('tensors')}: {verdicts}"],
        [
            "elements that are not the formula rounded once",
            f"{_count(tensors.get('differing_elements'))} of {_count(tensors.get('elements'))}",
        ],
        ["largest error, in spacings of the dtype", _number(tensors.get("largest_error_in_spacings"))],
    ]
    if tensors.get("norms_checked"):
        rows.append(["row norms compared with the magnitudes", _count(tensors["norms_checked"])])
    return _table(("every tensor, against a computation that shares no code with the merge", ""), rows)


def _forward_table(verification: Mapping[str, Any]) -> str:
    forward = verification.get("forward")
    if not isinstance(forward, Mapping):
        return ""
    if not forward.get("ran"):
        return f"Forward: not run. {_text(forward.get('reason') or '')}"
    wide, deployed = forward.get("wide_dtype"), forward.get("deployed_dtype")
    rows = []
    for label, key, tolerance in (
        ("base (the effect)", "base", None),
        (f"formula rounded to {deployed}, run in {wide}", "rounded", None),
        (f"merged, run in {wide}", "merged_wide", "tolerance_wide"),
        (f"unmerged, run in {deployed}", "unmerged_deployed", None),
        (f"merged, run in {deployed}", "merged_deployed", "tolerance_deployed"),
    ):
        found = forward.get(key)
        if not isinstance(found, Mapping):
            continue
        limit = (forward.get(tolerance) if tolerance else None) or {}
        greedy = found.get("greedy") or {}
        rows.append(
            [
                label,
                _number(found.get("largest")),
                _number(found.get("rms")),
                _number(limit.get("rms")),
                _number(found.get("kl")),
                _number(limit.get("kl")),
                f"{found['top1']:.1%}" if isinstance(found.get("top1"), float) else "",
                _number(found.get("perplexity")),
                f"{greedy['equal']} of {greedy['compared']}" if greedy else "",
            ]
        )
    whose = "PEFT's" if forward.get("reference") == "peft" else "the paper's"
    title = (
        f"Logits of {forward.get('architecture')} on {forward.get('device')}, {forward.get('inputs')}, "
        f"{forward.get('positions')} positions: how far from {whose} unmerged forward in {wide}."
    )
    header = ("model", "largest", "rms", "allowed", "KL", "allowed", "same top-1", "perplexity", "greedy equal")
    return f"{_text(title)}\n\n{_table(header, rows)}"


def _onnx_table(check: Mapping[str, Any]) -> str:
    """Whatever the check measured, by the names that it has there."""
    rows = [
        [_text(key.replace("_", " ")), _number(value)]
        for key, value in check.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    ]
    return _table(("ONNX Runtime against torch", ""), rows)


def _files(record: Mapping[str, Any]) -> str:
    files = {name: facts for name, facts in recorded_files(record).items() if name != CARD_NAME}
    rows = [
        [_code(name), f"{facts.nbytes:,}", _code(facts.sha256) if facts.sha256 else "not computed"]
        for name, facts in list(files.items())[:_MOST_HASHES]
    ]
    more = f"\n\nand {len(files) - _MOST_HASHES} more, in `dora_export.json`" if len(files) > _MOST_HASHES else ""
    return f"### Files\n\n{_table(('file', 'bytes', 'sha256'), rows)}{more}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _field(source: object, key: str) -> str:
    value = source.get(key) if isinstance(source, Mapping) else None
    return str(value) if value else ""


def _text(value: object) -> str:
    """Words from outside, which may not become markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(value).split()))


def _code(value: object) -> str:
    text = re.sub(r"[`|\s]+", " ", str(value)).strip()
    return f"`{text}`" if text else ""


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _number(value: object) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return ""
    return f"{value:.3g}" if math.isfinite(value) else str(value)
