"""Plan a download: the needed files, those of them that are here, the exact bytes of the rest, and whether they fit."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.engine_config import EngineConfig, hub_name
from ..config.lora_names import partners
from ..config.model_paths import part_names
from ..errors import ConfigError, DownloadError, byte_size, short_path
from .cache import CachedRepo
from .find import find, find_all, find_cached, local_model_folder
from .listing import Hub, HubFile, list_files

SPARE = 0.05
"""Share of the download that must be free beyond it, because other programs write too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A file that a model needs from the Hub. `here` of its bytes are in the cache; `done`: all of them, verified."""

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
    """The files that a configuration needs, and those of them that `fetch` downloads into the folder `cache`.

    `files` make up the missing names. `present` are the needed names on this machine, each with its size; `unavailable`
    those that are neither here nor on the Hub. `reusable` are other files of the same commits with their content in the
    cache. `free` is the free space of the cache's disk, in bytes.
    """

    files: tuple[PlannedFile, ...]
    present: tuple[tuple[str, int], ...]
    unavailable: tuple[str, ...]
    reusable: tuple[HubFile, ...]
    cache: Path
    free: int

    @property
    def left(self) -> int:
        """Bytes to download."""
        return sum(file.left for file in self.files)

    def check_space(self) -> None:
        """Raise DownloadError with the sizes if the download does not fit on the disk."""
        need = int(self.left * (1 + SPARE))
        if need > self.free:
            raise DownloadError(
                f"The download of {byte_size(self.left)} does not fit: {byte_size(self.free)} are free on the disk of "
                f"{short_path(self.cache)}. Free {byte_size(need - self.free)} more, or set HF_HOME to a folder on a "
                "larger disk."
            )


def missing(config: EngineConfig, also: Sequence[str] = ()) -> list[str]:
    """The needed names, and those of `also`, that are not on this machine and may be on the Hub.

    A local model folder is taken as it is: nothing is downloaded into it or for it.
    """
    own_model = local_model_folder(config) is not None
    return [
        name
        for name, place in find_all(config, also).items()
        if place is None and hub_name(name) and not (own_model and name.startswith(f"{config.model_path}/"))
    ]


def companions_on_hub(config: EngineConfig) -> list[tuple[str, str]]:
    """(repository, file) that the Hub may have beside the LoRAs: the other halves of pairs, and PEFT's settings.

    A local LoRA has its companions beside it, if it has any.
    """
    loras = [lora for lora in config.lora_configs if find(lora.path, config) == find_cached(lora.path)]
    names = [partner.path for lora in loras if lora.expert == "auto" for partner in partners(lora.path)]
    names += [f"{lora.path.rpartition('/')[0]}/adapter_config.json" for lora in loras if "/adapter_model." in lora.path]
    absent = [hub_name(name) for name in dict.fromkeys(names) if find(name, config) is None]
    return [(name[0], name[1]) for name in absent if name and name[1]]


def make_plan(
    config: EngineConfig,
    *,
    also: Sequence[str] = (),
    hub: Hub | None = None,
    free: Callable[[Path], int] = lambda folder: disk_free(folder),
) -> DownloadPlan:
    """Ask the Hub about the missing files, one request per repository. DownloadError if the Hub cannot answer.

    `also` are paths that a run needs besides the model. `free` returns the free bytes of a folder's disk.
    """
    hub = hub or Hub()
    places, absent = find_all(config, also), missing(config, also)
    wanted: dict[str, list[str]] = {}
    for name in absent:
        repo, path = hub_name(name) or ("", None)
        if path is None:
            raise ConfigError(
                f"There is no {name} on this machine, and on the Hub it would be a whole repository. "
                "Check the path, or name a file or a folder inside the repository."
            )
        wanted.setdefault(repo, []).append(path + "/" * name.endswith("/"))
    files: dict[str, PlannedFile] = {}
    reusable: list[HubFile] = []
    for repo, paths in wanted.items():
        listing, cached = list_files(hub, repo), hub.repo(repo)
        chosen = [file for path in paths for file in _required(listing, path, repo)]
        chosen += [file for at, path in companions_on_hub(config) if at == repo for file in files_below(listing, path)]
        files |= {f"{repo}/{file.path}": planned_file(cached, file) for file in chosen}
        reusable += [file for file in listing if file not in chosen and cached.has(file.etag, file.size)]
    return DownloadPlan(
        files=tuple(sorted(files.values(), key=lambda planned: planned.file.size)),
        present=tuple((name, size_on_disk(place)) for name, place in places.items() if place is not None),
        unavailable=tuple(name for name, place in places.items() if place is None and name not in absent),
        reusable=tuple(reusable),
        cache=hub.cache,
        free=free(hub.cache),
    )


def files_below(listing: Iterable[HubFile], path: str) -> list[HubFile]:
    """The file at `path` in a repository, with the other parts if it is a split GGUF file; or all files of a folder."""
    folder, slash, name = path.rpartition("/")
    names, inside = {folder + slash + part for part in part_names(name)}, path.rstrip("/") + "/"
    return [file for file in listing if file.path in names or file.path.startswith(inside)]


def _required(listing: list[HubFile], path: str, repo: str) -> list[HubFile]:
    if files := files_below(listing, path):
        return files
    top = {file.path.partition("/")[0] + "/" * ("/" in file.path) for file in listing}
    raise DownloadError(
        f"{repo} has no {path}. It has: {', '.join(sorted(top)[:20]) or 'no files'}. Name one of these in the "
        "configuration."
    )


def planned_file(cached: CachedRepo, file: HubFile) -> PlannedFile:
    """A file with the number of its bytes in the cache."""
    if cached.has(file.etag, file.size):
        return PlannedFile(file=file, here=file.size, done=True)
    try:
        size = cached.partial(file.etag).stat().st_size
    except FileNotFoundError:
        size = 0
    return PlannedFile(file=file, here=size if size <= file.size else 0)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def disk_free(folder: Path) -> int:
    """Free bytes of the disk of `folder`, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
