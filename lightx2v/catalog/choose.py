"""FileChoice: the files that a person names for one model, by path or by the name of a found file.

    --high FILE --low FILE --t5 FILE --vae FILE --lora FILE:0.8 --lora high=FILE

What is left out is found: the other expert by the name of the first, the rest in the folders of models. What is named
is taken as it is, whatever its name says.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.checks import did_you_mean
from ..config.engine_config import hub_name
from ..config.environment import Environment
from ..config.lora_names import partner_names
from ..config.presets import is_preset, resolve
from ..errors import CheckpointError, ConfigError, quoted, short_path
from .catalog import Catalog
from .folders import model_folders
from .found_file import FoundFile, Kind
from .found_model import FoundModel, scheme
from .scan import Describe, describe_late, memory_file, recognise_late, scan

KIND_FOLDERS = ("diffusion_models", "unet", "checkpoints", "loras", "text_encoders", "clip", "vae")
"""ComfyUI's folders: what belongs to a file in one of them is in the others."""


def open_catalog(model_dirs: Sequence[str | Path] = (), environment: Environment | None = None) -> Catalog:
    """The catalogue of all folders of models: those in `model_dirs`, those that were told, and the usual ones."""
    environment = environment or Environment.read()
    return Catalog(scan(model_folders(model_dirs, environment), memory_file(environment)))


def named_preset(
    name: str | Path, model_dirs: Sequence[str | Path] = (), environment: Environment | None = None
) -> str | Path | dict[str, Any]:
    """`name` for a preset that `resolve` knows; the settings of the found model with that name."""
    if is_preset(name) or Path(name).suffix == ".json":
        return name
    models = open_catalog(model_dirs, environment).models
    if models and str(name) not in models and not os.path.dirname(name):
        raise ConfigError(
            f"There is no preset and no found model {quoted(str(name))}. {did_you_mean(str(name), [*models])} "
            "--list_presets and python -m lightx2v.find_models show the names."
        )
    return models[str(name)].settings() if str(name) in models else name


def add_file_flags(add: Callable[..., Any]) -> None:
    """Adds the flags of a FileChoice to a parser."""
    add("--high", metavar="FILE", help="the high-noise expert: a file, or a name that lightx2v-models lists")
    add("--low", metavar="FILE", help="the low-noise expert; without it, the file that belongs to --high")
    add("--t5", metavar="FILE", help="the text encoder")
    add("--vae", metavar="FILE")
    add(
        "--lora",
        metavar="[high=|low=]FILE[:STRENGTH]",
        action="append",
        default=[],
        help="a LoRA in addition to the preset's, for one expert or by its name; may be repeated",
    )
    add_folder_flag(add)


def add_folder_flag(add: Callable[..., Any]) -> None:
    add(
        "--model_dirs",
        metavar="FOLDER",
        nargs="+",
        default=[],
        help="folders that hold models, besides LIGHTX2V_MODEL_DIRS and the usual ones of ComfyUI, Wan2GP and the Hub",
    )


@dataclass(frozen=True)
class FileChoice:
    """Empty texts stand for parts that were not named. With a `catalog` the names are those in it, and no paths."""

    high: str = ""
    low: str = ""
    t5: str = ""
    vae: str = ""
    lora: Sequence[str] = ()
    model_dirs: Sequence[str] = ()
    catalog: Catalog | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> FileChoice:
        high, low, t5, vae = (getattr(options, name) or "" for name in ("high", "low", "t5", "vae"))
        return cls(high, low, t5, vae, lora=tuple(options.lora), model_dirs=tuple(options.model_dirs))

    @property
    def names_experts(self) -> bool:
        return bool(self.high or self.low)

    def settings(self, start: str | Path | Mapping[str, Any]) -> dict[str, Any]:
        """The content of a preset with the named experts and what completes them. The settings of the video are those
        of the preset `start`, or for {} those of a shipped preset for such a model."""
        if not start:
            return self.model.settings()
        base = resolve(start)
        return self.model.settings({**base.engine.to_json(), **base.request})

    @cached_property
    def model(self) -> FoundModel:
        """The named experts and what completes them."""
        high, low = self._file("--high", self.high, "expert"), self._file("--low", self.low, "expert")
        encoder, vae = self._file("--t5", self.t5, "text encoder"), self._file("--vae", self.vae, "VAE")
        return self._catalog.complete(high, low, encoder, vae)

    def overrides(self, start: str | Path | Mapping[str, Any]) -> dict[str, Any]:
        """Keys of a preset for what is named beside experts, to put over the preset `start`."""
        keys: dict[str, Any] = {}
        if not self.names_experts:
            if (encoder := self._file("--t5", self.t5, "text encoder")) is not None:
                quantised = encoder.quantised
                keys |= {"t5_quantized": quantised, "t5_quant_scheme": scheme(encoder) if quantised else None}
                keys |= {"t5_quantized_ckpt": None, "t5_original_ckpt": None}
                keys["t5_quantized_ckpt" if quantised else "t5_original_ckpt"] = str(encoder.path)
            if (vae := self._file("--vae", self.vae, "VAE")) is not None:
                keys["vae_path"] = str(vae.path)
        if self.lora:
            own = [lora.to_json() for lora in resolve(start).engine.lora_configs]
            keys["loras"] = [*own, *(spec for text in self.lora for spec in self._lora(text))]
        return keys

    def _lora(self, text: str) -> list[dict[str, Any]]:
        """The LoRAs of one --lora, as in a preset's JSON."""
        expert, equals, rest = text.partition("=")
        if not equals or expert not in ("high", "low"):
            expert, rest = "auto", text
        name, strength = rest, 1.0
        if (number := re.fullmatch(r"(.+):([+-]?[0-9]*\.?[0-9]+)", rest)) and not os.path.exists(rest):
            name, strength = number[1], float(number[2])
        spec = {
            "name": {"high": "high_noise_model", "low": "low_noise_model"}.get(expert, "auto"),
            "strength": strength,
        }
        path = os.path.expanduser(name)
        if os.path.exists(path) or (hub_name(name) is not None and name not in self._catalog.loras):
            return [spec | {"path": path}]
        if expert == "auto" and (lora := self._catalog.loras.get(name)) is not None:
            return [placed.to_json() for placed in lora.placed(strength, strength)]
        return [spec | {"path": str(self._catalog.find(name, "LoRA").path)}]

    def _file(self, flag: str, text: str, kind: Kind) -> FoundFile | None:
        if not text:
            return None
        path = Path(os.path.expanduser(text))
        if self.catalog is not None or "\0" in text or not os.path.exists(path):
            if self.catalog is None and path.suffix and path.name != text:
                raise ConfigError(f"{flag}: there is no file {short_path(path)}. Check the path.")
            return self._catalog.find(text, kind)
        try:
            found = _described(path, recognise_late)
        except OSError as error:
            raise CheckpointError(f"{flag}: {short_path(path)} cannot be read: {error.strerror}.") from None
        if found is None or found.kind != kind:
            what = "no model file that is known here" if found is None else f"of the kind {found.kind}"
            raise CheckpointError(f"{flag}: {short_path(path)} is {what}; expected {kind}. Choose another file.")
        return found

    @cached_property
    def _catalog(self) -> Catalog:
        """The found files, and those beside the named ones that belong to them."""
        if self.catalog is not None:
            return self.catalog
        named = [Path(os.path.expanduser(text)) for text in (self.high, self.low) if text]
        here = [path.absolute() for path in named if os.path.exists(path)]
        around = [path.parents[1] for path in here if path.parent.name in KIND_FOLDERS]
        catalog = open_catalog([*self.model_dirs, *around])
        known = {file.path for file in catalog.files}
        others = (Path(name) for path in here for name in partner_names(path.as_posix()))
        beside = [_described(path) for path in others if path not in known and os.path.exists(path)]
        return Catalog([*catalog.files, *filter(None, beside)])


def _described(path: Path, describe: Describe = describe_late) -> FoundFile | None:
    path = path.absolute()
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    else:
        size = path.stat().st_size
    found = describe(path, size)
    return found.named(path.name) if found is not None else None
