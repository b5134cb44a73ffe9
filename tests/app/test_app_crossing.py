"""Events of one open page that cross each other: none of them undoes another.

Covered: an event sent before an earlier answer arrived; many at the same time; answers that arrive in the wrong order;
an answer has values only for its own fields; a half-typed number is no error.
"""

from __future__ import annotations

import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from page_events import Keyboard
from patience import eventually
from studio_app import Page

pytestmark = pytest.mark.multi

STORED, VERSIONS = "lightx2v-studio", "versions"


@dataclass
class Browser:
    """The state of one page in a browser: its storage, the versions of the parts, and all values by elem_id."""

    keyboard: Keyboard
    session: str = field(default_factory=lambda: secrets.token_hex(6))
    holds: dict[str, Any] = field(default_factory=dict)

    def press(self, target: str, kind: str = "click", *, sent: Any = None, **values: Any) -> dict[str, Any]:
        """Sends an event with everything that the browser holds now, or with other `values`; returns the answer."""
        versions = {name: version(html) for name, html in self.parts.items() if html}
        changes = {**self.holds, VERSIONS: versions, **values}
        return self.keyboard.press(target, kind, sent=sent, session=self.session, **changes)

    def take(self, answer: dict[str, Any]) -> None:
        """Applies an answer."""
        for name, value in answer.items():
            if not (isinstance(value, dict) and value.get("__type__") == "update"):
                self.holds[name] = value
            elif "value" in value:
                self.holds[name] = value["value"]

    @property
    def parts(self) -> dict[str, str]:
        return {name: html for name, html in self.holds.items() if isinstance(html, str) and "data-version" in html}


def version(html: str) -> str:
    return html.split('data-version="')[1].split('"')[0]


@pytest.fixture
def browser(page: Page) -> Any:
    opened = Browser(Keyboard(page, page.http.get("/config").json()))
    opened.take(opened.press("timer", "tick"))
    yield opened
    page.stop(re.findall(r'data-id="([^"]+)"', str(opened.holds.get("queue"))))


def queue_of(browser: Browser, *prompts: str) -> list[str]:
    """Queues runs behind one that does not end; returns the ids of those that wait."""
    browser.take(browser.press("generate", prompt="\n".join(("an endless first one", *prompts)), per_line=True))
    browser.take(eventually(lambda: "running" in str((a := browser.press("timer", "tick")).get("stage")) and a))
    return re.findall(r'data-act="edit"[^>]*data-id="([^"]+)"', str(browser.holds["queue"]))


def test_an_event_from_before_an_answer_undoes_nothing(browser: Browser) -> None:
    second, _ = queue_of(browser, "second", "third")
    before = dict(browser.holds)
    browser.take(browser.press("queue", "act", sent={"act": "edit", "id": second}))
    assert browser.holds["generate"] == "Save to the queue" and browser.holds["prompt"] == "second"
    late = [browser.press("timer", "tick", **before), browser.press("prompt", "blur", **before)]
    late.append(browser.press("queue", "act", sent={"act": "down", "id": second}, **before))
    for answer in late:
        browser.take(answer)
    assert browser.holds[STORED]["editing"] == second and browser.holds["generate"] == "Save to the queue"
    browser.take(browser.press("generate", prompt="second, edited"))
    assert browser.holds["generate"] == "Generate"
    order = re.findall(r'class="prompt">([^<]+)', str(browser.holds["queue"]))
    assert order == ["an endless first one", "third", "second, edited"]


def test_one_run_cannot_be_edited_into_two(browser: Browser) -> None:
    (second,) = queue_of(browser, "second")
    browser.take(browser.press("queue", "act", sent={"act": "edit", "id": second}))
    browser.take(browser.press("generate", prompt="one\nand another", per_line=True))
    assert "these settings make 2" in str(browser.holds["cost"])
    browser.take(browser.press("generate", prompt="only one", per_line=True))
    assert re.findall(r'class="prompt">([^<]+)', str(browser.holds["queue"])) == ["an endless first one", "only one"]


def test_a_click_before_the_first_answer_counts(page: Page) -> None:
    new = Browser(Keyboard(page, page.http.get("/config").json()))
    early = new.press("generate", prompt="one")
    new.take(new.press("page", "load"))
    assert early[STORED]["job"] and early[STORED]["job"] == new.holds[STORED]["job"]
    assert early[STORED]["owner"] == new.holds[STORED]["owner"]


def test_many_clicks_at_once_all_count(browser: Browser, page: Page) -> None:
    made = [page_run(browser, prompt) for prompt in ("one", "two")]
    clicks = [("history", {"act": "compare", "id": id}) for id in made] + [("top", {"act": "language", "name": "zh"})]
    clicks.append(("history", {"act": "show", "id": made[0]}))
    before = dict(browser.holds)
    with ThreadPoolExecutor(16) as pool:
        ticks = [pool.submit(browser.press, "timer", "tick", **before) for _ in range(6)]
        pressed = [pool.submit(browser.press, target, "act", sent=sent, **before) for target, sent in clicks]
        answers = [event.result() for event in [*pressed, *ticks]]
    for answer in reversed(answers):
        browser.take(answer)
    browser.take(browser.press("timer", "tick"))
    kept = browser.holds[STORED]
    assert set(kept["compared"]) == set(made) and kept["language"] == "zh"
    assert kept["job"] == made[0] and kept["pinned"] is True


def page_run(browser: Browser, prompt: str) -> str:
    browser.take(browser.press("generate", prompt=prompt))
    browser.take(
        eventually(lambda: 'data-state="done"' in str((a := browser.press("timer", "tick")).get("stage")) and a)
    )
    return str(browser.holds[STORED]["job"])


def test_the_next_tick_corrects_answers_in_the_wrong_order(browser: Browser) -> None:
    second, third = queue_of(browser, "second", "third")
    early = browser.press("queue", "act", sent={"act": "edit", "id": second})
    late = browser.press("queue", "act", sent={"act": "cancel", "id": third})
    browser.take(late)
    browser.take(early)
    assert third in browser.holds["queue"], "the page is out of date"
    browser.take(browser.press("timer", "tick"))
    assert third not in browser.holds["queue"] and second in browser.holds["queue"]
    assert not {"queue", "top", "history", "preset", "cost", "examples"} & {
        name for name, html in browser.press("timer", "tick").items() if isinstance(html, str)
    }, "parts that are up to date are not sent again"


def test_an_answer_has_values_only_for_its_own_fields(browser: Browser) -> None:
    typed = {"prompt": "typed meanwhile", "seed": 77, "negative_prompt": "blur", "videos": 2}

    def values(answer: dict[str, Any]) -> set[str]:
        return {
            name
            for name, value in answer.items()
            if not isinstance(value, dict) or value.get("__type__") != "update" or "value" in value
        }

    picked = browser.press("preset", "pick", sent={"name": "demo_t2v_base"}, **typed)
    assert "steps" in values(picked) and not values(picked) & set(typed)
    fields = {"steps", "height", "width", "frames", "fps", "shift", "shape", "offload", "attention", "mode"} | set(
        typed
    )
    for target, kind in (("timer", "tick"), ("prompt", "blur"), ("generate", "click")):
        answer = browser.press(target, kind, **{**typed, "prompt": "x"})
        assert not values(answer) & fields, target
    page_language = browser.press("top", "act", sent={"act": "language", "name": "zh"}, **typed)
    assert not values(page_language) & fields


def test_a_half_typed_number_only_affects_the_cost(browser: Browser) -> None:
    answer = browser.press("width", "input", width=8)
    assert "problem" in str(answer["cost"]) and "width" in str(answer["cost"])
    assert browser.press("timer", "tick", width=8, steps=None), "and none to anything else"
    answer = browser.press("width", "input", width=96)
    assert "problem" not in str(answer["cost"])


def test_an_outdated_choice_is_no_error(browser: Browser) -> None:
    browser.take(browser.press("preset", "pick", sent={"name": "t2v_distill_lora"}))
    assert browser.holds["size"] == 632
    late = browser.press("timer", "tick", preset_name="demo_t2v_distill_lora", size=96, length=17)
    assert "option-demo_t2v_distill_lora" in str(late["preset"]), "the answer is about the preset of the event"


def test_a_problem_stays_until_the_fields_change(browser: Browser) -> None:
    browser.take(browser.press("generate", prompt=""))
    assert "problem" in browser.holds["cost"]
    browser.take(browser.press("timer", "tick", prompt=""))
    assert "problem" in browser.holds["cost"]
    browser.take(browser.press("timer", "tick", prompt="a red ball"))
    assert "problem" not in browser.holds["cost"]
