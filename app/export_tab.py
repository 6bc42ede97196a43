"""The Export tab: merge a loaded adapter into its base, see the proof, take the result away or publish it.

The one part of the app that stands on the exporters; everything else stands on the engine.
"""

import re
import zipfile
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from app import render
from app.shared import Shared
from dora_serve.errors import DoraServeError
from dora_serve.progress import Progress

MOST_ZIPPED = 4 << 30
"""Bytes that are packed for a browser; larger results are fetched from the folder that the page names."""

_LABELS = {
    "safetensors": "safetensors, for any program",
    "onnx": "ONNX",
    "onnx-adapters": "ONNX of the base, the adapter beside it",
    "nf4": "4 bits (nf4)",
    "nf4-double": "4 bits, scales quantized as well",
}
"""What the exporters make, in words."""

ABOUT = """<div class="ds-hint">Folds the adapter into dense weights, proves that the result is the unmerged model
(every tensor, and the logits), and writes it: what <code>dora-export merge</code> does. Nothing that fails is
kept.</div>"""

PUBLISH = """<div class="ds-hint">Sends what was exported above to the Hub, with a model card that holds its proof: what
<code>dora-export push</code> does. The token goes to the Hub and nowhere else: it is neither shown, logged nor
kept.</div>"""


def add_export_tab(shared: Shared) -> Any:
    """Put the tab into the page; returns the component with the choice of an adapter."""
    import gradio as gr

    from exporters.registry import EXPORTERS

    gr.HTML(ABOUT)
    with gr.Row(equal_height=True):
        chosen = gr.Dropdown(
            [], label="Adapter", allow_custom_value=True, scale=2, min_width=200, elem_id="ds-exported"
        )
        to = gr.Radio(
            [(_LABELS.get(name, name), name) for name in EXPORTERS],
            value="safetensors",
            label="To",
            scale=3,
            min_width=280,
        )
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

    # One at a time, and none while a push reads the folder that it would replace.
    merge.click(
        export, [chosen, to], [said, report, download], api_name="export", concurrency_limit=1, concurrency_id="export"
    )
    _add_push(shared, chosen, to)
    return chosen


def _add_push(shared: Shared, chosen: Any, to: Any) -> None:
    """The part that publishes the export of the chosen adapter."""
    import gradio as gr

    with gr.Accordion("Publish on the Hub", open=False, elem_id="ds-publish"):
        gr.HTML(PUBLISH)
        with gr.Row(equal_height=True):
            repo_id = gr.Textbox(label="Repository", placeholder="user/name", scale=2, elem_id="ds-repo")
            token = gr.Textbox(label="Token that may write", type="password", scale=2, elem_id="ds-token")
            public = gr.Checkbox(False, label="Public", scale=1, min_width=100)
            publish = gr.Button("Publish", scale=1, min_width=150, elem_id="ds-push")
        said = gr.HTML("", elem_id="ds-push-said")

    def push(
        name: str | None,
        exporter: str,
        repo_id: str,
        token: str,
        public: bool = False,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, str]:
        """Publish what /export made of this adapter; returns what to say, and nothing in place of the token."""

        def show(now: Progress) -> None:
            progress((now.done, now.total), desc=now.stage, unit=now.unit)

        token = (token or "").strip()
        try:
            return _push(shared, name, exporter, (repo_id or "").strip(), token, public, show), ""
        except DoraServeError as error:
            # The family's messages hold no token; this is for what a server may have said.
            text = str(error).replace(token, "***") if token else str(error)
            return render.message(f"Not published. {text}"), ""

    publish.click(
        push,
        [chosen, to, repo_id, token, public],
        [said, token],
        api_name="push",
        concurrency_limit=1,
        concurrency_id="export",
    )


def _push(shared: Shared, name: str | None, exporter: str, repo_id: str, token: str, public: bool, show: Any) -> str:
    """What to say of a push that was done. Raises DoraServeError for whatever stops it."""
    from exporters.hub import push
    from exporters.push_plan import PushRequest

    if not name:
        raise DoraServeError("No adapter is chosen.", remedy="Choose one of those that are loaded.")
    if not token:
        # Never the token of the machine that serves the page: whoever sees the page may press the button.
        raise DoraServeError(
            "No token is given.", remedy="Make one that may write at https://huggingface.co/settings/tokens."
        )
    folder = _folder(shared, name, exporter)
    if not folder.is_dir() or shared.exports.get((name, exporter)) != shared.loaded_from(name):
        # Nor what an adapter was exported to that had this name before.
        raise DoraServeError(f"{name!r} is not exported to {exporter} yet.", remedy="Merge and verify it first.")
    done = push(PushRequest(folder, repo_id, public=public, token=token), show)
    seen = "private" if done.plan.private else "public"
    sent = len(done.plan.to_send)
    notes = "".join(f" Note: {note}" for note in done.plan.notes)
    said = render.message(f"Published ({seen}): {sent} files sent, commit {done.commit[:12]}.{notes}", good=True)
    return f'{said}<p><a href="{escape(done.url)}" target="_blank" rel="noopener">{escape(done.url)}</a></p>'


def _folder(shared: Shared, name: str, exporter: str) -> Path:
    """Where the export of an adapter lies."""
    plain = re.sub(r"[^\w.-]+", "-", name)
    stem = name if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:8]}"
    return shared.uploads.parent / "exports" / f"{stem}-{exporter}"


def _export(shared: Shared, name: str, exporter: str, show: Any) -> tuple[Path, str]:
    """The folder that was made, and its report. Raises DoraServeError for whatever stops it."""
    from exporters.pipeline import ExportRequest, run_export
    from exporters.report import export_text

    adapter, base = shared.backend.paths(name)
    out = _folder(shared, name, exporter)
    out.parent.mkdir(parents=True, exist_ok=True)
    source = shared.loaded_from(name)
    shared.exports.pop((name, exporter), None)
    made = run_export(ExportRequest(adapter=adapter, base=base, out=out, to=exporter, overwrite=True), show)
    if source is not None:
        shared.exports[name, exporter] = source
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
