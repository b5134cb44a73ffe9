"""Queue, comparison, retries, images and edits in a real browser, over the painting engine.

Covered: several prompts make several jobs, which can be moved, edited and cancelled; two runs play in sync with their
differences; a failed run has a button that makes it succeed; the crop of an image is shown before the run; the last
frame becomes the next first one; two visitors have two histories.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from chromium import Person, person
from PIL import Image
from studio_app import Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def prompts(visitor: Person, where: str) -> list[str]:
    return [text.strip() for text in visitor.tab.locator(f"{where} .prompt").all_inner_texts()]


def test_lines_become_jobs_that_can_be_moved_edited_and_cancelled(visitor: Person) -> None:
    tab = visitor.tab
    tab.click("#advanced button")
    tab.check("#per_line input")
    tab.fill("#prompt textarea", "an endless one\nsecond\nthird\nfourth")
    tab.focus("#preset-button")
    visitor.settle("() => document.querySelector('#generate').innerText.includes('4')")
    tab.click("#generate")
    visitor.settle("() => document.querySelectorAll('#queue li').length === 4")
    visitor.see("running")
    assert prompts(visitor, "#queue") == ["an endless one", "second", "third", "fourth"]
    tab.click("#queue li:nth-child(4) [data-act=up]")
    visitor.settle("() => document.querySelectorAll('#queue .prompt')[2].innerText === 'fourth'")
    tab.click("#queue li:nth-child(2) [data-act=edit]")
    visitor.settle("() => document.querySelector('#prompt textarea').value === 'second'")
    visitor.settle("() => document.querySelector('#generate').innerText.startsWith('Save')")
    tab.fill("#prompt textarea", "second, edited")
    tab.click("#generate")
    visitor.settle("() => document.querySelectorAll('#queue .prompt')[1].innerText === 'second, edited'")
    tab.click("#queue li:nth-child(4) [data-act=cancel]")
    visitor.settle("() => document.querySelectorAll('#queue li').length === 3")
    visitor.stop("#status [data-act=stop]")
    visitor.settle("() => document.querySelectorAll('#history .run img').length === 2")
    assert prompts(visitor, "#history .run:has(img)") == ["fourth", "second, edited"]


def test_a_moved_run_keeps_the_keyboard_focus(visitor: Person) -> None:
    tab = visitor.tab
    tab.click("#advanced button")
    tab.check("#per_line input")
    visitor.make("an endless one\nsecond\nthird\nfourth")
    visitor.settle("() => document.querySelectorAll('#queue li').length === 4")
    tab.focus("#queue li:nth-child(4) [data-act=up]")
    for place in (2, 1):
        tab.keyboard.press("Enter")
        visitor.settle("n => document.querySelectorAll('#queue .prompt')[n].innerText === 'fourth'", place)
        visitor.settle("() => document.activeElement.closest('li')?.innerText.includes('fourth')")
    tab.keyboard.press("Enter")  # the first place has no way up; the other buttons of the row are there
    visitor.settle("() => document.activeElement.closest('li')?.innerText.includes('fourth')")


def test_a_high_noise_lora_fills_in_its_low_noise_partner(visitor: Person) -> None:
    tab = visitor.tab
    tab.click("#advanced button")
    tab.click("#loras button")
    tab.click("#add_lora")
    tab.fill("#lora_0_high input, #lora_0_high textarea", "someone/loras/style_high_noise.safetensors")
    tab.focus("#seed input")
    visitor.settle(
        "() => document.querySelector('#lora_0_low :is(input, textarea)').value ==="
        " 'someone/loras/style_low_noise.safetensors'"
    )
    visitor.settle("() => document.querySelector('#cost .problem')?.innerText.startsWith('There is no LoRA')")
    tab.fill("#lora_0_low :is(input, textarea)", "")
    tab.focus("#seed input")
    visitor.settle("() => document.querySelector('#cost .problem')?.innerText.startsWith('There is no LoRA')")
    assert tab.input_value("#lora_0_low :is(input, textarea)") == "", "a partner that was removed stays removed"
    tab.click("#remove_lora_0")
    tab.wait_for_selector("#lora_0_high", state="hidden")
    visitor.settle("() => document.querySelector('#cost .cost') && !document.querySelector('#cost .problem')")
    tab.click("#add_lora")
    tab.wait_for_selector("#lora_0_high", state="visible")
    assert tab.input_value("#lora_0_high :is(input, textarea)") == ""


def test_two_runs_play_in_sync_and_show_their_differences(visitor: Person) -> None:
    tab = visitor.tab
    for prompt in ("one ball", "another ball"):
        visitor.make(prompt)
        visitor.settle("text => document.querySelector('#history .run .prompt')?.innerText === text", prompt)
        visitor.see("done")
    for place in (1, 2):
        tab.hover(f"#history .run:nth-child({place})")
        tab.click(f"#history .run:nth-child({place}) [data-act=compare]")
        tab.wait_for_selector(f"#history .run:nth-child({place}).compared")
    tab.click("#tabs [role=tab]:nth-of-type(2)")
    tab.wait_for_selector(".compare video >> nth=1")
    visitor.settle("() => document.querySelectorAll('.diff .differs th').length")
    differs = tab.locator(".diff .differs th").all_inner_texts()
    assert [name.lower() for name in differs] == ["prompt", "seed"]
    tab.click("#compared [data-act=play]")
    visitor.settle("() => [...document.querySelectorAll('.compare video')].every(v => v.currentTime > 0.1)")
    tab.click("#compared [data-act=play]")
    tab.focus("#compared .seek")
    tab.keyboard.press("Home")
    visitor.settle("() => [...document.querySelectorAll('.compare video')].every(v => v.currentTime < 0.05)")
    visitor.settle("() => document.querySelector('#benchmark tbody')?.innerText.includes('4-step LoRA')")
    tab.click("#compared [data-act=clear]")
    tab.wait_for_selector("#compared .empty")


def test_a_failed_run_has_retry_buttons_that_succeed(visitor: Person) -> None:
    visitor.make("a ball that is too large")
    visitor.see("failed")
    visitor.settle("() => document.querySelector('#stage [role=alert]')?.innerText.includes('smaller')")
    visitor.tab.click("#status [data-act=retry_smaller]")
    visitor.see("done")
    visitor.settle("() => document.querySelector('#report').innerText.includes('64 × 64')")


def test_the_crop_is_shown_before_the_run(visitor: Person, tmp_path: Path) -> None:
    tab = visitor.tab
    Image.fromarray(np.full((300, 800, 3), 120, np.uint8)).save(tmp_path / "wide.png")
    tab.click("#mode label:nth-of-type(2)")
    tab.set_input_files("#image_path input[type=file]", str(tmp_path / "wide.png"))
    tab.wait_for_selector("#crop .window")
    visitor.settle("() => document.querySelector('#crop').innerText.includes('whole image')")
    tab.click("#shape label:has-text('1:1')")
    visitor.settle("() => document.querySelector('#crop').innerText.includes('bright part')")
    # The picture is as wide as it will be once it is decoded.
    visitor.settle(
        "wanted => { const [window, picture] = ['#crop .window', '#crop img'].map("
        "selector => document.querySelector(selector)?.getBoundingClientRect().width);"
        " return Math.abs(window / picture - wanted) < 0.02; }",
        300 / 800,
    )
    visitor.make("from a picture")
    visitor.see("done")
    tab.click("#report [data-act=last_frame]")
    visitor.settle("() => document.querySelector('#crop').innerText.includes('96 × 96')")


def test_two_visitors_have_two_histories(chrome: Browser, page: Page) -> None:
    with person(chrome, page) as alice, person(chrome, page) as bob:
        alice.make("alice's garden")
        alice.see("done")
        bob.open(f"?job={alice.job}")
        bob.tab.wait_for_selector("#history .empty")
        assert "garden" not in bob.tab.inner_text("body")
        bob.tab.wait_for_selector("#stage .stage[data-state=sample]")
