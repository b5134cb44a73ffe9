"""What every HTTP request passes before gradio sees it: host name, origin, size and rate.

gradio checks none of these by itself on loopback when the Host header is foreign, which is how a web page elsewhere
could talk to a server on this machine (DNS rebinding), nor does it bound the size of anything but uploaded files.
"""

from __future__ import annotations

import errno
import logging

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightx2v.server.limits import MAX_BODY, SAFE_METHODS, BodyRefused, RateLimit, bounded, host_name, same_origin

from ..exposure import Exposure

log = logging.getLogger("lightx2v.page")

MAX_JSON = 1_000_000


class Guard:
    """ASGI middleware. Refusals are plain sentences that repeat nothing of what was sent."""

    def __init__(self, app: ASGIApp, exposure: Exposure, origins: set[str]) -> None:
        """`origins` are further host names of our own page: the share link's, once it is known."""
        self._app = app
        self._exposure = exposure
        self._origins = origins
        # A page asks once or twice a second; a person who clicks fast ten times.
        self._rate = RateLimit(per_second=20, burst=100)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._limit(scope["path"])
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
            await self._app(scope, bounded(receive, limit), counted_send)
        except BodyRefused as body:
            if not started:
                await _refuse(body.status, str(body))(scope, receive, send)
        except OSError as error:
            if started or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.error("an upload could not be stored: %s", error.strerror)
            await _refuse(507, "A disk of the server is full. Free some space there, and send it again.")(
                scope, receive, send
            )

    def _limit(self, path: str) -> int:
        if path.startswith("/v1/"):  # the API, which takes pictures in base64
            return MAX_BODY
        return self._exposure.limits.upload + MAX_JSON if _is_upload(path) else MAX_JSON

    def _refusal(self, scope: Scope, headers: Headers, limit: int) -> PlainTextResponse | None:
        hosts = self._exposure.hosts
        name = host_name(headers.get("host", ""))
        if hosts is not None and name not in hosts:
            return _refuse(403, "This host name is not served. Start the page with --allow_host NAME to serve it.")
        if scope["method"] in SAFE_METHODS:
            return None
        if not self._exposure.hosted and not same_origin(headers, self._origins):
            return _refuse(403, "Requests from other sites are not accepted.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            return _refuse(413, "This is larger than the page accepts.")
        if not self._rate.take(_client(scope, headers, self._exposure)):
            return _refuse(429, "Too many requests. Wait a few seconds.", {"Retry-After": "5"})
        return None


def _is_upload(path: str) -> bool:
    return path.rstrip("/").endswith("/upload")


def _client(scope: Scope, headers: Headers, exposure: Exposure) -> str:
    """Behind a proxy of ours (Spaces, a share link) all come from one address; the proxy names the real one."""
    forwarded = headers.get("x-forwarded-for", "") if exposure.hosted or exposure.share else ""
    return forwarded.partition(",")[0].strip()[:64] or (scope["client"][0] if scope.get("client") else "")


def _refuse(status: int, sentence: str, headers: dict[str, str] | None = None) -> PlainTextResponse:
    return PlainTextResponse(sentence, status_code=status, headers=headers)
