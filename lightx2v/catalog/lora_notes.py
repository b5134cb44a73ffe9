"""LoraNotes: what a LoRA's header and the files beside it say of it: trigger words, base model, picture.

Beside `style.safetensors` other programs keep `style.civitai.info` (Civitai Helper), `style.metadata.json` (LoRA
Manager), `style.json` (A1111), and a picture `style.png` or `style.preview.png`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TEXT, MAX_TRIGGERS = 120, 12
MAX_NOTE = 2 << 20
"""Bytes of a file beside a LoRA that is still read."""
PICTURES = tuple(f"{mark}{ending}" for mark in ("", ".preview") for ending in (".png", ".jpg", ".jpeg", ".webp"))
BESIDE = (".civitai.info", ".metadata.json", ".json")
TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "trigger_phrase", "activation text")
BASE_KEYS = ("modelspec.architecture", "ss_base_model_version", "base_model", "baseModel", "sd version", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraNotes:
    """Texts are as their authors wrote them, on one line and cut where they are long."""

    triggers: tuple[str, ...] = ()
    trained_for: str = ""
    thumbnail: Path | None = None


def lora_notes(path: Path, metadata: Mapping[str, Any]) -> LoraNotes:
    """The notes about the LoRA at `path`, whose header has this metadata. What cannot be read counts as absent."""
    sources = [dict(metadata), *_beside(path)]
    triggers = [word for source in sources for word in _triggers(source)]
    bases = [text for source in sources for key in BASE_KEYS if (text := _text(source.get(key)))]
    pictures = (path.with_name(path.stem + ending) for ending in PICTURES)
    return LoraNotes(
        triggers=tuple(dict.fromkeys(triggers))[:MAX_TRIGGERS],
        trained_for=next(iter(bases), ""),
        thumbnail=next((picture for picture in pictures if picture.is_file()), None),
    )


def _beside(path: Path) -> Iterator[dict[str, Any]]:
    for ending in BESIDE:
        note = path.with_name(path.stem + ending)
        try:
            if note.stat().st_size > MAX_NOTE:
                continue
            content = json.loads(note.read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            inner = content.get("civitai")
            yield content | inner if isinstance(inner, dict) else content


def _triggers(source: Mapping[str, Any]) -> Iterator[str]:
    values = [source.get(key) for key in TRIGGER_KEYS]
    words = source.get("trainedWords")
    for value in [*values, *(words if isinstance(words, list) else [])]:
        for part in value if isinstance(value, list) else re.split(r"[,\n]", value) if isinstance(value, str) else ():
            if text := _text(part):
                yield text
    yield from _most_frequent_tag(source.get("ss_tag_frequency"))


def _most_frequent_tag(value: Any) -> Iterator[str]:
    """The tag that kohya's trainer counted in every caption of a folder, where there is exactly one: the trigger."""
    try:
        folders = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return
    for tags in folders.values() if isinstance(folders, dict) else ():
        counts = {tag: n for tag, n in tags.items() if isinstance(n, int)} if isinstance(tags, dict) else {}
        most = [tag for tag, n in counts.items() if n == max(counts.values())]
        if len(most) == 1 and (text := _text(most[0])):
            yield text


def _text(value: Any) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return "".join(filter(str.isprintable, text))[:MAX_TEXT]
