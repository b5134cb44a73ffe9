"""A web server on loopback that answers as its plan says, right or wrong, and counts its requests."""

from __future__ import annotations

import contextlib
import socketserver
import ssl
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from patience import PATIENCE


@dataclass
class Plan:
    """The response of one path. `length` is the value of Content-Length: None for the true one, "" for no header."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | str | None = None
    endless: bool = False
    drip: float = 0.0
    """Seconds between two bytes."""


class BadHTTP:
    def __init__(self, plans: dict[str, Plan], tls: ssl.SSLContext | None = None) -> None:
        self.plans = plans
        self.connections = 0
        self.asked: list[str] = []
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                if tls is not None:
                    self.request.settimeout(PATIENCE)
                    self.request = tls.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                super().finish()
                self.request.close()

            def handle(self) -> None:
                outer.connections += 1
                with contextlib.suppress(OSError):
                    outer._answer(self)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Print nothing about a handshake that the client broke off."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def _answer(self, handler: socketserver.StreamRequestHandler) -> None:
        path = handler.rfile.readline().decode("latin1").split(" ")[1]
        while handler.rfile.readline().strip():
            pass
        self.asked.append(path)
        plan = self.plans.get(path, Plan(status=404))
        length = len(plan.body) if plan.length is None else plan.length
        headers = plan.headers | ({} if length == "" else {"Content-Length": str(length)})
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        handler.wfile.write(f"HTTP/1.1 {plan.status} Planned\r\n{lines}Connection: close\r\n\r\n".encode("latin1"))
        while plan.endless and not self._over.is_set():
            handler.wfile.write(b"x" * 65536)
        for byte in plan.body if plan.drip else b"":
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(plan.drip)
        if not plan.drip:
            handler.wfile.write(plan.body)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
