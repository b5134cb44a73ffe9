"""A real browser on a launched page: chromium, visitors with a tab, and their actions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from patience import PATIENCE
from studio_app import Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = ("--no-sandbox", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required")
HARMLESS = ("Method not implemented.",)
"""gradio itself logs this about a function that it does not need."""


def executable() -> str | None:
    """The path of chromium on this machine; LIGHTX2V_CHROMIUM names another."""
    found = (shutil.which(name) for name in (os.environ.get("LIGHTX2V_CHROMIUM", ""), *NAMES) if name)
    return next(filter(None, found), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """One browser for all tests; without one they are skipped."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = executable()
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


UNFINISHED = """() => [...document.querySelectorAll('#queue [data-id], #stage .stage:is([data-state=queued],'
    + '[data-state=running])')].map(e => e.dataset.id || e.dataset.job)"""
"""Ids of a visitor's unfinished runs, the running one first."""


@dataclass
class Person:
    """A visitor with a tab. `complaints` collects errors and warnings from the browser's console."""

    tab: Tab
    page: Page
    complaints: list[str] = field(default_factory=list)

    def open(self, query: str = "") -> None:
        self.tab.goto(self.page.url + query)
        self.tab.wait_for_selector("#preset-button")
        self.tab.wait_for_selector("#stage .stage")

    def make(self, prompt: str) -> None:
        self.tab.fill("#prompt textarea", prompt)
        self.tab.click("#generate")

    def stop(self, button: str) -> None:
        """Presses a Stop button; says yes if the page asks, which it does once a run has taken a few seconds."""
        self.tab.click(button)
        self.tab.wait_for_selector(f"dialog.ask, body:not(:has({button}:not([disabled])))", state="attached")
        if (yes := self.tab.query_selector("dialog.ask [value=yes]")) is not None:
            yes.click()

    def see(self, state: str) -> None:
        """Waits until the stage shows a run in that state: running, done, failed, cancelled."""
        self.tab.wait_for_selector(f"#stage .stage[data-state={state}]")

    @property
    def job(self) -> str:
        """The run on the stage."""
        return str(self.tab.get_attribute("#stage .stage", "data-job"))

    def settle(self, script: str, argument: Any = None) -> Any:
        """Waits until a JavaScript expression is true."""
        return self.tab.wait_for_function(script, arg=argument)


@contextmanager
def person(
    browser: Browser,
    page: Page,
    *,
    width: int = 1440,
    height: int = 900,
    script: str = "",
    leave: bool = True,
    **options: Any,
) -> Iterator[Person]:
    """A new visitor: a fresh profile with one tab, in which `script` runs before the page's own. Nothing may be said on
    the console when they leave. Their runs end with them, unless the page itself is gone by then (`leave=False`)."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(PATIENCE * 1000)
    if script:
        context.add_init_script(script)
    someone = Person(tab=context.new_page(), page=page)
    watch(someone.tab, someone.complaints)
    someone.open()
    try:
        yield someone
        assert not someone.complaints
    finally:
        left = someone.tab.evaluate(UNFINISHED) if leave else []
        context.close()
        page.stop(left)


def watch(tab: Tab, complaints: list[str]) -> None:
    """Collects console messages, failed requests and exceptions of scripts."""

    def said(message: Any) -> None:
        if message.type in ("error", "warning") and message.text not in HARMLESS:
            complaints.append(f"{message.type}: {message.text}")

    tab.on("console", said)
    tab.on("pageerror", lambda error: complaints.append(f"script: {error}"))
    tab.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)


def downloads(tab: Tab, click: str, folder: Path) -> Path:
    """Clicks and returns the file that the browser saves."""
    with tab.expect_download() as waiting:
        tab.click(click)
    target = folder / waiting.value.suggested_filename
    waiting.value.save_as(target)
    return target
