"""gradio's private parts that the page relies on, checked against the installed version.

A failure here names what a new gradio changed. Fix app/gradio_compat.py, run the browser tests, then raise TESTED.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from gradio import blocks, queueing, route_utils, routes
from gradio.context import LocalContext
from gradio.routes import App
from gradio.state_holder import SessionState
from starlette.requests import Request

from app.gradio_compat import (
    forget_copies,
    keep_no_sent_values,
    merge_updates,
    newest_component,
    payload,
    signed_in,
    tolerant,
)

ROOT = Path(__file__).parents[2]
TESTED = "6.31"
"""The release of gradio that these tests and the browser tests passed with."""


def test_the_tested_gradio_is_installed_and_pinned() -> None:
    assert version("gradio").rpartition(".")[0] == TESTED
    assert re.search(rf"^gradio=={re.escape(TESTED)}\.\d+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_every_new_component_gets_a_greater_number() -> None:
    before = newest_component()
    assert gr.Textbox(render=False)._id == before
    assert newest_component() == before + 1


def within_a_loop(make: Callable[[], Any]) -> Any:
    """Outside one gradio opens event loops that it never closes."""

    async def made() -> Any:
        return make()

    return asyncio.run(made())


def test_copies_are_dropped_from_the_session_and_the_page_stays() -> None:
    def opened() -> tuple[SessionState, int]:
        with gr.Blocks() as page:
            own = gr.Textbox()
        return SessionState(page), own._id

    session, own = within_a_loop(opened)
    newest = newest_component()
    copy = gr.Textbox(render=False)
    session.blocks_config.blocks[copy._id + 1] = copy
    token = LocalContext.blocks_config.set(session.blocks_config)
    try:
        forget_copies(newest)
    finally:
        LocalContext.blocks_config.reset(token)
    assert own in session.blocks_config.blocks and copy._id + 1 not in session.blocks_config.blocks
    forget_copies(newest)  # outside an event it does nothing


@pytest.mark.parametrize(("sent", "expected"), [({"act": "stop"}, {"act": "stop"}), (None, {}), (["stop"], {})])
def test_a_click_carries_the_scripts_object(sent: Any, expected: dict[str, Any]) -> None:
    assert payload(gr.EventData(None, sent)) == expected


def test_a_tolerant_component_is_the_same_to_the_browser_and_writes_no_file() -> None:
    before = set((ROOT / "app").rglob("*.pyi"))
    kind = tolerant(gr.Textbox, lambda _, sent: str(sent))
    box = kind(label="x")
    assert box.get_block_name() == "textbox" and box.preprocess(5) == "5"
    assert set((ROOT / "app").rglob("*.pyi")) == before


def test_an_update_is_marked_as_gradio_marks_it() -> None:
    label = gr.update(label="Seed")
    assert merge_updates(label, 5) == {**label, "value": 5}
    assert merge_updates(label, gr.update(value=5, visible=True)) == {**label, "value": 5, "visible": True}


@pytest.mark.parametrize("prefix", ["access-token-", "access-token-unsecure-"])
def test_the_session_cookie_is_gradios(prefix: str) -> None:
    app = within_a_loop(App)
    app.auth, app.tokens = None, {"secret": "studio"}
    assert f'f"{prefix}{{app.cookie_id}}"' in inspect.getsource(inspect.getmodule(App))  # type: ignore[arg-type]

    def request(token: str) -> Request:
        cookie = f"{prefix}{app.cookie_id}={token}".encode()
        return Request({"type": "http", "app": app, "headers": [(b"cookie", cookie)]})

    assert signed_in(request("anything")), "without a password everyone is in"
    app.auth = SimpleNamespace()
    assert signed_in(request("secret")) and not signed_in(request("guessed"))


def test_a_session_forgets_what_an_event_has_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte in each of five hundred sessions took as much memory as all else."""
    monkeypatch.setattr(SessionState, "_update_value_in_config", None)  # put back after the test
    session: Any = SimpleNamespace(config_values={5: {"props": {"value": "what was sent before"}}})
    keep_no_sent_values()
    SessionState._update_value_in_config(session, 5, "what was sent")
    assert not session.config_values


def test_gradio_calls_what_is_replaced_under_the_name_that_is_replaced() -> None:
    """What the replacements do is tested on a launched page, in test_app_forged.py and test_app_uploads.py."""
    for module in (routes, queueing):
        assert "route_utils.call_process_api(" in inspect.getsource(module)
    assert "state._update_value_in_config(" in inspect.getsource(blocks)
    assert "self._files_to_close_on_error.append(" in inspect.getsource(route_utils.GradioMultiPartParser)
    assert 'form.getlist("files")' in inspect.getsource(route_utils.upload_fn)


PRIVATE = {"call_process_api", "_update_value_in_config", "GradioMultiPartParser", "_files_to_close_on_error"}
PRIVATE |= {"_data", "cookie_id", "tokens", "_id", "Context", "LocalContext", "ABCMeta"}


def test_no_other_file_touches_gradios_private_parts() -> None:
    sources = [ROOT / "app.py", *(path for path in (ROOT / "app").rglob("*.py") if path.name != "gradio_compat.py")]
    found = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, "attr", ""), getattr(node, "module", ""), getattr(node, "value", "")}
            names |= {alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
            private = {name for name in names if isinstance(name, str)} & {*PRIVATE, "gradio.context", "__type__"}
            found += [f"{path.name}:{node.lineno} {name}" for name in private]
    assert not found
