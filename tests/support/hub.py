"""A Hugging Face Hub of one's own on loopback: what huggingface_hub's client says and expects, over real HTTP.

Repositories live in memory. Spoken here: create a repository, look at a revision and its tree, download (large files
by way of a redirect to another path, as from the Hub's storage), and upload with preupload, git-LFS batch, storage,
verification and commit. Tokens and refusals are the Hub's: `X-Error-Code`, 401 without a token, 404, or as asked.
(PyPI was searched first: its mirrors and local hubs only serve downloads.)
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

TOKEN = "hf_secret"
LARGE = ".safetensors"  # what the Hub stores as large files, by .gitattributes


@dataclass
class Repository:
    """Files of each branch, and the commits that made them."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        names = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.branches[branch].items())
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, or of a commit that is a branch's head."""
        for branch, files in self.branches.items():
            if revision in (branch, self.sha(branch)):
                return files
        return None


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by name.
        stored: large files by SHA-256; `large` gives it by name.
        requests: method and path of every request, in order.
        fetched: names of files whose content was downloaded.
        tokens: every Authorization header seen.
        failures: (part of a path, status, error code); the requests that it hits are refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"  # another host, where no token may go
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.large: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()
        self.failures: list[tuple[str, int, str]] = []

    def add(self, name: str, folder: Path) -> Repository:
        """A repository with the files of a folder."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repositories[name] = Repository({"main": files})
        return self.repositories[name]

    def fail(self, path: str, status: int, code: str = "") -> None:
        self.failures.append((path, status, code))


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def answer(self) -> None:
        """Read the request, refuse it where told to, and pass it on."""
        hub, path = self.server, self.path.split("?")[0]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        hub.tokens.add(self.headers.get("Authorization"))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        failures = [(status, code) for part, status, code in hub.failures if part in path]
        if failures:
            self.refuse(*failures[0])
        elif path.endswith("/auth-check/write"):
            self.reply({}) if allowed else self.refuse(403, "Forbidden")
        elif path.startswith("/storage/"):
            self.storage(path.rpartition("/")[2])
        elif self.command in ("GET", "HEAD"):
            self.read(path)
        elif not allowed:
            self.refuse(401, "InvalidToken")
        else:
            self.write(path)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def storage(self, oid: str) -> None:
        """Large files' own server: no token is sent there, and content must be what its name says."""
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.server.stored[oid] = self.body
        if self.command == "GET":
            self.server.fetched += [name for name, known in self.server.large.items() if known == oid]
        self.reply(self.server.stored[oid] if self.command == "GET" else b"")

    def read(self, path: str) -> None:
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        kind, revision = (parts[4:6] if parts[0] == "api" else parts[2:4]) or ["revision", "main"]
        files = repository.files(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        branch = next(branch for branch, held in repository.branches.items() if held is files)
        sha = repository.sha(branch)
        if kind == "revision":
            return self.reply({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        if kind == "tree":
            return self.reply([_entry(file, data) for file, data in files.items()])
        file = "/".join(parts[4:])
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[file]
        if file.endswith(LARGE):
            oid = hashlib.sha256(data).hexdigest()
            self.server.stored[oid], self.server.large[file] = data, oid
            linked = {"X_Linked_Size": str(len(data)), "X_Linked_Etag": f'"{oid}"', "X_Repo_Commit": sha}
            return self.reply(b"", 302, Location=f"{self.server.storage}/{oid}", **linked)
        self.server.fetched += [file] * (self.command == "GET")
        self.reply(data, ETag=f'"{_blob_id(data)}"', X_Repo_Commit=sha)

    def write(self, path: str) -> None:
        hub, parts = self.server, path.strip("/").split("/")
        if path == "/api/repos/create":
            wanted = json.loads(self.body)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, Repository())
            return self.reply({"url": f"{hub.endpoint}/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        repository = hub.repositories.get(name)
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        if path.endswith("/info/lfs/objects/batch"):
            return self.reply({"objects": [self.instructions(each) for each in json.loads(self.body)["objects"]]})
        if path.endswith("/verify"):
            return self.reply({})
        action, branch = parts[4], parts[5]
        if action == "branch":
            known = branch in repository.branches
            repository.branches.setdefault(branch, dict(repository.branches["main"]))
            return self.reply({}, 409 if known else 200)
        if branch not in repository.branches:
            return self.refuse(404, "RevisionNotFound")
        if action == "preupload":
            names = [each["path"] for each in json.loads(self.body)["files"]]
            kinds = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            files = [{"path": name, "uploadMode": kind, "shouldIgnore": False} for name, kind in kinds.items()]
            return self.reply({"files": files})
        self.commit(name, branch)

    def instructions(self, wanted: dict) -> dict:
        """Where a large file goes; nothing to do for one that is there."""
        if wanted["oid"] in self.server.stored:
            return wanted
        upload = {"href": f"{self.server.storage}/{wanted['oid']}"}
        verify = {"href": self.server.endpoint + self.path.split("?")[0].replace("/objects/batch", "/verify")}
        return {**wanted, "actions": {"upload": upload, "verify": verify}}

    def commit(self, name: str, branch: str) -> None:
        repository = self.server.repositories[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.branches[branch])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        repository.branches[branch] = files
        repository.commits.append(lines[0]["value"]["summary"])
        sha = repository.sha(branch)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}"})


def _blob_id(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, which huggingface_hub takes for the real one; large files go the LFS way, not by Xet's client."""
    server = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_TOKEN", "")  # so that it is as it was afterwards, whatever a run does
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers its endpoint
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
