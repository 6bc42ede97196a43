"""What a forward check is asked, and what it found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dora_serve.comparison import Comparison, Tolerance
from dora_serve.prompts import Sample


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
