"""A visitor in a real browser makes a video, leaves, comes back, and finds everything again.

Covered: typing, progress that moves, a video that plays, a reload and a second tab in mid-run that find the run
again, Stop and the next run after it, history, a video dropped on the page, downloads, no console errors.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium import Person, downloads, person
from studio_app import Page, launched

from lightx2v.media.mp4 import read_settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

STAR = "a yellow star spins over the sea at sunset"


@pytest.fixture(scope="module")
def demo(chrome: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page with the demo model. `chrome` comes first so that nothing starts without a browser."""
    with launched(tmp_path_factory.mktemp("demo") / "outputs", demo=True) as started:
        yield started


def test_from_a_prompt_to_a_video_that_plays(chrome: Browser, demo: Page, tmp_path: Path) -> None:
    with person(chrome, demo) as visitor:
        make_and_watch(visitor, tmp_path)


def make_and_watch(visitor: Person, folder: Path) -> None:
    tab = visitor.tab
    assert tab.is_visible("#stage .stage[data-state=sample]"), "the stage is never empty"
    # What the bar and the picture showed on the way is collected in the page: polling from here could miss it.
    tab.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const bar = document.querySelector('[role=progressbar]'), picture = document.querySelector('img.preview');
            if (bar) window.seen.push([Number(bar.getAttribute('aria-valuenow')), picture ? picture.src : '']);
        }).observe(document.querySelector('#theatre'), {childList: true, subtree: true, attributes: true}); }"""
    )
    tab.click("#preset-button")
    tab.click("#option-demo_t2v_base")
    tab.wait_for_selector("#option-demo_t2v_base[aria-selected=true]", state="attached")
    tab.click("#advanced button")
    visitor.settle("() => document.querySelector('#steps input')?.value === '20'")
    tab.fill("#steps input", "100")  # a few seconds on any machine
    tab.fill("#prompt textarea", STAR)
    tab.press("#prompt textarea", "Control+Enter")
    visitor.see("done")
    visitor.settle("() => { const v = document.querySelector('#stage video:not(.ambient)');"
                   " return v && v.readyState >= 3 && v.currentTime > 0; }")  # fmt: skip
    video = tab.eval_on_selector("#stage video", "v => [v.duration, v.videoWidth, v.videoHeight, v.error]")
    assert video[0] == pytest.approx(17 / 16, abs=0.1) and video[1:] == [96, 96, None]
    seen = [percent for percent, _ in tab.evaluate("window.seen")]
    running = [percent for percent in seen if percent]
    assert running == sorted(running) and running[0] < 100 and running[-1] == 100, running
    assert visitor.job in tab.url
    for word in ("total", "peak RAM", "Seed"):
        visitor.settle("word => document.querySelector('#report').innerText.includes(word)", word)
    file = downloads(tab, "#report a[download]", folder)
    assert read_settings(str(file))["request"]["prompt"] == STAR


def test_a_reload_and_a_second_tab_show_the_same_run(visitor: Person) -> None:
    tab = visitor.tab
    prompt = "a red ball held on its way left"
    visitor.make(prompt)
    visitor.see("running")
    job = visitor.job
    tab.reload()
    tab.wait_for_selector(f"#stage .stage[data-job='{job}']")
    other = tab.context.new_page()
    other.goto(visitor.page.url)
    other.wait_for_selector(f"#stage .stage[data-job='{job}']")
    other.close()
    visitor.page.let_go(prompt)
    visitor.see("done")
    assert visitor.job == job, "the run continued while the page was closed"
    assert tab.input_value("#prompt textarea") == prompt


def test_stop_ends_a_run_and_the_next_one_starts(visitor: Person) -> None:
    tab = visitor.tab
    for prompt in ("an endless blue box", "a pink heart"):
        visitor.make(prompt)
        tab.wait_for_selector("#stage .stage[data-state=running], #stage .stage[data-state=queued]")
    visitor.settle("() => document.querySelector('#queue .queue li')")
    first = tab.get_attribute("#queue li.running [data-act=stop]", "data-id")
    visitor.stop(f"#queue [data-act=stop][data-id='{first}']")
    assert visitor.page.wait(str(first))["state"] == "cancelled"
    visitor.see("done")
    assert visitor.job != first
    tab.wait_for_selector(f"#history [data-act=show][data-id='{first}'] .nopicture")


def test_history_and_dropped_videos_restore_settings(visitor: Person) -> None:
    tab = visitor.tab
    tab.click("#advanced button")
    tab.fill("#seed input", "77")
    visitor.make(STAR)
    visitor.see("done")
    first = visitor.job
    tab.fill("#seed input", "5")
    tab.fill("#prompt textarea", "something else")
    tab.click(f"#history [data-act=show][data-id='{first}']")
    tab.click(f"#report [data-act=restore][data-id='{first}']")
    visitor.settle("text => document.querySelector('#prompt textarea').value === text", STAR)
    visitor.settle("() => document.querySelector('#seed input').value === '77'")

    tab.fill("#seed input", "6")
    tab.fill("#prompt textarea", "something else again")
    drop(visitor, visitor.page.folder / f"{first}.mp4")
    visitor.settle("text => document.querySelector('#prompt textarea').value === text", STAR)
    visitor.see("shown")
    visitor.settle("() => document.querySelector('#seed input').value === '77'")


def test_a_foreign_video_is_refused_with_a_message(visitor: Person, tmp_path: Path) -> None:
    (tmp_path / "other.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 200)
    drop(visitor, tmp_path / "other.mp4")
    visitor.tab.wait_for_selector("#cost .problem")


def drop(visitor: Person, file: Path) -> None:
    """Drops a file on the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    visitor.tab.evaluate(
        """data => { const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], 'dropped.mp4', {type: 'video/mp4'}));
            const options = {dataTransfer, bubbles: true, cancelable: true};
            for (const type of ['dragover', 'drop']) document.body.dispatchEvent(new DragEvent(type, options));
        }""",
        data,
    )
