"""The weight decomposition analysis as a picture: a scatter with its trend, and heat maps over layers."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_serve.decomposition import Decomposition, ModuleChange
from dora_serve.errors import OutputError, UnavailableError, no_such_path

_COLOURS = ("#0f8b8d", "#e4572e", "#6c5ce7", "#d9a404", "#2e86de", "#8e5572", "#4caf50", "#7f8c8d")
_MARKERS = "osD^vP*X"
_SUFFIXES = (".png", ".svg", ".pdf")
_INK = "#010203"
"""What is drawn in it takes the colour of the page's own text in an SVG."""


def require_drawing(path: Path) -> None:
    """Raise what `save_plot` would for this path, before the work that leads to it: UnavailableError, OutputError."""
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(
            f"{str(path)!r} has a suffix that no picture is written as: wanted {', '.join(_SUFFIXES)}.",
            remedy="Name the file so.",
            path=str(path),
        )
    if not path.absolute().parent.is_dir():
        raise OutputError(no_such_path("The folder", path.absolute().parent), remedy="Make it first.", path=str(path))
    _matplotlib()


def save_plot(decompositions: Mapping[str, Decomposition], path: Path) -> None:
    """Write the picture of some adapters, by name, to a .png, .svg or .pdf, which appears once it is complete.

    Raises UnavailableError without matplotlib, OutputError for another suffix or a file that cannot be written.
    """
    require_drawing(path)
    suffix = path.suffix.lower()
    picture = io.BytesIO()
    _draw(decompositions, "#222222", picture, format=suffix[1:], dpi=150, facecolor="white")
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, suffix=suffix, delete=False) as file:
            part = Path(file.name)
            try:
                file.write(picture.getvalue())
            except BaseException:
                part.unlink()
                raise
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        raise OutputError(
            f"{str(path)!r} could not be written: {error.strerror or error}.",
            remedy="Give a file in a folder that exists and may be written to.",
            path=str(path),
        ) from error


def plot_svg(decompositions: Mapping[str, Decomposition]) -> str:
    """The picture as an <svg> for a page, whose text and axes have the page's own colour, light or dark."""
    text = io.StringIO()
    _draw(decompositions, _INK, text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r' width="[^"]*"', ' width="100%"', svg, count=1)
    return re.sub(r' height="[^"]*"', "", svg, count=1)


def _matplotlib() -> tuple[Any, Any]:
    """`rc_context` and `Figure`; neither opens a window, nor keeps the figures."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnavailableError(
            "Drawing needs matplotlib, which is not installed.", remedy="pip install 'dora-serve[plot]'"
        ) from error
    return rc_context, Figure


def _draw(decompositions: Mapping[str, Decomposition], ink: str, target: Any, **saving: Any) -> None:
    rc_context, figure_class = _matplotlib()
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    style = {
        **colours,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
    }
    # A dollar sign would begin a formula.
    decompositions = {name.replace("$", r"\$"): found for name, found in decompositions.items()}
    rows = len(decompositions)
    with rc_context(style):
        figure = figure_class(figsize=(11, 4.2 + 2.1 * (rows - 1)), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
        for part in (figure, left, right):
            part.patch.set_alpha(0)
        _scatter(left.subplots(), decompositions, ink)
        grid = right.subplots(2 * rows, 1, squeeze=False)[:, 0]
        for number, (name, found) in enumerate(decompositions.items()):
            label = f"{name}: " if rows > 1 else ""
            _heat_map(figure, grid[2 * number], found, f"{label}ΔD, the change of direction", "delta_direction")
            _heat_map(
                figure, grid[2 * number + 1], found, f"{label}ΔM / m, the relative change of magnitude", "relative"
            )
        figure.savefig(target, **saving)


def _scatter(axes: Any, decompositions: Mapping[str, Decomposition], ink: str) -> None:
    """One adapter: a colour for each kind of module. Several: a colour for each adapter, a marker for each kind."""
    alone = len(decompositions) == 1
    kinds = list(dict.fromkeys(change.kind for found in decompositions.values() for change in found.modules))
    titles = []
    for number, (name, found) in enumerate(decompositions.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for place, kind in enumerate(kinds):
            group = [change for change in found.modules if change.kind == kind]
            axes.scatter(
                [change.delta_direction for change in group],
                [change.delta_magnitude for change in group],
                s=22,
                alpha=0.75,
                linewidths=0,
                color=_COLOURS[place % len(_COLOURS)] if alone else colour,
                marker="o" if alone else _MARKERS[place % len(_MARKERS)],
                label=kind if alone else (f"{name} ({found.method})" if place == 0 else None),
            )
        trend = found.trend
        if trend.slope is not None and trend.intercept is not None:
            ends = [min(c.delta_direction for c in found.modules), max(c.delta_direction for c in found.modules)]
            heights = [trend.intercept + trend.slope * end for end in ends]
            axes.plot(ends, heights, color=ink if alone else colour, linewidth=1.2, linestyle="--")
        shown = "none" if trend.correlation is None else f"{trend.correlation:+.2f}"
        slope = "" if trend.slope is None else f", slope {trend.slope:.3g}"
        titles.append(f"{name} ({found.method}): correlation {shown}{slope}")
    axes.set_title("\n".join(titles))
    axes.set_xlabel("ΔD, mean change of direction (1 − cos)")
    axes.set_ylabel("ΔM, mean change of magnitude")
    axes.patch.set_alpha(0)
    axes.legend(frameon=False, fontsize=8, labelcolor=ink)


def _heat_map(figure: Any, axes: Any, found: Decomposition, title: str, what: str) -> None:
    """Rows are kinds of modules, columns are layers; what has no layer stands at its left."""
    layers = sorted({-1 if change.layer is None else change.layer for change in found.modules})
    kinds = list(dict.fromkeys(change.kind for change in found.modules))
    table = [[float("nan")] * len(layers) for _ in kinds]
    for change in found.modules:
        table[kinds.index(change.kind)][layers.index(-1 if change.layer is None else change.layer)] = _value(
            change, what
        )
    image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_title(title)
    axes.set_yticks(range(len(kinds)), kinds)
    every = max(1, len(layers) // 10)
    axes.set_xticks(
        range(0, len(layers), every), ["–" if layers[n] < 0 else layers[n] for n in range(0, len(layers), every)]
    )
    axes.set_xlabel("layer")
    axes.patch.set_alpha(0)
    figure.colorbar(image, ax=axes, pad=0.01)


def _value(change: ModuleChange, what: str) -> float:
    if what == "relative":
        return change.delta_magnitude / change.magnitude if change.magnitude else float("nan")
    return change.delta_direction
