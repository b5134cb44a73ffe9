"""The page in a real browser: languages, themes, keyboard, screen readers, phones.

Covered: English and Chinese; light and dark with a contrast of 4.5 or more; every field and button has a name; all
of it works with the keyboard; nothing scrolls sideways at 390, 768 and 1440 pixels; the stage does not jump.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from chromium import Person, person
from studio_app import Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

HAN = re.compile(r"[一-鿿]")


LABELS = "[...document.querySelectorAll('[data-testid=block-info], #generate, [role=tab], h2')]"


def test_a_chinese_browser_gets_chinese_and_can_switch_to_english(chrome: Browser, page: Page) -> None:
    with person(chrome, page, locale="zh-CN") as visitor:
        tab = visitor.tab
        visitor.settle("() => document.querySelector('#generate')?.innerText.includes('生成')")
        tab.click("#advanced button")
        visitor.settle("() => document.querySelector('#advanced [data-testid=block-info]')?.checkVisibility()")
        tab.click("#mode label:nth-of-type(2)")
        visitor.settle("() => document.querySelector('#image_path')?.innerText.includes('将图片拖到此处')")
        texts = tab.evaluate(f"{LABELS}.filter(e => e.checkVisibility()).map(e => e.innerText.trim()).filter(Boolean)")
        assert len(texts) > 15 and all(HAN.search(text) for text in texts), texts
        assert tab.evaluate("document.documentElement.lang") == "zh"
        tab.click("#generate")
        visitor.settle("() => document.querySelector('#cost .problem')?.innerText.includes('图生视频需要首帧图片')")
        tab.click("[data-act=language][data-name=en]")
        visitor.settle("() => document.querySelector('#generate')?.innerText === 'Generate'")
        visitor.settle("() => document.documentElement.lang === 'en'")
        visitor.settle(f"() => {LABELS}.every(e => !/[一-鿿]/.test(e.innerText))")
        tab.reload()
        visitor.settle("() => document.querySelector('#generate')?.innerText === 'Generate'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(chrome: Browser, page: Page, scheme: str) -> None:
    """WCAG AA, from the colours that the browser computes, before a run and with a report."""
    with person(chrome, page, color_scheme=scheme) as visitor:
        visitor.settle("dark => document.body.classList.contains('dark') === dark", scheme == "dark")
        visitor.tab.click("#advanced button")
        visitor.settle("() => document.querySelector('#advanced [data-testid=block-info]')?.checkVisibility()")
        visitor.make("contrast")
        visitor.see("done")
        visitor.tab.wait_for_selector("#report .report")
        for summary in visitor.tab.query_selector_all("#report summary"):
            summary.click()
        visitor.tab.click("#preset-button")
        visitor.settle(
            "() => document.getAnimations()"
            ".every(a => a.playState !== 'running' || a.effect.getTiming().iterations > 9)"
        )
        measured = visitor.tab.evaluate(CONTRAST)
        assert len(measured) > 60, "the check covers most of the page"
        faint = [f"{ratio:.2f} {text!r}" for text, ratio, needed in measured if ratio < needed]
        assert not faint, faint


CONTRAST = """() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v / 255);
    };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const behind = (element) => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            const layer = rgba(getComputedStyle(e).backgroundColor);
            if (layer[3]) layers.push(layer);
            if (layer[3] === 1) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    };
    const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
        const v = c[i] / 255; return sum + weight * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
    const found = [];
    const walker = document.createTreeWalker(document.querySelector('.gradio-container'), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
        const disabled = element.closest(':disabled, [aria-hidden=true], .stage, style, script');
        if (!text || disabled || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        const style = getComputedStyle(element), below = behind(element), ink = over(rgba(style.color), below);
        const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        found.push([text.slice(0, 40), (a + 0.05) / (b + 0.05), large ? 3 : 4.5]);
    }
    return found;
}"""


def test_a_chosen_theme_stays(visitor: Person) -> None:
    visitor.tab.click("[data-act=theme]")
    visitor.settle("() => document.body.classList.contains('dark')")
    visitor.tab.reload()
    visitor.settle("() => document.body.classList.contains('dark')")


NAMELESS = """() => {
    const kinds = 'button, input, textarea, select, [role=combobox], [role=progressbar], video';
    const text = (e) => e?.innerText?.trim();
    const named = (e) => text(e) || e.ariaLabel || e.title || e.placeholder || text(e.closest('label'))
        || [...(e.labels || [])].some(text) || text(document.getElementById(e.getAttribute('aria-labelledby')));
    return [...document.querySelectorAll(kinds)]
        .filter(e => e.checkVisibility() && !e.closest('[aria-hidden=true]') && !named(e))
        .map(e => e.outerHTML.slice(0, 120));
}"""


def test_everything_that_takes_input_has_a_name(visitor: Person) -> None:
    tab = visitor.tab
    tab.click("#advanced button")
    tab.click("#mode label:nth-of-type(2)")
    tab.wait_for_selector("#image_path")
    visitor.make("names")
    tab.wait_for_selector("#cost .problem[role=alert]")
    nameless = tab.evaluate(NAMELESS)
    assert not nameless, nameless
    assert "first frame" in tab.inner_text("#cost"), "image to video without an image names what is missing"


def test_everything_works_with_the_keyboard(visitor: Person) -> None:
    tab = visitor.tab
    tab.focus("#preset-button")
    tab.keyboard.press("ArrowDown")
    assert tab.get_attribute("#preset-button", "aria-expanded") == "true"
    tab.keyboard.press("Home")
    chosen = tab.get_attribute("#preset-button", "aria-activedescendant")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f"#{chosen}[aria-selected=true]", state="attached")
    tab.focus("#prompt textarea")
    tab.keyboard.type("an endless ball by keys")
    tab.keyboard.press("Control+Enter")
    visitor.see("running")
    bar = "[role=progressbar]"
    assert tab.get_attribute(bar, "aria-valuemax") == "100" and tab.get_attribute(bar, "aria-valuetext")
    tab.keyboard.press("Tab")  # out of the text box, where Escape is the browser's
    tab.keyboard.press("Escape")
    visitor.see("cancelled")
    reached = set()
    tab.focus("#prompt textarea")
    for _ in range(40):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"preset-button", "generate", "offload", "restore"} <= reached, reached


@pytest.mark.parametrize(("width", "height"), [(390, 844), (768, 1024), (1440, 900)])
def test_no_width_scrolls_sideways_and_the_stage_does_not_jump(
    chrome: Browser, page: Page, width: int, height: int
) -> None:
    with person(chrome, page, width=width, height=height) as visitor:
        tab = visitor.tab
        box = "JSON.stringify((({top, height, left}) => [top + scrollY, height, left].map(Math.round))"
        box += "(document.querySelector('#stage .stage').getBoundingClientRect()))"
        wide = "document.documentElement.scrollWidth"
        places = [tab.evaluate(box)]
        prompt = f"a ball held on a screen of {width}"
        visitor.make(prompt)
        visitor.see("running")
        places.append(tab.evaluate(box))
        tab.wait_for_selector("img.preview")
        places.append(tab.evaluate(box))
        page.let_go(prompt)
        visitor.see("done")
        places.append(tab.evaluate(box))
        assert len(set(places)) == 1, places
        cut = tab.evaluate(
            "[...document.querySelectorAll('.phases span, .run .quiet')]"
            ".filter(e => !e.checkVisibility() || e.scrollWidth > e.clientWidth).map(e => e.innerText)"
        )
        assert not cut, "phases and presets are named in full"
        assert tab.evaluate(wide) == width
        chips = "[...document.querySelectorAll('.top .chip:not(.lost)')].map(e => e.checkVisibility())"
        assert tab.evaluate(chips) == [True] * 3, "device, free memory, loaded model"
        tab.click("#preset-button")
        visitor.settle("() => document.querySelector('#preset-button').ariaExpanded === 'true'")
        assert tab.evaluate(wide) == width
        tab.keyboard.press("Escape")
        tab.click("#advanced button")
        visitor.settle("() => document.querySelector('#advanced [data-testid=block-info]')?.checkVisibility()")
        assert tab.evaluate(wide) == width
        tab.click("#tabs [role=tab]:nth-of-type(2)")
        tab.wait_for_selector("#benchmark table")
        assert tab.evaluate(wide) == width


def test_only_an_open_list_covers_the_button_on_a_phone(chrome: Browser, page: Page) -> None:
    on_top = """name => {
        const {left, top, width, height} = document.querySelector('#generate').getBoundingClientRect();
        return !!document.elementFromPoint(left + width / 4, top + height / 2).closest(name); }"""
    meet = "const top = name => document.querySelector(name).getBoundingClientRect().top;"
    meet += "scrollBy(0, top('#preset-button') - top('#generate'));"
    with person(chrome, page, width=390, height=500) as visitor:
        tab = visitor.tab
        tab.evaluate(meet)
        assert tab.evaluate(on_top, "#generate"), "the preset's row scrolls under it"
        tab.evaluate("scrollBy(0, 160)")
        tab.click("#preset-button")
        assert tab.evaluate(on_top, "[role=listbox]"), "every preset is readable"


@pytest.mark.parametrize("script", ["", "Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined})"])
def test_settings_are_copied_also_without_a_clipboard_api(chrome: Browser, page: Page, script: str) -> None:
    """Over http from another machine a browser has none."""
    with person(chrome, page, script=script) as visitor:
        tab = visitor.tab
        visitor.make("a ball")
        visitor.see("done")
        tab.click("#report .snippets summary")
        tab.click("#report figure:first-of-type [data-act=copy]")
        tab.wait_for_selector("#report [data-act=copy].copied")
        tab.fill("#prompt textarea", "")
        tab.press("#prompt textarea", "Control+V")
        assert tab.input_value("#prompt textarea") == tab.inner_text("#report figure:first-of-type code")


def test_seven_controls_and_no_more_are_there_at_first(visitor: Person) -> None:
    """Beside them are the choice of text or image, and examples."""
    ids = visitor.tab.evaluate(
        "[...document.querySelectorAll('#left :not(#mode) > [data-testid=block-info], #preset-label, #generate')]"
        ".filter(e => e.checkVisibility()).map(e => e.innerText.trim())"
    )
    assert ids == ["Prompt", "Preset", "Offload", "Size", "Shape", "Length", "Generate"]
