"""Every planted fault is caught, and named for what it is; the right merge beside it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import CheckpointError
from dora_serve.formats import read_adapter
from dora_serve.plan import MergePlan
from dora_serve.resolve import plan_merge
from dora_serve.structure_check import config_difference
from dora_serve.tensor_check import check_tensors
from tests.faults import FAULTS, UNREADABLE, WORLDS, World


@dataclass(frozen=True)
class Planned:
    world: World
    plan: MergePlan


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planned]:
    """Worlds by name, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("worlds")

    @cache
    def make(name: str) -> Planned:
        world = WORLDS[name](root)
        return Planned(world, plan_merge(open_checkpoint(world.base), read_adapter(world.adapter)))

    return make


@pytest.mark.parametrize("name", [name for name in WORLDS if name != "tied"])
def test_the_right_merge_passes(planned: Callable[[str], Planned], name: str) -> None:
    """PEFT's own, in float64. Of the tied world it makes none: that is one of the faults."""
    here = planned(name)
    merged = open_checkpoint(here.world.merged)
    report = check_tensors(here.plan, merged)
    assert report.passed, [finding.message for finding in report.findings]
    assert config_difference(here.plan, merged) is None


CASES = [(name, world) for name, fault in FAULTS.items() for world in fault.worlds]


@pytest.mark.parametrize(("name", "world"), CASES, ids=[f"{name} in {world}" for name, world in CASES])
def test_a_planted_fault_is_caught_and_named(
    planned: Callable[[str], Planned], name: str, world: str, tmp_path: Path
) -> None:
    fault, here = FAULTS[name], planned(world)
    out = tmp_path / "out"
    fault.write(here.world, out)
    if fault.kind == UNREADABLE:
        with pytest.raises(CheckpointError):
            open_checkpoint(out)
        return
    report = check_tensors(here.plan, open_checkpoint(out))
    assert not report.passed
    found = {finding.kind: finding for finding in report.findings}
    messages = [finding.message for finding in report.findings]
    assert found.keys() == {fault.kind, *fault.besides}, messages
    assert all(finding.modules for finding in report.findings)
    if fault.part:
        assert all(fault.part in module for module in found[fault.kind].modules)
        assert fault.part in report.ranked[0].module


def test_the_faults_are_many_and_of_many_kinds() -> None:
    assert len(FAULTS) >= 50
    assert len({fault.kind for fault in FAULTS.values()}) >= 25
