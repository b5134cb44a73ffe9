"""What every HTTP request passes first: host name, origin, size and rate. The page's guard uses the same parts.

A web page elsewhere can make a visitor's browser talk to a server on this machine; the host name (DNS rebinding) and
the origin give it away. Refusals are plain sentences that repeat nothing of what was sent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Set

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .responses import error_response

MAX_BODY = 60_000_000
"""Two pictures of 20 MB in base64 and some text."""
BODY_SECONDS = 300.0
"""Such a body over a line of 1.6 Mbit/s. A client that sends a byte now and then must not hold its place for ever."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class RateLimit:
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


class BodyRefused(Exception):
    """A body that is not read to its end: larger than it said, or too slow. The text is for the client."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def bounded(receive: Receive, limit: int, seconds: float = BODY_SECONDS) -> Receive:
    """`receive`, raising BodyRefused past `limit` bytes, or if the body is not whole `seconds` after the first read."""
    seen, whole, deadline = 0, False, 0.0

    async def counted() -> Message:
        nonlocal seen, whole, deadline
        if whole:  # what still comes is the end of the connection, which may be far
            return await receive()
        deadline = deadline or time.monotonic() + seconds
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise BodyRefused(408, f"The request was not complete after {seconds:g} seconds. Send it again.") from None
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise BodyRefused(413, _larger(limit))
        whole = not message.get("more_body", False)
        return message

    return counted


def host_name(host: str) -> str:
    """The Host header without its port."""
    return (host if host.endswith("]") or host.count(":") != 1 and "]" not in host else host.rpartition(":")[0]).lower()


def same_origin(headers: Headers, more: Set[str] = frozenset()) -> bool:
    """Whether a browser sent it from our own page (or one of `more` hosts), or something that is no browser did."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") != "cross-site"
    ours = {headers.get("host", "").lower(), headers.get("x-forwarded-host", "").lower()} - {""}
    return origin.partition("://")[2].lower() in ours | more


class RequestLimits:
    """ASGI middleware. `hosts` are the Host headers that are answered, None for any."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Set[str] | None = None,
        *,
        per_second: float = 20,
        burst: int = 100,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._hosts, self._body_seconds = app, hosts, body_seconds
        self._rate = RateLimit(per_second, burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, bounded(receive, MAX_BODY, self._body_seconds), noted)
        except BodyRefused as body:
            if not started:
                await error_response(body.status, "BadRequest", str(body))(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if self._hosts is not None and host_name(headers.get("host", "")) not in self._hosts:
            return error_response(
                403, "Forbidden", "This host name is not served. Start the server with --allow_host NAME."
            )
        if scope["method"] in SAFE_METHODS:
            return None
        if not same_origin(headers):
            return error_response(403, "Forbidden", "Requests from other sites are not accepted.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > MAX_BODY:
            return error_response(413, "BadRequest", _larger(MAX_BODY))
        if not self._rate.take(scope["client"][0] if scope.get("client") else ""):
            sentence = "Too many requests. Wait a few seconds."
            return error_response(429, "Busy", sentence, {"Retry-After": "5"})
        return None


def _larger(limit: int) -> str:
    return f"The request is larger than {limit // 1_000_000} MB."
