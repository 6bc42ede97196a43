"""A Hub on the loopback, for huggingface_hub as it is: HF_ENDPOINT is all that its clients change.

It speaks what a download needs: the model's description, the tree, and `resolve` with etags, commits, ranges and the
redirect of large files to another host. The shapes of the answers are those of the Hub's API (huggingface_hub 2.4.0:
hf_api.py ModelInfo and RepoFile, file_download.py get_hf_file_metadata, utils/_http.py hf_raise_for_status).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Repository:
    """commits: by sha. refs: branches and tags. gated: only `members` may read files; private: only they know of it."""

    commits: dict[str, Files]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    members: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    token: str | None
    range: str | None


class FakeHub:
    """repositories: by id. requests: all that came, in order. status: answer everything with this status instead.

    cuts: file name -> the bytes at which its connection breaks, one after another. holds: file name -> the byte after
    which nothing more is sent until `released` is set; `held` says that it has come to that. tokens: those that are
    valid.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.status: int | None = None
        self.cuts: dict[str, list[int]] = {}
        self.holds: dict[str, int] = {}
        self.held = threading.Event()
        self.released = threading.Event()
        self.tokens: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, files: Files, *, ref: str = "main", **rights: bool) -> str:
        """Commit the files and point `ref` at them; returns the commit's sha."""
        digest = hashlib.sha1(repo_id.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + content)
        repository = self.repositories.setdefault(repo_id, Repository({}, {}, **rights))
        repository.commits[digest.hexdigest()] = files
        repository.refs[ref] = digest.hexdigest()
        return digest.hexdigest()

    def fetched(self) -> list[str]:
        """The names of the files whose bytes were asked for, since the last call."""
        gets = [request.path for request in self.requests if request.method == "GET"]
        self.requests.clear()
        # A redirect has been asked for twice; the storage is what counts.
        bodies = [path for path in gets if not path.startswith("/api/")]
        return sorted({re.split(r"@|/resolve/[^/]+/", path)[-1] for path in bodies})

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
            host = (self.headers["Host"] or "").partition(":")[0]
            hub.requests.append(Request(self.command, host, path, token, self.headers["Range"]))
            if host == "localhost":  # the storage that large files are redirected to; it knows no tokens
                _, repo_id, commit, name = path.split("@")
                return self._file(name, hub.repositories[repo_id].commits[commit][name])
            if hub.status is not None:
                return self._refuse(hub.status)
            if token is not None and token not in hub.tokens:
                return self._refuse(401, message="Invalid credentials in Authorization header")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path):
                return self._api(match[1], match[2], match[3] or "main", token)
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._resolve(match[1], match[2], match[3], token)
            return self._refuse(404)

        def _find(self, repo_id: str, revision: str, token: str | None) -> tuple[Repository, str] | None:
            """The repository and the commit, None where the request has been refused."""
            repository = hub.repositories.get(repo_id)
            if repository is None or (repository.private and token not in repository.members):
                # The Hub does not tell the two apart, and asks the unknown to log in.
                self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
                return None
            commit = repository.refs.get(revision, revision)
            if commit not in repository.commits:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return repository, commit

        def _api(self, repo_id: str, kind: str | None, revision: str, token: str | None) -> None:
            found = self._find(repo_id, revision, token)
            if found is None:
                return None
            repository, commit = found
            files = []
            for name, content in repository.commits[commit].items():
                entry: dict[str, object] = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                if _is_large(name):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "oid": digest, "sha256": digest, "pointerSize": 130}
                files.append((name, entry))
            if kind == "tree":
                return self._json([{"type": "file", "path": name, **entry} for name, entry in files])
            siblings = [{"rfilename": name, "size": entry["size"]} for name, entry in files]
            return self._json({"id": repo_id, "sha": commit, "siblings": siblings, "gated": repository.gated})

        def _resolve(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
            found = self._find(repo_id, revision, token)
            if found is None:
                return None
            repository, commit = found
            if repository.gated and token not in repository.members:
                return self._refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted.")
            content = repository.commits[commit].get(name)
            if content is None:
                return self._refuse(404, "EntryNotFound", "Entry not found")
            if not _is_large(name):
                return self._file(name, content, commit)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{hub.port}/@{repo_id}@{commit}@{name}")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def _file(self, name: str, content: bytes, commit: str | None = None) -> None:
            first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if self.headers["Range"] else 200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            if commit is not None:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - first))
            if self.headers["Range"]:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in hub.holds:
                self.wfile.write(content[first : hub.holds[name]])
                hub.held.set()
                hub.released.wait()
                self.close_connection = True
            elif hub.cuts.get(name):
                self.wfile.write(content[first : hub.cuts[name].pop(0)])
                self.close_connection = True
            else:
                self.wfile.write(content[first:])

        def _json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            if message is not None:
                self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
