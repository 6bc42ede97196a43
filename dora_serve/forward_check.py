"""The forward check: a merged folder, loaded as its user would load it, against the unmerged model.

The measure is the unmerged model U in a dtype wider than the deployed one: float32 for bfloat16 and float16, float64
for float32. Run on the same inputs and compared with U's logits, by root mean square and by mean KL divergence:

    base            in the wider dtype      the adapter's effect
    unmerged        in the deployed dtype   what computing in that dtype costs a model that is right
    rounded         in the wider dtype      the formula's weights rounded once: what storing them costs (16 bits only)
    merged folder   in the wider dtype      allowed: ROUNDED_FACTOR x rounded; with float32 weights COMPUTED_FACTOR x
                                            unmerged, for there the merge itself was computed in the deployed dtype
    merged folder   in the deployed dtype   allowed: COMPUTED_FACTOR x unmerged

KL grows with the square of a difference of logits, so its factors are squared. No tolerance is below what rounding the
logits once would cost (eps / 4 of their root mean square), so that an exact model raises no alarm.

The factors were measured, as ratios to what is allowed before its factor. Clean merges, by PEFT 0.21.2, of LoRA and
DoRA, on 20 families of tiny random models: merged in float32 arithmetic into 16 bits, in the wider dtype 0.98 - 1.03; a
delta rounded and then added 0.77 - 1.47; all of the merge in 16 bits 0.92 - 2.42; float32, in the wider dtype 0.01 -
0.71; in the deployed dtype 0.39 - 1.82 (the extremes are routers that flip). Faults, in the wider dtype: on the tiny
models 17 and more for a doubled scale, a dropped magnitude or a layer left out; on SmolLM2-135M with a trained DoRA of
rank 4 (clean: 1.0) 55 for a doubled scale, 8 for dropped magnitudes, 7 for a scale of 1.1, 2.8 - 14 for one layer of 30
left out. One module of 210 left out has 1.3 - 4: whether one matrix is right is for the check of every tensor to say.

Greedy continuations are U's. A model that agrees up to a token has seen the same prefix, so one forward over prompt and
continuation shows the first difference, without generating anew.

Peak memory: one model in the wider dtype (float32: twice the bytes of a bfloat16 checkpoint; with adapted experts, one
layer's more) and U's logits, positions x classes in the wider dtype; models are loaded one after the other.
"""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dora_serve.adapter import Adapter
from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint, read_json
from dora_serve.comparison import Comparison, Tolerance, compare, dtype_name, scale_of
from dora_serve.denoiser_inputs import denoiser_samples, nested
from dora_serve.errors import CheckpointError, DoraServeError, PlanError, UnavailableError
from dora_serve.model_classes import DIFFUSERS_KEY, ModelClass
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.prompts import Sample, Samples, make_samples, read_prompts, room_for
from dora_serve.quiet import quiet_transformers
from dora_serve.reference import Attached, attach_adapter
from dora_serve.reference_load import from_tensors

ROUNDED_FACTOR = 2.5
COMPUTED_FACTOR = 3.0
_RUNNABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ForwardOptions:
    """reference: whose unmerged forward is the measure, ours (reference.py) or PEFT's own. prompts: a file of them,
    None for the built-in ones. device: None for the GPU where there is one. greedy_tokens: how many tokens the
    unmerged model goes on for, greedily, after each prompt; all models are compared on them as well.
    """

    reference: Literal["native", "peft"] = "native"
    prompts: Path | None = None
    device: str | None = None
    greedy_tokens: int = 16


@dataclass(frozen=True)
class ForwardReport:
    """What the forward check found.

    output: what was compared, "logits", "hidden states", or the "output" of a denoiser.
    ran: whether both models were run; if not, `reason` says why, and `failures` is empty where the merged folder is
    not what stopped it. All comparisons are with the unmerged model in the wider dtype: base, whose difference is the
    adapter's effect; rounded, the formula's weights rounded to the deployed dtype and run in the wider one;
    unmerged_deployed, the unmerged model run in the deployed dtype; merged_wide and merged_deployed, the folder. A
    comparison is None where it was not made. changes_nothing: the effect is within what computing in the deployed
    dtype costs.
    unmerged_logits (positions, classes) in the wider dtype on the CPU, and samples: one of each for every prompt, the
    continuation included; not part of the JSON.
    """

    ran: bool
    reason: str | None = None
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reference: str = "native"
    device: str = "cpu"
    architecture: str | None = None
    output: str = "logits"
    wide_dtype: str | None = None
    deployed_dtype: str | None = None
    inputs: str | None = None
    positions: int = 0
    perplexity: float | None = None
    base: Comparison | None = None
    rounded: Comparison | None = None
    unmerged_deployed: Comparison | None = None
    merged_wide: Comparison | None = None
    merged_deployed: Comparison | None = None
    tolerance_wide: Tolerance | None = None
    tolerance_deployed: Tolerance | None = None
    changes_nothing: bool = False
    unmerged_logits: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    samples: tuple[Sample, ...] = field(default=(), repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the models were run and agree."""
        return self.ran and not self.failures

    @property
    def allowed_rms(self) -> float | None:
        """What is allowed of the merged model in the wider dtype, the stricter of the two; None if it was not run."""
        return self.tolerance_wide.rms if self.tolerance_wide else None

    @property
    def allowed_kl(self) -> float | None:
        """The same for the KL divergence."""
        return self.tolerance_wide.kl if self.tolerance_wide else None

    @property
    def token_ids(self) -> tuple[Tensor, ...]:
        """(positions,) of each sample: prompt and greedy continuation; empty for models of no tokens."""
        return tuple(sample.token_ids for sample in self.samples)

    def to_json(self) -> dict[str, object]:
        """Plain values; a number that is not finite becomes None."""
        hidden = {"unmerged_logits", "samples"}
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in hidden}
        return {"passed": self.passed, **{name: _plain(value) for name, value in shown.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Comparison | Tolerance):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _CannotRun(Exception):
    """Why a model cannot be run, as a sentence."""


class _MergedCannotRun(_CannotRun):
    """The merged folder cannot be run, where the base can: a failure."""


class _OutOfMemory(_CannotRun):
    """The device is too small, which says nothing of the model."""


def check_forward(
    base_folder: Path,
    adapter: Adapter,
    merged_folder: Path,
    options: ForwardOptions | None = None,
    *,
    base: ShardedCheckpoint | None = None,
    tokenizer_folder: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> ForwardReport:
    """Compare the merged folder with the unmerged model on the same inputs.

    base: the tensors of the base, where its folder holds others or only codes of them (dora_serve.quantized).
    tokenizer_folder: where the tokenizer lies, for a component of a pipeline; by default in the base's folder.

    Raises DoraServeError for prompts that cannot be read, UnavailableError without transformers (or PEFT, where it is
    asked for); everything else that stops it is in the report.
    """
    options = options or ForwardOptions()
    require_package("transformers", "verify")
    if options.reference == "peft":
        require_package("peft", "peft")
    prompts = read_prompts(options.prompts) if options.prompts is not None else None
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    coded = base if base is not None and base.quantization is not None else None
    place = tokenizer_folder or base_folder
    check = _Check(base_folder, adapter, merged_folder, options, prompts, device, on_progress, place, coded)
    with quiet_transformers(), _full_precision(), torch.inference_mode():
        return check.run()


def require_package(package: str, extra: str) -> None:
    """Raise UnavailableError, with the extra that brings it, where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(
            f"The forward check needs {package}, which is not installed.",
            remedy=f"Run `pip install 'dora-serve[{extra}]'`.",
            package=package,
        )


@dataclass
class _Check:
    """One run of check_forward: what is given, and what the runs leave for the later ones."""

    base_folder: Path
    adapter: Adapter
    merged_folder: Path
    options: ForwardOptions
    prompts: tuple[str, ...] | None
    device: str
    on_progress: OnProgress
    tokenizer_folder: Path
    coded_base: ShardedCheckpoint | None = None
    model_class: ModelClass | None = None
    causal: bool = False
    inputs: str = ""
    output: str = "logits"
    samples: list[Sample] = field(default_factory=list)
    unmerged: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: int = 0
    runs_planned: int = 6
    total: int = 0

    def run(self) -> ForwardReport:
        try:
            deployed = _deployed_dtype(self.merged_folder, self._find_architecture())
        except _MergedCannotRun as stop:
            return self._stopped(str(stop), [str(stop)])
        except _CannotRun as stop:
            return self._stopped(str(stop))
        narrow = deployed in (torch.bfloat16, torch.float16)
        wide = torch.float32 if narrow else torch.float64
        self.runs_planned = 6 if narrow else 5
        merged: dict[torch.dtype, Comparison] = {}
        failures: list[str] = []
        try:
            base, rounded = self._unmerged_wide(wide, deployed if narrow else None)
            # A float64 model computes parts of itself in float32 (norms, rotary embeddings): no finer measure exists.
            unmerged_deployed = self._unmerged_deployed(deployed if narrow else torch.float32)
            tolerances = self._tolerances(wide, deployed, rounded, unmerged_deployed)
            for dtype, tolerance in tolerances.items():
                merged[dtype] = self._merged(dtype)
                failures += tolerance.judge(merged[dtype], dtype)
        except _MergedCannotRun as stop:
            failures.append(str(stop))
        except _CannotRun as stop:
            return self._stopped(str(stop))
        nothing = base is not None and base.rms <= unmerged_deployed.rms
        if base is not None and nothing:
            self.notes.append(
                f"The adapter changes nothing that can be seen: it moves the logits by {base.rms:.2g} (root mean "
                f"square), where computing in {dtype_name(deployed)} moves them by {unmerged_deployed.rms:.2g}."
            )
        return ForwardReport(
            ran=True,
            failures=tuple(failures),
            notes=tuple(self.notes),
            reference=self.options.reference,
            device=self.device,
            architecture=self.architecture,
            output=self.output,
            wide_dtype=dtype_name(wide),
            deployed_dtype=dtype_name(deployed),
            inputs=self.inputs,
            positions=sum(len(logits) for logits in self.unmerged),
            perplexity=self._perplexity(),
            base=base,
            unmerged_deployed=unmerged_deployed,
            merged_wide=merged.get(wide),
            merged_deployed=merged.get(deployed),
            rounded=rounded,
            tolerance_wide=tolerances.get(wide),
            tolerance_deployed=tolerances.get(deployed),
            changes_nothing=nothing,
            unmerged_logits=tuple(self.unmerged),
            samples=tuple(self.samples),
        )

    def _perplexity(self) -> float | None:
        itself = ((sample, logits, logits) for sample, logits in zip(self.samples, self.unmerged, strict=True))
        return compare(itself, causal=self.causal).perplexity

    def _stopped(self, reason: str, failures: Sequence[str] = ()) -> ForwardReport:
        return ForwardReport(
            ran=False,
            reason=reason,
            failures=tuple(failures),
            notes=tuple(self.notes),
            reference=self.options.reference,
            device=self.device,
            architecture=self.architecture or None,
        )

    @property
    def architecture(self) -> str:
        return self.model_class.name if self.model_class else ""

    def _find_architecture(self) -> Mapping[str, object]:
        """The class of both models, into self; returns the merged folder's configuration."""
        base = _config(self.base_folder)
        try:
            merged = _config(self.merged_folder)
        except _CannotRun as stop:
            raise _MergedCannotRun(str(stop)) from stop
        if DIFFUSERS_KEY in merged or DIFFUSERS_KEY in base:
            require_package("diffusers", "diffusers")
        try:
            self.model_class = ModelClass.of(self.merged_folder, merged, base)
        except ValueError as error:
            raise _CannotRun(str(error)) from error
        return merged

    def _make_samples(self, model: Any) -> Samples:
        if self.model_class is not None and self.model_class.library == "diffusers":
            return denoiser_samples(model)
        return make_samples(model, self.tokenizer_folder, self.prompts, _trained_tokens(self.adapter))

    def _unmerged_wide(
        self, wide: torch.dtype, rounded_to: torch.dtype | None
    ) -> tuple[Comparison | None, Comparison | None]:
        """Inputs, continuations and logits of the unmerged model, into self.

        Returns what differs from them when the adapter is left out, and when the formula's weights are rounded_to.
        """
        with ExitStack() as stack:
            model, attached = self._attach(stack, wide)
            with _as_cannot_run(f"{self.architecture} does not run"):
                made = self._make_samples(model)
            self.inputs = made.description
            self.notes += made.notes
            self.causal = any(sample.grows == "input_ids" for sample in made.samples)
            self.total = self.runs_planned * len(made.samples)
            for sample in made.samples:
                with _as_cannot_run(f"{self.architecture} does not run on {made.description}"):
                    tokens = _greedy(model, sample, self.options.greedy_tokens)
                    self.samples.append(sample.continued(tokens))
                    self.output, scores = _scores(model, self.samples[-1])
                    self.unmerged.append(scores.cpu())
                self._tick()
            if attached is not None and attached.uncalled:
                self.notes.append(_uncalled(attached))
        if any(bool((logits.isnan() | logits.isposinf()).any()) for logits in self.unmerged):
            raise _CannotRun(f"The unmerged model's own logits are not finite in {dtype_name(wide)}.")
        if self.options.reference == "peft":
            del model
            model = self._load(self.base_folder, wide)  # PEFT does not undo everything that it loads
        return self._base(model), self._rounded(model, rounded_to) if rounded_to is not None else None

    def _base(self, model: Any) -> Comparison | None:
        try:
            return self._compare_model(model, "The base model does not run on these inputs")
        except _OutOfMemory:
            raise
        except _CannotRun as stop:
            self.notes.append(f"The adapter's effect was not measured: {stop}")
            return None

    def _rounded(self, model: Any, dtype: torch.dtype) -> Comparison | None:
        try:
            with attach_adapter(model, self.adapter, rounded_to=dtype):
                return self._compare_model(model, f"{self.architecture} does not run")
        except PlanError as error:  # PEFT may read what reference.py does not
            self.notes.append(f"What rounding the weights costs was not measured: {error.message}")
            return None

    def _unmerged_deployed(self, dtype: torch.dtype) -> Comparison:
        with ExitStack() as stack:
            model, _ = self._attach(stack, dtype)
            return self._compare_model(model, f"{self.architecture} does not run in {dtype_name(dtype)}")

    def _tolerances(
        self, wide: torch.dtype, deployed: torch.dtype, rounded: Comparison | None, computed: Comparison
    ) -> dict[torch.dtype, Tolerance]:
        """By the dtype in which the merged model is run. See the module's docstring."""
        scale, name = scale_of(self.unmerged), dtype_name(deployed)
        tolerances = {}
        if computed.is_finite:
            why = f"computing in {name} costs the unmerged model"
            by_computing = Tolerance.of(computed, COMPUTED_FACTOR, scale, torch.finfo(deployed).eps, why)
            tolerances = {wide: by_computing, deployed: by_computing}
        else:
            self.notes.append(
                f"The unmerged model overflows in {name}, and so may the merged one: it was judged in "
                f"{dtype_name(wide)} only."
            )
        if rounded is not None:
            why = f"rounding its weights once to {name} costs a model that is right"
            tolerances[wide] = Tolerance.of(rounded, ROUNDED_FACTOR, scale, torch.finfo(wide).eps, why)
        if not tolerances:
            raise _CannotRun("No tolerance can be measured: " + " ".join(self.notes[-2:]))
        return tolerances

    def _merged(self, dtype: torch.dtype) -> Comparison:
        try:
            model = self._load(self.merged_folder, dtype)
            return self._compare_model(model, f"The merged model {str(self.merged_folder)!r} does not run")
        except _OutOfMemory:
            raise
        except _CannotRun as stop:
            raise _MergedCannotRun(str(stop)) from stop

    def _attach(self, stack: ExitStack, dtype: torch.dtype) -> tuple[Any, Attached | None]:
        """The unmerged model, for as long as `stack` is open; the base alone after that, unless it is PEFT's."""
        model = self._load(self.base_folder, dtype)
        if self.options.reference == "peft":
            from peft import PeftModel

            with _as_cannot_run(f"PEFT cannot load the adapter {str(self.adapter.path)!r}"):
                wrapped = PeftModel.from_pretrained(model, str(self.adapter.path))
                return wrapped.get_base_model().eval(), None
        try:
            return model, stack.enter_context(attach_adapter(model, self.adapter))
        except PlanError as error:
            raise _CannotRun(f"The unmerged forward cannot be computed: {error}") from error

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        """A model as its user would load it, in eval mode and on the device. The one before it is gone by now."""
        assert self.model_class is not None
        library = self.model_class.library
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        with _as_cannot_run(f"{library} cannot load {str(folder)!r} as {self.architecture}"):
            coded = self.coded_base if folder == self.base_folder else None
            model, missing = self.model_class.load(folder, dtype, self.device, coded)
        if folder == self.base_folder:
            brought = tuple(change.name for change in self.adapter.replacements)
            missing = [name for name in missing if not name.endswith(brought)]
        if missing:
            shown = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            raise _CannotRun(
                f"{str(folder)!r} lacks {shown}, which {self.architecture} needs: {library} would make random "
                "numbers of it."
            )
        return model

    def _compare_model(self, model: Any, failing: str) -> Comparison:
        def runs() -> Iterator[tuple[Sample, Tensor, Tensor]]:
            for sample, unmerged in zip(self.samples, self.unmerged, strict=True):
                with _as_cannot_run(failing):
                    _, logits = _scores(model, sample)
                if logits.shape != unmerged.shape:
                    raise _CannotRun(f"{failing}: its output is {list(logits.shape)}, wanted {list(unmerged.shape)}.")
                yield sample, unmerged, logits
                self._tick()

        return compare(runs(), causal=self.causal)

    def _tick(self) -> None:
        self.done += 1
        self.on_progress(Progress("Comparing the forward", self.done, self.total, "forwards"))


def measure_loss(checkpoint: ShardedCheckpoint, forward: ForwardReport, device: str) -> Comparison | None:
    """How far a quantized model, its codes decoded to float32, is from the unmerged one on the samples of `forward`.

    None where it cannot be loaded or run. Peak memory: the model in float32.
    """
    import transformers

    model_class = getattr(transformers, forward.architecture or "", None)
    if model_class is None or not forward.samples:
        return None
    with quiet_transformers(), _full_precision(), torch.inference_mode():
        model = from_tensors(model_class, checkpoint, torch.float32)[0].to(device).eval()
        pairs = zip(forward.samples, forward.unmerged_logits, strict=True)
        runs = ((sample, unmerged, _scores(model, sample)[1]) for sample, unmerged in pairs)
        return compare(runs, causal=any(sample.grows == "input_ids" for sample in forward.samples))


def _config(folder: Path) -> Mapping[str, object]:
    try:
        config = read_json(folder)
    except CheckpointError as error:
        raise _CannotRun(str(error)) from error
    if not config:
        raise _CannotRun(f"{str(folder)!r} has no config.json, so transformers cannot load it.")
    return config


def _deployed_dtype(folder: Path, config: Mapping[str, object]) -> torch.dtype:
    """The dtype that from_pretrained takes by itself: the configuration's, else that of most of the weights."""
    text_config = config.get("text_config")
    for table in (config, text_config if isinstance(text_config, dict) else {}):
        dtype = getattr(torch, str(table.get("dtype") or table.get("torch_dtype")), None)
        if isinstance(dtype, torch.dtype) and dtype in _RUNNABLE:
            return dtype
    try:
        tensors = open_checkpoint(folder).tensors.values()
    except CheckpointError as error:
        raise _MergedCannotRun(str(error)) from error
    sizes = {dtype: sum(entry.nbytes for entry in tensors if entry.dtype == dtype) for dtype in _RUNNABLE}
    return max(sizes, key=lambda dtype: sizes[dtype])


def _trained_tokens(adapter: Adapter) -> list[int]:
    return sorted({index for rows in adapter.token_rows for index in rows.indices})


def _uncalled(attached: Attached) -> str:
    count, names = len(attached.uncalled), attached.uncalled[:3]
    return (
        f"{count} of {len(attached.modules)} adapted modules did not run on these inputs, so the forward says nothing "
        f"of them: {', '.join(names)}{', ...' if count > len(names) else ''}."
    )


def _call(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    moved = {
        name: value.to(device=model.device, dtype=model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    return model(**nested(moved), **options)


def _scores(model: Any, sample: Sample) -> tuple[str, Tensor]:
    """What a model puts out, in a word, and as (positions, classes): token or class logits, the hidden states of a
    model without a head, with the projection where a text encoder has one, or what a denoiser makes of its latents."""
    output = _call(model, sample.inputs)
    denoised = getattr(output, "sample", None)
    if isinstance(denoised, Tensor):
        channels_last = denoised.movedim(1, -1) if denoised.ndim > 3 else denoised
        return "output", channels_last.flatten(0, -2)
    hidden, projected = getattr(output, "last_hidden_state", None), getattr(output, "text_embeds", None)
    if isinstance(hidden, Tensor) and isinstance(projected, Tensor):
        width = math.gcd(hidden.shape[-1], projected.shape[-1])
        return "hidden states", torch.cat([hidden.reshape(-1, width), projected.reshape(-1, width)])
    for name, what in (("logits", "logits"), ("logits_per_image", "logits"), ("last_hidden_state", "hidden states")):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return what, value.flatten(0, -2)
    floating = [value for value in output.to_tuple() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(floating) > 1 and floating[0].shape == floating[1].shape:
        return "logits", torch.stack(floating[:2]).flatten(0, -2)  # the start and end of an answer
    if not floating:
        raise ValueError("its output holds no tensor")
    return "output", floating[0].flatten(0, -2)


def _greedy(model: Any, sample: Sample, count: int) -> list[int]:
    """Tokens that the model goes on with, the most likely one each time, up to and with an end token."""
    if sample.grows is None:
        return []
    room = room_for(model, sample)
    count = count if room is None else min(count, room)
    ends = _end_tokens(model)
    tokens: list[int] = []
    # Models that see keep positions of the last picture between calls, which a cached step would take for its own.
    cached = getattr(model.config, "vision_config", None) is None
    output = _call(model, sample.inputs, use_cache=cached)
    while len(tokens) < count:
        tokens.append(int(output.logits[0, -1].argmax()))
        if tokens[-1] in ends or len(tokens) == count:
            break
        cache = getattr(output, "past_key_values", None) if cached else None
        if cache is None:
            output = _call(model, sample.continued(tokens).inputs)
            continue
        step = dict(sample.continued(tokens).inputs)
        step[sample.grows] = step[sample.grows][:, -1:]
        output = _call(model, step, past_key_values=cache, use_cache=True)
    return tokens


def _end_tokens(model: Any) -> set[int]:
    ends: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config):
        value = getattr(owner, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends


@contextmanager
def _as_cannot_run(what: str) -> Iterator[None]:
    """Turn whatever other people's code raises into a reason. Errors of ours for the user pass."""
    try:
        yield
    except (DoraServeError, _CannotRun):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _OutOfMemory(
            f"{what}: the device has too little memory; another one can be named (--device cpu)."
        ) from error
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise _CannotRun(f"{what}: {type(error).__name__}: {first[:300]}") from error


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 means float32: convolutions on a GPU would round their inputs to TF32's ten bits."""
    settings: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn,
    )
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
