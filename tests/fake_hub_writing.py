"""What the loopback Hub answers to those who write: make a repository, upload, commit, open a pull request.

The shapes are those of huggingface_hub 2.4.0 (hf_api.py create_repo, create_branch, create_discussion; _commit_api.py
preupload and commit; lfs.py batch, parts, completion and verify) and of git-lfs' page on its batch API.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import yaml

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub, Repository

Answer = tuple[int, Any, Mapping[str, str]]
Query = Mapping[str, list[str]]


class Refusal(Exception):
    def __init__(self, status: int, code: str | None = None, message: str | None = None) -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


def write(hub: FakeHub, method: str, raw_path: str, query: Query, token: str | None, body: bytes) -> Answer:
    """status, JSON and headers of the answer. raw_path: still quoted, since a revision may hold slashes."""
    if raw_path.startswith("/storage/"):
        return _store(hub, method, raw_path.removeprefix("/storage/"), body)
    if raw_path == "/api/validate-yaml":
        return _validate(json.loads(body))
    if raw_path == "/api/repos/create":
        return _create(hub, token, json.loads(body))
    if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", raw_path):
        repository = _writable(hub, match[1], token, anyone=True)
        return (_batch if match[2] == "batch" else _verify)(hub, match[1], repository, json.loads(body))
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/([\w-]+)(?:/([^/]+))?", raw_path)
    if match is None:
        raise Refusal(404)
    repo_id, what, revision = match[1], match[2], unquote(match[3] or "main")
    offered = query.get("create_pr") == ["1"]
    repository = _writable(hub, repo_id, token, anyone=offered)
    if what == "xet-write-token":
        if hub.xet_storage is None:
            raise Refusal(404)
        headers = {
            "X-Xet-Cas-Url": hub.xet_storage,
            "X-Xet-Access-Token": "of-xet",
            "X-Xet-Token-Expiration": "9999999999",
        }
        named = {"casUrl": hub.xet_storage, "accessToken": "of-xet", "exp": 9999999999}
        return 200, named, headers
    if what == "branch":
        return _branch(repository, revision)
    if revision not in repository.refs:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if what == "preupload":
        return _preupload(repository, revision, json.loads(body))
    if what == "commit":
        return _commit(hub, repo_id, repository, revision, offered, body)
    raise Refusal(404)


def _writable(hub: FakeHub, repo_id: str, token: str | None, *, anyone: bool) -> Repository:
    """anyone: who may read it may open a pull request."""
    repository = hub.repositories.get(repo_id)
    if repository is None or (repository.private and token not in repository.members):
        raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
    if token is None:
        raise Refusal(401, message="Invalid username or password.")
    if token not in repository.writers and not anyone:
        raise Refusal(403, message="You don't have write access to this repo")
    return repository


def _create(hub: FakeHub, token: str | None, wanted: Mapping[str, Any]) -> Answer:
    from tests.fake_hub import Repository

    if token not in hub.users:
        raise Refusal(401, message="Invalid username or password.")
    owner = wanted["organization"] or hub.users[token]
    if owner != hub.users[token]:
        raise Refusal(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
    repo_id = f"{owner}/{wanted['name']}"
    if repo_id in hub.repositories:
        return 409, {"error": "You already created this model repo", "url": f"{hub.endpoint}/{repo_id}"}, {}
    private = wanted.get("visibility") == "private" or wanted.get("private", False)
    hub.repositories[repo_id] = Repository({}, {}, private=private, members={token}, writers={token})
    hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
    return 200, {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}, {}


def _branch(repository: Repository, name: str) -> Answer:
    if name in repository.refs:
        raise Refusal(409, message=f"Reference already exists: {name}")
    repository.refs[name] = repository.refs["main"]
    return 200, {}, {}


def _validate(given: Mapping[str, str]) -> Answer:
    """As the Hub does, as far as its documentation of model cards goes."""
    front = re.match(r"---\n(.*?)\n---", given["content"].replace("\r\n", "\n"), re.DOTALL)
    errors = []
    try:
        data = (yaml.safe_load(front[1]) if front else {}) or {}
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
    for key in ("base_model", "tags", "language"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append({"message": f'"{key}" must be a string or an array of strings'})
    if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        errors.append({"message": '"base_model_relation" must be one of [adapter, merge, quantized, finetune]'})
    for key in ("license", "pipeline_tag", "library_name"):
        if not isinstance(data.get(key, ""), str):
            errors.append({"message": f'"{key}" must be a string'})
    return (400 if errors else 200), {"errors": errors, "warnings": []}, {}


def _preupload(repository: Repository, revision: str, given: Mapping[str, Any]) -> Answer:
    from tests.fake_hub import blob_id, is_large

    held = repository.commits[repository.refs[revision]]
    files = []
    for file in given["files"]:
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if file["path"] in held:
            content = held[file["path"]]
            answer["oid"] = hashlib.sha256(content).hexdigest() if mode == "lfs" else blob_id(content)
        files.append(answer)
    return 200, {"files": files}, {}


def _batch(hub: FakeHub, repo_id: str, repository: Repository, given: Mapping[str, Any]) -> Answer:
    assert given["operation"] == "upload"
    assert given["hash_algo"] == "sha256"
    objects = []
    for wanted in given["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub.stored:
            storage = f"http://localhost:{hub.port}/storage"
            upload: dict[str, Any] = {"href": f"{storage}/{oid}"}
            if hub.part_bytes is not None and size > hub.part_bytes:
                count = -(-size // hub.part_bytes)
                parts = {str(number): f"{storage}/{oid}/{number}" for number in range(1, count + 1)}
                upload = {"href": f"{storage}/complete/{oid}", "header": {"chunk_size": str(hub.part_bytes), **parts}}
            verify = {"href": f"{hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return 200, {"transfer": "basic" if hub.part_bytes is None else "multipart", "objects": objects}, {}


def _verify(hub: FakeHub, repo_id: str, repository: Repository, given: Mapping[str, Any]) -> Answer:
    if len(hub.stored.get(given["oid"], b"")) != given["size"]:
        raise Refusal(404, message="The upload is not whole")
    return 200, {}, {}


def _store(hub: FakeHub, method: str, rest: str, body: bytes) -> Answer:
    """The storage of large files, which knows the hash of what it is to get."""
    if match := re.fullmatch(r"complete/([0-9a-f]{64})", rest):
        parts = hub.parts.pop(match[1])
        given = json.loads(body)["parts"]
        assert [part["partNumber"] for part in given] == sorted(parts)
        assert [part["etag"] for part in given] == [hashlib.md5(parts[number]).hexdigest() for number in sorted(parts)]
        return _keep(hub, match[1], b"".join(parts[number] for number in sorted(parts)))
    oid, _, number = rest.partition("/")
    if number:
        hub.parts.setdefault(oid, {})[int(number)] = body
        return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}
    return _keep(hub, oid, body)


def _keep(hub: FakeHub, oid: str, content: bytes) -> Answer:
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, message="The content is not what its name says")
    hub.stored[oid] = content
    hub.received.append(oid)
    return 200, {}, {}


def _commit(hub: FakeHub, repo_id: str, repository: Repository, revision: str, offered: bool, body: bytes) -> Answer:
    lines = [json.loads(line) for line in body.splitlines()]
    header = lines[0]["value"]
    parent = repository.refs[revision]
    if header.get("parentCommit", parent) != parent and not offered:
        raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
    files = dict(repository.commits[parent])
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.stored:
                raise Refusal(400, message=f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = hub.stored[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise Refusal(400, message=f"unknown operation {line['key']}")
    answer: dict[str, Any] = {}
    if offered:
        repository.discussions.append(header["summary"])
        revision = f"refs/pr/{len(repository.discussions)}"
        answer["pullRequestUrl"] = f"{hub.endpoint}/{repo_id}/discussions/{len(repository.discussions)}"
    sha = hub.add(repo_id, files, ref=revision)
    return 200, {**answer, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True}, {}
