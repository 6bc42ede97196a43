"""The Compare tab: one prompt, up to six columns, all at once.

Annotations are not postponed in the tabs: Gradio reads the types of handlers, and is imported where it is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from app import render
from app.backend import AdapterRow
from app.desk import LETTERS, MOST_COLUMNS, Desk, Settings
from app.shared import Shared
from app.votes import to_csv, to_json
from dora_serve.errors import DoraServeError

EXAMPLES = (
    "To JSON (what, date, time): concert on 06/12/2024 at 10:46 am",
    "To JSON (what, date, time): Dec 26 2025, 5:45 pm: budget review",
    "Explain photosynthesis.",
)
CHAT, COMPLETION = "Chat", "Completion"
VIEWS = (("Plain", "plain"), ("Differences from the base", "differences"), ("Surprise of the base", "surprise"))
HINTS = {
    "plain": "",
    "differences": '<div class="ds-hint"><mark class="ds-diff">marked</mark>: what the base did not say there.</div>',
    "surprise": '<div class="ds-hint">How likely the base finds each token: likely<span class="ds-scale"></span>'
    "1 in 3000. Point at a token for its probability.</div>",
}

# A browser has no navigator.clipboard on a page that came over plain HTTP from another machine.
_COPY = """async () => {{
  const answer = document.querySelector('#ds-slot-{place} .ds-answer');
  if (!answer) return;
  try {{
    await navigator.clipboard.writeText(answer.innerText);
  }} catch {{
    const area = document.createElement('textarea');
    area.value = answer.innerText;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }}
}}"""


@dataclass(frozen=True)
class Slot:
    """The components of one column."""

    column: Any
    answer: Any
    stop: Any
    again: Any
    copy: Any


def add_compare_tab(shared: Shared) -> Any:
    """Put the tab into the page that is being built; returns the component with the choice of columns."""
    import gradio as gr

    backend, desks = shared.backend, shared.desks
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            "",
            label="Prompt",
            placeholder="Ask all columns at once",
            lines=2,
            max_lines=8,
            scale=6,
            min_width=280,
            elem_id="ds-prompt",
        )
        with gr.Column(scale=1, min_width=150):
            run = gr.Button("Run", variant="primary", elem_id="ds-run")
            stop_all = gr.Button("Stop all", size="sm", elem_id="ds-stop-all")
    gr.Examples([[example] for example in EXAMPLES], inputs=[prompt], label="Try")
    with gr.Row(equal_height=True):
        columns = gr.Dropdown(
            choices=[],
            label="Columns, in this order (1 to 6)",
            multiselect=True,
            max_choices=MOST_COLUMNS,
            allow_custom_value=True,  # programs have not been told the choices
            scale=4,
            min_width=280,
            elem_id="ds-columns",
        )
        view = gr.Radio(list(VIEWS), value="plain", label="Show", scale=4, min_width=280, elem_id="ds-view")
    with gr.Accordion("Chat, system prompt and sampling", open=False):
        with gr.Row():
            mode = gr.Radio([CHAT, COMPLETION], value=CHAT, label="Mode", min_width=160)
            system = gr.Textbox("", label="System prompt", placeholder="none", lines=1, scale=3, min_width=220)
            clear = gr.Button("New conversation", min_width=140)
        with gr.Row():
            max_tokens = gr.Slider(1, 1024, value=128, step=1, label="Most tokens")
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: the likeliest)")
            top_p = gr.Slider(0.01, 1, value=1, step=0.01, label="Top p")
            top_k = gr.Slider(0, 200, value=0, step=1, label="Top k (0: all)")
            penalty = gr.Slider(1, 2, value=1, step=0.01, label="Repetition penalty")
            seed = gr.Number(value=0, precision=0, minimum=0, label="Seed, the same for all")
    said = gr.HTML("", elem_id="ds-compare-said")
    hint = gr.HTML("", elem_id="ds-compare-hint")
    slots = []
    with gr.Row(elem_id="ds-slots", equal_height=True):
        for place in range(MOST_COLUMNS):
            with gr.Column(
                visible=place < 3, min_width=270, elem_classes="ds-slot", elem_id=f"ds-slot-{place}"
            ) as slot:
                answer = gr.HTML(render.empty_column(), padding=False)
                with gr.Row(elem_classes="ds-buttons"):
                    stop = gr.Button("Stop", size="sm")
                    again = gr.Button("Again", size="sm")
                    copy = gr.Button("Copy", size="sm")
            slots.append(Slot(slot, answer, stop, again, copy))
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300), gr.Row():
            votes = [
                gr.Button(
                    f"{LETTERS[place]} is best",
                    size="sm",
                    visible=place < 3,
                    min_width=90,
                    elem_id=f"ds-vote-{place}",
                )
                for place in range(MOST_COLUMNS)
            ]
            tie = gr.Button("Tie", size="sm", min_width=70, elem_id="ds-vote-tie")
            bad = gr.Button("All bad", size="sm", min_width=70, elem_id="ds-vote-bad")
        with gr.Column(scale=2, min_width=280):
            blind = gr.Checkbox(
                label="Blind: shuffle the columns and hide their names until the vote",
                container=False,
                elem_id="ds-blind",
            )
            tally = gr.HTML(render.scoreboard(()), elem_id="ds-tally")
            with gr.Row():
                as_csv = gr.DownloadButton("Votes as CSV", size="sm", interactive=False)
                as_json = gr.DownloadButton("Votes as JSON", size="sm", interactive=False)

    settings = [mode, system, max_tokens, temperature, top_p, top_k, penalty, seed]
    shown = [slot.column for slot in slots] + [slot.answer for slot in slots]
    outputs = [*shown, *votes, said, prompt]

    def known() -> tuple[AdapterRow, ...]:
        """The adapters, none where a server is away: the columns themselves say so."""
        try:
            return backend.adapters()
        except DoraServeError:
            return ()

    def drawn(desk: Desk, how: render.View, rows: Any, before: dict[Any, str]) -> dict[Any, Any]:
        """Updates for the columns that look otherwise than `before`, which is brought up to date."""
        updates: dict[Any, Any] = {}
        for place in range(len(desk.columns)):
            html = render.column(desk, place, how, rows)
            if before.get(place) != html:
                before[place] = html
                updates[slots[place].answer] = html
        return updates

    def opened(desk: Desk) -> dict[Any, Any]:
        """Updates for what goes with the number and the names of the columns."""
        count = len(desk.columns) or 3
        updates: dict[Any, Any] = {slot.column: gr.Column(visible=place < count) for place, slot in enumerate(slots)}
        for place, button in enumerate(votes):
            name = desk.name(place) if place < len(desk.columns) else f"{LETTERS[place]}"
            updates[button] = gr.Button(f"{name} is best", visible=place < count)
        return updates

    def ask(
        text: str | None,
        names: list[str] | None,
        how: render.View,
        hide: bool,
        chat: str,
        system_text: str | None,
        most: int,
        heat: float,
        p: float,
        k: int,
        repeat: float,
        start: float | None,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        desk = desks.of(request.session_hash)
        text = text or ""
        wanted = Settings(chat == CHAT, system_text or "", int(most), heat, p, int(k), repeat, int(start or 0))
        try:
            rows = known()
            looks = desk.ask(backend, text, names or [], wanted, blind=hide)
            before: dict[Any, str] = {}
            yield {**opened(desk), **drawn(desk, how, rows, before), said: "", prompt: "" if wanted.chat else text}
            for _ in looks:
                yield drawn(desk, how, rows, before) or {said: ""}
            yield {**judged(desk, how), said: ""}
        except DoraServeError as error:
            yield {said: render.message(str(error))}

    def judged(desk: Desk, how: render.View) -> dict[Any, Any]:
        """All columns as they should look in the end, after the base has judged them where that is to be seen."""
        trouble = ""
        if how == "surprise":
            try:
                desk.score(backend)
            except DoraServeError as error:
                trouble = render.message(str(error))
        return {**drawn(desk, how, known(), {}), said: trouble}

    def look(how: render.View, request: gr.Request) -> dict[Any, Any]:
        return {**judged(desks.of(request.session_hash), how), hint: HINTS[how]}

    def again_at(place: int) -> Any:
        def ask_again(how: render.View, request: gr.Request) -> Iterator[dict[Any, Any]]:
            desk = desks.of(request.session_hash)
            try:
                before: dict[Any, str] = {}
                rows = known()
                for _ in desk.ask_again(backend, place):
                    yield drawn(desk, how, rows, before) or {said: ""}
                yield judged(desk, how)
            except DoraServeError as error:
                yield {said: render.message(str(error))}

        return ask_again

    def stop_at(place: int | None) -> Any:
        def stop_columns(request: gr.Request) -> None:
            desk = desks.of(request.session_hash)
            if place is None:
                desk.stop()
            else:
                desk.cancel(place)

        return stop_columns

    def new_conversation(request: gr.Request) -> dict[Any, Any]:
        desk = desks.of(request.session_hash)
        desk.clear()
        return {**opened(desk), said: "", **{slot.answer: render.empty_column() for slot in slots}}

    def vote_for(place: int | None, *, all_bad: bool = False) -> Any:
        def vote(how: render.View, request: gr.Request) -> dict[Any, Any]:
            desk = desks.of(request.session_hash)
            try:
                desk.vote(place, all_bad=all_bad)
            except DoraServeError as error:
                return {said: render.message(str(error))}
            return {
                **opened(desk),
                **drawn(desk, how, known(), {}),
                tally: render.scoreboard(desk.votes),
                as_csv: gr.DownloadButton(value=desk.written("votes.csv", to_csv(desk.votes)), interactive=True),
                as_json: gr.DownloadButton(value=desk.written("votes.json", to_json(desk.votes)), interactive=True),
                said: "",
            }

        return vote

    asking: dict[str, Any] = {
        "fn": ask,
        "inputs": [prompt, columns, view, blind, *settings],
        "outputs": outputs,
        "show_progress": "hidden",
        "concurrency_id": "generate",
        "trigger_mode": "multiple",
    }
    run.click(**asking, api_name="compare")
    prompt.submit(**asking, api_visibility="private")
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    view.change(look, [view], [*shown, said, hint], **quiet)
    stop_all.click(stop_at(None), None, None, queue=False, **quiet)
    clear.click(new_conversation, None, [*shown, *votes, said], **quiet)
    for place, slot in enumerate(slots):
        slot.stop.click(stop_at(place), None, None, queue=False, **quiet)
        slot.again.click(again_at(place), [view], [*shown, said], concurrency_id="generate", **quiet)
        slot.copy.click(None, None, None, js=_COPY.format(place=place), **quiet)
        votes[place].click(vote_for(place), [view], [*shown, *votes, tally, as_csv, as_json, said], **quiet)
    for button, kind in ((tie, False), (bad, True)):
        button.click(vote_for(None, all_bad=kind), [view], [*shown, *votes, tally, as_csv, as_json, said], **quiet)
    return columns
