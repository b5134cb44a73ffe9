"""Everything here that relies on gradio's private parts. tests/app/test_gradio_compat.py checks each of them.

Before the page moves to another version of gradio, run that test, and then name the version in it.
"""

import logging
import traceback
from abc import ABCMeta
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import route_utils
from gradio.components import Component
from gradio.context import Context, LocalContext
from gradio.state_holder import SessionState
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from lightx2v.errors import one_line

log = logging.getLogger("lightx2v.page")


def tolerant(kind: type[Component], preprocess: Callable[[Any, Any], Any]) -> Any:
    """A subclass of a gradio component that accepts any value: gradio's own `preprocess` logs a traceback for a wrong
    type. Bypasses gradio's metaclass, which writes an interface file beside every module that defines a component."""
    return ABCMeta.__new__(type(kind), kind.__name__, (kind,), {"is_template": True, "preprocess": preprocess})


def newest_component() -> int:
    """The number of the component that was made last."""
    return Context.id


def forget_copies(newest: int) -> None:
    """Drops components numbered above `newest` from the session whose event is being handled.

    For every output of an answer gradio makes a new component and keeps it in the page's session under a number that
    nothing asks for: a quarter of a megabyte per tick for as long as the page is open.
    """
    session = LocalContext.blocks_config.get(None)
    if session is not None:
        for number in [number for number in session.blocks if number > newest]:
            session.blocks.pop(number, None)


def payload(event: gr.EventData) -> dict[str, Any]:
    """The object that the page's script sent with a custom event; {} for anything else."""
    return event._data if isinstance(event._data, dict) else {}


def merge_updates(label: Any, value: Any) -> Any:
    """One update of a component from two: its new label, and its new value (or an update with one)."""
    if not (isinstance(value, dict) and value.get("__type__") == "update"):
        value = {"value": value}
    return {**label, **value}


REFUSED = "lightx2v.refused"
"""The key in an ASGI scope of a list that is filled once gradio has failed on the request's event by itself."""
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
FAILURES += (route_utils.FnIndexInferError, route_utils.httpx.InvalidURL)
"""What gradio raises for values and events that it did not expect."""
_HANDLERS = ("app.backend.", "app.events.", "app.form.", "app.views.", "app.web.gradio_api", "lightx2v.")
"""Modules that handle events. Those of lightx2v.server are middleware around them."""


def fails_by_itself(error: BaseException) -> bool:
    """Whether an exception came from gradio before any handler of ours was called: then the request is at fault, and
    one line in the log says how."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__"))
        if name.startswith(_HANDLERS) and not name.startswith("lightx2v.server."):
            return False
    log.warning("a request was refused: %s", one_line(f"{type(error).__name__}: {error}"[:200]))
    return True


def refuse_forged_events() -> None:
    """Make gradio refuse an event whose values it fails on, in one line. It would print a traceback."""
    process = route_utils.call_process_api

    async def process_or_refuse(app: Any, body: Any, *more: Any, **options: Any) -> Any:
        try:
            return await process(app, body, *more, **options)
        except gr.Error:
            raise
        except FAILURES as error:
            if not fails_by_itself(error):
                raise
            if body.request is not None:
                body.request.scope.get(REFUSED, []).append(error)
            raise gr.Error("The request does not fit this page. Reload it.", print_exception=False) from None

    route_utils.call_process_api = process_or_refuse


def keep_no_sent_values() -> None:
    """Forget the values that an event has sent. gradio keeps a copy of every component and of its last value in each
    session, half a megabyte and more, for links to a page in its present state, which this page does not have."""
    SessionState._update_value_in_config = lambda self, key, value: self.config_values.clear()


def clean_up_failed_uploads() -> None:
    """Make gradio refuse uploads that are no files in the field `files`, and remove the parts of every one that fails.
    It would answer 500 or nothing to some, and leave the parts on the disk."""
    parse = route_utils.GradioMultiPartParser.parse

    async def parse_or_clean(self: Any) -> Any:
        try:
            form = await parse(self)
            if not form or any(key != "files" or isinstance(value, str) for key, value in form.multi_items()):
                raise MultiPartException("The upload has no file, or a field that is not files. Send files=@FILE.")
            return form
        except BaseException:
            for file in self._files_to_close_on_error:
                file.close()
                Path(file.name).unlink(missing_ok=True)
            raise

    route_utils.GradioMultiPartParser.parse = parse_or_clean


def signed_in(request: Request) -> bool:
    """Whether gradio would accept this request: it needs no login, or its session cookie is valid."""
    app = request.app
    if getattr(app, "auth", None) is None:
        return True
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(request.cookies.get(name) in app.tokens for name in names)
