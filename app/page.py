"""The page: its tabs, what refreshes them, and endpoints for programs. It does not know which backend answers."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app import render
from app.adapters_tab import add_adapters_tab
from app.compare_tab import add_compare_tab
from app.desk import Settings, require_askable
from app.export_tab import add_export_tab
from app.inspect_tab import add_inspect_tab
from app.prompt_sets_tab import add_prompt_sets_tab
from app.run import Run
from app.shared import Shared
from dora_serve.errors import DoraServeError

TITLE = "dora-serve"
STYLE = Path(__file__).with_name("style.css")
GENERATIONS = 32
"""At a time, of all browsers together; the others wait in a queue of WAITING."""

WAITING = 128


def build_page(shared: Shared) -> Any:
    """The Blocks, ready to `launch` with `look()`."""
    import gradio as gr

    backend = shared.backend
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(_top(backend.label))
        refreshed: list[Any] = []
        with gr.Tabs():
            with gr.Tab("Compare"):
                refreshed.append(add_compare_tab(shared))
            with gr.Tab("Adapters"):
                adapters = gr.Column()
            with gr.Tab("Inspect"):
                refreshed.append(add_inspect_tab(shared))
            with gr.Tab("Prompt sets"):
                refreshed.append(add_prompt_sets_tab(shared))
            with gr.Tab("Export"):
                refreshed.append(add_export_tab(shared))

        def refresh(chosen: list[str]) -> list[Any]:
            """What shows the adapters, in the order of `refreshed`."""
            try:
                rows = backend.adapters()
            except DoraServeError:  # a server that is away: the tab that asks it says so
                rows = ()
            names = [row.name for row in rows]
            columns = ["base", *names]
            kept = [name for name in chosen or [] if name in columns] or shared.first_columns(columns)
            inspected = [name for name in kept if name in names] or names[:1]
            return [
                gr.Dropdown(choices=columns, value=kept),
                gr.Dropdown(choices=names, value=inspected[:2]),
                gr.Dropdown(choices=columns, value=kept),
                gr.Dropdown(choices=names, value=names[0] if names else None),
                render.adapter_table(rows),
                gr.Dropdown(choices=names, value=names[0] if names else None),
            ]

        with adapters:
            add_adapters_tab(shared, refreshed, refresh)
        page.load(refresh, [refreshed[0]], refreshed, api_visibility="private", show_progress="hidden")

        def leave(request: gr.Request) -> None:
            shared.desks.leave(request.session_hash)

        page.unload(leave)
        _add_endpoints(shared)

    page.queue(max_size=WAITING, default_concurrency_limit=GENERATIONS)
    return page


def look() -> dict[str, Any]:
    """What `launch` is told of the page's looks: fonts that lie beside Gradio's own files, nothing from elsewhere."""
    import gradio as gr

    # Gradio's own semi-bold files lack letters, so what is bold takes the bold ones.
    fonts: list[Any] = [
        gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)),
        "ui-sans-serif",
        "system-ui",
        "sans-serif",
    ]
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="lg", spacing_size="sm", text_size="md", font=fonts
    ).set(button_primary_background_fill="*primary_600", button_primary_text_color="white")
    return {"theme": theme, "css": STYLE.read_text(encoding="utf-8"), "footer_links": ["api", "settings"]}


def _top(label: str) -> str:
    from html import escape

    return (
        f'<div class="ds-top"><h1>dora-serve</h1><p>One base model, <code>{escape(label)}</code>, and adapters on it: '
        "small files of trained changes, its own weights stay as they are. Every column answers the same prompt in the "
        "same batch. The base, without an adapter, is the control: what another column says otherwise is what training "
        "changed, and what it costs stands above and below the answer. LoRA adds a product of two thin matrices to a "
        "weight; DoRA also learns the length of each of its rows.</p></div>"
    )


def _add_endpoints(shared: Shared) -> None:
    """For programs (`gradio_client`): plain values in, plain values out."""
    import gradio as gr
    from gradio.events import api

    backend = shared.backend
    running: dict[str, Run] = {}

    def generate(
        prompt: str,
        columns: list[str],
        chat: bool = True,
        system: str = "",
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> Iterator[list[dict[str, Any]]]:
        """All columns as they grow; "base" is the base. Raises where nothing can be asked."""
        session = (request.session_hash if request is not None else None) or ""
        try:
            require_askable(prompt, columns)
            settings = Settings(chat, system, max_tokens, temperature, top_p, top_k, repetition_penalty, seed)
            started = Run(backend, [settings.request(column, prompt) for column in columns])
            running[session] = started
            for answers in started.looks():
                yield [{"column": column, **asdict(answer)} for column, answer in zip(columns, answers, strict=True)]
        except DoraServeError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            running.pop(session, None)

    def stop(column: int, request: gr.Request = None) -> str:  # type: ignore[assignment]
        """End the answer in one column of what this client is generating, counted from 0; -1 ends all."""
        started = running.get((request.session_hash if request is not None else None) or "")
        if started is None:
            return "Nothing is running."
        started.cancel_all() if column < 0 else started.cancel(column)
        return "Stopped."

    def adapters() -> list[dict[str, Any]]:
        """All adapters that are loaded."""
        try:
            return [asdict(row) for row in backend.adapters()]
        except DoraServeError as error:
            raise gr.Error(str(error), print_exception=False) from error

    api(generate, api_name="generate", concurrency_id="generate")
    api(stop, api_name="stop", queue=False)
    api(adapters, api_name="adapters", queue=False)
