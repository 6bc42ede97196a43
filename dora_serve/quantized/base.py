"""Which weights a merge works on, where the adapter was trained on quantized ones: the user's choice, never a guess.

An adapter trained on a quantized base has learned on the dequantized weights, `deq(Wq)`. Merged into those it is the
model that was trained, and keeps the error that quantization made. Merged into the original weights it has a base that
it has never seen, as when a QLoRA is served on the 16-bit model: often as good or better, and not what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dora_serve.adapter import Adapter
from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.errors import CheckpointError, DoraServeError, UnavailableError
from dora_serve.names import ParameterNames
from dora_serve.quantized.codings import Quantization, QuantizedOnLoad
from dora_serve.quantized.view import as_stored_dense, dense_view, is_conv1d, is_quantized, transposed, with_entries
from dora_serve.safetensors_file import TensorEntry

MergeInto = Literal["dequantized", "original"]

QUANTIZATIONS = ("nf4", "nf4-single", "nf4-double", "fp4", "fp4-single", "fp4-double", "int8")
_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_FSDP_QLORA = "fsdp-qlora"
"""Its trainer builds Linear4bit with that one's own default, which quantizes the absmax as well, where transformers'
BitsAndBytesConfig leaves that off. Its DoRA exists on quantized bases alone, its LoRA on both."""

BOTH = (
    "--merge-into dequantized gives the model that was trained, with the error of its quantization; "
    "--merge-into original keeps the base's full precision, and is a model that was never trained or tested"
)


@dataclass(frozen=True)
class BaseChoice:
    """quantization: what `--base-quantization` says, None for a base that is used as it is stored. merge_into: what
    `--merge-into` says, None where it was not given."""

    quantization: str | None = None
    merge_into: MergeInto | None = None


@dataclass(frozen=True)
class ChosenBase:
    """The checkpoint to merge into, and what a user should be told of it."""

    checkpoint: ShardedCheckpoint
    notes: tuple[str, ...] = ()


def choose_base(checkpoint: ShardedCheckpoint, adapter: Adapter, choice: BaseChoice) -> ChosenBase:
    """The weights that the choice means.

    Raises DoraServeError, naming the flag, where a choice is needed and was not made or contradicts the base;
    CheckpointError for a quantized base that cannot be read; UnavailableError where transformers is needed.
    """
    if is_quantized(checkpoint):
        return _stored_quantized(checkpoint, choice)
    if choice.quantization is None:
        return _dense(checkpoint, adapter, choice)
    quantization = parse_quantization(choice.quantization, adapter.format)
    if choice.merge_into is None:
        raise DoraServeError(
            f"The adapter was trained on a base that was quantized as it was loaded ({quantization.label}), and there "
            f"are two ways to merge it: {BOTH}.",
            remedy="Say which, with --merge-into dequantized or --merge-into original.",
        )
    if choice.merge_into == "original":
        note = (
            f"Merged into the original weights, though the adapter was trained on them as {quantization.label} leaves "
            "them: this is not the model that was trained."
        )
        return ChosenBase(checkpoint, (note,))
    quantized = quantize_on_load(checkpoint, quantization)
    note = (
        f"{quantized.count} weights were quantized and dequantized again ({quantization.label}) before the merge, as "
        "they were for the training; the others are as they are stored."
    )
    return ChosenBase(quantized.checkpoint, (note,))


def _stored_quantized(checkpoint: ShardedCheckpoint, choice: BaseChoice) -> ChosenBase:
    view = dense_view(checkpoint)
    if choice.quantization is not None:
        raise DoraServeError(
            f"The base {str(checkpoint.folder)!r} is stored quantized ({view.quantization}), and --base-quantization "
            f"{choice.quantization} is for a base with its original weights.",
            remedy="Leave --base-quantization away, or give the original base.",
        )
    if choice.merge_into == "original":
        raise DoraServeError(
            f"The base {str(checkpoint.folder)!r} is stored quantized ({view.quantization}), so the original weights "
            "that --merge-into original asks for are not in it.",
            remedy="Give the base that it was made from with --base, or say --merge-into dequantized.",
        )
    note = (
        f"The base is stored quantized ({view.quantization}). The adapter is merged into what its codes stand for, the "
        "weights that it is used on, and the result is dense; for the original weights, give the original base."
    )
    return ChosenBase(view, (note,))


def _dense(checkpoint: ShardedCheckpoint, adapter: Adapter, choice: BaseChoice) -> ChosenBase:
    if choice.merge_into == "dequantized":
        raise DoraServeError(
            f"--merge-into dequantized needs to know how the base was quantized: {str(checkpoint.folder)!r} is dense.",
            remedy="Say it with --base-quantization, for example --base-quantization nf4, or give the quantized base.",
        )
    if adapter.format == _FSDP_QLORA and adapter.method == "DoRA" and choice.merge_into is None:
        raise DoraServeError(
            f"The adapter {str(adapter.path)!r} is a DoRA of fsdp_qlora, which trains those on bases that it "
            f"quantizes as it loads them, and its file does not say how. There are two ways to merge it: {BOTH}.",
            remedy="Say --base-quantization nf4 --merge-into dequantized, or --merge-into original. After training on "
            "HQQ, give the HQQ checkpoint itself as the base.",
        )
    if adapter.format == _FSDP_QLORA and choice.merge_into is None:
        note = (
            "fsdp_qlora trains a LoRA on the base as it is stored, or on one that it quantizes as it loads it, and the "
            "file does not say which: the first is assumed, and --base-quantization says the other."
        )
        return ChosenBase(checkpoint, (note,))
    return ChosenBase(checkpoint)


def parse_quantization(text: str, adapter_format: str = "peft") -> Quantization:
    """`KIND[:DTYPE]`: one of QUANTIZATIONS, and what the weights were cast to before. Raises DoraServeError."""
    found = re.fullmatch(r"(nf4|fp4|int8)(-single|-double)?(?::(\w+))?", text)
    if found is None or (found[1] == "int8" and found[2]) or (found[3] and found[3] not in _DTYPES):
        raise DoraServeError(
            f"--base-quantization {text!r} is not known: wanted one of {', '.join(QUANTIZATIONS)}, where the weights "
            f"were cast before with the dtype behind a colon ({', '.join(_DTYPES)}).",
            remedy="For a QLoRA say nf4 (nf4-double if it used bnb_4bit_use_double_quant). HQQ, GPTQ and AWQ depend on "
            "more than the weights: give the quantized checkpoint itself as the base.",
        )
    double = found[2] == "-double" or (found[2] is None and adapter_format == _FSDP_QLORA)
    kind: Literal["nf4", "fp4", "int8"] = "nf4" if found[1] == "nf4" else "fp4" if found[1] == "fp4" else "int8"
    return Quantization(kind, double and kind != "int8", _DTYPES.get(found[3] or ""))


@dataclass(frozen=True)
class QuantizedBase:
    """count: how many weights were quantized."""

    checkpoint: ShardedCheckpoint
    count: int


def quantize_on_load(checkpoint: ShardedCheckpoint, quantization: Quantization) -> QuantizedBase:
    """A dense checkpoint as it is once transformers has loaded it quantized: the linear layers, but for the head and
    what is tied. Raises UnavailableError where transformers does not know them, CheckpointError where one of them is no
    tensor of its own."""
    names = ParameterNames.of(checkpoint)
    if names.known is None:
        raise UnavailableError(
            "Which layers are quantized on loading is for transformers to say, which is not installed or does not know "
            f"the architecture in {str(checkpoint.folder)!r}.",
            remedy="Run `pip install 'dora-serve[verify]'`, or give a base that is stored quantized.",
        )
    weights: dict[str, TensorEntry] = {}
    for module in names.known.linear:
        places = names.find(f"{module}.weight")
        if len(places) != 1 or places[0].tensor_parts != 1:
            raise CheckpointError(
                f"{module} would be quantized as one layer, and its weight is no tensor of its own in "
                f"{str(checkpoint.folder)!r}.",
                remedy="Merge into the original weights (--merge-into original), or give a base stored quantized.",
                module=module,
            )
        entry = checkpoint.tensors[places[0].tensor]
        weights[entry.name] = _quantized(checkpoint.config, entry, quantization)
    if not weights:
        raise CheckpointError(
            f"No layer of {str(checkpoint.folder)!r} would be quantized on loading.",
            remedy="Leave --base-quantization away.",
        )
    return QuantizedBase(with_entries(checkpoint, weights, frozenset(), weights_label(quantization)), len(weights))


def weights_label(quantization: Quantization) -> str:
    return f"{quantization.label}, quantized here"


def _quantized(config: Mapping[str, object], entry: TensorEntry, quantization: Quantization) -> TensorEntry:
    straight = transposed(entry) if is_conv1d(config, entry.name) else entry
    # An int8 weight is dequantized to float32, a 4-bit one to the dtype that it was quantized from.
    dtype = torch.float32 if quantization.kind == "int8" else quantization.dtype or entry.dtype
    coded = replace(straight, dtype=dtype, coding=QuantizedOnLoad(straight, quantization))
    return as_stored_dense(config, coded, entry.name)
