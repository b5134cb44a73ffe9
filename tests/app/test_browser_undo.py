"""Nothing is lost in a real browser, and nothing happens unseen.

Covered: looking at a run, taking its settings, an example and a deletion can all be undone; a locked seed and a changed
run in the queue are shown beside Generate; Stop and Escape ask; errors and Generate are in view on every screen; a lost
connection stops the clock; the page answers a click before the server does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from chromium import Person, person
from studio_app import Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

TYPED = "words that took ten minutes"
IN_VIEW = """id => { const e = document.querySelector(id); if (!e) return false; const r = e.getBoundingClientRect();
    const seen = document.elementFromPoint(r.x + r.width / 2, r.y + 9);
    return r.top >= 0 && r.bottom <= innerHeight && e.contains(seen); }"""


def prompt_is(visitor: Person, text: str) -> None:
    visitor.settle("text => document.querySelector('#prompt textarea').value === text", text)


def test_the_browser_undoes_an_example(visitor: Person) -> None:
    visitor.tab.fill("#prompt textarea", TYPED)
    visitor.tab.click("#examples [data-act=example]")
    visitor.settle("text => document.querySelector('#prompt textarea').value !== text", TYPED)
    visitor.tab.click("#prompt textarea")
    visitor.tab.keyboard.press("Control+z")
    prompt_is(visitor, TYPED)


def test_looking_at_a_run_takes_nothing_and_taking_its_settings_can_be_undone(visitor: Person) -> None:
    tab = visitor.tab
    visitor.make("a run to look at")
    visitor.see("done")
    first = visitor.job
    tab.fill("#prompt textarea", TYPED)
    tab.click(f"#history [data-act=show][data-id='{first}']")
    tab.wait_for_selector(f"#history .current [data-id='{first}']")
    assert tab.input_value("#prompt textarea") == TYPED
    tab.click("#report [data-act=restore]")
    prompt_is(visitor, "a run to look at")
    tab.wait_for_selector("#cost [data-act=random_seed]")
    tab.click("#cost [data-act=undo_fill]")
    prompt_is(visitor, TYPED)
    tab.wait_for_selector("#cost [data-act=random_seed]", state="detached")


def test_a_deleted_run_comes_back(visitor: Person) -> None:
    tab = visitor.tab
    visitor.make("a run to delete")
    visitor.see("done")
    id = visitor.job
    tab.hover(f"#history .run:has([data-id='{id}'])")
    tab.click(f"#history [data-act=delete][data-id='{id}']")
    tab.wait_for_selector(f"#history [data-id='{id}']", state="detached")
    tab.click("#history [data-act=undo_delete]")
    tab.wait_for_selector(f"#history [data-act=show][data-id='{id}']")
    assert (visitor.page.folder / f"{id}.mp4").is_file()


def test_escape_leaves_a_change_before_it_stops_a_run_and_stopping_asks(visitor: Person) -> None:
    tab = visitor.tab
    for prompt in ("an endless run", "a run that waits"):
        visitor.make(prompt)
        tab.wait_for_selector("#stage .stage[data-state=running], #stage .stage[data-state=queued]")
    tab.click("#queue [data-act=edit]")
    tab.wait_for_selector("#cost [data-act=stop_editing]")
    tab.click("#queue h2")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#cost [data-act=stop_editing]", state="detached")
    visitor.see("running")
    long_ago = "document.querySelectorAll('[data-act=stop]').forEach(b => (b.dataset.since -= 60))"
    tab.evaluate(f"() => {{ {long_ago}; document.querySelector('#status [data-act=stop]').click(); }}")
    tab.wait_for_selector("dialog.ask")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("dialog.ask", state="detached")
    visitor.see("running")
    tab.evaluate(f"() => {{ {long_ago}; document.querySelector('#status [data-act=stop]').click(); }}")
    stopped = visitor.job
    tab.click("dialog.ask [value=yes]")
    assert visitor.page.wait(stopped)["state"] == "cancelled"


@pytest.mark.parametrize("size", [(1440, 900), (1024, 768), (390, 844), (360, 640), (320, 568)])
def test_generate_and_its_errors_are_in_view(chrome: Browser, page: Page, size: tuple[int, int]) -> None:
    with person(chrome, page, width=size[0], height=size[1]) as visitor:
        tab = visitor.tab
        visitor.settle(IN_VIEW, "#generate")
        tab.click("#generate")
        visitor.settle(IN_VIEW, "#cost .problem")
        tab.click("#mode label:nth-of-type(2)")
        tab.wait_for_selector("#image_path", state="visible")
        visitor.settle(IN_VIEW, "#generate")
        tab.click("#advanced button")
        tab.evaluate("document.querySelector('#advanced').scrollIntoView({block: 'end'})")
        visitor.settle(IN_VIEW, "#generate")


def test_a_lost_connection_is_said_and_the_clock_stops(visitor: Person) -> None:
    tab = visitor.tab
    visitor.make("an endless run offline")
    visitor.see("running")
    job = visitor.job
    tab.context.set_offline(True)
    tab.wait_for_selector(".lost .chip.lost", state="visible")
    before = tab.inner_text("#status .elapsed")
    tab.wait_for_timeout(1500)
    assert tab.inner_text("#status .elapsed") == before
    tab.context.set_offline(False)
    visitor.settle("() => !document.body.classList.contains('lost')")
    visitor.page.stop([job])  # the page loads itself anew now, and may not show the run to `person`
    visitor.complaints.clear()  # of the browser, about failed requests


def test_the_button_answers_before_the_server(chrome: Browser, page: Page) -> None:
    with person(chrome, page) as visitor:
        visitor.tab.route("**/gradio_api/**", lambda route: None)  # never answered
        visitor.tab.click("#generate")
        visitor.tab.wait_for_selector("#go.waiting")
        visitor.tab.unroute_all()


def test_the_title_of_the_tab_tells_how_far_a_run_is(visitor: Person) -> None:
    visitor.make("a ball held for the title")
    visitor.settle("() => /^\\d+% · /.test(document.title)")
    visitor.page.let_go("a ball held for the title")
    visitor.see("done")
    visitor.settle("() => !document.title.includes('%')")


def test_a_group_of_radio_buttons_is_one_stop_of_the_tab_key(visitor: Person) -> None:
    tab = visitor.tab
    visitor.settle("() => new Set([...document.querySelectorAll('#size input')].map(e => e.name)).size === 1")
    tab.focus("#size input:checked")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.closest('.block').id") == "shape"
    tab.focus("#size input:checked")
    before = tab.input_value("#width input") if tab.query_selector("#width input") else ""
    tab.keyboard.press("ArrowRight")
    visitor.settle("() => document.querySelectorAll('#size input')[2].checked")
    tab.wait_for_selector("#size label.selected >> nth=0")
    assert before == "" or visitor.settle("w => document.querySelector('#width input').value !== w", before)


def test_a_preset_keeps_the_size_that_the_visitor_chose(visitor: Person) -> None:
    tab = visitor.tab
    tab.click("#shape label:nth-of-type(1)")
    visitor.settle(
        "() => document.querySelector('#width input')?.value !== document.querySelector('#height input')?.value"
    )
    size = [tab.input_value(f"#{side} input") for side in ("width", "height")]
    tab.click("#preset-button")
    tab.click("#option-demo_t2v_fp8")
    tab.wait_for_selector("#option-demo_t2v_fp8[aria-selected=true]", state="attached")
    assert [tab.input_value(f"#{side} input") for side in ("width", "height")] == size
