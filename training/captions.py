"""A grammar of prompts about the demo world, in English and Chinese; it writes prompts and reads them.

Every attribute has several names. A caption may leave attributes out; chance decides these. The same tables make the
training captions, the tokenizer's vocabulary, the page's hints and the detector's reading of a prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

Words = dict[str, tuple[str, ...]]

ENGLISH: dict[str, Words] = {
    "kind": {
        "ball": ("ball", "circle", "sphere"),
        "box": ("box", "square", "cube", "block"),
        "triangle": ("triangle", "pyramid"),
        "star": ("star",),
        "heart": ("heart",),
        "ring": ("ring", "donut", "hoop"),
    },
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "orange": ("orange",),
        "yellow": ("yellow", "golden"),
        "green": ("green", "emerald"),
        "cyan": ("cyan", "turquoise", "teal"),
        "blue": ("blue",),
        "purple": ("purple", "violet"),
        "pink": ("pink", "rose"),
    },
    "motion": {
        "left": (
            "rolls left",
            "moves left",
            "slides left",
            "moves to the left",
            "rolls to the left",
            "goes left",
            "rolling left",
            "moving left",
        ),
        "right": (
            "rolls right",
            "moves right",
            "slides right",
            "moves to the right",
            "rolls to the right",
            "goes right",
            "rolling right",
            "moving right",
        ),
        "up": ("rises", "floats up", "flies up", "moves up", "goes up", "takes off", "rising", "flying up"),
        "down": ("falls", "falls down", "drops", "moves down", "goes down", "sinks", "falling", "falling down"),
        "grow": ("grows", "gets bigger", "becomes larger", "expands", "grows bigger", "growing"),
        "shrink": ("shrinks", "gets smaller", "becomes smaller", "contracts", "shrinking"),
        "spin": ("spins", "turns", "rotates", "twirls", "spins around", "spinning", "rotating"),
        "bounce": ("bounces", "hops", "jumps", "bounces up and down", "jumps up and down", "bouncing", "jumping"),
    },
    "ground": {
        "grass": (
            "over green grass",
            "on the grass",
            "on green grass",
            "in a meadow",
            "on a green meadow",
            "over the grass",
        ),
        "sand": ("in the desert", "on the sand", "on a sandy beach", "over the sand", "on the beach"),
        "snow": ("in the snow", "on the snow", "over white snow", "on a snowy field", "over the snow"),
        "sea": ("over the sea", "on the sea", "on the water", "over the ocean", "on blue water"),
    },
    "time": {
        "day": ("by day", "during the day", "in daylight", "on a sunny day", "at noon"),
        "sunset": ("at sunset", "at dusk", "in the evening", "in the evening light"),
        "night": ("at night", "in the moonlight", "on a starry night", "under the night sky", "by night"),
    },
}

CHINESE: dict[str, Words] = {
    "kind": {
        "ball": ("球", "圆球", "小球", "圆形"),
        "box": ("方块", "盒子", "正方形", "箱子"),
        "triangle": ("三角形", "三角"),
        "star": ("星星", "五角星"),
        "heart": ("爱心", "心形", "桃心"),
        "ring": ("圆环", "甜甜圈", "环"),
    },
    "colour": {
        "red": ("红色", "红"),
        "orange": ("橙色", "橘色"),
        "yellow": ("黄色", "金色"),
        "green": ("绿色", "绿"),
        "cyan": ("青色", "青蓝色"),
        "blue": ("蓝色", "蓝"),
        "purple": ("紫色", "紫"),
        "pink": ("粉色", "粉红色"),
    },
    "motion": {
        "left": ("向左滚动", "向左移动", "往左移动", "向左滑动", "向左滚"),
        "right": ("向右滚动", "向右移动", "往右移动", "向右滑动", "向右滚"),
        "up": ("上升", "升起来", "向上飞", "向上移动", "飘起来"),
        "down": ("下落", "落下来", "掉下来", "向下移动", "下沉"),
        "grow": ("变大", "越来越大", "慢慢变大", "长大"),
        "shrink": ("变小", "越来越小", "慢慢变小", "缩小"),
        "spin": ("旋转", "转动", "转圈", "自转"),
        "bounce": ("弹跳", "跳动", "上下跳动", "跳来跳去", "蹦跳"),
    },
    "ground": {
        "grass": ("草地上", "绿色的草地上", "草原上", "绿草地上"),
        "sand": ("沙漠里", "沙滩上", "沙地上", "沙漠上"),
        "snow": ("雪地上", "雪地里", "白色的雪地上", "白雪上"),
        "sea": ("海面上", "大海上", "海上", "水面上", "蓝色的海面上"),
    },
    "time": {
        "day": ("白天", "晴天", "中午", "阳光下"),
        "sunset": ("黄昏", "日落时", "傍晚", "夕阳下"),
        "night": ("夜晚", "晚上", "夜里", "月光下", "星空下"),
    },
}

TAGS: dict[str, dict[str, Words]] = {  # the same in one word, for prompts that are lists
    "en": {
        "ground": {
            "grass": ("grass", "meadow"),
            "sand": ("sand", "desert", "beach"),
            "snow": ("snow",),
            "sea": ("sea", "ocean", "water"),
        },
        "time": {"day": ("day", "daylight"), "sunset": ("sunset", "dusk", "evening"), "night": ("night", "moonlight")},
    },
    "zh": {
        "ground": {
            "grass": ("草地", "草原"),
            "sand": ("沙漠", "沙滩", "沙地"),
            "snow": ("雪地", "雪"),
            "sea": ("大海", "海", "海面"),
        },
        "time": {"day": ("白天",), "sunset": ("黄昏", "日落", "夕阳"), "night": ("夜晚", "夜")},
    },
}

FILLERS = (  # words that say nothing about the five attributes
    *(
        "a",
        "an",
        "one",
        "the",
        "video",
        "of",
        "clip",
        "that",
        "which",
        "is",
        "and",
        "it",
        "here",
        "there",
        "slowly",
        "quickly",
    ),
    *(
        "beautiful",
        "little",
        "big",
        "toy",
        "scene",
        "shape",
        "thing",
        "object",
        "clear",
        "bright",
        "animation",
        "with",
        "to",
    ),
)
CHINESE_FILLERS = (
    "一个",
    "一颗",
    "一只",
    "个",
    "的",
    "在",
    "视频",
    "画面",
    "里",
    "着",
    "，",
    "。",
    "、",
    "！",
    "正在",
    "动画",
    "东西",
    "物体",
)

PUNCTUATION = "，。、！？；："
"""The tokenizer drops punctuation."""

LANGUAGES: dict[str, dict[str, Words]] = {"en": ENGLISH, "zh": CHINESE}

OFFICIAL_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan's default negative prompt. The demo's tokenizer does not know most of it, so training includes it."""


def caption(words: Mapping[str, str], chance: random.Random, *, language: str | None = None, drop: float = 0.0) -> str:
    """A prompt for these attributes. Each is left out with probability `drop`, the kind less often."""
    said = {name: value for name, value in words.items() if chance.random() >= (drop / 3 if name == "kind" else drop)}
    if language is None:
        language = "en" if chance.random() < 0.6 else "zh"
    if chance.random() < 0.08:
        tables = LANGUAGES[language] | TAGS[language]
        parts = [chance.choice(tables[name][value]) for name, value in said.items()]
        chance.shuffle(parts)
        return (", " if language == "en" else "，").join(parts)
    pick = {name: chance.choice(LANGUAGES[language][name][value]) for name, value in said.items()}
    return _english(pick, chance) if language == "en" else _chinese(pick, chance)


def _english(pick: dict[str, str], chance: random.Random) -> str:
    kind = pick.get("kind") or chance.choice(("shape", "thing", "object", "toy"))
    named = " ".join(filter(None, (pick.get("colour"), kind)))
    article = chance.choice(("the", "one", "an" if named[0] in "aeiou" else "a", "an" if named[0] in "aeiou" else "a"))
    thing = f"{article} {named}"
    ground, time, motion = pick.get("ground"), pick.get("time"), pick.get("motion")
    order = chance.random()
    if order < 0.55:
        text = " ".join(filter(None, (thing, motion, ground, time)))
    elif order < 0.70 and time:
        text = " ".join(filter(None, (f"{time},", thing, motion, ground)))
    elif order < 0.85 and ground and motion:
        text = " ".join(filter(None, (thing, ground, motion, time)))
    elif ground and time:
        text = " ".join(filter(None, (time, ground + ",", thing, motion)))
    else:
        text = " ".join(filter(None, (thing, motion, time, ground)))
    if chance.random() < 0.15:
        text = chance.choice(("a video of ", "a clip of ", "an animation of ")) + text
    if chance.random() < 0.25:
        text = text[0].upper() + text[1:] + "."
    return text


def _chinese(pick: dict[str, str], chance: random.Random) -> str:
    kind = pick.get("kind") or chance.choice(("东西", "物体"))
    colour = pick.get("colour", "")
    if colour:
        colour += "的" if colour.endswith("色") and chance.random() < 0.85 else ""
    thing = chance.choice(("一个", "一个", "一颗", "一只", "")) + colour + kind
    ground, time, motion = pick.get("ground", ""), pick.get("time", ""), pick.get("motion", "")
    order = chance.random()
    if order < 0.35 and ground:
        text = f"{time}的{ground}，{thing}{motion}" if time else f"{ground}，{thing}{motion}"
    elif order < 0.65:
        text = (f"{time}，" if time else "") + thing + (f"在{ground}" if ground else "") + motion
    elif order < 0.85 and ground:
        text = f"{thing}在{time + '的' if time else ''}{ground}{motion}"
    else:
        text = thing + (f"在{ground}" if ground else "") + motion + (f"，{time}" if time else "")
    return text + ("。" if chance.random() < 0.25 else "")


# ---- reading


def _phrases() -> list[tuple[str, str, str]]:
    """(phrase, attribute, value), longest first; fillers have the attribute ""."""
    found = [
        (phrase, attribute, value)
        for tables in (*LANGUAGES.values(), *TAGS.values())
        for attribute, words in tables.items()
        for value, phrases in words.items()
        for phrase in phrases
    ]
    found += [(filler, "", "") for filler in (*FILLERS, *CHINESE_FILLERS)]
    return sorted(found, key=lambda entry: -len(entry[0]))


def is_chinese(phrase: str) -> bool:
    return ord(phrase[0]) > 0x2E80


_PATTERNS = [
    (re.compile(re.escape(phrase) if is_chinese(phrase) else rf"\b{re.escape(phrase)}\b"), attribute, value)
    for phrase, attribute, value in _phrases()
]


def read(prompt: str) -> tuple[dict[str, str], list[str]]:
    """The attributes that a prompt names, and its words that are unknown in the demo world."""
    rest = prompt.lower()
    found: dict[str, str] = {}
    for pattern, attribute, value in _PATTERNS:
        rest, hits = pattern.subn(" ", rest)
        if hits and attribute:
            found.setdefault(attribute, value)
    return found, re.findall(r"[^\W_]+", rest)


def vocabulary() -> list[str]:
    """The tokenizer's pieces: every English word with SentencePiece's mark of a word's start, every Chinese phrase."""
    pieces: dict[str, None] = {"▁": None}
    for phrase, _, _ in _phrases():
        if not is_chinese(phrase):
            pieces.update(dict.fromkeys("▁" + word for word in (*phrase.split(), "animation")))
        elif phrase not in PUNCTUATION:
            pieces.setdefault(phrase)
    return list(pieces)
