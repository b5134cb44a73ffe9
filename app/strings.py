"""Strings: the texts of assets/strings.json in one language. `Words(language)("key", name=value)` returns one."""

import json
import re

from lightx2v.config.model_paths import PROJECT

LANGUAGES = {"en": "English", "zh": "中文"}
_TABLE: dict[str, list[str]] = json.loads((PROJECT / "assets" / "strings.json").read_text(encoding="utf-8"))
TABLES = {language: {key: texts[index] for key, texts in _TABLE.items()} for index, language in enumerate(LANGUAGES)}
"""{language: {key: text}}. The file has a row for each key, with a text for each language in the order above."""


class Words:
    """The texts of one language."""

    def __init__(self, language: str) -> None:
        self.language = language if language in TABLES else "en"
        self._table = TABLES[self.language]

    def __call__(self, key: str, /, **values: object) -> str:
        text = self._table[key]
        return text.format(**values) if values else text

    def preset(self, name: str) -> str:
        """A short name for a preset: its variant in this language. An unknown preset keeps its own name."""
        variants = "(base|hybrid|three_phase|distill_lora)|(?:distill_)?(merged|720p|fp8|gguf_q[45])"
        match = re.fullmatch(rf"(demo_)?[ti]2v_(?:{variants})(_offload)?(_cfg_ulysses)?", name)
        if match is None:
            return name
        variant = self("variant_" + (match[2] or f"distill_{match[3]}"))
        return f"{self('demo')} · {variant}" if match[1] else f"Wan2.2 · {variant}"


def preferred(header: str) -> str:
    """The best supported language for an Accept-Language header; English if it names none."""
    ranked: list[tuple[float, str]] = []
    for part in header.split(",")[:20]:
        name, _, quality = part.strip().partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            weight = 0.0
        ranked.append((-weight, name.strip().lower().partition("-")[0]))
    return next((name for _, name in sorted(ranked, key=lambda item: item[0]) if name in TABLES), "en")
