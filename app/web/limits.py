"""The limits of every HTTP request to the page: host name, origin, body size and rate; and of wrong passwords.

gradio accepts any Host header on loopback, which would let a web page elsewhere talk to a server on this machine (DNS
rebinding), and it limits no size but that of uploaded files.
"""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightx2v.server.guess_limit import TOO_MANY, WAIT_SECONDS, GuessLimit
from lightx2v.server.limits import MAX_BODY, RequestLimits, address

from ..exposure import Exposure
from .forged_events import respond
from .uploads import UploadLimit, Uploads

MAX_JSON = 1_000_000


def page_limits(exposure: Exposure, origins: set[str]) -> Middleware:
    """RequestLimits for the page. Add to `origins` further host names of the page: the share link's, once known.

    The rate of 20 a second is generous: an open page sends one or two, a person who clicks fast ten.
    """

    def body_limit(path: str) -> int:
        if path.startswith("/v1/"):  # the API, which accepts images in base64
            return MAX_BODY
        return exposure.limits.upload + MAX_JSON if path.rstrip("/").endswith("/upload") else MAX_JSON

    return Middleware(
        RequestLimits,
        hosts=exposure.hosts,
        origins=None if exposure.hosted else origins,
        body_limit=body_limit,
        client_of=visitor_of(exposure),
        respond=respond,
    )


def visitor_of(exposure: Exposure) -> Callable[[Scope, Headers], str]:
    """A function that names who sends a request. Behind Spaces or a share link all requests come from one proxy, which
    names the visitor's address; a visitor may forge it, so no secret depends on it."""

    def visitor(scope: Scope, headers: Headers) -> str:
        forwarded = headers.get("x-forwarded-for", "") if exposure.hosted or exposure.share else ""
        return forwarded.partition(",")[0].strip()[:64] or address(scope)

    return visitor


def upload_limit(exposure: Exposure) -> Middleware:
    """Bounds the bytes of each visitor's uploads."""
    limits = exposure.limits
    largest = limits.upload + MAX_JSON
    return Middleware(UploadLimit, uploads=Uploads(limits.kept), visitor_of=visitor_of(exposure), largest=largest)


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
            await respond(429, "Busy", TOO_MANY, headers)(scope, receive, send)
            return

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._guesses.give_back(peer)
            await send(message)

        await self._app(scope, receive, send_and_note)
