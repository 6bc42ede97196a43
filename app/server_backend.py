"""Any OpenAI-compatible server, vLLM above all: adapters are models beside the base, and vLLM loads and unloads them.

Its requests run side by side, and the server batches them; nothing is known of its adapters but their names.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.backend import BASE, AdapterRow, Stream, TokenScore
from app.server_score import score_answer
from dora_serve.decomposition import Decomposition
from dora_serve.engine.requests import Event, FinishReason, Request, Timings
from dora_serve.errors import DoraServeError, EngineError, UnavailableError
from dora_serve.progress import OnProgress

CONNECT_SECONDS = 10.0
_NO_ROUTE = "Not Found"
"""What a server says of a path that it does not have; vLLM answers 404 for an adapter that is not there as well."""

READ_SECONDS = 120.0
"""The longest silence within an answer; loading an adapter may take as long."""


class ServerBackend:
    """url: of the server, with or without /v1. base: the base's model name, by default the first that has no parent.

    Raises UnavailableError where the server does not answer or lists no model.
    """

    confined = False

    def __init__(self, url: str, *, base: str | None = None, api_key: str | None = None) -> None:
        import httpx

        root = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(base_url=root, headers=headers, timeout=timeout, limits=limits)
        self.url = root
        models = self._models()
        roots = [model["id"] for model in models if not model.get("parent")]
        if not roots:
            raise UnavailableError(f"The server {root} lists no base model.", remedy="Start it with one.")
        self.base = base or roots[0]
        self.label = f"{self.base} at {root}"

    def adapters(self) -> tuple[AdapterRow, ...]:
        return tuple(
            AdapterRow(name=model["id"], source=str(model.get("root") or self.url))
            for model in sorted(self._models(), key=lambda model: str(model["id"]))
            if model["id"] != self.base
        )

    def load(self, name: str, source: str | Path, *, replace: bool = False) -> str:
        if not name or name in (BASE, self.base):
            raise EngineError(f"An adapter cannot be called {name!r}.", remedy="Give it another name.")
        if any(row.name == name for row in self.adapters()):
            if not replace:
                raise EngineError(
                    f"There is an adapter {name!r} already.", remedy="Replace it, or choose another name."
                )
            self.unload(name)
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(source)})
        return f"Added {name}: the server has loaded it."

    def unload(self, name: str) -> None:
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def stream(self, requests: Sequence[Request]) -> Stream:
        return _ServerStream(self, requests)

    def score(self, request: Request, text: str, token_ids: Sequence[int]) -> tuple[TokenScore, ...]:
        return score_answer(self._post, self.base, request, text)

    def decompose(self, name: str, on_progress: OnProgress) -> Decomposition:
        raise UnavailableError(
            "A server does not show the weights of its adapters.",
            remedy="Use `dora-export inspect ADAPTER --base BASE --plot out.png` where they lie.",
        )

    def paths(self, name: str) -> tuple[str, str]:
        raise UnavailableError(
            "The weights of a server's adapters are not on this machine.",
            remedy="Use `dora-export merge ADAPTER --base BASE` where they lie.",
        )

    def events(self, index: int, request: Request, cancelled: threading.Event) -> Iterator[Event]:
        """The answer to one request, as the engine's events; its tokens have no ids."""
        import httpx

        path, body = _request_body(request, request.adapter or self.base)
        queued = time.perf_counter()
        first = last = 0.0
        chunks = 0
        usage: Mapping[str, Any] = {}
        reason: FinishReason | None = None
        try:
            with self._client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refused(response)
                for line in response.iter_lines():
                    if cancelled.is_set():
                        reason = "cancelled"
                        break
                    chunk = _chunk(line)
                    if chunk is None:
                        continue
                    usage = chunk.get("usage") or usage
                    text, ended = _piece(chunk)
                    last = time.perf_counter()
                    if text:
                        first, chunks = first or last, chunks + 1
                        yield Event(index, text=text)
                    if ended:
                        reason = "length" if ended == "length" else "stop"
        except httpx.HTTPError as error:
            raise self._gone(error) from error
        if reason is None:
            raise UnavailableError(f"The server {self.url} ended in the middle of an answer.", remedy="Ask it again.")
        made = int(usage.get("completion_tokens") or chunks)
        asked = int(usage.get("prompt_tokens") or 0)
        began = first or last or queued
        timings = Timings(0.0, began - queued, max(0.0, last - began), asked, made)
        yield Event(index, finish_reason=reason, timings=timings)

    def _models(self) -> list[Mapping[str, Any]]:
        import httpx

        try:
            response = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._gone(error) from error
        if response.status_code != 200:
            raise _refused(response)
        try:
            return [dict(model) for model in response.json()["data"] if isinstance(model["id"], str)]
        except (ValueError, KeyError, TypeError) as error:
            raise UnavailableError(
                f"What answers at {self.url} is no OpenAI-compatible server: /v1/models is no list of models.",
                remedy="Give the address of vLLM, or of another such server.",
            ) from error

    def _post(self, path: str, body: Mapping[str, object]) -> Any:
        import httpx

        try:
            response = self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise self._gone(error) from error
        if response.status_code == 404 and path.endswith("_lora_adapter") and _said(response) == _NO_ROUTE:
            raise UnavailableError(
                f"The server {self.url} cannot change its adapters: {_said(response)}",
                remedy="Start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.",
            )
        if response.status_code != 200:
            raise _refused(response)
        try:
            return response.json()
        except ValueError:  # vLLM answers in words that it has loaded an adapter
            return response.text

    def _gone(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"The server {self.url} does not answer: {str(error) or type(error).__name__}.",
            remedy="See that it runs, and ask again.",
        )


class _ServerStream:
    """A thread for each request; their events come in the order in which they happen."""

    def __init__(self, backend: ServerBackend, requests: Sequence[Request]) -> None:
        self._backend = backend
        self._cancelled = [threading.Event() for _ in requests]
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._open = len(requests)
        for index, request in enumerate(requests):
            threading.Thread(target=self._follow, args=(index, request), name="server", daemon=True).start()

    def __iter__(self) -> Iterator[Event]:
        while self._open:
            event = self._events.get()
            self._open -= event.finish_reason is not None
            yield event

    def cancel(self, index: int) -> None:
        self._cancelled[index].set()

    def _follow(self, index: int, request: Request) -> None:
        try:
            for event in self._backend.events(index, request, self._cancelled[index]):
                self._events.put(event)
        except DoraServeError as error:
            self._events.put(Event(index, finish_reason="error", error=error))
        except Exception as error:  # the column must end, whatever the server sent
            sent = UnavailableError(f"The server's answer is not understood: {error}.", remedy="Ask it again.")
            self._events.put(Event(index, finish_reason="error", error=sent))


def _request_body(request: Request, model: str) -> tuple[str, dict[str, object]]:
    """Path and body. What OpenAI's protocol does not have is only sent where it is asked for."""
    sampling = request.sampling
    body: dict[str, object] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.stop:
        body["stop"] = list(request.stop)
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if sampling.repetition_penalty != 1.0:
        body["repetition_penalty"] = sampling.repetition_penalty
    if request.messages is not None:
        return "/v1/chat/completions", body | {"messages": [dict(message) for message in request.messages]}
    return "/v1/completions", body | {"prompt": request.prompt}


def _chunk(line: str) -> dict[str, Any] | None:
    """One server-sent event, None for what is no chunk."""
    if not line.startswith("data:") or line[5:].strip() in ("", "[DONE]"):
        return None
    value = json.loads(line[5:])
    if "error" in value:
        raise EngineError(f"The server says: {_message(value)}", remedy="Correct the request.")
    return dict(value)


def _piece(chunk: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text of a chunk, and why the answer ended, if it did."""
    choices = chunk.get("choices") or []
    if not choices:
        return "", None
    choice = choices[0]
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else delta.get("content")
    return text or "", choice.get("finish_reason")


def _refused(response: Any) -> EngineError:
    return EngineError(
        f"The server answers {response.status_code}: {_said(response)}",
        remedy="Correct the request.",
        status=response.status_code,
    )


def _said(response: Any) -> str:
    try:
        return _message(response.json())
    except ValueError:
        return str(response.text)[:300]


def _message(value: Any) -> str:
    """The sentence in an error, in OpenAI's form or in another."""
    error = value.get("error", value) if isinstance(value, dict) else value
    found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return str(found if found is not None else value)[:300]
