"""A small OpenAI-compatible server, with vLLM's endpoints for adapters. It answers with what it was asked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """adapters: name -> path. asked: the bodies of all requests for text. die_after: chunks until a connection breaks.
    pause: seconds between chunks. words: a token's id is its place in it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.adapters: dict[str, str] = {"style": "/adapters/style"}
        self.asked: list[dict[str, Any]] = []
        self.die_after: int | None = None
        self.pause = 0.01
        self.can_load = self.can_tokenize = self.can_echo = True
        self.words: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        models: list[dict[str, Any]] = [{"id": "big-base", "object": "model", "root": "big-base", "parent": None}]
        for name, path in self.server.adapters.items():
            models.append({"id": name, "object": "model", "root": path, "parent": "big-base"})
        self._json(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("_lora_adapter"):
            self._change(body)
        elif self.path == "/tokenize":
            self._tokenize(body)
        elif body.get("echo"):
            self._echo(body)
        else:
            self._answer(body)

    def _change(self, body: dict[str, Any]) -> None:
        if not self.server.can_load:
            self._json(404, {"detail": "Not Found"})
        elif self.path == "/v1/load_lora_adapter" and body["lora_path"].startswith("/adapters/"):
            self.server.adapters[body["lora_name"]] = body["lora_path"]
            self._text(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
        elif self.path == "/v1/unload_lora_adapter" and body["lora_name"] in self.server.adapters:
            del self.server.adapters[body["lora_name"]]
            self._text(200, "Success")
        else:
            self._json(404 if "unload" in self.path else 400, {"error": {"message": "No adapter found for that"}})

    def _tokenize(self, body: dict[str, Any]) -> None:
        """Every word a token, those of a chat with their roles before them."""
        if not self.server.can_tokenize:
            self._json(404, {"detail": "Not Found"})
            return
        if "messages" in body:
            text = " ".join(f"<{message['role']}> {message['content']}" for message in body["messages"])
            text += " <assistant>" if body["add_generation_prompt"] else ""
        else:
            text = body["prompt"]
        words = _words(text)
        self.server.words += [word for word in dict.fromkeys(words) if word not in self.server.words]
        self._json(200, {"tokens": [self.server.words.index(word) for word in words], "count": len(words)})

    def _echo(self, body: dict[str, Any]) -> None:
        """Every word a token, the first without a log-probability, each of the others -(its length)."""
        if not self.server.can_echo:
            self._json(400, {"error": {"message": "echo is not supported"}})
            return
        prompt = body["prompt"]
        tokens = [*(_words(prompt) if isinstance(prompt, str) else [self.server.words[place] for place in prompt])]
        tokens.append(" more")
        offsets = [sum(map(len, tokens[:place])) for place in range(len(tokens))]
        logprobs = [None, *(-float(len(token)) for token in tokens[1:])]
        found = {"tokens": tokens, "token_logprobs": logprobs, "text_offset": offsets}
        self._json(200, {"choices": [{"text": "", "logprobs": found}]})

    def _answer(self, body: dict[str, Any]) -> None:
        self.server.asked.append(body)
        if body["model"] not in {"big-base", *self.server.adapters}:
            self._json(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        chat = self.path == "/v1/chat/completions"
        said = body["messages"][-1]["content"] if chat else body["prompt"]
        words = [f"{body['model']} ", "says ", "<b>", *(f" {word}" for word in said.split())]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number, word in enumerate(words[: body["max_tokens"]]):
            if number == self.server.die_after:
                self.close_connection = True
                return
            choice = {"delta": {"content": word}} if chat else {"text": word}
            self._chunk({"choices": [{"index": 0, "finish_reason": None, **choice}]})
            time.sleep(self.server.pause)
        reason = "stop" if len(words) <= body["max_tokens"] else "length"
        ended = {"delta": {}} if chat else {"text": ""}
        self._chunk({"choices": [{"index": 0, "finish_reason": reason, **ended}]})
        usage = {"prompt_tokens": 7, "completion_tokens": min(len(words), body["max_tokens"])}
        self._chunk({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, value: dict[str, Any]) -> None:
        try:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            self.wfile.flush()
        except OSError:  # the client has left
            self.close_connection = True

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._text(status, json.dumps(value), "application/json")

    def _text(self, status: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _words(text: str) -> list[str]:
    """The words of a text, each with the spaces before it."""
    return re.findall(r" *[^ ]+", text)
