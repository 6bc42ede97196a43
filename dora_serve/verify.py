"""Whether a merged folder is the unmerged model, whoever made it: every tensor, then the forward.

Nothing that merged is trusted here: `tensor_check` recomputes every value from the formula, and `forward_check` runs
the unmerged model (reference.py, or PEFT) against the folder loaded as a user would load it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import CheckpointError
from dora_serve.forward_check import check_forward
from dora_serve.forward_report import ForwardOptions, ForwardReport
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.quantized.view import codes_in
from dora_serve.structure_check import config_difference
from dora_serve.tensor_check import check_tensors
from dora_serve.tensor_report import TensorReport


@dataclass(frozen=True)
class VerifyReport:
    """Both checks. unreadable: why the folder could not even be opened; the checks are None then.

    config: what its config.json says otherwise than the base's, None for nothing. The forward runs with what it says
    and so is the judge of it; where the forward was not run there is none, and it is a failure.
    """

    tensors: TensorReport | None
    forward: ForwardReport | None
    unreadable: str | None = None
    config: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every tensor is right and the forward, where it can be run at all, agrees."""
        if self.tensors is None or not self.tensors.passed or self._config_failures:
            return False
        return self.forward is None or not self.forward.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that is wrong, in plain sentences, causes before consequences."""
        if self.unreadable is not None:
            return (self.unreadable,)
        found = [finding.message for finding in self.tensors.findings] if self.tensors else []
        return (*found, *self._config_failures, *(self.forward.failures if self.forward else ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader may want to know of the folder and is not wrong."""
        return (f"{self.config}; the forward was run with it.",) if self.config and self._ran else ()

    @property
    def _config_failures(self) -> tuple[str, ...]:
        if self.config is None or self._ran:
            return ()
        return (f"{self.config}; the forward was not run, so nothing shows that this changes nothing.",)

    @property
    def _ran(self) -> bool:
        return self.forward is not None and self.forward.ran

    @property
    def changes_nothing(self) -> bool:
        return self.forward is not None and self.forward.changes_nothing

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "notes": list(self.notes),
            "tensors": self.tensors.summary() if self.tensors else None,
            "forward": self.forward.to_json() if self.forward else None,
        }


def verify(
    plan: MergePlan,
    merged: Path,
    options: ForwardOptions | None = None,
    *,
    tokenizer_folder: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> VerifyReport:
    """Check the folder `merged` against `plan`, which names the base and the adapter.

    tokenizer_folder: where that of a pipeline's text encoder lies; a model's own is in its folder.

    Raises UnavailableError without transformers, DoraServeError for prompts that cannot be read; whatever is wrong
    with `merged` itself is in the report. Peak memory: one model at a time, and logits.
    """
    try:
        checkpoint = open_checkpoint(merged)
        codes = codes_in(checkpoint)
        if codes is not None:
            return VerifyReport(
                None,
                None,
                f"{str(merged)!r} is quantized ({codes}), and so equals no merge: the dense one that it was made from "
                "can be verified, and what quantizing that cost stands in its dora_export.json, if dora-export did it.",
            )
        tensors = check_tensors(plan, checkpoint, on_progress=on_progress)
    except CheckpointError as error:
        return VerifyReport(None, None, str(error))
    forward = check_forward(
        plan.base.folder,
        plan.adapter,
        merged,
        options,
        base=plan.base,
        tokenizer_folder=tokenizer_folder,
        on_progress=on_progress,
    )
    return VerifyReport(tensors, forward, config=config_difference(plan, checkpoint))
