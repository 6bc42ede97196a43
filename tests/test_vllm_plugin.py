"""The parts of the vLLM plugin that need no vLLM; tests/vllm runs the rest, in an environment that has it."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path

import pytest
import torch

from dora_serve.vllm_plugin import is_tested, register
from dora_serve.vllm_plugin.on_import import on_import
from dora_serve.vllm_plugin.scaling import (
    NO_DORA,
    SEVERAL,
    Batch,
    SlotScales,
    define_operator,
    scale_output,
    scale_rows,
)


def test_vllm_finds_the_plugin() -> None:
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="dora_serve")
    assert found.load() is register


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.32.0", True),
        ("0.32.3", True),
        ("0.32.0+cpu", True),
        ("0.31.9", False),
        ("0.33.0", False),
        ("0.32.0rc1", False),
        ("0.320.0", False),
        ("1.0.32.0", False),
        ("0.32.1.dev7+gabc", False),
    ],
)
def test_the_versions_it_patches(version: str, tested: bool) -> None:
    assert is_tested(version) is tested


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0"])
def test_another_vllm_stays_as_it_is(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = types.ModuleType("vllm.version")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.version", module)
    finders = list(sys.meta_path)
    register()
    assert sys.meta_path == finders
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"this is {version}" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_an_action_follows_an_import_be_it_late_or_long_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders, seen = list(sys.meta_path), []
    on_import("imported_late", lambda: seen.append(sys.modules["imported_late"].value))
    on_import("never_imported_at_all", lambda: seen.append("never"))
    assert not seen
    import imported_late  # type: ignore[import-not-found]

    assert seen == [1]
    assert imported_late.__spec__.origin == str(tmp_path / "imported_late.py")
    on_import("imported_late", lambda: seen.append("at once"))
    assert seen == [1, "at once"]
    sys.meta_path[:] = finders
    del sys.modules["imported_late"]


def _one_batch(
    dtype: torch.dtype, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SlotScales]:
    generator = torch.Generator().manual_seed(1)
    scales = SlotScales(3, 8, torch.device("cpu"), bias)
    norm_scale = 1 + 0.5 * torch.randn(8, generator=generator)
    scales.set(0, norm_scale)
    scales.set(1, None)
    rows = torch.randn(5, 8, generator=generator).to(dtype)
    batch = Batch(torch.zeros(6, dtype=torch.long))
    batch.slots = {0}
    batch.update(torch.tensor([0, 1, -1, 0, -1, 77]), (7, 8, 0, 7, 0), [7, 8])  # one more than there are tokens
    before = rows.clone()
    scale_rows(rows, scales.norm_scale, scales.offset, batch.rows, batch.row)
    return before, rows, norm_scale, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_tokens_of_a_dora_alone_are_scaled_and_rounded_once(dtype: torch.dtype, with_bias: bool) -> None:
    bias = torch.linspace(-40, 40, 8).to(dtype) if with_bias else None
    before, rows, norm_scale, _ = _one_batch(dtype, bias)
    for untouched in (1, 2, 4):
        assert torch.equal(rows[untouched], before[untouched])
    for token in (0, 3):
        # The bias is in what is scaled already, and must come out as it went in.
        shift = torch.zeros(8, dtype=torch.float64) if bias is None else bias.double()
        wanted = norm_scale.double() * (before[token].double() - shift) + shift
        # Two roundings in float32 of terms as large as the bias, and one to the dtype.
        size = before[token].double().abs() + shift.abs()
        allowed = 4 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps / 2 * wanted.abs()
        assert ((rows[token].double() - wanted).abs() <= allowed).all()
        assert not torch.equal(rows[token], before[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("adapters", [(7, 8, 0), (7,)], ids=["three kinds", "one DoRA"])
def test_a_long_batch_is_scaled_as_its_tokens_are_one_by_one(
    dtype: torch.dtype, with_bias: bool, adapters: tuple[int, ...]
) -> None:
    """It goes in blocks, here of 20 tokens, whose last one is not full."""
    width, tokens = 3200, 50
    scales = SlotScales(2, width, torch.device("cpu"), torch.linspace(-4, 4, width).to(dtype) if with_bias else None)
    scales.set(0, torch.linspace(0.5, 1.5, width))
    ids = [adapters[token % len(adapters)] for token in range(tokens)]
    slots = torch.tensor([{7: 0, 8: 1, 0: -1}[one] for one in ids])
    batch = Batch(torch.zeros_like(slots))
    batch.slots = {0}
    before = torch.randn(tokens, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    together, alone = before.clone(), before.clone()
    batch.update(slots, ids, [7, 8])
    scale_rows(together, scales.norm_scale, scales.offset, batch.rows, batch.row)
    for token in range(tokens):
        batch = Batch(torch.zeros(1, dtype=torch.long))
        batch.slots = {0}
        batch.update(slots[token : token + 1], ids[token : token + 1], [7, 8])
        scale_rows(alone[token : token + 1], scales.norm_scale, scales.offset, batch.rows, batch.row)
    assert torch.equal(together, alone)
    changed = (together != before).any(dim=1)
    assert torch.equal(changed, slots == 0)


def test_a_slot_that_is_given_to_a_lora_is_as_new() -> None:
    scales = SlotScales(2, 4, torch.device("cpu"), torch.ones(4))
    fresh = SlotScales(2, 4, torch.device("cpu"), torch.ones(4))
    scales.set(1, torch.full((4,), 3.0))
    assert scales.offset is not None
    assert fresh.offset is not None
    assert not torch.equal(scales.norm_scale, fresh.norm_scale)
    assert not torch.equal(scales.offset, fresh.offset)
    scales.set(1, None)
    assert torch.equal(scales.norm_scale, fresh.norm_scale)
    assert torch.equal(scales.offset, fresh.offset)
    scales.set(0, torch.full((4,), 3.0))
    scales.reset()
    assert torch.equal(scales.norm_scale, fresh.norm_scale)
    assert torch.equal(scales.offset, fresh.offset)


def test_nothing_is_done_for_a_batch_without_a_dora() -> None:
    rows = torch.ones(2, 4)
    scale_rows(rows, torch.full((2, 4), 5.0), None, torch.tensor([0, 0]), torch.tensor([NO_DORA]))
    assert torch.equal(rows, torch.ones(2, 4))


def test_a_batch_knows_whether_a_token_belongs_to_a_dora() -> None:
    batch = Batch(torch.zeros(3, dtype=torch.long))
    batch.slots = {1}
    for adapters, adapter_in_slot, row in (
        ((0, 0, 0), [7, 9], NO_DORA),
        ((7, 7, 0), [7, 9], NO_DORA),
        ((7, 9, 0), [7, 9], SEVERAL),
        ((7, 9, 0), [9, 7], SEVERAL),  # slot 1 holds 7 now
        ((9, 9, 0), [9, 7], NO_DORA),
        ((7, 7, 7), [9, 7], 1),
        ((0, 0, 0), [9, None], NO_DORA),  # a slot that was emptied since
    ):
        slots = [adapter_in_slot.index(one) if one else -1 for one in adapters]
        batch.update(torch.tensor(slots), adapters, adapter_in_slot)
        assert batch.any_in_use is (row != NO_DORA)
        assert batch.row.item() == row
        assert batch.rows.tolist() == [2 if slot == -1 else slot for slot in slots]


@pytest.fixture(scope="module")
def operator() -> None:
    define_operator("CPU")


def test_compiled_code_looks_at_the_batch_whenever_it_runs(operator: None) -> None:
    """As vLLM compiles a layer: in one graph, with buffers that are attributes, and no guards on what is in them."""
    scales = SlotScales(2, 6, torch.device("cpu"), torch.ones(6))
    scales.set(0, torch.linspace(0.5, 3, 6))
    batch, slots = Batch(torch.zeros(16, dtype=torch.long)), torch.full((16,), -1)
    layer = types.SimpleNamespace(punica_wrapper=types.SimpleNamespace(dora=batch), slot_scales=scales)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def forward(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = scale_output(layer, torch.nn.functional.linear(x, weight))
        return output + 1

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    plain = forward(x)
    # Compiled while no DoRA is about, then one comes, then it goes, all without compiling anew.
    assert torch.equal(compiled(x), plain)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    batch.slots = {0}
    slots[:3] = torch.tensor([0, -1, 0])
    batch.update(slots, (7, 0, 7), [7, None])
    scaled = forward(x)
    assert torch.equal(compiled(x), scaled)
    assert torch.equal(scaled[1], plain[1])
    assert not torch.equal(scaled[0], plain[0])
    batch.update(slots, (7, 7, 7), [7, None])
    assert torch.equal(compiled(x)[1], scaled[1]) is False
    assert torch.equal(compiled(x), forward(x))
    batch.update(slots, (0, 0, 0), [7, None])
    assert torch.equal(compiled(x), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
