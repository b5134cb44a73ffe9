"""A server on loopback that speaks the Hub's protocol, with faults that a test can choose.

Two addresses, as in life: the Hub lists a repository, answers small files itself and redirects large ones to a content
network, which knows nothing of tokens. What every address sent is on record.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Sent:
    """One response to a GET of a file: the path, the range and the token of the request, and the bytes sent."""

    path: str
    range: str | None
    token: str | None
    bytes: int = 0
    running: bool = True


@dataclass
class Fault:
    """A fault of one response."""

    status: int | None = None
    cut_after: int | None = None
    """Bytes after which the connection closes."""
    stall_after: int | None = None
    """Bytes after which the server sends nothing more until it ends."""
    no_range: bool = False
    length: int | None = None
    """The wrong value of Content-Length."""
    shift: int = 0
    """Bytes between the requested range and the one that is sent."""
    retry_after: str | None = None
    after: Callable[[], bool] = lambda: True
    """The server sends the body once this returns True."""


@dataclass
class HubServer:
    """`files` by repository and path. A path with "/" or a size over `large` is one for the content network."""

    files: dict[str, dict[str, bytes]]
    large: int = 1000
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    said: dict[str, bytes] = field(default_factory=dict)
    """By path, the content whose hash and size the server lists, where it sends another one."""
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    """The only token that gated repositories accept; None accepts none."""
    pace: float = 0.0
    """Seconds between two pieces of 64 kB from the content network."""
    commit: str = COMMIT
    sent: list[Sent] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Paths of all requests to the Hub's own address."""
    ending: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    cdn: str = ""

    def bytes_of(self, path: str) -> int:
        return sum(sent.bytes for sent in self.sent if sent.path == path)

    def listing(self, repo: str) -> dict[str, Any]:
        siblings = []
        for path, content in self.files[repo].items():
            content = self.said.get(path, content)
            entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if len(content) > self.large:
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": self.commit, "siblings": siblings, "private": False, "tags": []}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Listener(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a client that was killed or cancelled: many tests do that."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(server: HubServer) -> Iterator[HubServer]:
    """Runs both addresses while the block does."""

    class Hub(_Handler):
        hub = server

        def do_GET(self) -> None:
            server.asked.append(self.path)
            path = self.path.partition("?")[0]
            if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)) is not None:
                self.repo_info(match[1])
            elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) is not None:
                self.resolve(match[1], match[3])
            else:
                self.answer(404, b"{}")

        do_HEAD = do_GET

        def repo_info(self, repo: str) -> None:
            if repo not in server.files:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            else:
                self.answer(200, json.dumps(server.listing(repo)).encode(), {"Content-Type": "application/json"})

        def resolve(self, repo: str, path: str) -> None:
            content = server.files[repo].get(path)
            if content is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            given = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            if repo in server.gated and (not given or given != server.token):
                return self.answer(403 if given else 401, b"", {"X-Error-Code": "GatedRepo"})
            said = server.said.get(path, content)
            head = {"X-Repo-Commit": server.commit, "X-Linked-Size": str(len(said))}
            if len(said) > server.large:
                head |= {"X-Linked-Etag": f'"{sha256(said)}"', "Location": f"{server.cdn}/{repo}/{path}?signature=x"}
                return self.answer(302, b"", head)
            self.send_file(path, content, head | {"ETag": f'"{git_sha1(said)}"'})

    class Cdn(_Handler):
        hub = server

        def do_GET(self) -> None:
            owner, name, path = self.path.partition("?")[0].strip("/").split("/", 2)
            self.send_file(path, server.files[f"{owner}/{name}"][path], {"ETag": '"of the network"'})

        do_HEAD = do_GET

    listeners = [Listener(("127.0.0.1", 0), handler) for handler in (Hub, Cdn)]
    server.url, server.cdn = (f"http://127.0.0.1:{listener.server_address[1]}" for listener in listeners)
    for listener in listeners:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.ending.set()
        for listener in listeners:
            listener.shutdown()
            listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def answer(self, status: int, body: bytes, head: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (head or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, path: str, content: bytes, head: dict[str, str]) -> None:
        asked = self.headers.get("range")
        sent = Sent(path=path, range=asked, token=self.headers.get("authorization"))
        faults = self.hub.faults.get(path, [])
        fault = faults.pop(0) if faults and self.command == "GET" else Fault()
        if self.command == "GET":
            self.hub.sent.append(sent)
        if fault.status is not None:
            return self.answer(fault.status, b"", {"Retry-After": fault.retry_after} if fault.retry_after else {})
        start = 0
        if asked and not fault.no_range:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            start -= fault.shift
            head = head | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        self.send_response(206 if "Content-Range" in head else 200)
        for name, value in head.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if fault.length is None else fault.length))
        self.end_headers()
        if self.command == "GET":
            self.send_body(sent, body, fault)

    def send_body(self, sent: Sent, body: bytes, fault: Fault) -> None:
        ends = [end for end in (fault.cut_after, fault.stall_after) if end is not None]
        end = min([len(body), *ends])
        while not fault.after() and not self.hub.ending.wait(0.01):
            pass
        try:
            for at in range(0, end, 1 << 16):
                piece = body[at : min(end, at + (1 << 16))]
                self.wfile.write(piece)
                sent.bytes += len(piece)
                time.sleep(self.hub.pace)
            if fault.stall_after is not None:
                self.hub.ending.wait(60)
        except (BrokenPipeError, ConnectionResetError):
            pass
        sent.running = False
        if end < len(body) or fault.length is not None:
            self.close_connection = True
