"""The part of the hub's HTTP that huggingface_hub asks for, on this machine and in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


class Hub:
    """Repositories: name -> revision -> path -> bytes; `private` ones want the token."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}  # every state by its hash
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.address = ""

    def commit(self, repository: str, revision: str, lines: list[dict[str, Any]]) -> str:
        files = self.repositories[repository].setdefault(revision, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        return self.oid(repository, revision)

    def oid(self, repository: str, revision: str) -> str:
        if revision in self.commits:
            return revision
        files = self.repositories[repository][revision]
        oid = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        self.commits[oid] = dict(files)
        return oid

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        return self.repositories[repository].get(revision, self.commits.get(revision))


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def say(self, code: int, value: Any = b"", **headers: str) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            for name, text in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        @property
        def known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def missing(self, what: str) -> None:
            self.say(
                404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound", X_Error_Message=f"{what} not found"
            )

        def do_POST(self) -> None:
            path, body = urlsplit(self.path).path, self.body()
            if not self.known and path != "/api/validate-yaml":
                self.say(401, {"error": "Invalid credentials"})
            elif path == "/api/validate-yaml":
                self.say(200, {"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                given = json.loads(body)
                name = "/".join(filter(None, (given.get("organization") or "me", given["name"])))
                if name in hub.repositories:
                    self.say(409, {"error": "exists", "url": f"{hub.address}/{name}"})
                    return
                hub.repositories[name] = {"main": {}}
                if given.get("private") or given.get("visibility") == "private":
                    hub.private.add(name)
                self.say(200, {"url": f"{hub.address}/{name}", "name": name})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.say(200, {"files": files})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                repository, revision = found[1], unquote(found[2])
                oid = hub.commit(repository, revision, [json.loads(line) for line in body.splitlines() if line])
                url = f"{hub.address}/{repository}/commit/{oid}"
                self.say(200, {"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
                versions = hub.repositories[found[1]]
                versions.setdefault(unquote(found[2]), dict(versions["main"]))
                self.say(200, {})
            else:
                self.say(404, {"error": path})

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/api/whoami-v2":
                self.say(200 if self.known else 401, {"name": "me", "type": "user", "orgs": []})
                return
            found = re.fullmatch(
                r"(?:/api/models)?/([^/]+/[^/]+?)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path
            )
            repository = found[1] if found else ""
            if repository not in hub.repositories or (repository in hub.private and not self.known):
                self.missing("Repo") if self.known or repository not in hub.private else self.say(
                    401, {"error": "Invalid username or password."}
                )
                return
            assert found is not None
            what, revision, name = found[2], unquote(found[3] or "main"), unquote(found[4] or "")
            files = hub.files(repository, revision)
            if files is None:
                self.missing("Revision")
                return
            oid = hub.oid(repository, revision)
            if what == "tree":
                self.say(200, [{"type": "file", "path": n, "size": len(d), "oid": oid} for n, d in files.items()])
            elif what == "resolve":
                if name not in files:
                    self.missing("Entry")
                    return
                data = files[name]
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.say(
                    200,
                    data,
                    ETag=etag,
                    X_Repo_Commit=oid,
                    Content_Type="application/octet-stream",
                    Accept_Ranges="bytes",
                )
            else:
                siblings = [{"rfilename": n} for n in files]
                self.say(200, {"id": repository, "modelId": repository, "sha": oid, "siblings": siblings, "tags": []})

        do_HEAD = do_GET

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub of one's own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
