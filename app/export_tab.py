"""The Export tab: merge a loaded adapter into its base, see the proof, take the result away.

The one part of the app that stands on the exporters; everything else stands on the engine.
"""

import zipfile
from html import escape
from pathlib import Path
from typing import Any

from app import render
from app.shared import Shared
from dora_serve.errors import DoraServeError
from dora_serve.progress import Progress

MOST_ZIPPED = 4 << 30
"""Bytes that are packed for a browser; larger results are fetched from the folder that the page names."""

ABOUT = """<div class="ds-hint">Folds the adapter into dense weights, proves that the result is the unmerged model
(every tensor, and the logits), and writes it: what <code>dora-export merge</code> does. Nothing that fails is
kept.</div>"""


def add_export_tab(shared: Shared) -> Any:
    """Put the tab into the page; returns the component with the choice of an adapter."""
    import gradio as gr

    from exporters.registry import EXPORTERS

    gr.HTML(ABOUT)
    with gr.Row(equal_height=True):
        chosen = gr.Dropdown([], label="Adapter", allow_custom_value=True, scale=3, elem_id="ds-exported")
        to = gr.Radio(sorted(EXPORTERS, reverse=True), value="safetensors", label="To", scale=2)
        merge = gr.Button("Merge and verify", variant="primary", scale=1, min_width=150, elem_id="ds-merge")
    said = gr.HTML("", elem_id="ds-export-said")
    report = gr.HTML("", elem_id="ds-report")
    download = gr.DownloadButton("Download", size="sm", interactive=False, elem_id="ds-export-download")

    def export(
        name: str | None,
        exporter: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, str, Any]:
        """Merge, verify and export, and say how it went."""

        def show(now: Progress) -> None:
            progress((now.done, now.total), desc=now.stage, unit=now.unit)

        try:
            if not name:
                raise DoraServeError("No adapter is chosen.", remedy="Choose one of those that are loaded.")
            out, text = _export(shared, name, exporter, show)
        except DoraServeError as error:
            return render.message(f"Not exported. {error}"), "", gr.DownloadButton(interactive=False)
        packed = _packed(out, shared.desks.of(request.session_hash).path(f"{out.name}.zip"))
        button = gr.DownloadButton(value=packed, interactive=packed is not None)
        said = render.message(f"Exported to {out} on the machine that serves this page.", good=True)
        return said, f'<pre class="ds-report">{escape(text)}</pre>', button

    merge.click(export, [chosen, to], [said, report, download], api_name="export", concurrency_limit=1)
    return chosen


def _export(shared: Shared, name: str, exporter: str, show: Any) -> tuple[Path, str]:
    """The folder that was made, and its report. Raises DoraServeError for whatever stops it."""
    from exporters.pipeline import ExportRequest, run_export
    from exporters.report import export_text

    adapter, base = shared.backend.paths(name)
    out = shared.uploads.parent / "exports" / f"{Path(name).name}-{exporter}"
    out.parent.mkdir(parents=True, exist_ok=True)
    made = run_export(ExportRequest(adapter=adapter, base=base, out=out, to=exporter, overwrite=True), show)
    return out, export_text(made)


def _packed(folder: Path, target: Path) -> str | None:
    """The folder as a zip, without compressing what is random anyway; None where it is too large to pack."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if sum(path.stat().st_size for path in files) > MOST_ZIPPED:
        return None
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            archive.write(path, f"{folder.name}/{path.relative_to(folder)}")
    return str(target)
