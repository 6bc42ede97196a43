"""A Hub on the loopback, for huggingface_hub as it is: HF_ENDPOINT is all that its clients change.

It speaks what a download needs: the model's description, the tree, and `resolve` with etags, commits, ranges and the
redirect of large files to another host. What an upload needs is in fake_hub_writing.py. The shapes of the answers are
those of the Hub's API (huggingface_hub 2.4.0: hf_api.py ModelInfo and RepoFile, file_download.py get_hf_file_metadata,
utils/_http.py hf_raise_for_status).
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
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Repository:
    """commits: by sha. refs: branches and tags. gated: only `members` may read files; private: only they know of it.
    writers: the tokens that may commit. discussions: the titles of its pull requests, the first being number 1.
    """

    commits: dict[str, Files]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    members: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    discussions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    token: str | None
    range: str | None


@dataclass
class Fault:
    """What is answered to requests instead. pattern: of "METHOD /path". times: how often. cut: the connection is closed
    in the middle of the request's body, and nothing is answered.
    """

    pattern: str
    status: int = 0
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    body: object = None
    cut: bool = False


class FakeHub:
    """repositories: by id. requests: all that came, in order. status: answer everything with this status instead.

    cuts: file name -> the bytes at which its connection breaks, one after another. holds: file name -> the byte after
    which nothing more is sent until `released` is set; `held` says that it has come to that. tokens: those that are
    valid. ranges: whether parts of files are served.

    users: the names behind tokens. faults: taken before anything else. stored: what lies in the storage of large
    files, by sha256. received: the sha256 of every upload that was whole. stalled: uploads, by sha256, that are taken
    to their middle and no further until `released`. part_bytes: of uploads in parts, None for whole ones. xet_storage:
    the address that is offered for Xet.
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
        self.ranges = True
        self.users: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.received: list[str] = []
        self.stalled: set[str] = set()
        self.part_bytes: int | None = None
        self.xet_storage: str | None = None
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

    def log_in(self, token: str, name: str) -> None:
        """Make a token valid, of a user of that name, who may read and write what lies under it."""
        self.tokens.add(token)
        self.users[token] = name
        for repo_id, repository in self.repositories.items():
            if repo_id.startswith(f"{name}/"):
                repository.members.add(token)
                repository.writers.add(token)

    def files(self, repo_id: str, ref: str = "main") -> Files:
        repository = self.repositories[repo_id]
        return repository.commits[repository.refs[ref]]

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


def is_large(name: str, size: int = 0) -> bool:
    """Whether a file is kept in the storage of large files, which .gitattributes and its size say."""
    return name.endswith((".safetensors", ".bin", ".gguf", ".onnx", ".onnx.data")) or size > 10_000_000


def blob_id(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    from tests.fake_hub_writing import Refusal, write

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            split = urlsplit(self.path)
            path = unquote(split.path)
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
            host = (self.headers["Host"] or "").partition(":")[0]
            hub.requests.append(Request(self.command, host, path, token, self.headers["Range"]))
            fault = next(
                (one for one in hub.faults if one.times and re.search(one.pattern, f"{self.command} {path}")), None
            )
            if fault is not None:
                fault.times -= 1
                return self._fail(fault)
            if self.command == "PUT" and path.rpartition("/")[2] in hub.stalled:
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
                hub.held.set()
                hub.released.wait()
                self.close_connection = True
                return None
            body = self._body()
            if host == "localhost" and self.command in ("GET", "HEAD"):
                # The storage that large files are redirected to; it knows no tokens.
                _, repo_id, commit, name = path.split("@")
                return self._file(name, hub.repositories[repo_id].commits[commit][name])
            if hub.status is not None:
                return self._refuse(hub.status)
            if token is not None and token not in hub.tokens:
                return self._refuse(401, message="Invalid credentials in Authorization header")
            if path == "/api/whoami-v2":
                return self._json({"name": hub.users[token]}) if token in hub.users else self._refuse(401)
            if self.command in ("POST", "PUT") or "/xet-write-token/" in path:
                try:
                    status, value, headers = write(hub, self.command, split.path, parse_qs(split.query), token, body)
                except Refusal as refusal:
                    return self._refuse(refusal.status, refusal.code, refusal.message)
                return self._json(value, status, headers)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", split.path):
                return self._api(match[1], match[2], unquote(match[3] or "main"), token)
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", split.path):
                return self._resolve(match[1], unquote(match[2]), unquote(match[3]), token)
            return self._refuse(404)

        def _body(self) -> bytes:
            if self.headers["Transfer-Encoding"] == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers["Content-Length"] or 0))

        def _fail(self, fault: Fault) -> None:
            if fault.cut:
                self.rfile.read(int(self.headers["Content-Length"] or 0) // 2)
                self.close_connection = True
                return
            self._body()
            self._json(fault.body or {}, fault.status, fault.headers)

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
                entry: dict[str, object] = {"size": len(content), "oid": blob_id(content)}
                if is_large(name, len(content)):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "oid": digest, "sha256": digest, "pointerSize": 130}
                files.append((name, entry))
            if kind == "tree":
                return self._json([{"type": "file", "path": name, **entry} for name, entry in files])
            siblings = [{"rfilename": name, "size": entry["size"]} for name, entry in files]
            facts = {"id": repo_id, "sha": commit, "siblings": siblings, "gated": repository.gated}
            return self._json({**facts, "private": repository.private})

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
            if not is_large(name, len(content)):
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
            wanted = self.headers["Range"] if hub.ranges else None
            first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            if commit is not None:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in hub.holds:
                self.wfile.write(content[start : hub.holds[name]])
                hub.held.set()
                hub.released.wait()
                self.close_connection = True
            elif hub.cuts.get(name):
                self.wfile.write(content[start : hub.cuts[name].pop(0)])
                self.close_connection = True
            else:
                self.wfile.write(content[start:stop])

        def _json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            for name, text in (headers or {}).items():
                self.send_header(name, text)
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
