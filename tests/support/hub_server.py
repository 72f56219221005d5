"""A small Hub on loopback: the HTTP calls that huggingface_hub makes to create, push, look at and load a model.

Commits are whole snapshots. Weights go through LFS, as on the Hub, so that both ways of uploading are used.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_test"
USER = "someone"
LFS_FILES = (".safetensors", ".png", ".bin")


@dataclass
class Repository:
    """A model's repository: its files at each commit, the newest last."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def add(self, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((commit, files))
        return commit

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        return next((each for each in self.commits if each[0] == revision), self.commits[-1])


@dataclass
class Hub:
    """The state of the server.

    `faults` says how some calls fail, by their names below: a status, `"cut"` (the connection), `"text"` (an answer
    that is no JSON), `"other"` (JSON of another kind) or `"silent"` (no answer while the server runs).
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    faults: dict[str, int | str] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub at `hub.url`, empty; after the test, it has been asked nothing that it does not speak."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
    assert hub.unknown == []


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        for pattern, wanted, answer in _ROUTES:
            if method in wanted and (match := re.fullmatch(pattern, path)):
                fault = self.hub.faults.get(answer.__name__)
                answer(self, body, *match.groups()) if fault is None else self._fail(fault)
                return
        self.hub.unknown.append(f"{method} {self.path}")
        self._send(404, {"error": "no such call"})

    def _fail(self, fault: int | str) -> None:
        if isinstance(fault, int):
            self._send(fault, {"error": "no more room"})
        elif fault in ("text", "other"):
            self._send(200, b"<html>Please log in.</html>" if fault == "text" else ["no", "more"])
        else:
            self.close_connection = True
            if fault == "silent":
                self.hub.over.wait()

    def _send(self, status: int, data: Any = b"", **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _is_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _found(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._is_user()):
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repository

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if not self._is_user():
            self._send(401, {"error": "Invalid user token."})
        elif not name.startswith(f"{USER}/"):
            self._send(403, {"error": f"You don't have the rights to create a model under {asked['organization']}"})
        elif name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
            self.hub.repositories[name].add({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def whoami(self, body: bytes) -> None:
        self._send(200, {"name": USER, "type": "user"})

    def validate(self, body: bytes) -> None:
        """As the Hub does before it takes a card: YAML at the top, and a base model that could be one of its own."""
        header = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        data = yaml.safe_load(header.group(1)) if header else {}
        base = data.get("base_model", "a/b")
        errors = []
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(base)):
            errors.append({"message": f'"base_model" with value "{base}" is not valid. Use a model id.'})
        for each in data.get("model-index", []):
            for result in each["results"]:
                for key in ("task", "dataset", "metrics"):
                    if not result.get(key):
                        errors.append({"message": f'"model-index[0].results.{key}" is required'})
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def elsewhere(self, body: bytes) -> None:
        self._send(404, {"error": "not here"})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._found(name)) is not None:
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(LFS_FILES) else "regular",
                    "shouldIgnore": False,
                    "oid": None if each["path"] not in repository.files else "0" * 40,
                }
                for each in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            href = f"{self.hub.url}/lfs/{each['oid']}"
            actions = {} if each["oid"] in self.hub.objects else {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append({"oid": each["oid"], "size": each["size"], **actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._send(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._found(name)
        if repository is None:
            return
        files = dict(repository.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repository.add(files)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if (repository := self._found(name)) is not None:
            commit, files = repository.at(revision or "main")
            siblings = [{"rfilename": path} for path in files]
            self._send(
                200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            )

    def tree(self, body: bytes, name: str, revision: str, under: str | None) -> None:
        if (repository := self._found(name)) is not None:
            _, files = repository.at(revision)
            inside = {path: content for path, content in files.items() if path.startswith((under or "").lstrip("/"))}
            if under and not inside:
                self._send(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
                return
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in inside.items()
            ]
            self._send(200, rows)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repository := self._found(name)) is not None:
            commit, files = repository.at(revision)
            if path not in files:
                self._send(404, {"error": "not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                return
            digest = hashlib.sha256(files[path]).hexdigest()
            self._send(200, files[path], ETag=f'"{digest}"', X_Repo_Commit=commit)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, tuple[str, ...], Any]] = [
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (r"/api/validate-yaml", ("POST",), _Handler.validate),
    (r"/api/agent-harnesses", ("GET",), _Handler.elsewhere),  # asked for by some, in some surroundings
    (rf"/api/models/{_NAME}/preupload/([^/]+)", ("POST",), _Handler.preupload),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (r"/lfs/(\w+)", ("PUT",), _Handler.lfs_put),
    (rf"/api/models/{_NAME}/commit/([^/]+)", ("POST",), _Handler.commit),
    (rf"/api/models/{_NAME}", ("GET",), _Handler.info),
    (rf"/api/models/{_NAME}/revision/([^/]+)", ("GET",), _Handler.info),
    (rf"/api/models/{_NAME}/tree/([^/]+)(/.+)?", ("GET",), _Handler.tree),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), _Handler.resolve),
]
