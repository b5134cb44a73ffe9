"""Who asks: the keys that are let in, and the owner that each of them stands for.

A key comes as `Authorization: Bearer KEY`, as the password of HTTP Basic (what a browser asks for, for /docs), or as
`X-API-Key`. Jobs belong to the key that submitted them; without keys (this machine only) all belong to one owner.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .responses import error_response

OWNER = "lightx2v.owner"
"""Where the owner is kept in an ASGI scope."""
NOBODY = "api"
"""The owner of all jobs where there are no keys."""


class ApiKeyAuth:
    """ASGI middleware: 401 without one of the keys, on every route. Without keys everybody is let in."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._owners = {_digest(key): f"api-{_digest(key).hex()[:16]}" for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # there are no websockets here
                await send({"type": "websocket.close", "code": 1008})
            return
        owner = self._owner(Headers(scope=scope)) if self._owners else NOBODY
        if owner is None:
            sentence = "An API key is needed: send the header Authorization: Bearer KEY."
            answer = error_response(
                401, "Unauthorized", sentence, {"WWW-Authenticate": 'Basic realm="LightX2V", charset="UTF-8"'}
            )
            await answer(scope, receive, send)
            return
        scope[OWNER] = owner
        await self._app(scope, receive, send)

    def _owner(self, headers: Headers) -> str | None:
        given = _digest(_key(headers))
        owner = None
        for digest, name in self._owners.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(given, digest):
                owner = name
        return owner


def owner_of(request: Request) -> str:
    """Whose request it is."""
    return request.scope[OWNER]


def _key(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
