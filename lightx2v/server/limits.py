"""RequestLimits: the middleware that checks host name, origin, body size and rate of every HTTP request.

The server and the page use it. A web page elsewhere can make a visitor's browser send requests to a server on this
machine; the host name (DNS rebinding) and the origin reveal it. Error messages repeat nothing of the request.
"""

import asyncio
import errno
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .responses import error_response

log = logging.getLogger("lightx2v.server")

MAX_BODY = 60_000_000
"""Two images of 20 MB in base64 and some text."""
BODY_SECONDS = 300.0
"""Such a body at 1.6 Mbit/s. A client that sends a byte now and then must not keep its place for ever."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

Respond = Callable[[int, str, str, Mapping[str, str] | None], Response]
"""Makes the response to a refused request from status, type, message and headers."""


class RateLimit:
    """Each client may send `burst` requests at once, then `per_second`. Remembers the last thousand clients."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._rate, self._burst = per_second, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> bool:
        """True if this client may send one more request now."""
        now = time.monotonic()
        with self._lock:
            left, since = self._left.pop(client, (float(self._burst), now))
            left = min(self._burst, left + (now - since) * self._rate)
            allowed = left >= 1
            self._left[client] = (left - allowed, now)
            if len(self._left) > 1000:
                self._left.popitem(last=False)
        return allowed

    def give_back(self, client: str) -> None:
        """Count the client's last request as not sent."""
        with self._lock:
            if client in self._left:
                left, since = self._left[client]
                self._left[client] = (min(float(self._burst), left + 1), since)


class RequestRefused(Exception):
    """A request that breaks a limit. The arguments are those of `Respond`; the message is for the client.

    It is no HTTPException: the application inside the middleware would respond to one in a form of its own.
    """

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, kind, message, headers)
        self.response = status, kind, message, headers


class RequestLimits:
    """ASGI middleware. `hosts` are the accepted Host headers, None for any; `origins` are hosts besides the request's
    own whose pages may send requests, None for any. `body_limit` gives the bytes that a path accepts, `client_of` the
    name by which clients share the rate limit, and `respond` the form of the error responses. A client may have made
    up the name, so all clients of one address together have ten times the rate."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Set[str] | None = None,
        origins: Set[str] | None = frozenset(),
        body_limit: Callable[[str], int] = lambda path: MAX_BODY,
        client_of: Callable[[Scope, Headers], str] = lambda scope, headers: address(scope),
        respond: Respond = error_response,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._hosts, self._origins, self._body_seconds = app, hosts, origins, body_seconds
        self._body_limit, self._client_of, self._respond = body_limit, client_of, respond
        self._rate, self._address_rate = RateLimit(20, 100), RateLimit(200, 1000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            limit = self._body_limit(scope["path"])
            self._check(scope, Headers(scope=scope), limit)
            await self._app(scope, bounded(receive, limit, self._body_seconds), send_and_note)
        except ClientDisconnect:  # nobody to answer
            return
        except (RequestRefused, OSError) as error:
            if started and isinstance(error, OSError):
                raise
            refused = disk_full(error) if isinstance(error, OSError) else error
            if not started:
                await self._respond(*refused.response)(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers, limit: int) -> None:
        if self._hosts is not None and host_name(headers.get("host", "")) not in self._hosts:
            raise RequestRefused(403, "Forbidden", "This host name is not allowed. Restart with --allow_host NAME.")
        if scope["method"] in SAFE_METHODS:
            return
        if self._origins is not None and not same_origin(headers, self._origins):
            raise RequestRefused(403, "Forbidden", "Requests from other sites are not allowed.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > limit:
            raise _too_large(limit)
        if not (self._rate.take(self._client_of(scope, headers)) and self._address_rate.take(address(scope))):
            message = "Too many requests. Wait a few seconds."
            raise RequestRefused(429, "Busy", message, {"Retry-After": "5"})


def bounded(receive: Receive, limit: int, seconds: float) -> Receive:
    """`receive` that refuses bodies beyond `limit` bytes, and those incomplete `seconds` after the first read."""
    size, complete, deadline = 0, False, 0.0

    async def receive_bounded() -> Message:
        nonlocal size, complete, deadline
        if complete:  # the next message is the end of the connection, for which there is no deadline
            return await receive()
        deadline = deadline or time.monotonic() + seconds
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await receive()
        except TimeoutError:
            late = f"The request was not complete after {seconds:g} seconds. Send it again."
            raise RequestRefused(408, "BadRequest", late) from None
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)
        complete = not message.get("more_body", False)
        return message

    return receive_bounded


def host_name(host: str) -> str:
    """The Host header without its port."""
    return (host if host.endswith("]") or host.count(":") != 1 and "]" not in host else host.rpartition(":")[0]).lower()


def same_origin(headers: Headers, more: Set[str] = frozenset()) -> bool:
    """True if our own page, or one from `more` hosts, sent the request, or a program that is no browser."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") != "cross-site"
    own = {headers.get("host", "").lower(), headers.get("x-forwarded-host", "").lower()} - {""}
    return origin.partition("://")[2].lower() in own | more


def address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""


def disk_full(error: OSError) -> RequestRefused:
    """The refusal of a request that a full disk cannot store. Raises any other OSError again."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    log.error("a request could not be stored: %s", error.strerror)
    message = "A disk of the server is full. Free some space on the server and send the request again."
    return RequestRefused(507, "OutputError", message)


def _too_large(limit: int) -> RequestRefused:
    return RequestRefused(413, "BadRequest", f"The request is too large: at most {limit // 1_000_000} MB are accepted.")
