"""The Prompt sets tab: every prompt of a file in every column, a table, and a score where the file has the answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app import render
from app.desk import MOST_COLUMNS, Settings, require_askable
from app.prompt_sets import exact_matches, read_prompts, table_csv
from app.run import Run
from app.shared import Shared
from dora_serve.errors import DoraServeError

ABOUT = """<div class="ds-hint">Every prompt of a file in every column, the likeliest token each time. A .txt has one
prompt a line; a .jsonl or .csv has <code>prompt</code> and, where it is known, the right <code>answer</code>: then the
share of exact matches is shown.</div>"""


def add_prompt_sets_tab(shared: Shared) -> Any:
    """Put the tab into the page; returns the component with the choice of columns."""
    import gradio as gr

    gr.HTML(ABOUT)
    with gr.Row(equal_height=False):
        file = gr.File(
            label="Prompts: .txt, .jsonl or .csv",
            file_types=[".txt", ".jsonl", ".csv"],
            height=160,
            scale=2,
            elem_id="ds-set-file",
        )
        with gr.Column(scale=2, min_width=280):
            columns = gr.Dropdown(
                [], label="Columns", multiselect=True, max_choices=MOST_COLUMNS, allow_custom_value=True
            )
            most = gr.Slider(1, 512, value=64, step=1, label="Most tokens")
        with gr.Column(scale=1, min_width=150):
            chat = gr.Checkbox(True, label="As chat")
            run = gr.Button("Run all", variant="primary", elem_id="ds-set-run")
            stop = gr.Button("Stop", size="sm")
    said = gr.HTML("", elem_id="ds-set-said")
    scores = gr.HTML("", elem_id="ds-set-scores")
    table = gr.HTML("", elem_id="ds-set-table")
    download = gr.DownloadButton("Table as CSV", size="sm", interactive=False)
    running: dict[str, Run] = {}

    def run_set(
        path: str | None, names: list[str], most_tokens: int, as_chat: bool, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """Run all prompts in all columns, greedily, and show how far it is."""
        session = request.session_hash or ""
        try:
            if path is None:
                raise DoraServeError("There is no file of prompts yet.", remedy="Choose one.")
            items = read_prompts(Path(path))
            for item in items:
                require_askable(item.prompt, names)
            settings = Settings(chat=as_chat, max_tokens=int(most_tokens))
            requests = [settings.request(name, item.prompt) for item in items for name in names]
            running[session] = started = Run(shared.backend, requests)
            for answers in started.looks():
                done = sum(answer.finish is not None for answer in answers)
                yield {said: render.message(f"{done} of {len(answers)} answers", good=True)}
        except DoraServeError as error:
            yield {said: render.message(str(error))}
            return
        finally:
            running.pop(session, None)
        texts = {name: [_shown(answer) for answer in answers[place :: len(names)]] for place, name in enumerate(names)}
        rows = [
            [item.prompt, item.answer or "", *(texts[name][place] for name in names)]
            for place, item in enumerate(items)
        ]
        found = {name: exact_matches(items, texts[name]) for name in names}
        judged = "".join(_score(name, *pair) for name, pair in found.items() if pair[1])
        out = shared.desks.of(session).written("answers.csv", table_csv(items, texts))
        yield {
            said: render.message(f"{len(items)} prompts in {len(names)} columns.", good=True),
            scores: f'<div class="ds-tally">{judged}</div>' if judged else "",
            table: render.table(["prompt", "answer", *names], rows),
            download: gr.DownloadButton(value=out, interactive=True),
        }

    def stop_set(request: gr.Request) -> None:
        started = running.get(request.session_hash or "")
        if started is not None:
            started.cancel_all()

    run.click(
        run_set,
        [file, columns, most, chat],
        [said, scores, table, download],
        api_name="run_prompt_set",
        concurrency_id="generate",
        show_progress="hidden",
    )
    stop.click(stop_set, None, None, queue=False, api_visibility="private")
    return columns


def _shown(answer: Any) -> str:
    return f"(error: {answer.error})" if answer.error is not None else str(answer.text)


def _score(name: str, right: int, of: int) -> str:
    from html import escape

    return (
        f'<div class="ds-count"><span>{escape(name)}</span><i style="--share:{right / of:.3f}"></i>'
        f"<b>{right / of:.0%} exact</b></div>"
    )
