"""Every family of docs/families.md: trained by PEFT, merged and verified end to end, and compared with PEFT's model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.formats import read_adapter
from dora_serve.reference import attach_adapter
from exporters.pipeline import Export, ExportRequest, run_export
from tests.cases import adapt, ask_here, compare_with_unmerged, load, merge_to, quiet, read_tensors, save
from tests.families import FAMILIES, Family, gemma3, llava, qwen2_5_vl, qwen2_vl

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


def merged_and_verified(root: Path) -> Export:
    """`dora-export merge` of root's folders, whose verification has run the model's own forward."""
    export = run_export(ExportRequest(str(root / "adapter"), str(root / "base"), root / "merged"))
    assert export.verification is not None
    assert export.verification.tensors is not None
    assert export.verification.tensors.exact
    forward = export.verification.forward
    assert forward is not None
    assert forward.ran, forward.reason
    assert forward.passed
    assert not forward.changes_nothing
    return export


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_family_is_merged_and_verified(family: Family, tmp_path: Path) -> None:
    model = family.model()
    base = save(model, tmp_path / "base")
    adapt(load(base, model), tmp_path / "adapter", **family.config)
    export = merged_and_verified(tmp_path)
    assert export.verification is not None
    forward = export.verification.forward
    assert forward is not None
    assert forward.architecture == type(model).__name__
    unreached = [note for note in forward.notes if "did not run on these inputs" in note]
    assert [note.rpartition(": ")[2].rstrip(".").split(", ") for note in unreached] == (
        [list(family.unreached)] if family.unreached else []
    )
    if not family.unreached:
        compare_with_unmerged(tmp_path, model, family.inputs(model))


# Names by generation of transformers: each is a list of renamings of what transformers 5 has at run time.

Renamings = tuple[tuple[str, str], ...]
LLAVA_4_51: Renamings = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi", "multi"),
)
LLAVA_4_57: Renamings = ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),)
QWEN_4_51: Renamings = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
GENERATIONS: dict[str, tuple[Callable[[], Any], dict[str, Renamings], dict[str, Renamings]]] = {
    # Adapters, then checkpoints: those of the Hub have the names of before 4.52, and later versions save them as well.
    "llava": (llava, {"4.51": LLAVA_4_51, "4.57": LLAVA_4_57}, {"Hub": LLAVA_4_51, "4.57": LLAVA_4_57, "5": ()}),
    "gemma3": (gemma3, {"4.51": LLAVA_4_51, "4.57": LLAVA_4_57}, {"Hub": LLAVA_4_51}),
    "qwen2_vl": (qwen2_vl, {"4.51": QWEN_4_51, "5": ()}, {"Hub": QWEN_4_51, "5": ()}),
    "qwen2_5_vl": (qwen2_5_vl, {"4.51": QWEN_4_51}, {"Hub": QWEN_4_51, "5": ()}),
}


def renamed(tensors: Mapping[str, Tensor], renamings: Renamings, prefix: str = "") -> dict[str, Tensor]:
    out = {}
    for name, value in tensors.items():
        short = name.removeprefix(prefix)
        for pattern, replacement in renamings:
            short, found = re.subn(pattern, replacement, short)
            if found:
                break
        out[prefix + short] = value
    return out


@pytest.mark.parametrize("family", GENERATIONS)
def test_adapters_and_checkpoints_of_all_generations(family: str, tmp_path: Path) -> None:
    """Any pair of them gives the tensors that PEFT's own merge in transformers 5 has, and attaches for the forward."""
    make, adapters, checkpoints = GENERATIONS[family]
    model = make()
    targets = ["q_proj", "qkv", "fc1", "linear_1"] + ([] if family == "gemma3" else ["lm_head"])  # tied there
    trained = adapt(model, tmp_path / "trained", target_modules=targets)
    with quiet():
        wanted = {name: value.detach() for name, value in trained.merge_and_unload().named_parameters()}
    weights = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    own = {name: value.detach() for name, value in model.named_parameters()}
    for adapter_names, checkpoint_names in product(adapters, checkpoints):
        root = tmp_path / f"{adapter_names} {checkpoint_names}"
        shutil.copytree(tmp_path / "trained", root / "adapter")
        changed = renamed(weights, adapters[adapter_names], "base_model.model.")
        save_file(changed, root / "adapter" / "adapter_model.safetensors")
        model.config.save_pretrained(root / "base")
        stored = renamed(own, checkpoints[checkpoint_names])
        save_file(stored, root / "base" / "model.safetensors", metadata={"format": "pt"})
        merge_to(root / "base", root / "adapter", root / "merged")
        merged = read_tensors(root / "merged")
        for name, value in renamed(wanted, checkpoints[checkpoint_names]).items():
            # PEFT adds in float32; ours is rounded once from float64.
            torch.testing.assert_close(merged[name], value, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
        with attach_adapter(load(root / "base", model), read_adapter(root / "adapter")) as attached:
            assert len(attached.modules) == len(weights) // 2


def test_the_page_lists_what_is_tested() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in page.splitlines() if line.startswith("|")}
    for family in FAMILIES:
        assert (family.name, f"`{type(family.model()).__name__}`", family.trained) in rows
