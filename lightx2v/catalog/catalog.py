"""Catalog: the model files of some folders by name, the models that they make, and the LoRAs in pairs."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.checks import did_you_mean
from ..errors import ConfigError, quoted
from .found_file import FoundFile, Kind
from .found_model import FoundModel, PlacedLora, fits
from .pairs import lora_pairs, partner, without_expert

MAX_NAME = 120
PREFERRED = ("bf16", "fp16", "fp8", "int8", "fp32")
"""Of several text encoders and VAEs the first of these is taken; GGUF files come last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLora:
    """A LoRA as people see it: a pair of files, or one file for one expert or both. `name` is without the expert."""

    name: str
    high: FoundFile | None
    low: FoundFile | None

    @property
    def files(self) -> list[FoundFile]:
        """One file for both experts counts once."""
        return list({file.path: file for file in (self.high, self.low) if file is not None}.values())

    @property
    def first(self) -> FoundFile:
        return self.files[0]

    @property
    def triggers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word for file in self.files for word in file.triggers))

    def placed(self, high: float = 1.0, low: float = 1.0) -> list[PlacedLora]:
        """Its files on their experts, with a strength for each."""
        halves = (("high", self.high, high), ("low", self.low, low))
        return [PlacedLora(file=file, expert=expert, strength=s) for expert, file, s in halves if file is not None]


class Catalog:
    """Made of the result of `scan`. It does not look at the disk again."""

    def __init__(self, files: Sequence[FoundFile] = ()) -> None:
        names = _names([file.path for file in files])
        pairs = lora_pairs([file for file in files if file.kind == "LoRA"])
        self._other_half = {path: other.path for path, other in pairs.items()}
        experts = {half.path: half.expert for half in pairs.values()}
        self.files = tuple(
            replace(file, name=name, expert=experts.get(file.path, file.expert))
            for file, name in zip(files, names, strict=True)
        )

    def of_kind(self, *kinds: Kind) -> list[FoundFile]:
        return [file for file in self.files if file.kind in kinds]

    def find(self, name: str, *kinds: Kind) -> FoundFile:
        """The file with this name, with or without its ending. ConfigError names the nearest one."""
        known = self.of_kind(*kinds) if kinds else list(self.files)
        found = [file for file in known if name in (file.name, without_ending(file.name))]
        if len(found) != 1:
            what = " or ".join(kinds) or "model file"
            if not known:
                raise ConfigError(f"No {what} was found. Tell a folder that holds one with --model_dirs FOLDER.")
            hint = did_you_mean(name, [file.name for file in known])
            several = "There are several" if found else "There is no"
            raise ConfigError(f"{several} {what} called {quoted(name)}. {hint} lightx2v-models lists all.")
        return found[0]

    @cached_property
    def models(self) -> dict[str, FoundModel]:
        """Every pair of experts, and every pair of base experts with each found LoRA that distils it, by name."""
        experts = self.of_kind("expert")
        models: dict[str, FoundModel] = {}
        for high in experts:
            low = partner(high, experts) if high.expert == "high" else None
            if low is None:
                continue
            for model in self._variants(high, low):
                if not model.problems:
                    name = _free_name(model.name, models)
                    models[name] = replace(model, name=name)
        return models

    @cached_property
    def loras(self) -> dict[str, FoundLora]:
        """Every LoRA, pairs as one, by name."""
        files, seen, loras = self.of_kind("LoRA"), set[Path](), dict[str, FoundLora]()
        by_path = {file.path: file for file in files}
        for file in files:
            if file.path in seen:
                continue
            other = by_path.get(self._other_half.get(file.path, Path()))
            halves = {file.expert: file, **({other.expert: other} if other else {})}
            seen |= {each.path for each in halves.values()}
            name = without_expert(file.name) if other else without_ending(file.name)
            name = file.name if name in loras else name
            high, low = (halves.get(expert, halves.get(None)) for expert in ("high", "low"))
            loras[name] = FoundLora(name=name, high=high, low=low)
        return loras

    def complete(
        self,
        high: FoundFile | None,
        low: FoundFile | None = None,
        text_encoder: FoundFile | None = None,
        vae: FoundFile | None = None,
        loras: Iterable[PlacedLora] = (),
    ) -> FoundModel:
        """A model of these files and, for the parts left out, of found ones. ConfigError where an expert is missing."""
        given = high or low
        if given is None:
            raise ConfigError("No expert is given. Name the high-noise or the low-noise expert's file.")
        if high is None or low is None:
            other = partner(given, self.of_kind("expert"))
            if other is None:
                role = "low" if low is None else "high"
                raise ConfigError(
                    f"No {role}-noise expert that belongs to {given.name} was found. Give it with --{role} FILE."
                )
            high, low = high or other, low or other
        return FoundModel(
            name=_slug(without_expert(high.name)),
            high=high,
            low=low,
            text_encoder=text_encoder or self._nearest("text encoder", high),
            vae=vae or self._nearest("VAE", high),
            tokenizer=self._nearest("tokenizer", high),
            loras=tuple(loras),
        )

    def _variants(self, high: FoundFile, low: FoundFile) -> Iterable[FoundModel]:
        plain = self.complete(high, low)
        yield plain
        if high.distilled:
            return
        for lora in self.loras.values():
            first = lora.first
            if first.distilled and first.task == high.task and first.width == high.width and lora.high and lora.low:
                name = f"{plain.name}+{_slug(lora.name)}"[:MAX_NAME]
                yield replace(plain, name=name, loras=tuple(lora.placed()))

    def _nearest(self, kind: Kind, beside: FoundFile) -> FoundFile | None:
        """The file of this kind that shares most folders with `beside`, the best preserved one among several there."""
        files = [file for file in self.of_kind(kind) if not file.problem and fits(file, beside)]

        def order(file: FoundFile) -> tuple[int, int]:
            shared = sum(1 for a, b in zip(file.path.parts, beside.path.parts, strict=False) if a == b)
            kinds = [*PREFERRED, file.quantisation]
            return -shared, kinds.index(file.quantisation)

        return min(files, key=order, default=None)


def without_ending(name: str) -> str:
    return re.sub(r"\.(safetensors|gguf|pth|pt)$", "", name, flags=re.IGNORECASE)


def summary(catalog: Catalog) -> dict[str, Any]:
    """What was found, by names: for other programs and other people."""
    return {
        "models": [
            {"name": model.name, "task": model.task, "variant": model.variant, "summary": model.summary}
            for model in catalog.models.values()
        ],
        "files": [file.to_public_json() for file in catalog.files],
    }


def _slug(name: str) -> str:
    """A name that can stand in an address, a file's name and a command line."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")[:MAX_NAME] or "model"


def _free_name(name: str, taken: Container[str]) -> str:
    """`name`, or else with a number behind it."""
    others = (f"{name[: MAX_NAME - len(mark)]}{mark}" for mark in map("-{}".format, itertools.count(2)))
    return next(each for each in itertools.chain([name], others) if each not in taken)


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its last part, with as many of the folders above as make it unique."""
    parts = [_readable_parts(path) for path in paths]
    counts = [1 if path.suffix else 2 for path in paths]
    while True:
        names = ["/".join(each[-count:]) for each, count in zip(parts, counts, strict=True)]
        same = {name for name, number in Counter(names).items() if number > 1}
        longer = [name in same and count < len(each) for name, each, count in zip(names, parts, counts, strict=True)]
        if not any(longer):
            return names
        counts = [count + more for count, more in zip(counts, longer, strict=True)]


def _readable_parts(path: Path) -> list[str]:
    """The parts of a path; those of the Hub's cache as OWNER, REPO and what is inside."""
    text = os.fsencode(path).decode("utf-8", "replace")  # bytes that are no text cannot be sent to a page
    parts = [part for part in Path(text).parts if not re.fullmatch(r"snapshots|[0-9a-f]{40}", part)]
    return [
        piece
        for part in parts
        for piece in (part.removeprefix("models--").split("--") if part.startswith("models--") else [part])
    ]
