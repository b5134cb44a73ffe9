"""Before a download: what a model needs, what of it is here, the exact bytes of the rest, and whether they fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..config.engine_config import EngineConfig, hub_name
from ..config.lora_names import partner_names
from ..errors import ConfigError, DownloadError, byte_size, short_path
from .cache import CachedRepo
from .find import find, find_all, find_cached, local_model_folder
from .listing import Hub, HubFile, list_files

SPARE = 0.05
"""Share of the download that has to be free on top of it: other programs write, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A file that a model needs from the Hub; `here` of its bytes are on this machine, and if it is `done` all of them,
    checked."""

    file: HubFile
    here: int
    done: bool = False

    @property
    def name(self) -> str:
        return f"{self.file.repo}/{self.file.path}"

    @property
    def left(self) -> int:
        return self.file.size - self.here


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadPlan:
    """`files` make up what was missing. `found` are the needed names that are here, each with its size; `known` other
    files of the same commits whose content is here; `lacking` needed names that are neither here nor on the Hub. `free`
    is what is free on the cache's disk, in bytes."""

    files: tuple[PlannedFile, ...]
    found: tuple[tuple[str, int], ...]
    lacking: tuple[str, ...]
    known: tuple[HubFile, ...]
    cache: Path
    free: int

    @property
    def left(self) -> int:
        """Bytes to fetch."""
        return sum(file.left for file in self.files)

    def check_space(self) -> None:
        """DownloadError with the numbers if what is left does not fit on the disk."""
        need = int(self.left * (1 + SPARE))
        if need > self.free:
            raise DownloadError(
                f"{byte_size(self.left)} are to be downloaded, and {byte_size(self.free)} are free on the disk of "
                f"{short_path(self.cache)}. Free {byte_size(need - self.free)} more, or set HF_HOME to a folder on a "
                "larger disk."
            )


def missing(config: EngineConfig) -> list[str]:
    """The names of files and folders that `config` needs, that are not on this machine and may be on the Hub.

    A model folder that is here is taken as it is: nothing is put into it or beside it.
    """
    own_model = local_model_folder(config) is not None
    return [
        name
        for name, place in find_all(config).items()
        if place is None and hub_name(name) and not (own_model and name.startswith(f"{config.model_path}/"))
    ]


def partners_on_hub(config: EngineConfig) -> list[str]:
    """Names that the Hub may have for the partners of LoRAs that are given for both experts.

    A local LoRA has its partner beside it, if it has one.
    """
    loras = [lora.path for lora in config.lora_configs if lora.expert == "auto"]
    from_hub = [path for path in loras if find(path, config) == find_cached(path)]
    names = [name for path in from_hub for name in partner_names(path) if (hub_name(name) or ("", None))[1]]
    return [name for name in names if find(name, config) is None]


def make_plan(
    config: EngineConfig, *, hub: Hub | None = None, free: Callable[[Path], int] | None = None
) -> DownloadPlan:
    """Asks the Hub about what is missing, one question a repository. DownloadError where it has no answer.

    `free` tells what is free at a path, in bytes.
    """
    hub = hub or Hub()
    absent = missing(config)
    found, lacking = [], []
    for name, place in find_all(config).items():
        if place is not None:
            found.append((name, bytes_of(place)))
        elif name not in absent:
            lacking.append(name)
    wanted: dict[str, list[str]] = {}
    for name in absent:
        repo, inside = hub_name(name) or ("", None)
        if inside is None:
            raise ConfigError(
                f"There is no {name} on this machine, and on the Hub it would be a whole repository. "
                "Check the path, or name the file or the folder in the repository that is meant."
            )
        wanted.setdefault(repo, []).append(inside + "/" * name.endswith("/"))
    partners = [name for name in map(hub_name, partners_on_hub(config)) if name and name[0] in wanted]
    for repo, inside in partners:  # they come along where the Hub has them
        wanted[repo].append(inside or "")
    files: dict[str, PlannedFile] = {}
    known = []
    for repo, insides in wanted.items():
        listing = list_files(hub, repo)
        cached = hub.repo(repo)
        for inside in insides:
            chosen = part(listing, inside)
            if not chosen and (repo, inside) in partners:
                continue
            if not chosen:
                raise DownloadError(
                    f"{repo} has no {inside}. It has: {', '.join(sorted(_tops(listing))[:20]) or 'no files'}. "
                    "Name one of these in the configuration."
                )
            files |= {f"{repo}/{file.path}": planned(cached, file) for file in chosen}
        known += [file for file in listing if f"{repo}/{file.path}" not in files and cached.has(file.etag, file.size)]
    return DownloadPlan(
        files=tuple(sorted(files.values(), key=lambda planned: planned.file.size)),
        found=tuple(found),
        lacking=tuple(lacking),
        known=tuple(known),
        cache=hub.cache,
        free=(free or disk_free)(hub.cache),
    )


def part(listing: Iterable[HubFile], inside: str) -> list[HubFile]:
    """The file `inside` a repository, or all files of that folder."""
    return [file for file in listing if file.path == inside or file.path.startswith(inside.rstrip("/") + "/")]


def planned(cached: CachedRepo, file: HubFile) -> PlannedFile:
    """A file with what the cache has of it."""
    if cached.has(file.etag, file.size):
        return PlannedFile(file=file, here=file.size, done=True)
    try:
        size = cached.partial(file.etag).stat().st_size
    except FileNotFoundError:
        size = 0
    return PlannedFile(file=file, here=size if size <= file.size else 0)


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def disk_free(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _tops(listing: Iterable[HubFile]) -> set[str]:
    """Files and folders at the top of a repository."""
    return {file.path.partition("/")[0] + "/" * ("/" in file.path) for file in listing}
