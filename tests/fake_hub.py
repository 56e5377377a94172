"""A Hub of a few repositories on this machine, which speaks as much as huggingface_hub needs to read and write."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w.-]+)")
_API = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main")


class Hub:
    """`repositories` hold {name: content}; `gated` ones are refused; `asked` are the requests so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.messages: list[str] = []

    @contextmanager
    def serving(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(with_content=False)

    def do_GET(self) -> None:
        self._file(with_content=True)

    def do_POST(self) -> None:
        self.hub.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if self.headers.get("Authorization") != "Bearer right":
                return self._say(401, {"error": "Invalid username or password."}, {"X-Error-Message": "Who are you?"})
            self.hub.repositories.setdefault(name, {})
            return self._say(200, {"url": f"{self._self()}/{name}", "id": name, "name": name})
        found = _API.fullmatch(self.path.partition("?")[0])
        if found is None:
            return self._say(200, {})
        repository, what = found.groups()
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._say(200, {"files": files, "commitOid": COMMIT})
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "header":
                self.hub.messages.append(part["value"]["summary"])
            if part["key"] == "file":
                content = base64.b64decode(part["value"]["content"])
                self.hub.repositories[repository][part["value"]["path"]] = content
        return self._say(
            200, {"commitUrl": f"{self._self()}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def _self(self) -> str:
        return f"http://{self.headers['Host']}"

    def _file(self, with_content: bool) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        found = _FILE.fullmatch(self.path)
        if found is None:
            return self._say(404, {})
        repository, revision, name = found.groups()
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._say(401, {}, {"X-Error-Code": "RepoNotFound"})
        if repository in self.hub.gated:
            return self._say(403, {}, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT):
            return self._say(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if name not in files:
            return self._say(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def _say(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
