"""Example prompts and pictures: from the demo model's small world, or for Wan2.2."""

from pathlib import Path

from lightx2v.config.model_paths import PROJECT
from lightx2v.config.presets import PresetInfo

from ..strings import Words
from ..views.html import button, esc, tag

PICTURES = PROJECT / "assets" / "demo" / "examples"

PICTURES_SHOWN = ("yellow_star_night", "blue_ball_beach", "red_heart_sunset", "green_box_meadow")
"""Pictures in assets/demo/examples. The texts `picture_…` of the page are the prompts for them."""
COUNT = 3
"""Example prompts of each kind: the page's texts `example_demo_0` and so on."""


def examples(words: Words, info: PresetInfo) -> str:
    """Buttons with the example prompts of a preset. The demo's have pictures and a note about its small world."""
    if info.demo and info.task != "t2v":
        chips = [_picture(name, words("picture_" + name)) for name in PICTURES_SHOWN if picture(name)]
    else:
        kind = "demo" if info.demo else "t2v" if info.task == "t2v" else "i2v"
        prompts = [words(f"example_{kind}_{number}") for number in range(COUNT)]
        chips = [button(short(text), "example", kind="chip", text=text) for text in prompts]
    world = tag("p", esc(words("demo_world")), class_="quiet world") if info.demo else ""
    return tag("div", "".join(chips), class_="row examples") + world


def picture(name: str) -> Path | None:
    """The file of an example picture; None for an unknown name."""
    path = PICTURES / f"{name}.png"
    return path if name in PICTURES_SHOWN and path.is_file() else None


def short(text: str) -> str:
    """The first few words of a prompt, up to a comma if one comes early."""
    first = text.split(",")[0].removeprefix("a ").rstrip(".")
    return first if len(first) <= 44 else first[:42].rsplit(" ", 1)[0] + " …"


def _picture(name: str, text: str) -> str:
    image = tag("img", src=f"studio/examples/{name}.png", alt="", width=56, height=56)
    return tag(
        "button", image, type="button", class_="btn thumb", data_act="example", data_text=text, data_picture=name,
        aria_label=text, title=text,
    )  # fmt: skip
