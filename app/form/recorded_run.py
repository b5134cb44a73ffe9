"""RecordedRun: the settings inside a video as this page can repeat them, and the names of what is not here.

A path in a video is not trusted: its files are looked for among the found ones, by name, size and content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightx2v.catalog.found_file import FoundFile
from lightx2v.catalog.used_files import known_hash
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.folders import expand
from lightx2v.config.request import LoraSpec, Request
from lightx2v.errors import BadRequest

from ..backend.offer import FILE_KEYS, Offer
from .fields import file_name


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """`files` are fields of FILE_FIELDS for the files that are not the preset's own."""

    preset: str
    config: EngineConfig
    request: Request
    files: Mapping[str, str]
    missing: tuple[str, ...]


def recorded_run(settings: Mapping[str, Any], offer: Offer, default: Mapping[str, str]) -> RecordedRun:
    """`default` has the preset of each task for a video whose own is not on offer. BadRequest without settings."""
    data, engine = settings.get("request"), settings.get("engine")
    if not isinstance(data, Mapping):
        raise BadRequest("This video has no settings of this app in its metadata. Use a video that was made here.")
    request, recorded = Request.from_json(dict(data)), engine if isinstance(engine, Mapping) else {}
    task = "t2v" if request.task == "t2v" else "i2v"
    preset, missing = str(settings.get("preset") or ""), list[str]()
    if offer.tasks.get(preset) != task:
        missing += [preset] if preset else []
        preset = default[task]
    config = offer.settings(preset).engine
    files = {}
    for field, keys in FILE_KEYS.items():
        path = next((value for key in keys if isinstance(value := recorded.get(key), str)), None)
        own = [value for key in keys if (value := getattr(config, key))]
        if path is None or expand(path) in map(expand, own):
            continue
        file = _found(path, settings.get("files"), offer)
        if file is None:
            missing.append(file_name(path))
        elif str(file.path) not in own:
            files[field] = file.name
    loras, absent = _loras(request, recorded, config, offer)
    return RecordedRun(
        preset=preset, config=config, request=replace(request, loras=loras), files=files, missing=(*missing, *absent)
    )


def _found(path: str, records: Any, offer: Offer) -> FoundFile | None:
    """The found file that the video records with this path: of its name, size and, where both are known, content."""
    name = file_name(path)
    record = next((each for each in _mappings(records) if each.get("name") == name), {})
    size, digest = record.get("size"), record.get("sha256")
    for file in offer.catalog.catalog.files if offer.private else ():
        same_name = file.path.name == name
        if size not in (None, file.size) or not (same_name or (size and digest)):
            continue
        known = known_hash(file.path)
        if known == digest or (same_name and None in (known, digest)):
            return file
    return None


def _loras(
    request: Request, recorded: Mapping[str, Any], config: EngineConfig, offer: Offer
) -> tuple[tuple[LoraSpec, ...] | None, list[str]]:
    """The video's LoRAs on offer, None for those of the preset, and the names of the others."""
    own = {_expanded(lora) for lora in config.lora_configs}
    loras: Sequence[LoraSpec]
    if request.loras is not None:
        loras = request.loras
    else:
        loras = [LoraSpec.from_json(each) for each in _mappings(recorded.get("lora_configs"))]
    added = [lora for lora in loras if _expanded(lora) not in own]
    kept = [(lora, list(loras_on_offer([lora], offer))) for lora in added]
    absent = [file_name(lora.path) for lora, places in kept if not places]
    placed = [place for _, places in kept for place in places]
    return ((*config.lora_configs, *placed) if placed else None), list(dict.fromkeys(absent))


def loras_on_offer(loras: Iterable[LoraSpec], offer: Offer) -> Iterator[LoraSpec]:
    """Of the LoRAs of a video from outside those on offer, at their places here, each for the expert that it is for.
    The name of a found file is trusted; where several files have it, the one at that path is meant."""
    files = offer.lora_files
    places = {path.name: path for path in files.values()} | files
    own = {str(path): path for path in files.values()} if offer.private else {}
    for lora in loras:
        place = own.get(str(expand(lora.path))) or places.get(file_name(lora.path))
        if place is not None:
            yield from offer.placed(replace(lora, path=str(place)))


def _expanded(lora: LoraSpec) -> tuple[str, str, float | tuple[float, ...]]:
    return lora.expert, str(expand(lora.path)), lora.strength


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
