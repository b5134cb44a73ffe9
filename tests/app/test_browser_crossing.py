"""A visitor in a real browser who is faster than the network, or whose network or server fails for a while.

Covered: clicks and typing lose nothing while answers cross each other; after a lost connection or a restart of the app
the page has its run, history, queue and typed text again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium import Person, person
from patience import free_port
from studio_app import Page, launched

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

SLOW = """(() => {
    const wait = (ms) => new Promise((done) => setTimeout(done, ms)), quick = window.fetch;
    let count = 0;
    window.fetch = async (...what) => {
        if (!String(what[0]?.url ?? what[0]).includes('/run/')) return quick(...what);
        const number = count++;
        await wait([0, 250, 60, 400][number % 4]);
        const answer = await quick(...what);
        await wait([300, 0, 150][number % 3]);
        return answer;
    };
})()"""
"""Requests and answers of the page's events take turns in being late, so that they overtake each other."""


def test_fast_clicks_and_typing_survive_answers_that_cross(chrome: Browser, page: Page) -> None:
    with person(chrome, page, script=SLOW) as visitor:
        tab = visitor.tab
        tab.click("#advanced button")
        tab.check("#per_line input")
        tab.fill("#prompt textarea", "an endless one\nsecond\nthird")
        tab.click("#generate")
        visitor.settle("() => document.querySelectorAll('#queue li').length === 3")
        tab.click("#queue li:nth-child(2) [data-act=edit]")
        tab.click("#history h2")
        tab.focus("#prompt textarea")  # leaving it is an event too
        tab.focus("#steps input, #shift input")
        visitor.settle("() => document.querySelector('#generate').innerText.startsWith('Save')")
        visitor.settle("() => document.querySelector('#prompt textarea').value === 'second'")
        tab.focus("#seed input")
        tab.keyboard.press("Control+A")
        tab.keyboard.type("271828", delay=120)
        tab.focus("#prompt textarea")
        tab.keyboard.press("Control+A")
        tab.keyboard.type("second, typed letter by letter while answers arrive", delay=60)
        assert tab.input_value("#seed input") == "271828"
        assert tab.input_value("#prompt textarea") == "second, typed letter by letter while answers arrive"
        assert tab.inner_text("#generate").startswith("Save")
        for shape in ("16:9", "9:16", "16:9"):  # faster than any answer
            tab.click(f"#shape label:has-text('{shape}')")
        visitor.settle("() => document.querySelector('#width input').value === '128'")
        tab.click("#generate")
        visitor.settle("() => document.querySelectorAll('#queue .prompt')[1].innerText.startsWith('second, typed')")
        visitor.settle("() => document.querySelector('#generate').innerText === 'Generate'")
        tab.click("[data-act=language][data-name=zh]")
        tab.fill("#prompt textarea", "typed while the language changed")
        visitor.settle("() => document.querySelector('#generate').innerText === '生成视频'")
        tab.wait_for_timeout(1500)
        assert tab.input_value("#prompt textarea") == "typed while the language changed"
        assert tab.input_value("#seed input") == "271828"


def test_a_preset_sets_its_own_fields_and_keeps_the_rest(chrome: Browser, page: Page) -> None:
    with person(chrome, page, script=SLOW) as visitor:
        tab = visitor.tab
        tab.click("#advanced button")
        tab.click("#preset-button")
        tab.click("#option-demo_t2v_base")
        tab.fill("#seed input", "5")
        tab.fill("#prompt textarea", "typed while the preset changed")
        visitor.settle("() => document.querySelector('#steps input')?.value === '20'")
        tab.wait_for_timeout(1000)
        assert tab.input_value("#seed input") == "5"
        assert tab.input_value("#prompt textarea") == "typed while the preset changed"
        for choice in (2, 1, 2):
            tab.click(f"#mode label:nth-of-type({choice})")
        tab.wait_for_selector("#option-demo_i2v_base[aria-selected=true]", state="attached")
        assert tab.is_checked("#mode label:nth-of-type(2) input") and tab.input_value("#seed input") == "5"


def test_a_half_typed_number_is_reported_below_the_button_only(visitor: Person) -> None:
    tab = visitor.tab
    tab.click("#advanced button")
    tab.fill("#width input", "8")
    tab.wait_for_selector("#cost .problem")
    assert "width" in tab.inner_text("#cost") and not tab.is_visible(".toast-body")
    tab.fill("#width input", "128")
    visitor.settle("() => !document.querySelector('#cost .problem')")


def test_a_lost_connection_loses_neither_the_run_nor_the_text(visitor: Person) -> None:
    tab = visitor.tab
    visitor.make("an endless one")
    visitor.see("running")
    job = visitor.job
    tab.context.set_offline(True)
    tab.wait_for_selector(".toast-body:has-text('lost')")
    tab.fill("#prompt textarea", "typed while nobody listened")
    with tab.expect_event("load"):
        tab.context.set_offline(False)
    comes_back(visitor, job, "running")
    visitor.settle("() => document.querySelector('#prompt textarea').value === 'typed while nobody listened'")


@pytest.mark.slow
def test_a_restart_of_the_app_forgets_nothing(chrome: Browser, tmp_path: Path) -> None:
    port = free_port()
    with launched(tmp_path / "outputs", port=port) as page, person(chrome, page, leave=False) as visitor:
        tab = visitor.tab
        visitor.make("the first")
        visitor.see("done")
        first = visitor.job
        tab.click("#advanced button")
        tab.check("#per_line input")
        visitor.make("an endless one\nthe next")
        visitor.settle("() => document.querySelectorAll('#queue li').length === 2")
        tab.evaluate("window.before = true")
        page.process.kill()
        page.process.wait()
        tab.wait_for_selector(".toast-body:has-text('lost')")
        with launched(tmp_path / "outputs", port=port):
            visitor.settle("() => !window.before && document.querySelectorAll('#queue li').length === 2")
            tab.wait_for_selector(f"#history [data-id='{first}'] img")
            texts = tab.locator("#queue li").all_inner_texts()
            assert "an endless one" in texts[0] and "the next" in texts[1], texts
            assert tab.input_value("#prompt textarea") == "an endless one\nthe next"
            visitor.complaints.clear()  # that the server was away
            tab.close()


def comes_back(visitor: Person, job: str, state: str) -> None:
    visitor.tab.wait_for_selector(f"#stage .stage[data-job='{job}'][data-state='{state}']")
    lost = [text for text in visitor.complaints if "ERR_INTERNET_DISCONNECTED" in text]
    assert lost == visitor.complaints
    visitor.complaints.clear()
