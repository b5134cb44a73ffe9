"""ApiKeyAuth: the middleware that accepts API keys, and the owner that each key stands for.

A client sends a key as `Authorization: Bearer KEY`, as the password of HTTP Basic (which a browser asks for, on /docs),
or as `X-API-Key`. A job belongs to the key that submitted it; without keys (on loopback only) all have one owner.
"""

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
"""The key of the owner in an ASGI scope."""
ANONYMOUS = "api"
"""The owner of all jobs on a server without keys."""


class ApiKeyAuth:
    """ASGI middleware: 401 on every route for requests without a valid key. Without `keys` it accepts all requests."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._owners = {_digest(key): f"api-{_digest(key).hex()[:16]}" for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # there are no websocket routes
                await send({"type": "websocket.close", "code": 1008})
            return
        owner = self._owner(Headers(scope=scope)) if self._owners else ANONYMOUS
        if owner is None:
            message = "This server needs an API key. Send the header Authorization: Bearer KEY."
            headers = {"WWW-Authenticate": 'Basic realm="LightX2V", charset="UTF-8"'}
            await error_response(401, "Unauthorized", message, headers)(scope, receive, send)
            return
        scope[OWNER] = owner
        await self._app(scope, receive, send)

    def _owner(self, headers: Headers) -> str | None:
        received = _digest(_key(headers))
        owner = None
        for digest, name in self._owners.items():  # compares all, so that the duration reveals nothing
            if hmac.compare_digest(received, digest):
                owner = name
        return owner


def owner_of(request: Request) -> str:
    """The owner that the request's key stands for."""
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
