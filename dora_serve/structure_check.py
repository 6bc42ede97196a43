"""Whether a merged folder has the tensors and the configuration that the plan wants, before any value is looked at.

Whoever made the folder may have named and left out tensors in ways that change nothing: transformers' save_pretrained
puts `transformer.` in front of gpt2's names, stores a tied tensor once, and drops buffers that are not parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.plan import MergePlan, TensorPlan
from dora_serve.safetensors_file import TensorEntry, read_bytes
from dora_serve.tensor_report import Finding, TensorResult

COMPARE_BYTES = 1 << 22

_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias|position_ids|num_batches_tracked)$"
)
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")

_NOT_THE_MODEL = frozenset(
    {"transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map", "custom_pipelines"}
    | {"id2label", "label2id"}
)
"""Keys of config.json that say who wrote it, how it is stored, called or run, and not what it computes."""


@dataclass(frozen=True)
class Structure:
    """found: planned name to the merged folder's tensor. absent: results for all that is missing or extra."""

    found: Mapping[str, TensorEntry]
    absent: tuple[TensorResult, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def check_structure(plan: MergePlan, merged: ShardedCheckpoint) -> Structure:
    """Pair planned and merged tensors by name and compare the configurations. Reads values only to compare ties."""
    names = match_names(plan.tensors, merged.tensors)
    found = {wanted: merged.tensors[name] for wanted, name in names.items()}
    findings: list[Finding] = []
    notes: list[str] = []
    renamed = {wanted: name for wanted, name in names.items() if wanted != name}
    if renamed:
        wanted, name = next(iter(renamed.items()))
        notes.append(f"{len(renamed)} tensors have other names than in the base: {wanted} is {name}, and so on.")
    absent = [_absent(plan, merged, found, tensor) for name, tensor in plan.tensors.items() if name not in names]
    used = set(names.values())
    absent += [_extra(merged, found, entry) for name, entry in merged.tensors.items() if name not in used]
    untied = [result.name for result in absent if result.verdict == "missing" and result.name in plan.untied]
    missing = [result for result in absent if result.verdict == "missing" and result.name not in untied]
    extra = [result for result in absent if result.verdict == "extra"]
    if missing:
        findings.append(
            Finding(
                "missing-tensor",
                f"{_count(missing, 'tensor is', 'tensors are')} not in the merged folder: {_listing(missing)}.",
                tuple(result.name for result in missing),
            )
        )
    if extra:
        findings.append(
            Finding(
                "extra-tensor",
                f"{_count(extra, 'tensor does', 'tensors do')} not belong to the merged model: {_listing(extra)}.",
                tuple(result.name for result in extra),
            )
        )
    findings += _tie_findings(plan, merged, untied)
    findings += _config_findings(plan, merged)
    if any(result.verdict == "buffer" for result in absent):
        notes.append("Buffers that are not parameters are stored on one side only; the model computes them.")
    return Structure(found, tuple(absent), tuple(findings), tuple(notes))


def match_names(wanted: Collection[str], found: Collection[str]) -> dict[str, str]:
    """Wanted names to found ones: equal names, then one prefix that is added to, or taken from, all others it fits."""
    stored = set(found)
    names = {name: name for name in wanted if name in stored}
    left_wanted = {name for name in wanted if name not in names}
    left_found = [name for name in found if name not in names]
    added, removed = Counter[str](), Counter[str]()
    for name in left_found:
        added.update(prefix for prefix, rest in _splits(name) if rest in left_wanted)
    left = set(left_found)
    for name in left_wanted:
        removed.update(prefix for prefix, rest in _splits(name) if rest in left)
    best_added, best_removed = added.most_common(1), removed.most_common(1)
    if best_added and (not best_removed or best_added[0][1] >= best_removed[0][1]):
        prefix = best_added[0][0]
        names |= {name: prefix + name for name in left_wanted if prefix + name in left}
    elif best_removed:
        prefix = best_removed[0][0]
        names |= {
            name: name.removeprefix(prefix)
            for name in left_wanted
            if name.startswith(prefix) and name.removeprefix(prefix) in left
        }
    return names


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """Every way to cut a dotted name in two: the prefix with its dot, and the rest."""
    position = name.find(".")
    while position >= 0:
        yield name[: position + 1], name[position + 1 :]
        position = name.find(".", position + 1)


def ties(config: Mapping[str, object]) -> bool | None:
    """What a configuration says of tied embeddings; None where it leaves that to the family's default."""
    value = config.get("tie_word_embeddings")
    text_config = config.get("text_config")
    if value is None and isinstance(text_config, dict):
        value = text_config.get("tie_word_embeddings")
    return value if isinstance(value, bool) else None


def same_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two stored tensors are equal byte for byte, dtype and shape included."""
    if (first.dtype, first.shape, first.coding) != (second.dtype, second.shape, second.coding):
        return False
    if (first.path, first.start) == (second.path, second.start):
        return True
    start, size = 0, 1 << 12  # most tensors that differ do so in their first bytes
    while start < first.nbytes:
        size = min(size, first.nbytes - start)
        one = read_bytes(first.path, first.start + start, first.start + start + size)
        if one != read_bytes(second.path, second.start + start, second.start + start + size):
            return False
        start, size = start + size, COMPARE_BYTES
    return True


def _absent(
    plan: MergePlan, merged: ShardedCheckpoint, found: Mapping[str, TensorEntry], tensor: TensorPlan
) -> TensorResult:
    """The result for a planned tensor that the folder lacks."""
    modules = tuple(dict.fromkeys(edit.module for edit in tensor.loras))
    twin = None
    tied = _may_be_tied(tensor.name, tensor.shape) and ties(merged.config) is not False
    if tied and tensor.is_copy and tensor.name not in plan.untied:
        twin = next((name for name in found if _same_copy(tensor, plan.tensors[name])), None)
    if twin is not None:
        return TensorResult(tensor.name, None, modules, tensor.action, "tied", note=f"stored once, as {twin}")
    if tensor.is_copy and _is_buffer(tensor.name, tensor.shape):
        return TensorResult(tensor.name, None, modules, tensor.action, "buffer")
    return TensorResult(tensor.name, None, modules, tensor.action, "missing", note="not in the merged folder")


def _same_copy(first: TensorPlan, second: TensorPlan) -> bool:
    if not (second.is_copy and first.shape == second.shape and _may_be_tied(second.name, second.shape)):
        return False
    one, two = first.source, second.source
    return isinstance(one, TensorEntry) and isinstance(two, TensorEntry) and same_bytes(one, two)


def _extra(merged: ShardedCheckpoint, found: Mapping[str, TensorEntry], entry: TensorEntry) -> TensorResult:
    """The result for a tensor of the folder that the plan does not have."""
    twin = None
    if _may_be_tied(entry.name, entry.shape):
        alike = [name for name, other in found.items() if _may_be_tied(name, other.shape)]
        twin = next((name for name in alike if same_bytes(entry, found[name])), None)
    if twin is not None and ties(merged.config) is not False:
        return TensorResult(entry.name, entry.name, (), "", "tied", note=f"equal to {twin}")
    if _is_buffer(entry.name, entry.shape):
        return TensorResult(entry.name, entry.name, (), "", "buffer")
    return TensorResult(entry.name, entry.name, (), "", "extra", note="not in the plan")


def _may_be_tied(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it could share its values with another: an embedding or a head, never a part of a numbered layer.

    Equal bytes alone prove nothing: norms are all ones, biases all zeros.
    """
    if any(part.isdigit() for part in name.split(".")):
        return False
    return len(shape) > 1 or bool(re.search(r"(lm_head|predictions)\b.*bias$", name))


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Rotary frequencies, position numbers and causal masks: transformers stored them once and now computes them."""
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_BUFFERS.search(name) or (_CAUSAL_MASK.search(name) and (is_mask or prod(shape) == 1)))


def _tie_findings(plan: MergePlan, merged: ShardedCheckpoint, missing: list[str]) -> list[Finding]:
    says_tied = ties(merged.config)
    if plan.untied and (missing or says_tied):
        said = "config.json says that they are tied" if says_tied else "config.json does not say that they are tied"
        lacks = f", and {', '.join(missing)} is not stored" if missing else ""
        return [
            Finding(
                "tied-head",
                "The adapter changes only one side of the tied embeddings, so the merged model needs both: "
                f"{said}{lacks}.",
                plan.untied,
            )
        ]
    planned = ties(plan.base.config)
    if not plan.untied and None not in (planned, says_tied) and planned != says_tied and not _planned_tie(plan):
        return [
            Finding(
                "config",
                f"config.json says tie_word_embeddings = {says_tied}, wanted {planned} as in the base.",
                ("tie_word_embeddings",),
            )
        ]
    return []


def _planned_tie(plan: MergePlan) -> bool:
    return any(path[-1] == "tie_word_embeddings" for path in plan.config_changes)


def _config_findings(plan: MergePlan, merged: ShardedCheckpoint) -> list[Finding]:
    """config.json must have what the plan changes in it. The dtype is left to the tensors themselves."""
    if not plan.base.config:
        return []
    findings = []
    for path, wanted in plan.config_changes.items():
        if path[-1] in ("dtype", "torch_dtype") or (path[-1] == "tie_word_embeddings" and plan.untied):
            continue
        got = _lookup(merged.config, path)
        # How labels are called is the user's; how many there are is the head's.
        labels = path[-1] in ("id2label", "label2id") and isinstance(got, dict) and isinstance(wanted, dict)
        if got == wanted or (labels and isinstance(got, dict) and isinstance(wanted, dict) and len(got) == len(wanted)):
            continue
        name = ".".join(path)
        findings.append(Finding("config", f"config.json says {name} = {got!r}, wanted {wanted!r}.", (name,)))
    return findings


def config_difference(plan: MergePlan, merged: ShardedCheckpoint) -> str | None:
    """What config.json says otherwise than the base's, as a clause; None for nothing that can change the model.

    Only keys that both have are compared, since versions of transformers add keys and rename them (rope_theta became
    rope_parameters). What the plan changes, and ties, are findings of `check_structure` by themselves.
    """
    return difference(plan.base.config, merged.config, judged=plan.config_changes)


def difference(
    wanted: Mapping[str, object], got: Mapping[str, object], *, judged: Collection[tuple[str, ...]] = ()
) -> str | None:
    """`config_difference` of two configurations, but for the paths that are `judged` elsewhere."""
    elsewhere = {*judged, ("tie_word_embeddings",), ("text_config", "tie_word_embeddings")}
    found = {path: pair for path, pair in _differing(wanted, got) if path not in elsewhere}
    if not found:
        return None
    shown = [f"{'.'.join(path)} = {got!r}, wanted {wanted!r}" for path, (wanted, got) in list(found.items())[:6]]
    more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
    return f"config.json says {'; '.join(shown)}{more}"


def _differing(
    wanted: Mapping[str, object], got: Mapping[str, object], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[object, object]]]:
    """The path, wanted and found value of every key that both have with different values."""
    for key, value in wanted.items():
        other = got.get(key)
        # null leaves a value to the family's code, and saving writes what that made of it, or the other way round.
        if value is None or other is None or value == other or key in _NOT_THE_MODEL or key.startswith("_"):
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differing(value, other, (*above, key))
        elif key != "architectures" or not _same_members(value, other):
            yield (*above, key), (value, other)


def _same_members(one: object, other: object) -> bool:
    return isinstance(one, list) and isinstance(other, list) and sorted(map(str, one)) == sorted(map(str, other))


def _lookup(config: Mapping[str, object], path: tuple[str, ...]) -> object:
    value: object = config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _count(results: list[TensorResult], one: str, many: str) -> str:
    return f"{len(results)} {one if len(results) == 1 else many}"


def _listing(results: list[TensorResult], limit: int = 6) -> str:
    names = [result.name for result in results]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
