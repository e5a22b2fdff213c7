"""A hub on this machine: the part of its HTTP API that a commit of regular files needs, and what arrived."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecret"


class Hub:
    """What it holds.

    Attributes:
        repositories: by OWNER/NAME, each with "private" and its "files" by name.
        commits: of each, how many. closed: repositories that nobody may write to.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[str] = []
        self.closed: set[str] = set()
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        parts = path.partition("?")[0].strip("/").split("/")
        if (method, parts) == ("POST", ["api", "repos", "create"]):
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if (method, parts) == ("POST", ["api", "validate-yaml"]):
            return 200, {"warnings": [], "errors": []}
        name, rest = "/".join(parts[2:4]), parts[4:]
        if parts[:2] != ["api", "models"] or name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        if method == "GET" and not rest:
            files = [{"rfilename": file} for file in sorted(repository["files"])]
            return 200, {"id": name, "private": repository["private"], "siblings": files, "tags": []}
        if name in self.closed:
            return 403, {"error": f"you may not write to {name}"}
        if method == "POST" and rest == ["preupload", "main"]:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if method == "POST" and rest == ["commit", "main"]:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del repository["files"][value["path"]]
            self.commits.append(name)
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": f"{method} {path} is not here"}


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that runs; who has no token is not let in."""
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            status, told = 401, {"error": "no token"}
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                status, told = held.answer(self.command, self.path, body)
            content = json.dumps(told).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        held.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield held
        finally:
            server.shutdown()
