"""ForgedEvents: answers requests of gradio's API that gradio itself fails on, with one line instead of a traceback.

The page's script sends what the page offers. A request by hand may hold anything: a path of this machine in place of a
text, an event that does not exist, a number where a list belongs. gradio fails on some of it with a 500 and a traceback
of a hundred lines. A failure inside our own handlers is a fault of ours and keeps both.
"""

from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightx2v.server.limits import RequestRefused

from ..gradio_compat import FAILURES, REFUSED, fails_by_itself

MESSAGE = "The request does not fit this page. Reload the page, or call the endpoints that /gradio_api/info lists."


class ForgedEvents:
    """ASGI middleware: 422 for what gradio fails on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/gradio_api/"):
            await self._app(scope, receive, send)
            return
        started, refused = False, []

        async def send_and_note(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "status": 422} if refused and message["status"] == 500 else message
            await send(message)

        try:
            await self._app({**scope, REFUSED: refused}, receive, send_and_note)
        except (RequestRefused, OSError):  # which another middleware answers
            raise
        except ClientDisconnect:
            return
        except FAILURES as error:
            if started or not fails_by_itself(error):
                raise
            await respond(422, "BadRequest", MESSAGE)(scope, receive, send)


def respond(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> PlainTextResponse:
    """The form of all refusals on the page's own routes."""
    return PlainTextResponse(message, status_code=status, headers=headers)
