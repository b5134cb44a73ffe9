"""Example prompts and pictures: from the demo model's small world, or for Wan2.2."""

from pathlib import Path

from lightx2v.config.model_paths import PROJECT
from lightx2v.config.presets import PresetInfo

from ..strings import Words
from ..views.html import button, esc, tag

PICTURES = PROJECT / "assets" / "demo" / "examples"

DEMO = {
    "en": (
        "a yellow star spins over the sea at sunset",
        "a red ball rolls left over green grass at night",
        "a pink heart grows over snow by day",
    ),
    "zh": (
        "日落时的海面上，一颗黄色的星星在旋转",
        "夜晚的草地上，一个红色的球向左滚动",
        "白天的雪地上，一颗粉色的爱心慢慢变大",
    ),
}
DEMO_PICTURES = {
    "yellow_star_night": {"en": "a yellow star spins at night", "zh": "夜晚，一颗黄色的星星在旋转"},
    "blue_ball_beach": {"en": "a blue ball bounces on the sand by day", "zh": "白天的沙滩上，一个蓝色的球在弹跳"},
    "red_heart_sunset": {"en": "a red heart grows at sunset", "zh": "日落时，一颗红色的爱心慢慢变大"},
    "green_box_meadow": {"en": "a green box rolls right over the grass", "zh": "草地上，一个绿色的方块向右移动"},
}
"""Picture in assets/demo/examples -> a prompt for it, by language."""

FULL = {
    "t2v": {
        "en": (
            "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.",
            "Rain on a neon street at night, reflections ripple as a lone cyclist passes, slow tracking shot.",
            "A paper boat drifts down a mossy forest stream, sunlight flickers through the leaves, macro lens.",
        ),
        "zh": (
            "聚光灯下的舞台上，两只穿着拳击装备、戴着鲜艳手套的拟人化猫咪激烈对打。",
            "夜晚的霓虹街道下着雨，倒影随积水荡漾，一位骑行者缓缓经过，跟拍镜头。",
            "一只纸船顺着长满青苔的林间小溪漂流，阳光在树叶间闪烁，微距镜头。",
        ),
    },
    "i2v": {
        "en": (
            "Summer beach vacation style, a white cat wearing sunglasses sits on a surfboard. The fluffy-furred feline "
            "gazes directly at the camera with a relaxed expression.",
            "The camera slowly moves in, hair and clothes sway in the wind.",
            "Everything stays still but the water, which flows gently, static shot.",
        ),
        "zh": (
            "夏日海滩度假风格，一只戴着墨镜的白猫坐在冲浪板上，毛茸茸的猫咪神情悠闲地直视镜头。",
            "镜头缓缓推近，头发和衣服随风飘动。",
            "画面静止，只有水在轻轻流动，固定镜头。",
        ),
    },
}


def examples(words: Words, info: PresetInfo) -> str:
    """Buttons with the example prompts of a preset. The demo's have pictures and a note about its small world."""
    if info.demo and info.task != "t2v":
        chips = [_picture(name, texts[words.language]) for name, texts in DEMO_PICTURES.items() if picture(name)]
    else:
        prompts = DEMO[words.language] if info.demo else FULL["t2v" if info.task == "t2v" else "i2v"][words.language]
        chips = [button(short(text), "example", kind="chip", text=text) for text in prompts]
    world = tag("p", esc(words("demo_world")), class_="quiet world") if info.demo else ""
    return tag("div", "".join(chips), class_="row examples") + world


def picture(name: str) -> Path | None:
    """The file of an example picture; None for an unknown name."""
    path = PICTURES / f"{name}.png"
    return path if name in DEMO_PICTURES and path.is_file() else None


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
