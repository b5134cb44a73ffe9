"""From a folder like ComfyUI's to a video in a real browser: two clicks, a LoRA of the shelf, a preset of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium import Person, person
from model_tree import comfy_tree, style_lora
from studio_app import Page, launched

from lightx2v.media.mp4 import read_settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

FAST = "wan2.2_t2v_demo+wan2.2_t2v_demo_lightx2v_lora_4step"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = comfy_tree(tmp_path_factory.mktemp("files"))
    style_lora(folder)
    return folder


@pytest.fixture(scope="module")
def demo(chrome: Browser, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page with the demo model, which was told that folder. `chrome` comes first: nothing starts without one."""
    root = tmp_path_factory.mktemp("own")
    user = {"LIGHTX2V_USER_DIR": str(root / "user"), "HOME": str(root), "LIGHTX2V_MODEL_DIRS": str(models)}
    with launched(root / "outputs", demo=True, **user) as started:
        yield started


@pytest.fixture
def owner(chrome: Browser, demo: Page) -> Iterator[Person]:
    with person(chrome, demo) as someone:
        someone.tab.wait_for_selector(f'[id="option-{FAST}"]', state="attached")  # the folders have been looked through
        yield someone


def choose(visitor: Person, preset: str) -> None:
    visitor.tab.click("#preset-button")
    visitor.tab.click(f'[id="option-{preset}"]')
    visitor.tab.wait_for_selector(f'[id="option-{preset}"][aria-selected=true]', state="attached")


def test_two_clicks_and_a_prompt_make_a_video_with_a_lora(owner: Person, models: Path) -> None:
    tab = owner.tab
    choose(owner, FAST)
    owner.settle("() => document.querySelector('#cost').innerText.includes('nothing to download')")
    tab.fill("#prompt textarea", "a red ball rolls left")
    tab.click("#loras button >> nth=0")
    tab.fill("#lora_search :is(input, textarea)", "wtrclr")
    owner.settle("() => document.querySelectorAll('#shelf li').length === 1")
    tab.click("#shelf [data-act=trigger] >> nth=0")
    owner.settle("() => document.querySelector('#prompt textarea').value === 'a red ball rolls left, wtrclr style'")
    tab.click("#shelf [data-act=lora_add]")
    owner.settle(
        "() => document.querySelector('#lora_0_low :is(input, textarea)')?.value === 'watercolour.safetensors'"
    )
    tab.fill(".lora input[type=number] >> nth=0", "0.5")
    tab.focus("#preset-button")
    owner.settle("() => document.querySelector('#cost .cost') && !document.querySelector('#cost .problem')")
    tab.click("#generate")
    owner.see("done")
    settings = read_settings(str(owner.page.folder / f"{owner.job}.mp4"))
    assert settings["preset"] == FAST
    assert settings["engine"]["high_noise_original_ckpt"].endswith("wan2.2_t2v_high_noise_demo.safetensors")
    added = settings["request"]["loras"][2:]
    assert [(lora["name"], Path(lora["path"]).name, lora["strength"]) for lora in added] == [
        ("high_noise_model", "watercolour.safetensors", 0.5),
        ("low_noise_model", "watercolour.safetensors", 1.0),
    ]
    owner.settle("() => document.querySelector('#report').textContent.includes('watercolour.safetensors')")
    tab.click("#remove_lora_0")
    tab.click(f"#report [data-act=restore][data-id='{owner.job}']")
    owner.settle(
        "() => document.querySelector('#lora_0_high :is(input, textarea)')?.value === 'watercolour.safetensors'"
    )
    lora = models / "loras" / "watercolour.safetensors"
    lora.rename(lora.with_suffix(".away"))
    tab.click("#my_files button >> nth=0")
    tab.click("#mine [data-act=look_again]")
    owner.settle("() => !document.querySelector('#shelf').textContent.includes('watercolour')")
    with tab.expect_file_chooser() as chooser:
        tab.click("#restore")
    chooser.value.set_files(str(owner.page.folder / f"{owner.job}.mp4"))
    owner.settle("() => document.querySelector('#cost .problem')?.innerText.includes('watercolour.safetensors')")
    lora.with_suffix(".away").rename(lora)
    tab.click("#cost [data-act=go_on]")
    owner.settle("() => document.querySelector('#cost .cost') && !document.querySelector('#cost .problem')")


def test_files_that_do_not_fit_say_why_and_a_preset_is_saved(owner: Person) -> None:
    tab = owner.tab
    tab.click("#my_files button >> nth=0")
    tab.fill("#model_search :is(input, textarea)", "t2v_demo")
    tab.click("[data-act=use_model][data-model='wan2.2_t2v_demo']")
    tab.wait_for_selector('[id="option-wan2.2_t2v_demo"][aria-selected=true]', state="attached")
    owner.settle("() => document.querySelector('#mine').innerText.includes('umt5_demo_bf16.pth')")
    tab.click("#file_low input")
    tab.click("[role=option]:has-text('wan2.2_t2v_high_noise_demo')")
    owner.settle("() => document.querySelector('#cost .problem')?.innerText.includes('is given for both experts')")
    tab.click("#file_low input")
    tab.click("[role=option]:has-text('automatic')")
    owner.settle("() => document.querySelector('#cost .cost') && !document.querySelector('#cost .problem')")
    tab.fill("#new_name :is(input, textarea)", "t2v_base")
    tab.click("#save_preset")
    owner.settle("() => document.querySelector('#cost .problem')?.innerText.includes('already')")
    tab.fill("#new_name :is(input, textarea)", "my_style")
    tab.click("#save_preset")
    tab.wait_for_selector("#option-my_style[aria-selected=true]", state="attached")


def test_another_folder_is_told_on_the_page(owner: Person, tmp_path: Path) -> None:
    tab = owner.tab
    more = comfy_tree(tmp_path)
    for file in (more / "diffusion_models").iterdir():
        file.rename(file.with_name(file.name.replace("demo", "second")))
    tab.click("#my_files button >> nth=0")
    tab.fill("#folder :is(input, textarea)", "/nowhere/at/all")
    tab.click("#add_folder")
    owner.settle("() => document.querySelector('#cost .problem')?.innerText.startsWith('There is no folder')")
    tab.fill("#folder :is(input, textarea)", str(more))
    tab.click("#add_folder")
    tab.wait_for_selector('[id="option-wan2.2_t2v_second"]', state="attached")
    tab.click("#mine [data-act=forget_folder]")
    tab.wait_for_selector('[id="option-wan2.2_t2v_second"]', state="detached")
