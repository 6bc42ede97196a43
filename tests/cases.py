"""Tiny seeded models and PEFT adapters on them, made by transformers, PEFT, torch and safetensors: none of our code.

The last part runs the code under test on them.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_serve.checkpoint import open_checkpoint
from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.plan import MergePlan
from dora_serve.resolve import plan_merge
from dora_serve.runtime_names import RuntimeNames, describe, parse
from exporters.safetensors import write_model

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES: Mapping[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of a model in the style of Llama. Queries and outputs are square on purpose: no shape tells them from their
transposes."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


# Models


def build(architecture: str, model_type: str, **changes: Any) -> Any:
    """A transformers model of a class by name, e.g. "AutoModelForCausalLM", with seeded weights and no zero biases."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **changes)
    return vary(getattr(transformers, architecture).from_config(config))


def vary(model: Any, seed: int = 3) -> Any:
    """Give biases, norms and all else that starts as a constant a value of its own, so that nothing hides in it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def llama(**changes: Any) -> Any:
    return build("AutoModelForCausalLM", "llama", **{**SIZES, "tie_word_embeddings": False, **changes})


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """A transformers model by save_pretrained, another by safetensors."""
    model = copy.deepcopy(model).to(dtype)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **kwargs)
        return folder
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def load(folder: Path, like: nn.Module | type, dtype: torch.dtype = torch.float32, spare: str = "(?!)") -> Any:
    """A folder as a user would load it, in the class of `like`.

    Fails where a tensor is missing, misshapen, or left over and not matched by the pattern `spare`.
    """
    kind = like if isinstance(like, type) else type(like)
    model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
    over = {name for name in report.pop("unexpected_keys", ()) if not re.search(spare, name)}
    wrong = {key: sorted(map(str, found)) for key, found in report.items() if found}
    assert not wrong, wrong
    assert not over, over
    return model.eval()


# Inputs


Inputs = Callable[[nn.Module], dict[str, Tensor]]


def tokens(_: nn.Module) -> dict[str, Tensor]:
    """Two sentences of ids below 40, with those whose rows the tests train among them."""
    return {"input_ids": torch.tensor([[1, 5, 9, 3, 7, 7, 12, 2], [4, 39, 11, 30, 6, 21, 5, 2]])}


def token_pairs(model: nn.Module) -> dict[str, Tensor]:
    return tokens(model) | {"decoder_input_ids": torch.tensor([[1, 8, 3, 5], [1, 13, 39, 6]])}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


# Adapters


class quiet(warnings.catch_warnings):
    """PEFT warns of nearly everything that is tested here."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


def train(model: Any, seed: int = 11, size: float = 0.2) -> Any:
    """What training would have done: move every trainable parameter of a PEFT model, magnitudes by some per cent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            step = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * step.clamp(-2, 2))
            else:
                parameter.add_(size * step)
    return model.eval()


def adapt(
    base: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    saving: Mapping[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A trained PEFT model over a copy of `base`, saved to `folder`.

    dtype: of the adapter, by default what PEFT makes of it. saving: for save_pretrained. config: LoraConfig's.
    """
    torch.manual_seed(11)
    with quiet():
        model = train(get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 6, **config})))
        for name, parameter in model.named_parameters():
            if dtype is not None and "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder, **(saving or {}))
    return model


def unmerged(base: Path, adapter: Path, like: nn.Module | type, dtype: torch.dtype) -> Any:
    """PEFT's own model of a stored base and a stored adapter, all of it in `dtype`."""
    kind = like if isinstance(like, type) else type(like)
    with quiet():
        start = kind.from_pretrained(base, dtype=torch.float32)  # type: ignore[attr-defined]
        model = PeftModel.from_pretrained(start, adapter)
    return model.to(dtype).eval()


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """All scores of a forward, joined into one vector of float64."""
    dtype = next(model.parameters()).dtype
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "_experts_implementation", None):
        config._experts_implementation = "eager"  # the fused kernels know no float64
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**given)
    if isinstance(output, Tensor):
        return output.double().flatten()
    names = ("logits", "start_logits", "end_logits", "logits_per_image", "last_hidden_state")
    found = [output[name] for name in names if name in output]
    assert found, f"no scores among {list(output)}"
    return torch.cat([value.double().flatten() for value in found])


def distance(got: Tensor, truth: Tensor) -> float:
    """The root of the mean square of the differences."""
    assert got.shape == truth.shape
    assert bool(torch.isfinite(truth).all())
    return float((got - truth).square().mean().sqrt())


# Files


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def rewrite_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Load a safetensors file, change its tensors in place, save it again."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def rewrite_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; a value of None removes its key."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


# The code under test, on such folders


def ask_here(folder: Path, architecture: str | None = None) -> RuntimeNames | None:
    """`runtime_names` in this process, which has transformers loaded: starting another takes seconds each time."""
    try:
        return parse(json.loads(json.dumps(describe(folder, architecture))))
    except Exception:  # as the process would have ended
        return None


def plan(base: Path, adapter: Path, *, read: ReadOptions | None = None, dtype: torch.dtype | None = None) -> MergePlan:
    return plan_merge(open_checkpoint(base), read_adapter(adapter, read), dtype=dtype)


def merge_to(
    base: Path, adapter: Path, out: Path, *, read: ReadOptions | None = None, dtype: torch.dtype | None = None
) -> MergePlan:
    """Merge into a new folder, without the verification that the command line adds. Returns the plan."""
    planned = plan(base, adapter, read=read, dtype=dtype)
    out.mkdir()
    write_model(planned, out, metadata={"format": "pt"})
    return planned


@dataclass(frozen=True)
class Case:
    """A model, an adapter on it and what to feed it.

    config: LoraConfig's, as the function `adapt` takes it. untied: what the merge has to store apart, by its run-time
    name. changed: what it has to change in config.json. acts: whether the adapter reaches the outputs at all.
    """

    name: str
    model: Callable[[], nn.Module]
    config: Mapping[str, Any]
    inputs: Inputs = tokens
    untied: tuple[str, ...] = ()
    changed: Mapping[str, object] = field(default_factory=dict)
    acts: bool = True

    def __str__(self) -> str:
        return self.name


def check_merged_is_unmerged(case: Case, root: Path) -> MergePlan:
    """Make the case's folders, merge, and compare. Returns the plan."""
    model = case.model()
    base = save(model, root / "base")
    start = load(base, model)
    adapt(start, root / "adapter", **case.config)
    planned = merge_to(base, root / "adapter", root / "merged")
    compare_with_unmerged(root, start, case.inputs(start), acts=case.acts)
    assert planned.untied == tuple(sorted(case.untied))
    assert {".".join(path): value for path, value in planned.config_changes.items()} == dict(case.changed)
    return planned


def compare_with_unmerged(
    root: Path, like: nn.Module | type, inputs: Mapping[str, Tensor], *, acts: bool = True, spare: str = "(?!)"
) -> None:
    """`merged`, loaded by transformers, gives the logits of PEFT's unmerged model of `base` and `adapter`.

    The truth is the unmerged model in float64. Merged weights are within half a spacing of float32 of it, and a float32
    forward rounds as often as there are operations, in the unmerged model (which has more of them) as in the merged: so
    the merged one may be as far from the truth as the unmerged one is, in the root of the mean square. Over tiny models
    the two are random numbers of one size, hence the factor 4; what a fault does is 10^5 times as much.
    """
    truth = logits(unmerged(root / "base", root / "adapter", like, torch.float64), inputs)
    own_error = distance(logits(unmerged(root / "base", root / "adapter", like, torch.float32), inputs), truth)
    assert distance(logits(load(root / "merged", like, spare=spare), inputs), truth) <= 4 * own_error
    if acts:
        kind = like if isinstance(like, type) else type(like)
        base = kind.from_pretrained(root / "base", dtype=torch.float32)  # type: ignore[attr-defined]
        assert distance(logits(base.eval(), inputs), truth) > 1000 * own_error
