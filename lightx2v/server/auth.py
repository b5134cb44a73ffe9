"""ApiKeyAuth: the middleware that accepts API keys, and the owner that each key stands for.

A client sends a key as `Authorization: Bearer KEY`, as the password of HTTP Basic (which a browser asks for, on /docs),
or as `X-API-Key`. A job belongs to the key that submitted it; without keys (on loopback only) all have one owner. The
operator's key also opens the routes about workers.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .guess_limit import TOO_MANY, WAIT_SECONDS, GuessLimit, is_strong
from .limits import RequestRefused, address
from .responses import error_response

OWNER = "lightx2v.owner"
"""The key of the owner in an ASGI scope."""
ANONYMOUS = "api"
"""The owner of all jobs on a server without keys, and its operator: only this machine reaches such a server."""
OPERATOR = "lightx2v.operator"
"""The key of a bool in an ASGI scope: whether the client is the operator."""
NOT_OPERATOR = (
    "This route is for the operator of the server. Start it with --operator_key KEY, or set LIGHTX2V_OPERATOR_KEY, and "
    "send that key."
)


class ApiKeyAuth:
    """ASGI middleware: 401 on every route for requests without a valid key. Without keys it accepts all requests.

    `guesses` limits how often keys are tried that can be guessed; beyond it the response is 429."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[str] = (), operator: str = "", guesses: GuessLimit | None = None
    ) -> None:
        self._app, self._guesses = app, guesses or GuessLimit()
        keys = [*keys, operator] if operator else keys
        self._operator = _owner(operator) if operator or keys else ANONYMOUS
        owners = {key: (_digest(key), _owner(key)) for key in keys}
        self._strong = dict(owner for key, owner in owners.items() if is_strong(key))
        self._weak = dict(owner for key, owner in owners.items() if not is_strong(key))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # there are no websocket routes
                await send({"type": "websocket.close", "code": 1008})
            return
        try:
            scope[OWNER] = self._owner(scope) if self._strong or self._weak else ANONYMOUS
        except RequestRefused as refused:
            await error_response(*refused.response)(scope, receive, send)
            return
        scope[OPERATOR] = scope[OWNER] == self._operator
        await self._app(scope, receive, send)

    def _owner(self, scope: Scope) -> str:
        key, peer = _key(Headers(scope=scope)), address(scope)
        owner = _match(key, self._strong)
        if owner is None and key and self._weak:
            if not self._guesses.take(peer):
                raise RequestRefused(429, "Busy", TOO_MANY, {"Retry-After": str(WAIT_SECONDS)})
            if (owner := _match(key, self._weak)) is not None:
                self._guesses.give_back(peer)
        if owner is None:
            message = "This server needs an API key. Send the header Authorization: Bearer KEY."
            headers = {"WWW-Authenticate": 'Basic realm="LightX2V", charset="UTF-8"'}
            raise RequestRefused(401, "Unauthorized", message, headers)
        return owner


def owner_of(request: Request) -> str:
    """The owner that the request's key stands for."""
    return request.scope[OWNER]


def is_operator(request: Request) -> bool:
    """Whether the client runs the server: by a key of its own where there are keys."""
    return bool(request.scope[OPERATOR])


def check_operator(request: Request) -> None:
    """Refuse everybody but the operator."""
    if not is_operator(request):
        raise HTTPException(403, NOT_OPERATOR)


def _match(key: str, owners: Mapping[bytes, str]) -> str | None:
    """The owner of this key. Compares all, so that the duration reveals nothing."""
    received, owner = _digest(key), None
    for digest, name in owners.items():
        if hmac.compare_digest(received, digest):
            owner = name
    return owner


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


def _owner(key: str) -> str:
    return f"api-{_digest(key).hex()[:16]}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
