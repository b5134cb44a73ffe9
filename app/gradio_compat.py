"""Everything here that relies on gradio's private parts. tests/app/test_gradio_compat.py checks each of them.

Before the page moves to another version of gradio, run that test, and then name the version in it.
"""

from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context, LocalContext
from starlette.requests import Request


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


def signed_in(request: Request) -> bool:
    """Whether gradio would accept this request: it needs no login, or its session cookie is valid."""
    app = request.app
    if getattr(app, "auth", None) is None:
        return True
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(request.cookies.get(name) in app.tokens for name in names)
