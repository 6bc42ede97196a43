"""ONNX Runtime against torch: does the exported graph compute what the model in the folder computes?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.errors import CheckpointError, no_such_path
from dora_serve.safetensors_file import read_tensor

from .onnx import TRANSPOSED, architecture_of, is_causal, load_model, output_names, quiet, require

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    Array: TypeAlias = NDArray[Any]

# ONNX Runtime may be this many times as far from torch's float32 as torch's float32 is from its float64.
_FLOAT32_FACTOR = 8.0
# Least error, in spacings of float32 at the largest logit, to take for torch's: a tiny model can be exact by luck.
_FLOAT32_FLOOR = 2.0
# What the real rounding of the weights did may exceed what random rounding errors did by this factor.
_ROUNDING_FACTOR = 3.0

_PADDED_ROWS = 3
_PADDING = 3  # columns beyond the longest prompt, so that every row is padded
_SINGLE_STEPS = 8  # tokens at the end of each prompt that are fed one at a time


@dataclass(frozen=True)
class OnnxCheck:
    """ONNX Runtime against torch in float32, on the same tokens. Differences are of logits, or of a head's outputs.

    max_abs, mean_abs, kl (of ONNX from torch, nats per position), top1 (share of positions): whole prompts.
    decode_max_abs: the same positions through the cache: one token on an empty past, a chunk, then one at a time.
    padded_max_abs: a batch of prompts padded to one length (with a cache: on the left, the last token as a step of its
        own), against each prompt alone in torch.
    greedy_equal of greedy_total prompts continue with the same `greedy_tokens` tokens. Another token is a failure
        only where torch's logits tell the two apart by more than the tolerance; else it is a near tie.
    initializers: weights in the graph; initializers_equal: those that equal a tensor of the checkpoint cast to
        float32, or its transpose, bit for bit. Stacked experts are compared with the stack that transformers makes.
    reference_max_abs: distance from the given logits of the unmerged model; reference_limit: what was allowed.
    tolerance: for every difference but the reference's; check_onnx says where it comes from.
    failures: a sentence for each thing that does not hold; `passed` means there are none.

    None where there is nothing to measure: decode_max_abs without a cache (greedy_total is 0 then), kl and top1 of
    hidden states, the reference's without one. A difference is infinite where ONNX Runtime gave a value that is not
    finite, another shape, or nothing.
    """

    prompts: int
    max_abs: float
    mean_abs: float
    kl: float | None
    top1: float | None
    decode_max_abs: float | None
    padded_max_abs: float
    greedy_equal: int
    greedy_total: int
    greedy_tokens: int
    initializers: int
    initializers_equal: int
    reference_max_abs: float | None
    reference_limit: float | None
    provider: str
    tolerance: float
    passed: bool
    failures: tuple[str, ...]


def check_onnx(
    onnx_path: Path,
    model_folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    reference_logits: Sequence[torch.Tensor] | None = None,
    device: str = "cpu",
    greedy_tokens: int = 16,
    on_progress: Callable[[str], None] | None = None,
) -> OnnxCheck:
    """Compare `onnx_path` with the model it was made from, and with the unmerged model where its logits are given.

    Torch runs `model_folder` in float32 with eager attention, which shares nothing with the attention that was traced,
    and has left memory before ONNX Runtime starts. Logits of all prompts are held, so a prompt should have tens to
    hundreds of tokens.

    The tolerance follows from float32. Torch's float32 and ONNX Runtime's are two evaluations of one expression in
    different orders, so both err by about as much as torch's float32 differs from its float64, at most over these
    prompts. Eight times that is allowed between them, because the largest of many errors varies by a few times, and at
    least 16 spacings of float32 at the largest logit.

    reference_logits: float32 (tokens, vocabulary) per prompt, of the unmerged model. ONNX Runtime may be no further
    from them than torch on the merged folder is, nor than one rounding of the weights explains, plus the tolerance.
    Rounding explains 3 times the effect of errors drawn uniformly within half a spacing of the checkpoint's dtype on
    every weight. So a fault that torch and ONNX share, both having read the folder wrongly, is seen as well.

    device: "cuda" puts torch on the GPU, and ONNX Runtime where it has its CUDA provider (with TF32 off).

    Raises ValueError for prompts that cannot be compared, CheckpointError and UnavailableError as export_onnx does.
    What is wrong with the ONNX model is in `failures`.
    """
    require("onnxruntime", "onnx_ir", "transformers")
    if not onnx_path.is_file():
        raise CheckpointError(no_such_path("The ONNX model", onnx_path))
    if not prompts or not all(prompts):
        raise ValueError("check_onnx needs at least one prompt, and none may be empty")
    if reference_logits is not None and len(reference_logits) != len(prompts):
        raise ValueError(f"{len(reference_logits)} reference logits were given for {len(prompts)} prompts")
    import torch

    tell = on_progress or (lambda message: None)
    failures: list[str] = []
    with quiet(), torch.no_grad():
        tell("running torch in float32 and float64")
        # Eager everything: what the exporter traced is sdpa and batched_mm.
        model = load_model(model_folder, attention="eager", experts="eager")
        torch.nn.Module.to(model, device)
        weights = _compare_weights(onnx_path, model_folder, model, failures)
        expected = _run_torch(
            model, prompts, greedy_tokens, _storage_dtype(model_folder) if reference_logits is not None else None
        )
        del model
        tell("running ONNX Runtime")
        got = _run_onnx(onnx_path, device, architecture_of(model_folder), prompts, greedy_tokens, failures)
    return _compare(expected, got, weights, reference_logits, greedy_tokens, failures)


@dataclass(frozen=True)
class _Expected:
    """What torch computed. An answer is (rows, width): the logits of a prompt's tokens, or a head's outputs."""

    answers: list[torch.Tensor]
    greedy: list[tuple[list[int], torch.Tensor]]  # the tokens, and the logits (tokens, vocabulary) they are the top of
    tolerance: float
    rounding: float | None  # the effect on the answers of rounding every weight
    distributions: bool  # whether the rows are logits


@dataclass(frozen=True)
class _Got:
    """What ONNX Runtime computed; empty lists where it could not."""

    provider: str
    answers: list[torch.Tensor]
    decoded: list[torch.Tensor]
    padded: list[tuple[int, torch.Tensor]]  # with the number of the prompt
    greedy: list[list[int]]


@dataclass(frozen=True)
class _Weights:
    total: int
    equal: int


# Torch


def _run_torch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], greedy_tokens: int, stored: torch.dtype | None
) -> _Expected:
    """Answers and greedy tokens in float32, what float64 changes, what rounding to `stored` does. Spoils `model`."""
    import torch

    causal = is_causal(type(model).__name__)
    answers = [_torch_answer(model, prompt) for prompt in prompts]
    greedy = [_torch_greedy(model, prompt, greedy_tokens) for prompt in prompts] if causal else []
    with _float64(model):
        error = max(
            _max_abs(_torch_answer(model, prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)
        )
    spacing = torch.finfo(torch.float32).eps * max(float(answer.abs().max()) for answer in answers)
    rounding = None
    if stored is not None:
        _round_at_random(model, stored)
        rounding = max(
            _max_abs(_torch_answer(model, prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)
        )
    return _Expected(
        answers=answers,
        greedy=greedy,
        # Of a model that is not finite nothing may pass.
        tolerance=_FLOAT32_FACTOR * max(error, _FLOAT32_FLOOR * spacing) if error < inf else 0.0,
        rounding=rounding,
        distributions="last_hidden_state" not in output_names(type(model).__name__),
    )


def _torch_answer(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    import torch

    architecture = type(model).__name__
    ids = torch.tensor([prompt], device=model.device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
    outputs = {name: output[name].cpu() for name in output_names(architecture) if output.get(name) is not None}
    return _answer(architecture, outputs, 0, slice(None))


def _answer(architecture: str, outputs: Mapping[str, torch.Tensor], row: int, tokens: slice) -> torch.Tensor:
    """The outputs for one row of a batch as one matrix, of its real `tokens` only."""
    import torch

    pooled = architecture.endswith("ForSequenceClassification")
    parts = [value[row] if pooled or name == "pooler_output" else value[row][tokens] for name, value in outputs.items()]
    return torch.cat([part if part.ndim == 2 else part[None] for part in parts])


def _torch_greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` tokens through transformers' own cache, an end token being a token like any other."""
    import torch

    ids, cache, tokens, tops = torch.tensor([prompt], device=model.device), None, [], []
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tops.append(output.logits[0, -1].cpu())
        tokens.append(int(tops[-1].argmax()))
        ids = torch.tensor([tokens[-1:]], device=model.device)
    return tokens, torch.stack(tops) if tops else torch.empty(0, 0)


@contextmanager
def _float64(model: PreTrainedModel) -> Iterator[None]:
    """Compute in float64 within the block. To save memory, a module's weights are widened only while it runs; those
    of embeddings, which other modules also read (a tied head, relative positions), throughout.
    """
    import torch

    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }

    def convert(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)

    def hook(dtype: torch.dtype) -> Callable[..., None]:
        return lambda module, *_: convert(set(module.parameters(recurse=False)) - embeddings, dtype)

    convert(embeddings, torch.float64)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(hook(torch.float64)))
        handles.append(module.register_forward_hook(hook(torch.float32), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        convert(embeddings, torch.float32)


def _round_at_random(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every weight an error drawn uniformly within half a spacing of `dtype`, as rounding to it does."""
    import torch

    generator = torch.Generator(model.device).manual_seed(0)
    eps = torch.finfo(dtype).eps
    for parameter in model.parameters():
        _, exponent = torch.frexp(parameter)
        error = torch.rand(parameter.shape, generator=generator, device=parameter.device) - 0.5
        parameter.add_(torch.ldexp(error * eps, exponent - 1))


# ONNX Runtime


class _Refusal(Exception):
    """ONNX Runtime would not load or run the model; the message is its own."""


class _Session:
    """An inference session, fed with tokens. A cache maps input names to arrays, and is empty for a graph without."""

    def __init__(self, path: Path, device: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors are raised as well, and a library does not print
        # Threads that wait by spinning take the cores from whatever else runs here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        self._session = _or_refusal(lambda: onnxruntime.InferenceSession(path, options, providers=providers))
        self.provider: str = self._session.get_providers()[0]
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]

    def empty_cache(self, batch: int) -> dict[str, Array]:
        shapes = {name: self._inputs[name].shape for name in self._past}
        return {
            name: np.zeros((batch, heads, 0, width), dtype=np.float32) for name, (_, heads, _, width) in shapes.items()
        }

    def run(
        self, ids: Array, mask: Array, cache: Mapping[str, Array]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Array]]:
        """The outputs of the last ids.shape[1] of mask.shape[1] tokens, and the cache with these tokens in it."""
        import torch

        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        known["token_type_ids"] = np.zeros_like(ids)
        unknown = sorted(set(self._inputs) - set(known))
        if unknown:
            raise _Refusal(f"it asks for {', '.join(unknown)}, which nothing here gives")
        feed = {name: known[name] for name in self._inputs}
        values = _or_refusal(lambda: self._session.run(None, feed))
        named = dict(zip(self.outputs, values, strict=True))
        presents = {name: f"present.{name.removeprefix('past_key_values.')}" for name in self._past}
        if not set(presents.values()) <= set(named):
            raise _Refusal("it takes a cache and gives none back")
        grown = {name: named.pop(present) for name, present in presents.items()}
        return {name: torch.from_numpy(value) for name, value in named.items()}, grown


def _or_refusal(call: Callable[[], Any]) -> Any:
    """What `call` returns; ONNX Runtime's exceptions, which have no base of their own, as a _Refusal."""
    try:
        return call()
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise _Refusal(str(error).splitlines()[0]) from error
        raise


def _run_onnx(
    path: Path,
    device: str,
    architecture: str,
    prompts: Sequence[Sequence[int]],
    greedy_tokens: int,
    failures: list[str],
) -> _Got:
    causal = is_causal(architecture)
    try:
        session = _Session(path, device)
        if missing := [name for name in _required_outputs(architecture) if name not in session.outputs]:
            raise _Refusal(f"it has no output {', '.join(missing)}")
        return _Got(
            provider=session.provider,
            answers=[_whole(session, architecture, prompt) for prompt in prompts],
            decoded=[_stepwise(session, prompt) for prompt in prompts] if causal else [],
            padded=_padded(session, architecture, prompts),
            greedy=[_onnx_greedy(session, prompt, greedy_tokens) for prompt in prompts] if causal else [],
        )
    except _Refusal as refusal:
        failures.append(f"ONNX Runtime cannot run the model: {refusal}.")
        return _Got(provider="none", answers=[], decoded=[], padded=[], greedy=[])


def _required_outputs(architecture: str) -> tuple[str, ...]:
    return tuple(name for name in output_names(architecture) if name != "pooler_output")


def _batch(prompts: Sequence[Sequence[int]], width: int, left: bool) -> tuple[Array, Array]:
    """Token ids and attention mask (len(prompts), width); padding is token 0, which the mask makes irrelevant."""
    ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        real = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, real], mask[row, real] = prompt, 1
    return ids, mask


def _whole(session: _Session, architecture: str, prompt: Sequence[int]) -> torch.Tensor:
    ids, mask = _batch([prompt], len(prompt), left=True)
    outputs, _ = session.run(ids, mask, session.empty_cache(1))
    return _answer(architecture, outputs, 0, slice(None))


def _stepwise(session: _Session, prompt: Sequence[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) through the cache: the first token, a chunk, the last few one at a time."""
    import torch

    ids, mask = _batch([prompt], len(prompt), left=True)
    ends = sorted(
        {1, max(1, len(prompt) - _SINGLE_STEPS), *range(max(1, len(prompt) - _SINGLE_STEPS), len(prompt) + 1)}
    )
    parts, cache, start = [], session.empty_cache(1), 0
    for end in ends:
        outputs, cache = session.run(ids[:, start:end], mask[:, :end], cache)
        parts.append(outputs["logits"][0])
        start = end
    return torch.cat(parts)


def _padded(session: _Session, architecture: str, prompts: Sequence[Sequence[int]]) -> list[tuple[int, torch.Tensor]]:
    """Answers for a batch of prompts of different lengths, by the prompt's number."""
    import torch

    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    numbers = [by_length[round(row * (len(by_length) - 1) / (_PADDED_ROWS - 1))] for row in range(_PADDED_ROWS)]
    rows = [prompts[number] for number in numbers]
    width = max(map(len, rows)) + _PADDING
    causal = is_causal(architecture)
    ids, mask = _batch(rows, width, left=causal)
    cache = session.empty_cache(len(rows))
    if not causal:
        outputs, _ = session.run(ids, mask, cache)
        return [
            (number, _answer(architecture, outputs, row, slice(0, len(rows[row]))))
            for row, number in enumerate(numbers)
        ]
    first, cache = session.run(ids[:, :-1], mask[:, :-1], cache)
    last, _ = session.run(ids[:, -1:], mask, cache)
    logits = torch.cat([first["logits"], last["logits"]], dim=1)
    return [(number, logits[row, width - len(rows[row]) :]) for row, number in enumerate(numbers)]


def _onnx_greedy(session: _Session, prompt: Sequence[int], count: int) -> list[int]:
    ids, mask = _batch([prompt], len(prompt), left=True)
    cache, tokens = session.empty_cache(1), []
    for _ in range(count):
        outputs, cache = session.run(ids, mask, cache)
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        ids, mask = np.array([tokens[-1:]], dtype=np.int64), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return tokens


# The comparison


def _compare(
    expected: _Expected,
    got: _Got,
    weights: _Weights,
    reference_logits: Sequence[torch.Tensor] | None,
    greedy_tokens: int,
    failures: list[str],
) -> OnnxCheck:
    tolerance = expected.tolerance

    def largest(what: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        distance = max((_max_abs(one, other) for one, other in pairs), default=inf)
        if pairs and distance > tolerance:
            failures.append(f"{what} differs from torch by {distance:.3g}, and {tolerance:.3g} is allowed.")
        return distance

    pairs = list(zip(got.answers, expected.answers, strict=bool(got.answers)))
    max_abs = largest("A whole prompt", pairs)
    decode = [*zip(got.decoded, expected.answers, strict=bool(got.decoded))]
    padded = [(answer, expected.answers[number]) for number, answer in got.padded]
    decode_max_abs = largest("A prompt fed through the cache", decode)
    padded_max_abs = largest("A prompt in a padded batch", padded)
    comparable = max_abs < inf
    if not all(bool(answer.isfinite().all()) for answer in expected.answers):
        failures.append("Torch computes values that are not finite from the model in the folder.")
    greedy_equal = _count_greedy(expected, got, failures)
    reference_max_abs = reference_limit = None
    if reference_logits is not None:
        reference_max_abs, reference_limit = _against_reference(expected, got, reference_logits, failures)
    return OnnxCheck(
        prompts=len(expected.answers),
        max_abs=max_abs,
        mean_abs=_mean_abs(pairs) if comparable else inf,
        kl=(_kl(pairs) if comparable else inf) if expected.distributions else None,
        top1=(_top1(pairs) if comparable else 0.0) if expected.distributions else None,
        decode_max_abs=decode_max_abs if expected.greedy else None,
        padded_max_abs=padded_max_abs,
        greedy_equal=greedy_equal,
        greedy_total=len(expected.greedy),
        greedy_tokens=greedy_tokens,
        initializers=weights.total,
        initializers_equal=weights.equal,
        reference_max_abs=reference_max_abs,
        reference_limit=reference_limit,
        provider=got.provider,
        tolerance=tolerance,
        passed=not failures,
        failures=tuple(failures),
    )


def _against_reference(
    expected: _Expected, got: _Got, reference_logits: Sequence[torch.Tensor], failures: list[str]
) -> tuple[float, float]:
    """ONNX Runtime's distance from the unmerged model, and the largest allowed."""
    assert expected.rounding is not None
    references = [reference.reshape(-1, reference.shape[-1]).cpu() for reference in reference_logits]
    torch_distance = max(map(_max_abs, expected.answers, references))
    limit = min(torch_distance, _ROUNDING_FACTOR * expected.rounding) + expected.tolerance
    distance = max(map(_max_abs, got.answers, references), default=inf)
    if distance == inf or distance > limit:
        failures.append(
            f"ONNX Runtime is {distance:.3g} from the unmerged model's logits and {limit:.3g} is allowed; torch on the "
            f"merged folder is {torch_distance:.3g} from them, and rounding the weights moves them by "
            f"{expected.rounding:.3g}."
        )
    return distance, limit


def _count_greedy(expected: _Expected, got: _Got, failures: list[str]) -> int:
    equal = 0
    for number, ((tokens, logits), found) in enumerate(zip(expected.greedy, got.greedy, strict=bool(got.greedy))):
        step = next((step for step, (one, other) in enumerate(zip(tokens, found, strict=True)) if one != other), None)
        if step is None:
            equal += 1
            continue
        # A graph of another vocabulary may name tokens that the model does not have.
        rival = logits[step, found[step]] if found[step] < logits.shape[1] else -inf
        margin = float(logits[step, tokens[step]] - rival)
        if margin > expected.tolerance:
            failures.append(
                f"Greedy token {step + 1} of prompt {number + 1} is {found[step]} and torch's is {tokens[step]}, "
                f"{margin:.3g} above it."
            )
    return equal


def _max_abs(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinite where shapes differ or anything is not finite."""
    if one.shape != other.shape:
        return inf
    distance = float((one.double() - other.double()).abs().max())
    return distance if distance < inf else inf  # NaN compares false


def _mean_abs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = sum(float((one.double() - other.double()).abs().sum()) for one, other in pairs)
    return total / sum(one.numel() for one, _ in pairs)


def _kl(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = 0.0
    for found, wanted in pairs:
        p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return max(total, 0.0) / sum(len(one) for one, _ in pairs)  # rounding can make it negative


def _top1(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    same = sum(int((found.argmax(-1) == wanted.argmax(-1)).sum()) for found, wanted in pairs)
    return same / sum(len(one) for one, _ in pairs)


# The weights


def _compare_weights(onnx_path: Path, model_folder: Path, model: PreTrainedModel, failures: list[str]) -> _Weights:
    """Every float initializer that is a matrix, or has a parameter's name, against the checkpoint's tensors."""
    import onnx_ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    loaded = model.state_dict()
    try:
        initializers = onnx_ir.load(onnx_path).graph.initializers
    except DecodeError:
        failures.append("The graph is not an ONNX file.")
        return _Weights(0, 0)
    weights = {
        name: value.const_value
        for name, value in initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and (len(value.const_value.shape) > 1 or name in loaded)
    }
    outside = sorted({str(place) for tensor in weights.values() if (place := _outside(tensor)) is not None})
    if outside:
        failures.append(f"Weights lie outside the model's folder, in {', '.join(outside)}.")
        return _Weights(len(weights), 0)
    checkpoint = open_checkpoint(model_folder)
    digests = _checkpoint_digests(checkpoint, {tuple(tensor.shape.numpy()) for tensor in weights.values()})
    unequal = [name for name, tensor in weights.items() if not _equals(name, tensor, checkpoint, digests, loaded)]
    for tensor in weights.values():
        if isinstance(tensor, onnx_ir.ExternalTensor):
            tensor.release()  # a view that somebody still holds would keep the file in memory
    if unequal:
        failures.append(
            f"{len(unequal)} of {len(weights)} weights in the graph do not equal the checkpoint's, such as "
            f"{', '.join(unequal[:3])}."
        )
    return _Weights(len(weights), len(weights) - len(unequal))


def _outside(tensor: onnx_ir.TensorProtocol) -> str | None:
    """Where the tensor's data lies, unless that is the graph itself or a file beside it."""
    location = getattr(tensor, "location", None)
    return None if location is None or PurePath(location).name == str(location) else str(location)


def _checkpoint_digests(checkpoint: ShardedCheckpoint, shapes: set[tuple[int, ...]]) -> dict[bytes, set[str]]:
    """Digests of the checkpoint's tensors in float32, and of matrices' transposes, to their names; one at a time.

    shapes: of the weights to look for; what has another is left out.
    """
    digests: dict[bytes, set[str]] = {}
    for name, entry in checkpoint.tensors.items():
        turned = (*entry.shape[:-2], *entry.shape[:-3:-1])
        if not {entry.shape, turned} & shapes or not entry.dtype.is_floating_point:
            continue
        tensor = read_tensor(entry).float()
        if entry.shape in shapes:
            digests.setdefault(_digest(tensor.numpy()), set()).add(name)
        if turned in shapes and len(turned) > 1:
            digests.setdefault(_digest(tensor.mT.contiguous().numpy()), set()).add(name + TRANSPOSED)
    return digests


def _equals(
    name: str,
    tensor: onnx_ir.TensorProtocol,
    checkpoint: ShardedCheckpoint,
    digests: Mapping[bytes, set[str]],
    loaded: Mapping[str, torch.Tensor],
) -> bool:
    """Whether an initializer is its tensor of the checkpoint, or any where its name says nothing."""
    try:
        array = tensor.numpy()
    except (OSError, ValueError):  # the file is not there or too short
        return False
    parameter = name.removesuffix(TRANSPOSED)
    if found := digests.get(_digest(array)):
        return parameter not in checkpoint.tensors or name in found
    # What transformers makes of several tensors, such as a stack of experts, is in no file.
    expected = loaded.get(parameter)
    return expected is not None and _digest(array) == _digest(expected.cpu().numpy())


def _digest(array: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B") if array.size else b"").digest()


def _storage_dtype(model_folder: Path) -> torch.dtype:
    """The dtype that most of the checkpoint's elements have."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for entry in open_checkpoint(model_folder).tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.nbytes // entry.dtype.itemsize
    return sizes.most_common(1)[0][0] if sizes else torch.float32
