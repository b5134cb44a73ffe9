"""Offer: what the page's names mean: presets, the user's own ones, models made of found files, found LoRAs.

On a page that others can reach, own presets, found models and LoRAs are offered only as far as the operator allows them
by name, and single files never.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightx2v.catalog.choose import FileChoice
from lightx2v.catalog.found_file import FoundFile, Kind
from lightx2v.catalog.found_model import FoundModel
from lightx2v.catalog.live_catalog import LiveCatalog
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_names import expert_of
from lightx2v.config.presets import PresetInfo, Resolved, list_presets, list_user_presets, resolve, shipped_names
from lightx2v.config.request import LoraSpec
from lightx2v.config.user_presets import save_preset
from lightx2v.errors import LightX2VError

FILE_FIELDS: dict[str, Kind] = {
    "file_high": "expert",
    "file_low": "expert",
    "file_t5": "text encoder",
    "file_vae": "VAE",
}
"""The page's fields that name single files, and the kind of each. An empty one is automatic."""
FILE_KEYS = {
    "file_high": ("high_noise_quantized_ckpt", "high_noise_original_ckpt"),
    "file_low": ("low_noise_quantized_ckpt", "low_noise_original_ckpt"),
    "file_t5": ("t5_quantized_ckpt", "t5_original_ckpt"),
    "file_vae": ("vae_path",),
}
"""The keys of an EngineConfig that each field decides."""
Files = Mapping[str, str]
"""{field of FILE_FIELDS: name of a found file}."""


@dataclass(frozen=True, slots=True)
class FoundPreset:
    """A model of found files, as a preset."""

    model: FoundModel
    settings: Resolved


class Offer:
    """`only`, if given, limits the offer to these shipped presets. `private`: only the user can reach the page."""

    def __init__(
        self, catalog: LiveCatalog | None = None, *, only: Container[str] | None = None, private: bool = True
    ) -> None:
        self.catalog = catalog or LiveCatalog(allowed=())
        self.private, self._only = private, only
        self.shipped = [info for info in list_presets() if info.gpus == 1 and not info.offload]
        self._shown = [info for info in self.shipped if only is None or info.name in only]
        self._names = shipped_names()
        self._own: list[PresetInfo] = []
        self._version = -1
        self._found: dict[str, FoundPreset] = {}
        self._known: dict[str, FoundPreset] = {}
        """Those of earlier versions of the catalogue too: an event may be about one that has just gone."""
        self.reread()

    def reread(self) -> None:
        """Read the user's presets again and look for files again."""
        if self._only is None:
            shown = lambda name: self.private or self.catalog.offers(name)  # noqa: E731
            self._own = [info for info in list_user_presets() if shown(info.name) and info.gpus == 1]
            self.catalog.refresh()

    # ---- presets ------------------------------------------------------------------------------------------------

    @property
    def presets(self) -> list[PresetInfo]:
        """Those with the program, the user's own ones, and the found models."""
        taken = {info.name for info in (*self._shown, *self._own)}
        found = [found.settings.preset for name, found in self.found.items() if name not in taken]
        return [*self._shown, *self._own, *found]

    @property
    def tasks(self) -> dict[str, str]:
        """{preset: task} of the presets on offer."""
        return {info.name: info.task for info in self.presets}

    def group(self, name: str) -> str:
        """Where a preset comes from: "" is with the program, "own" saved by the user, "found" made of found files."""
        if any(info.name == name for info in self._own):
            return "own"
        return "found" if name not in self._names and (name in self.found or name in self._known) else ""

    def settings(self, name: str, files: Files | None = None) -> Resolved:
        """The settings of an offered preset, with single files in place of its own. Never fails without `files`."""
        if files and any(files.values()):
            return _named(resolve(self.content(name, files)), name)
        return self._known[name].settings if self.group(name) == "found" else settings_of(name)

    def content(self, name: str, files: Files | None = None) -> str | dict[str, Any]:
        """What `resolve` takes for a preset: its name, or the content that single files give. CheckpointError or
        ConfigError says why these do not fit."""
        chosen = {key: text for key, text in (files or {}).items() if text} if self.private else {}
        if (model := self.model(name, chosen)) is not None:
            found = self.group(name) == "found"
            base = None if found else settings_of(name)
            return model.settings(None if base is None else {**base.engine.to_json(), **base.request})
        if not chosen:
            return name
        base = settings_of(name)
        return {**base.engine.to_json(), **base.request, **self._choice(chosen).overrides(name)}

    def model(self, name: str, files: Files) -> FoundModel | None:
        """The found files of a preset with these single files in place of its own; None for a preset without any."""
        chosen = {key: text for key, text in files.items() if text}
        model = self._known[name].model if self.group(name) == "found" else None
        if model is None:
            choice = self._choice(chosen)
            return choice.model if choice.names_experts else None
        if not chosen:
            return model
        made = self._choice({"file_high": model.high.name, "file_low": model.low.name} | chosen).model
        kept = {"text_encoder": model.text_encoder} if "file_t5" not in chosen else {}
        kept |= {"vae": model.vae} if "file_vae" not in chosen else {}
        return replace(made, name=name, loras=model.loras, **kept)

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Save the content of a preset under a name of the user's. It is on offer then."""
        save_preset(name, content, {*self._names, *self.tasks})
        self.reread()

    def _choice(self, files: Files) -> FileChoice:
        names = {key.removeprefix("file_"): text for key, text in files.items()}
        return FileChoice(**names, catalog=self.catalog.catalog)

    @property
    def found(self) -> dict[str, FoundPreset]:
        """The models that are found now, by name."""
        if self._only is None and self._version != (version := self.catalog.version):
            found: dict[str, FoundPreset] = {}
            for name, model in self.catalog.models.items():
                with contextlib.suppress(LightX2VError):  # choosing its files says why
                    found[name] = FoundPreset(model, _named(model.resolved(), name))
            self._known |= found
            self._found, self._version = found, version
        return self._found

    # ---- files ---------------------------------------------------------------------------------------------------

    def choices(self, field: str, task: str) -> list[FoundFile]:
        """The found files that a field of FILE_FIELDS may name, for a task."""
        files = self.catalog.catalog.of_kind(FILE_FIELDS[field]) if self.private else []
        other = {"file_high": "low", "file_low": "high"}.get(field)
        fitting = [file for file in files if file.task in (None, task)]
        return sorted(fitting, key=lambda file: (bool(file.problem), file.expert == other, file.name.lower()))

    def files_of(self, name: str, config: EngineConfig) -> tuple[dict[str, str], list[str]]:
        """The fields of FILE_FIELDS with which the preset gives an engine with the files of `config`, and the names of
        files that were found no more."""
        own, absent = self.settings(name).engine, list[str]()
        by_path = {str(file.path): file.name for file in self.catalog.catalog.files} if self.private else {}
        fields = {}
        for field, keys in FILE_KEYS.items():
            paths = [path for key in keys if (path := getattr(config, key)) and path != getattr(own, key)]
            fields[field] = by_path.get(paths[0], "") if paths else ""
            absent += [Path(path).name for path in paths[:1] if path not in by_path]
        return fields, absent

    def placed(self, lora: LoraSpec) -> list[LoraSpec]:
        """A LoRA for the experts that it is for, as files of theirs: an "auto" one as its pair or for both."""
        if lora.expert != "auto":
            return [lora]
        found = (each for each in self.catalog.loras.values() if lora.path in (str(file.path) for file in each.files))
        if (entry := next(found, None)) is not None:
            return [replace(lora, expert=each.expert, path=str(each.file.path)) for each in entry.placed()]  # type: ignore[arg-type]
        named = expert_of(lora.path)
        return [replace(lora, expert=expert) for expert in ("high", "low") if named in (None, expert)]

    @property
    def lora_files(self) -> dict[str, Path]:
        """{name: path} of the files of all LoRAs on offer."""
        return {file.name: file.path for lora in self.catalog.loras.values() for file in lora.files}

    def lora_name(self, path: str) -> str:
        """The name of an offered LoRA's file; another path as it is, without its folders for others."""
        if path in (files := self.lora_files):
            return path
        real = os.path.realpath(os.path.expanduser(path))
        found = (name for name, file in files.items() if real == os.path.realpath(file))
        return next(found, path if self.private else Path(path).name)


@lru_cache(maxsize=128)
def settings_of(preset: str) -> Resolved:
    """The settings of a preset file, which do not change while the app runs."""
    return resolve(preset)


def _named(resolved: Resolved, name: str) -> Resolved:
    return replace(resolved, preset=replace(resolved.preset, name=name))
