"""The Inspect tab: the DoRA paper's weight decomposition analysis of loaded adapters, overlaid."""

from typing import Any

from app import render
from app.shared import Shared
from dora_serve.decomposition import Decomposition
from dora_serve.decomposition_plot import plot_svg
from dora_serve.errors import DoraServeError
from dora_serve.progress import Progress

MOST_ADAPTERS = 4
HEADER = ("adapter", "kind", "modules", "mean ΔM", "mean ΔD", "correlation", "slope")
ABOUT = """<div class="ds-hint">Every weight is a length (magnitude) and a direction for each output. ΔM is how far
training moved the lengths, ΔD how far it turned the directions, one dot for each module. In the DoRA paper (figure 2)
LoRA moves both together, a positive correlation, while DoRA and full fine-tuning trade one for the other, a negative
one.</div>"""


def add_inspect_tab(shared: Shared) -> Any:
    """Put the tab into the page; returns the component with the choice of adapters."""
    import gradio as gr

    gr.HTML(ABOUT)
    with gr.Row(equal_height=True):
        chosen = gr.Dropdown(
            [],
            label="Adapters, one or several",
            multiselect=True,
            max_choices=MOST_ADAPTERS,
            allow_custom_value=True,
            scale=5,
            min_width=280,
            elem_id="ds-inspected",
        )
        draw = gr.Button("Analyse", variant="primary", scale=1, min_width=140, elem_id="ds-analyse")
    said = gr.HTML("", elem_id="ds-inspect-said")
    picture = gr.HTML("", elem_id="ds-picture")
    with gr.Accordion("Numbers", open=False):
        numbers = gr.HTML("")

    def inspect(names: list[str], progress: gr.Progress = gr.Progress()) -> tuple[str, str, str]:  # noqa: B008
        """Read the base's adapted weights and compare, then draw."""
        try:
            if not names:
                raise DoraServeError("No adapter is chosen.", remedy="Choose one or several.")
            found = {}
            for name in names[:MOST_ADAPTERS]:

                def show(now: Progress, name: str = name) -> None:
                    progress((now.done, now.total), desc=f"{name}: {now.stage}")

                found[name] = shared.backend.decompose(name, show)
            svg = plot_svg(found)
        except DoraServeError as error:
            return render.message(str(error)), "", ""
        rows = [row for name, decomposition in found.items() for row in _rows(name, decomposition)]
        return "", f'<div class="ds-picture">{svg}</div>', render.table(HEADER, rows)

    draw.click(inspect, [chosen], [said, picture, numbers], api_name="inspect")
    return chosen


def _rows(name: str, found: Decomposition) -> list[list[str]]:
    rows = []
    for kind, trend in {"all": found.trend, **found.by_kind}.items():
        group = [change for change in found.modules if kind in ("all", change.kind)]
        means = [
            sum(change.delta_magnitude for change in group) / max(1, len(group)),
            sum(change.delta_direction for change in group) / max(1, len(group)),
        ]
        values = [f"{value:.3g}" if value is not None else "–" for value in (*means, trend.correlation, trend.slope)]
        rows.append([name, kind, str(trend.modules), *values])
    return rows
