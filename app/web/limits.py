"""The limits of every HTTP request to the page: host name, origin, body size and rate; and of wrong passwords.

gradio accepts any Host header on loopback, which would let a web page elsewhere talk to a server on this machine (DNS
rebinding), and it limits no size but that of uploaded files.
"""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightx2v.server.guess_limit import TOO_MANY, WAIT_SECONDS, GuessLimit
from lightx2v.server.limits import MAX_BODY, RequestLimits, address

from ..exposure import Exposure

MAX_JSON = 1_000_000


def page_limits(exposure: Exposure, origins: set[str]) -> Middleware:
    """RequestLimits for the page. Add to `origins` further host names of the page: the share link's, once known.

    The rate of 20 a second is generous: an open page sends one or two, a person who clicks fast ten.
    """

    def body_limit(path: str) -> int:
        if path.startswith("/v1/"):  # the API, which accepts images in base64
            return MAX_BODY
        return exposure.limits.upload + MAX_JSON if path.rstrip("/").endswith("/upload") else MAX_JSON

    def client_of(scope: Scope, headers: Headers) -> str:
        """Behind Spaces or a share link all requests come from one proxy, which names the client's address."""
        forwarded = headers.get("x-forwarded-for", "") if exposure.hosted or exposure.share else ""
        return forwarded.partition(",")[0].strip()[:64] or address(scope)

    return Middleware(
        RequestLimits,
        hosts=exposure.hosts,
        origins=None if exposure.hosted else origins,
        body_limit=body_limit,
        client_of=client_of,
        respond=_respond,
    )


def sign_in_limit(guesses: GuessLimit) -> Middleware:
    """Limits how often a password is tried on the page's form, together with the keys of the API."""
    return Middleware(SignInLimit, guesses=guesses)


class SignInLimit:
    """ASGI middleware: 429 for a POST to gradio's /login after too many wrong passwords."""

    def __init__(self, app: ASGIApp, guesses: GuessLimit) -> None:
        self._app, self._guesses = app, guesses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self._app(scope, receive, send)
            return
        peer = address(scope)
        if not self._guesses.take(peer):
            headers = {"Retry-After": str(WAIT_SECONDS)}
            await _respond(429, "Busy", TOO_MANY, headers)(scope, receive, send)
            return

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._guesses.give_back(peer)
            await send(message)

        await self._app(scope, receive, send_and_note)


def _respond(status: int, kind: str, message: str, headers: Mapping[str, str] | None) -> PlainTextResponse:
    return PlainTextResponse(message, status_code=status, headers=headers)
