"""What every HTTP request passes before gradio sees it: host name, origin, size and rate.

gradio checks none of these by itself on loopback when the Host header is foreign, which is how a web page elsewhere
could talk to a server on this machine (DNS rebinding), nor does it bound the size of anything but uploaded files.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .exposure import Exposure

MAX_JSON = 1_000_000
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Bucket:
    """A rate limit by client: `burst` at once, then `per_second`. Remembers the last thousand clients."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._rate, self._burst = per_second, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> bool:
        """Whether this client may do one more thing now."""
        now = time.monotonic()
        with self._lock:
            left, since = self._left.pop(client, (float(self._burst), now))
            left = min(self._burst, left + (now - since) * self._rate)
            allowed = left >= 1
            self._left[client] = (left - allowed, now)
            if len(self._left) > 1000:
                self._left.popitem(last=False)
        return allowed


class TooLarge(Exception):
    """The body of a request without Content-Length went past its limit."""


class Guard:
    """ASGI middleware. Refusals are plain sentences that repeat nothing of what was sent."""

    def __init__(self, app: ASGIApp, exposure: Exposure, origins: set[str]) -> None:
        """`origins` are further host names of our own page: the share link's, once it is known."""
        self._app = app
        self._exposure = exposure
        self._origins = origins
        # A page asks once or twice a second; a person who clicks fast ten times.
        self._rate = Bucket(per_second=20, burst=100)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._exposure.limits.upload + MAX_JSON if _is_upload(scope["path"]) else MAX_JSON
        refusal = self._refusal(scope, headers, limit)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        started = False

        async def counted_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, _bounded(receive, limit), counted_send)
        except TooLarge:
            if not started:
                await _refuse(413, "This is larger than the page accepts.")(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers, limit: int) -> PlainTextResponse | None:
        hosts = self._exposure.hosts
        name = _host_name(headers.get("host", ""))
        if hosts is not None and name not in hosts:
            return _refuse(403, "This host name is not served. Start the page with --allow_host NAME to serve it.")
        if scope["method"] in SAFE_METHODS:
            return None
        if not self._exposure.hosted and not self._same_origin(headers):
            return _refuse(403, "Requests from other sites are not accepted.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            return _refuse(413, "This is larger than the page accepts.")
        if not self._rate.take(_client(scope, headers, self._exposure)):
            return _refuse(429, "Too many requests. Wait a few seconds.", {"Retry-After": "5"})
        return None

    def _same_origin(self, headers: Headers) -> bool:
        """Whether a browser sent it from our own page, or something that is no browser sent it."""
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") != "cross-site"
        ours = {headers.get("host", "").lower(), headers.get("x-forwarded-host", "").lower()} - {""}
        return urlsplit(origin).netloc.lower() in ours | self._origins


def _is_upload(path: str) -> bool:
    return path.rstrip("/").endswith("/upload")


def _bounded(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise TooLarge
        return message

    return bounded


def _host_name(host: str) -> str:
    """The Host header without its port."""
    return (host if host.endswith("]") or host.count(":") != 1 and "]" not in host else host.rpartition(":")[0]).lower()


def _client(scope: Scope, headers: Headers, exposure: Exposure) -> str:
    """Behind a proxy of ours (Spaces, a share link) all come from one address; the proxy names the real one."""
    forwarded = headers.get("x-forwarded-for", "") if exposure.hosted or exposure.share else ""
    return forwarded.partition(",")[0].strip()[:64] or (scope["client"][0] if scope.get("client") else "")


def _refuse(status: int, sentence: str, headers: dict[str, str] | None = None) -> PlainTextResponse:
    return PlainTextResponse(sentence, status_code=status, headers=headers)
