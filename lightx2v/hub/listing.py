"""Ask the Hub which files a repository has, with their sizes and hashes, and explain why it refuses."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..config.proxies import proxies_in_use, use_proxies
from ..errors import DownloadError, quoted
from .cache import CachedRepo, standard_cache

ANSWER = 15.0
"""Seconds to wait for the list of files of a repository."""

MAX_PATH = 1000
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """Where files come from and go to, and how patient a transfer is. The defaults follow HF_ENDPOINT and HF_HOME.

    After `stall` seconds without a byte, a transfer opens a new connection. It gives up after `tries` connections in a
    row without a byte, with pauses of `pause` seconds that double. `parallel_files` are downloaded at the same time.
    """

    endpoint: str = ""
    stall: float = 20.0
    tries: int = 6
    pause: float = 1.0
    parallel_files: int = 4

    def __post_init__(self) -> None:
        if not self.endpoint:
            from huggingface_hub import constants

            object.__setattr__(self, "endpoint", constants.ENDPOINT)

    @property
    def cache(self) -> Path:
        return standard_cache()

    def repo(self, name: str) -> CachedRepo:
        return CachedRepo(self.cache, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """One file of one commit. `etag` is the sha256 of a large file, and git's sha1 of a small one."""

    repo: str
    commit: str
    path: str
    size: int
    etag: str


def list_files(hub: Hub, repo: str) -> list[HubFile]:
    """All files of a repository's newest commit. DownloadError says what to do where the Hub refuses."""
    from huggingface_hub import HfApi

    use_proxies()
    try:
        info = HfApi(endpoint=hub.endpoint).model_info(repo, files_metadata=True, timeout=ANSWER)
    except request_errors() as error:
        raise explain(error, hub, repo) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # not JSON, or other JSON: a login page
        raise DownloadError(
            f"{hub.endpoint} did not answer with a list of files ({error!s:.80}). A proxy or a login page may have "
            "answered instead; check HF_ENDPOINT and the network."
        ) from None
    files = []
    for sibling in info.siblings or ():
        size = sibling.lfs.size if sibling.lfs else sibling.size
        etag = str((sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or "")
        # Commit, hash and path become names in the file system, so each is checked.
        if not re.fullmatch(r"[0-9a-f]{40}", info.sha or "") or not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", etag):
            raise DownloadError(
                f"{hub.endpoint} gives no hash for {quoted(sibling.rfilename)} of {repo}. Try another mirror."
            )
        if size is None or size < 0 or not _is_path(sibling.rfilename):
            raise DownloadError(
                f"{hub.endpoint} lists {quoted(sibling.rfilename)} of {repo} without a size or a valid name. "
                "Try another mirror."
            )
        files.append(HubFile(repo=repo, commit=str(info.sha), path=sibling.rfilename, size=size, etag=etag))
    return files


def _is_path(name: str) -> bool:
    """Whether every system can store a file of this name below a folder."""
    try:
        parts = [part.encode() for part in re.split(r"[/\\]", name)]
    except UnicodeEncodeError:  # half a surrogate
        return False
    if len(name) > MAX_PATH or _CONTROL.search(name):
        return False
    return all(0 < len(part) <= 255 and part not in (b".", b"..") for part in parts)


def request_errors() -> tuple[type[Exception], ...]:
    """What a request may raise. The first is the base class of httpx's errors, or of httpx2's: huggingface_hub 1 uses
    the one, 2 the other. Both let the errors pass that socksio raises where a proxy does not speak SOCKS."""
    from huggingface_hub.errors import HfHubHTTPError

    root = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    socks = sys.modules.get("socksio")
    return (root, OSError) if socks is None else (root, OSError, socks.SOCKSError)


def explain(error: Exception, hub: Hub, repo: str) -> DownloadError:
    """A DownloadError that says what `error` means and what to do."""
    from huggingface_hub import errors

    place, page = hub.endpoint, f"{hub.endpoint}/{repo}"
    log_in = f"Make a token at {place}/settings/tokens, and run `hf auth login` or set HF_TOKEN."
    by_kind = {
        errors.OfflineModeIsEnabled: f"HF_HUB_OFFLINE is set, so {repo} cannot be downloaded. Unset it, or copy the "
        "files here.",
        errors.GatedRepoError: f"{repo} is gated: accept its conditions on {page}. {log_in}",
        errors.RepositoryNotFoundError: f"There is no folder {repo} on this machine, and {place} shows you no model "
        f"with this name. Check the name or the path. If the model is private: {log_in}",
        errors.EntryNotFoundError: f"{repo} no longer has this file. Try again; if that does not help, see {page}.",
    }  # a gated repository's error is also one of a missing repository, so the order counts
    by_status = {
        401: f"{place} does not accept the token (401). {log_in}",
        403: f"The token may not read {repo} (403). Give it the right to read gated repositories, and accept the "
        f"conditions on {page}.",
        429: f"{place} has had too many requests from here (429). Try again in some minutes.",
    }
    text = next((text for kind, text in by_kind.items() if isinstance(error, kind)), None)
    if text is None and isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        later = f"{place} answered {status} for {repo}. Try again later, or set HF_ENDPOINT to a mirror."
        text = by_status.get(status, later)
    proxies = f"the proxy in {' and '.join(used)}" if (used := proxies_in_use()) else "the network"
    return DownloadError(
        text
        or f"{place} cannot be reached ({str(error) or type(error).__name__:.120}). Check {proxies}, or set "
        "HF_ENDPOINT to a mirror. If all files are on this machine, set HF_HUB_OFFLINE=1."
    )
