"""New processes, folders to break, and a stand-in of the Hub on this machine."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from peft_bituning import LaserRecommender
from peft_bituning.serving.manifest import write_manifest

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def loaded(trained) -> LaserRecommender:
    """Return a recommender loaded anew, free to be changed."""
    return LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")


@pytest.fixture
def copied(trained, tmp_path: Path) -> Path:
    """Return a copy of the trained folder, free to be broken."""
    return Path(shutil.copytree(trained.folder, tmp_path / "copy"))


@pytest.fixture
def sign() -> Callable[[Path], None]:
    """Return a function that rewrites a folder's manifest, as somebody who means it would."""

    def rewrite(folder: Path) -> None:
        names = json.loads((folder / "manifest.json").read_text())["sha256"]
        write_manifest(folder, [name for name in names if (folder / name).is_file()])

    return rewrite


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Return a function that runs a script in a new process and gives what it printed."""

    def run(script: str, *arguments: object, cwd: Path, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=840,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


class LocalHub(ThreadingHTTPServer):
    """What `huggingface_hub` calls of the Hub, in memory: every commit is a whole set of files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> path -> content
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that send a new process here, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def commit(self, repo_id: str, changes: dict[str, bytes]) -> str:
        """Add a commit and return its name."""
        history = self.commits[repo_id]
        files = {**next(reversed(history.values()), {}), **changes}
        name = hashlib.sha1(f"{len(history)} {sorted(files)}".encode()).hexdigest()
        history[name] = files
        return name


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"POST {self.path}")
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "who are you?"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo_id in self.server.commits else 200
            self.server.commits.setdefault(repo_id, {})
            return self._json({"url": f"{self.server.url}/{repo_id}"}, status)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repo_id, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if repo_id in self.server.commits and action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if repo_id in self.server.commits and action == "commit":
            operations = [json.loads(line) for line in body.splitlines()]
            changes = {
                operation["value"]["path"]: base64.b64decode(operation["value"]["content"])
                for operation in operations
                if operation["key"] == "file"
            }
            name = self.server.commit(repo_id, changes)
            return self._json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{name}", "commitOid": name})
        return self._missing("RepoNotFound")

    def _answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            parts = path.removeprefix("/api/models/").split("/")
            repo_id, action = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision"
            revision = parts[3] if len(parts) > 3 else "main"
            found = self._find(repo_id, revision)
            if found is None:
                return self._missing("RevisionNotFound" if repo_id in self.server.commits else "RepoNotFound")
            name, files = found
            if action == "tree":
                return self._json(
                    [
                        {"type": "file", "path": each, "size": len(content), "oid": _blob(content)}
                        for each, content in files.items()
                    ]
                )
            siblings = [{"rfilename": each} for each in files]
            return self._json({"_id": "0", "id": repo_id, "sha": name, "siblings": siblings, "private": False})
        repo_id, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        found = self._find(repo_id, revision)
        if found is None:
            return self._missing("RepoNotFound")
        name, files = found
        if file not in files:
            return self._missing("EntryNotFound", {"X-Repo-Commit": name})
        self._send(
            200, files[file], {"ETag": f'"{_blob(files[file])}"', "X-Repo-Commit": name, "Accept-Ranges": "none"}
        )

    def _find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.server.commits.get(repo_id)
        if history is None:
            return None
        if not history and revision == "main":
            return "0" * 40, {}
        name = next(reversed(history)) if revision == "main" else revision
        return (name, history[name]) if name in history else None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="session")
def local_hub() -> Iterator[LocalHub]:
    """Return a running stand-in of the Hub."""
    with LocalHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
