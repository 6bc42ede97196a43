"""PEFT's layer_replication: the merged folder holds the repeated layers and is the unmerged PEFT model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from exporters.cli import main

REPEATED = [[0, 3], [1, 4]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A folder with `base` and `adapter`, tokens, and the logits of PEFT's unmerged model on them."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("replicate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], layer_replication=REPEATED)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    tokens = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        return folder, tokens, adapted.eval()(input_ids=tokens).logits


def test_the_repeated_layers_are_written_out(world: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder, tokens, wanted = world
    out = tmp_path / "merged"
    assert main(["merge", str(folder / "adapter"), "--base", str(folder / "base"), "-o", str(out)]) == 0
    merged = LlamaForCausalLM.from_pretrained(out).eval()
    assert merged.config.num_hidden_layers == 6
    with torch.no_grad():
        got = merged(input_ids=tokens).logits
    # Two float32 evaluations of six layers: tens of roundings of values below the largest logit.
    allowed = 64 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= allowed
    base = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    assert float((base(input_ids=tokens).logits - wanted).abs().max()) > 1000 * allowed


@pytest.mark.parametrize("spec", [[[0, 5]], [[2, 1]], [[0]], [[-1, 2]], "0-4", [["0", "4"]]])
def test_a_list_that_does_not_fit_is_refused(
    world: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], spec: object
) -> None:
    folder = world[0]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (folder / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"layer_replication": spec}))
    assert main(["merge", str(adapter), "--base", str(folder / "base"), "-o", str(tmp_path / "out")]) == 1
    assert "layer_replication" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
