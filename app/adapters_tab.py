"""The Adapters tab: what is loaded, and adding, replacing and removing while others generate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from app import render
from app.shared import Shared, name_for, require_name
from app.uploads import unpack
from dora_serve.errors import DoraServeError


def _named_by(files: Sequence[Path]) -> str:
    """Of files that were uploaded together, in whatever order: the weights' name, every configuration has one name."""
    return next((path for path in files if path.suffix.lower() == ".safetensors"), files[0]).stem


def add_adapters_tab(shared: Shared, refreshed: list[Any], refresh: Callable[..., list[Any]]) -> Any:
    """Put the tab into the page; returns the table.

    refreshed: components that show which adapters there are, the table to be added; refresh: the updates for them.
    """
    import gradio as gr

    backend = shared.backend
    table = gr.HTML("", elem_id="ds-table")
    said = gr.HTML("", elem_id="ds-adapters-said")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            folder = gr.Textbox(
                "",
                label="Folder or Hub id",
                info="a PEFT adapter: a folder that this page may read, or user/name[@revision][:folder]",
                elem_id="ds-folder",
            )
            files = gr.File(
                label="or files: .safetensors and adapter_config.json, or a .zip",
                file_count="multiple",
                file_types=[".safetensors", ".json", ".zip"],
                height=160,
                elem_id="ds-files",
                visible=backend.confined,
            )
        with gr.Column(min_width=300):
            name = gr.Textbox("", label="Name", info="empty: the folder's own", elem_id="ds-name")
            replace = gr.Checkbox(
                label="Replace the adapter of that name", info="what runs keeps the old one until it ends"
            )
            add = gr.Button("Add", variant="primary", elem_id="ds-add")
        with gr.Column(min_width=300):
            chosen = gr.Dropdown([], label="Loaded adapter", allow_custom_value=True, elem_id="ds-chosen")
            remove = gr.Button("Remove", elem_id="ds-remove")
            update = gr.Button("Refresh the table", size="sm")
    refreshed += [table, chosen]

    def add_adapter(
        where: str | None, uploaded: list[str] | None, called: str | None, instead: bool, columns: list[str]
    ) -> list[Any]:
        """Add an adapter from a folder, a Hub id or files, and say how it went."""
        source: str | Path | None = None
        try:
            paths = [Path(path) for path in uploaded or []]
            where, called = where or "", called or ""
            if paths and where.strip():
                raise DoraServeError("Both a folder and files are given.", remedy="Take one of them away.")
            source = unpack(paths, shared.uploads) if paths else shared.source(where)
            given = require_name(called.strip()) or name_for(_named_by(paths) if paths else source)
            before = shared.loaded_from(given)
            report = backend.load(given, source, replace=instead)
        except DoraServeError as error:
            if source is not None:
                shared.discard(source)
            return [render.message(f"Not added. {error}"), *refresh(columns), gr.skip(), gr.skip()]
        if before is not None and before != str(source):
            shared.discard(before)
        return [render.message(report, good=True), *refresh(columns), "", None]

    def remove_adapter(called: str | None, columns: list[str]) -> list[Any]:
        """Forget an adapter, and say how it went."""
        try:
            if not called:
                raise DoraServeError("No adapter is chosen.", remedy="Choose one of those that are loaded.")
            before = shared.loaded_from(called)
            backend.unload(called)
            shared.discard(before or "")
        except DoraServeError as error:
            return [render.message(f"Not removed. {error}"), *refresh(columns)]
        return [render.message(f"Removed {called}.", good=True), *refresh(columns)]

    columns = refreshed[0]
    add.click(
        add_adapter, [folder, files, name, replace, columns], [said, *refreshed, name, files], api_name="add_adapter"
    )
    remove.click(remove_adapter, [chosen, columns], [said, *refreshed], api_name="remove_adapter")
    update.click(refresh, [columns], refreshed, api_visibility="private")
    return table
