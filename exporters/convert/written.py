"""What a converter hands over to be written: a file of tensors and a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dora_serve.adapter import LoraWeights
from dora_serve.errors import UnmergeableError
from dora_serve.norm_scale_file import NormScales, write_norm_scales


@dataclass(frozen=True)
class Written:
    """file: the tensors' name. config: by the name of a JSON file. notes: what its readers do with it. norm_scales: of
    a DoRA for vLLM, by module, and of which base."""

    file: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    norm_scales: NormScales | None = None


def write(written: Written, folder: Path) -> None:
    """Into a folder that exists."""
    from safetensors.torch import save

    # Not save_file, which makes files that their owner alone may read.
    (folder / written.file).write_bytes(save(dict(written.tensors), dict(written.metadata) or None))
    for name, table in written.config.items():
        (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    if written.norm_scales is not None:
        write_norm_scales(folder, written.norm_scales.scales, written.norm_scales.base)


def refuse(target: str, problems: list[str]) -> None:
    """Raises UnmergeableError where there are problems, with all of them."""
    if not problems:
        return
    shown = "".join(f"\n  - {problem}" for problem in problems[:20])
    more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
    raise UnmergeableError(
        f"The adapter means something that {target} cannot say:{shown}{more}",
        remedy="Merge it (dora-export merge) or, to serve it as a plain LoRA, approximate it: --to lora --rank R.",
        problems=problems,
    )


def alpha_of(module: LoraWeights) -> float:
    """The alpha whose quotient by the rank is the scaling, to the last bit where there is one."""
    return module.scaling * module.rank
