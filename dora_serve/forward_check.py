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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_serve.adapter import Adapter
from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint, read_json
from dora_serve.comparison import Comparison, Tolerance, compare, dtype_name, scale_of
from dora_serve.denoiser_inputs import denoiser_samples
from dora_serve.errors import CheckpointError, PlanError, UnavailableError
from dora_serve.forward_dtypes import deployed_dtype, is_narrow, wide_dtype
from dora_serve.forward_memory import why_not_run
from dora_serve.forward_report import ForwardOptions, ForwardReport
from dora_serve.model_classes import DIFFUSERS_KEY, ModelClass
from dora_serve.model_runs import (
    CannotRun,
    MergedCannotRun,
    OutOfMemory,
    as_cannot_run,
    full_precision,
    greedy_tokens,
    scores_of,
)
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.prompts import Sample, Samples, make_samples, read_prompts
from dora_serve.quiet import quiet_transformers
from dora_serve.reference import Attached, attach_adapter
from dora_serve.reference_load import from_tensors
from dora_serve.safetensors_file import TensorEntry

ROUNDED_FACTOR = 2.5
COMPUTED_FACTOR = 3.0


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
    with quiet_transformers(), full_precision(), torch.inference_mode():
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
        except MergedCannotRun as stop:
            return self._stopped(str(stop), [str(stop)])
        except CannotRun as stop:
            return self._stopped(str(stop))
        narrow, wide = is_narrow(deployed), wide_dtype(deployed)
        self.runs_planned = 6 if narrow else 5
        if too_large := self._too_large(wide):
            return self._stopped(too_large)
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
        except MergedCannotRun as stop:
            failures.append(str(stop))
        except CannotRun as stop:
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

    def _too_large(self, wide: torch.dtype) -> str | None:
        """Why neither model can be loaded. A GPU says so itself, when it is full."""
        if self.device != "cpu":
            return None
        stored = [_entries(self.coded_base or self.base_folder), _entries(self.merged_folder)]
        return why_not_run(stored, read_json(self.merged_folder), wide)

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
        except CannotRun as stop:
            raise MergedCannotRun(str(stop)) from stop
        if DIFFUSERS_KEY in merged or DIFFUSERS_KEY in base:
            require_package("diffusers", "diffusers")
        try:
            self.model_class = ModelClass.of(self.merged_folder, merged, base)
        except ValueError as error:
            raise CannotRun(str(error)) from error
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
            with as_cannot_run(f"{self.architecture} does not run"):
                made = self._make_samples(model)
            self.inputs = made.description
            self.notes += made.notes
            self.causal = any(sample.grows == "input_ids" for sample in made.samples)
            self.total = self.runs_planned * len(made.samples)
            for sample in made.samples:
                with as_cannot_run(f"{self.architecture} does not run on {made.description}"):
                    tokens = greedy_tokens(model, sample, self.options.greedy_tokens)
                    self.samples.append(sample.continued(tokens))
                    self.output, scores = scores_of(model, self.samples[-1])
                    self.unmerged.append(scores.cpu())
                self._tick()
            if attached is not None and attached.uncalled:
                self.notes.append(_uncalled(attached))
        if any(bool((logits.isnan() | logits.isposinf()).any()) for logits in self.unmerged):
            raise CannotRun(f"The unmerged model's own logits are not finite in {dtype_name(wide)}.")
        if self.options.reference == "peft":
            del model
            model = self._load(self.base_folder, wide)  # PEFT does not undo everything that it loads
        return self._base(model), self._rounded(model, rounded_to) if rounded_to is not None else None

    def _base(self, model: Any) -> Comparison | None:
        try:
            return self._compare_model(model, "The base model does not run on these inputs")
        except OutOfMemory:
            raise
        except CannotRun as stop:
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
            raise CannotRun("No tolerance can be measured: " + " ".join(self.notes[-2:]))
        return tolerances

    def _merged(self, dtype: torch.dtype) -> Comparison:
        try:
            model = self._load(self.merged_folder, dtype)
            return self._compare_model(model, f"The merged model {str(self.merged_folder)!r} does not run")
        except OutOfMemory:
            raise
        except CannotRun as stop:
            raise MergedCannotRun(str(stop)) from stop

    def _attach(self, stack: ExitStack, dtype: torch.dtype) -> tuple[Any, Attached | None]:
        """The unmerged model, for as long as `stack` is open; the base alone after that, unless it is PEFT's."""
        model = self._load(self.base_folder, dtype)
        if self.options.reference == "peft":
            from peft import PeftModel

            with as_cannot_run(f"PEFT cannot load the adapter {str(self.adapter.path)!r}"):
                wrapped = PeftModel.from_pretrained(model, str(self.adapter.path))
                return wrapped.get_base_model().eval(), None
        try:
            return model, stack.enter_context(attach_adapter(model, self.adapter))
        except PlanError as error:
            raise CannotRun(f"The unmerged forward cannot be computed: {error}") from error

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        """A model as its user would load it, in eval mode and on the device. The one before it is gone by now."""
        assert self.model_class is not None
        library = self.model_class.library
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        with as_cannot_run(f"{library} cannot load {str(folder)!r} as {self.architecture}"):
            coded = self.coded_base if folder == self.base_folder else None
            model, missing = self.model_class.load(folder, dtype, self.device, coded)
        if folder == self.base_folder:
            brought = tuple(change.name for change in self.adapter.replacements)
            missing = [name for name in missing if not name.endswith(brought)]
        if missing:
            shown = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            raise CannotRun(
                f"{str(folder)!r} lacks {shown}, which {self.architecture} needs: {library} would make random "
                "numbers of it."
            )
        return model

    def _compare_model(self, model: Any, failing: str) -> Comparison:
        def runs() -> Iterator[tuple[Sample, Tensor, Tensor]]:
            for sample, unmerged in zip(self.samples, self.unmerged, strict=True):
                with as_cannot_run(failing):
                    _, logits = scores_of(model, sample)
                if logits.shape != unmerged.shape:
                    raise CannotRun(f"{failing}: its output is {list(logits.shape)}, wanted {list(unmerged.shape)}.")
                yield sample, unmerged, logits
                self._tick()

        return compare(runs(), causal=self.causal)

    def _tick(self) -> None:
        self.done += 1
        self.on_progress(Progress("Comparing the forward", self.done, self.total, "forwards"))


def measure_loss(checkpoint: ShardedCheckpoint, forward: ForwardReport, device: str) -> Comparison | None:
    """How far a quantized model, its codes decoded to float32, is from the unmerged one on the samples of `forward`.

    None where it cannot be loaded or run, or has no room. Peak memory: the model in float32.
    """
    import transformers

    model_class = getattr(transformers, forward.architecture or "", None)
    too_large = device == "cpu" and why_not_run([checkpoint.tensors.values()], {}, torch.float32)
    if model_class is None or not forward.samples or too_large:
        return None
    with quiet_transformers(), full_precision(), torch.inference_mode():
        model = from_tensors(model_class, checkpoint, torch.float32)[0].to(device).eval()
        pairs = zip(forward.samples, forward.unmerged_logits, strict=True)
        runs = ((sample, unmerged, scores_of(model, sample)[1]) for sample, unmerged in pairs)
        return compare(runs, causal=any(sample.grows == "input_ids" for sample in forward.samples))


def _config(folder: Path) -> Mapping[str, object]:
    try:
        config = read_json(folder)
    except CheckpointError as error:
        raise CannotRun(str(error)) from error
    if not config:
        raise CannotRun(f"{str(folder)!r} has no config.json, so transformers cannot load it.")
    return config


def _entries(model: ShardedCheckpoint | Path) -> Iterable[TensorEntry]:
    """The tensors of a model; none of files that cannot be read, which loading them says."""
    try:
        return (open_checkpoint(model) if isinstance(model, Path) else model).tensors.values()
    except CheckpointError:
        return ()


def _deployed_dtype(folder: Path, config: Mapping[str, object]) -> torch.dtype:
    try:
        tensors = open_checkpoint(folder).tensors.values()
    except CheckpointError as error:
        raise MergedCannotRun(str(error)) from error
    return deployed_dtype(config, ((entry.dtype, entry.nbytes) for entry in tensors))


def _trained_tokens(adapter: Adapter) -> list[int]:
    return sorted({index for rows in adapter.token_rows for index in rows.indices})


def _uncalled(attached: Attached) -> str:
    count, names = len(attached.uncalled), attached.uncalled[:3]
    return (
        f"{count} of {len(attached.modules)} adapted modules did not run on these inputs, so the forward says nothing "
        f"of them: {', '.join(names)}{', ...' if count > len(names) else ''}."
    )
