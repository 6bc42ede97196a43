"""Every kind of layer, alone in a process and split over two, against PEFT."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from dora_serve.checkpoint import open_checkpoint
from dora_serve.formats import read_adapter
from dora_serve.norm_scale_file import fingerprint, write_norm_scales
from dora_serve.resolve import plan_merge
from dora_serve.stored_norm_scales import stored_norm_scales
from tests.vllm.cases import Answer, Ask, Swap, assert_same, peft_answers, serve, token_prompts

TOKENS = 16
TOLERANCE = 5e-5  # float32: a few hundred roundings of logits around 10

PROMPTS = token_prompts()


@pytest.fixture(scope="module")
def wanted(tiny: Mapping[str, Path]) -> dict[str | None, list[Answer]]:
    adapters = {None: None, "dora": tiny["dora"], "lora": tiny["lora"]}
    answers = {name: peft_answers(tiny["base"], path, PROMPTS, TOKENS) for name, path in adapters.items()}
    everything = [tuple(answer.tokens) for answers in answers.values() for answer in answers]
    assert len(set(everything)) == len(everything)  # each adapter says something of its own
    return answers


def asks(*names: str | None) -> list[Ask]:
    return [Ask(prompt, name, TOKENS) for prompt in PROMPTS for name in names]


def test_base_lora_and_dora_in_one_batch_and_alone(
    tiny: Mapping[str, Path], wanted: Mapping[str | None, list[Answer]], tmp_path: Path
) -> None:
    base, dora = open_checkpoint(tiny["base"]), tiny["dora"]
    scales = stored_norm_scales(plan_merge(base, read_adapter(dora)))
    known = shutil.copytree(dora, tmp_path / "known")
    write_norm_scales(known, scales, fingerprint(base))
    # Served as the file says, wrong as it is: so it is read, and not computed anew.
    doubled = shutil.copytree(dora, tmp_path / "doubled")
    write_norm_scales(doubled, {name: 2 * scale for name, scale in scales.items()}, fingerprint(base))
    # Of another base, or beside another adapter, it says nothing.
    other_base = shutil.copytree(dora, tmp_path / "other_base")
    write_norm_scales(other_base, {name: 2 * scale for name, scale in scales.items()}, "0" * 64)
    stale = shutil.copytree(doubled, tmp_path / "stale")
    (stale / "adapter_config.json").write_text((stale / "adapter_config.json").read_text() + "\n")
    alike = {"known": known, "other_base": other_base, "stale": stale}
    adapters = {"dora": dora, "lora": tiny["lora"], "doubled": doubled, **alike}
    names = (None, "dora", "lora")
    batches = [asks(*names), asks("dora"), asks("lora"), asks(None), *(asks(name) for name in ("doubled", *alike))]
    mixed, *alone = serve(tiny["base"], adapters, batches, skip_tokenizer_init=True)
    for position, name in enumerate(names):
        assert_same(mixed[position::3], wanted[name], TOLERANCE)
    for answers, name in zip(alone, ("dora", "lora", None), strict=False):
        assert_same(answers, wanted[name], TOLERANCE)
    said_twice, *others = alone[3:]
    assert [one.tokens for one in said_twice] != [one.tokens for one in wanted["dora"]]
    for answers in others:
        assert_same(answers, wanted["dora"], TOLERANCE)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole_loras", "fully_sharded_loras"])
def test_tensor_parallel_gives_the_same(
    tiny: Mapping[str, Path], wanted: Mapping[str | None, list[Answer]], sharded: bool
) -> None:
    names = (None, "dora", "lora")
    (answers,) = serve(
        tiny["base"],
        {"dora": tiny["dora"], "lora": tiny["lora"]},
        [asks(*names)],
        skip_tokenizer_init=True,
        tensor_parallel_size=2,
        fully_sharded_loras=sharded,
    )
    for position, name in enumerate(names):
        assert_same(answers[position::3], wanted[name], TOLERANCE)


MENDED_STAGES = """
from dora_serve.vllm_plugin.on_import import on_import

def mend():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather = GPUModelRunner.sync_and_gather_intermediate_tensors

    def sync_and_gather(self, *args, **kwargs):
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return gather(self, *args, **kwargs)

    GPUModelRunner.sync_and_gather_intermediate_tensors = sync_and_gather

on_import("vllm.v1.worker.gpu_model_runner", mend)
"""
"""vLLM makes what a later stage is handed when it warms up, which it does not do on a CPU unless it compiles: without
this its second stage fails at the first token, with any adapter or none. Run by every process as it starts."""


def test_pipeline_parallel_gives_the_same(
    tiny: Mapping[str, Path], wanted: Mapping[str | None, list[Answer]], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(MENDED_STAGES)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = (None, "dora", "lora")
    (answers,) = serve(
        tiny["base"],
        {"dora": tiny["dora"], "lora": tiny["lora"]},
        [asks(*names)],
        environment={"PYTHONPATH": os.pathsep.join(paths)},
        skip_tokenizer_init=True,
        pipeline_parallel_size=2,
    )
    for position, name in enumerate(names):
        assert_same(answers[position::3], wanted[name], TOLERANCE)


def test_a_dora_in_the_place_of_a_lora_is_one_from_the_next_token_on(
    tiny: Mapping[str, Path], wanted: Mapping[str | None, list[Answer]]
) -> None:
    """vLLM looks at a batch again where its adapters are others, and here they are the same: one token each."""
    batch = [Ask(PROMPTS[0], "lora", 1)]
    batches: list[list[Ask] | Swap] = [batch, Swap("lora", tiny["dora"]), batch, Swap("lora", tiny["lora"]), batch]
    answers = serve(tiny["base"], {"lora": tiny["lora"]}, batches, skip_tokenizer_init=True)
    for found, name in zip(answers[::2], ("lora", "dora", "lora"), strict=True):
        assert_same(found, [Answer(wanted[name][0].tokens[:1], wanted[name][0].logprobs[:1])], TOLERANCE)
