"""A conversion in words and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median

from dora_serve.comparison import Comparison
from exporters.convert.approximate import Approximation, worst
from exporters.convert.run import Conversion

_SHOWN = 8


def conversion_text(conversion: Conversion) -> str:
    """Everything a person should know of it before it is written."""
    source, written = conversion.source, conversion.written
    lines = [
        f"{source.path.name} ({source.method}, {source.format}): {len(source.modules)} modules, "
        f"{len(written.tensors)} tensors as {conversion.to}"
    ]
    if conversion.approximation is not None:
        lines += ["", *loss_lines(conversion.approximation)]
    lines += ["", *(f"Note: {note}" for note in conversion.notes)] if conversion.notes else []
    return "\n".join(lines)


def loss_lines(near: Approximation) -> list[str]:
    """What an approximation loses, by module and on the logits."""
    shares = [loss.of_update for loss in near.modules] or [0.0]
    lines = [
        "Of each module's update W' - W, this share of its length is lost: "
        f"median {median(shares):.1%}, largest {max(shares):.1%}.",
        "",
        f"{'module':<60}  rank  of W' - W     of W",
    ]
    for loss in worst(near, _SHOWN).values():
        lines.append(f"{loss.module:<60}  {loss.rank:>4}  {loss.of_update:>9.2%}  {loss.of_weight:>7.2%}")
    if len(near.modules) > _SHOWN:
        lines.append(f"and {len(near.modules) - _SHOWN} more, which lose less (--json lists them)")
    lines.append("")
    if near.logits is None or near.base is None:
        lines.append(f"The logits were not compared: {near.why_not}")
    else:
        lines.append(f"Logits on {near.inputs}, against the adapter as it is:")
        lines += [_row("the approximation", near.logits), _row("the base alone", near.base)]
    return lines


def _row(name: str, found: Comparison) -> str:
    return (
        f"  {name:<18} rms {found.rms:.3g}, largest {found.largest:.3g}, KL {found.kl:.3g}, same top-1 {found.top1:.1%}"
    )


def conversion_json(conversion: Conversion, out: str | None) -> dict[str, object]:
    """The same as plain values."""
    near = conversion.approximation
    values: dict[str, object] = {
        "out": out,
        "from": conversion.source.format,
        "to": conversion.to,
        "method": conversion.source.method,
        "modules": len(conversion.source.modules),
        "tensors": len(conversion.written.tensors),
        "notes": list(conversion.notes),
    }
    if near is not None:
        values["approximation"] = {
            "modules": [asdict(loss) for loss in near.modules],
            "logits": asdict(near.logits) if near.logits else None,
            "base": asdict(near.base) if near.base else None,
            "inputs": near.inputs,
            "why_not": near.why_not,
        }
    return values
