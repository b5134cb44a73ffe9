"""What the Hub says: which files a repository has, how large they are, what their hashes are, and why it refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError
from .cache import CachedRepo, standard_cache

ANSWER = 15.0
"""Seconds to wait for an answer about a repository."""
LOG_IN = "Make a token at {place}/settings/tokens, and run `hf auth login` or set HF_TOKEN."


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """Where files come from and go to, and how patient a transfer is. The defaults follow HF_ENDPOINT and HF_HOME.

    After `stall` seconds without a byte a connection is made anew; after `tries` in a row that brought nothing, with
    pauses from `pause` seconds on, the transfer gives up. `at_once` files come at the same time.
    """

    endpoint: str = ""
    stall: float = 20.0
    tries: int = 6
    pause: float = 1.0
    at_once: int = 4

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

    try:
        info = HfApi(endpoint=hub.endpoint).model_info(repo, files_metadata=True, timeout=ANSWER)
    except failures() as error:
        raise explain(error, hub, repo) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # no JSON, or another: a login page, a proxy
        raise DownloadError(
            f"{hub.endpoint} answered something else than a list of files ({error!s:.80}). A proxy or a login page may "
            "stand between; check HF_ENDPOINT and the network."
        ) from None
    files = []
    for sibling in info.siblings or ():
        size = sibling.lfs.size if sibling.lfs else sibling.size
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        # These become names in the file system, so they are not taken on trust.
        if not re.fullmatch(r"[0-9a-f]{40}", info.sha or "") or not re.fullmatch(
            r"[0-9a-f]{40}|[0-9a-f]{64}", etag or ""
        ):
            raise DownloadError(
                f"{hub.endpoint} gives no hash for {repo}/{sibling.rfilename:.100}. Try another mirror."
            )
        if size is None or size < 0 or any(part in ("", ".", "..") for part in re.split(r"[/\\]", sibling.rfilename)):
            raise DownloadError(
                f"{hub.endpoint} lists {repo}/{sibling.rfilename:.100} without a size or a proper name."
            )
        files.append(HubFile(repo=repo, commit=str(info.sha), path=sibling.rfilename, size=size, etag=str(etag)))
    return files


def failures() -> tuple[type[Exception], ...]:
    """What a request may raise. The first is the root of httpx's errors, or of httpx2's: huggingface_hub 1 builds on
    the one, 2 on the other."""
    from huggingface_hub.errors import HfHubHTTPError

    root = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return (root, OSError)


def explain(error: Exception, hub: Hub, repo: str) -> DownloadError:
    """`error` in words that say what to do."""
    from huggingface_hub import errors

    place, page = hub.endpoint, f"{hub.endpoint}/{repo}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return DownloadError(f"HF_HUB_OFFLINE is set, so {repo} cannot be fetched. Unset it, or copy the files here.")
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(f"{repo} is gated: accept its conditions on {page}. {LOG_IN.format(place=place)}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DownloadError(
            f"There is no folder {repo} on this machine, and {place} shows no model of this name to you. Check the "
            f"name or the path; if the model is private: {LOG_IN.format(place=place)}"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return DownloadError(f"{repo} no longer has this file. Try again; if that does not help, see {page}.")
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status == 401:
        return DownloadError(f"{place} does not accept the token (401). {LOG_IN.format(place=place)}")
    if status == 403:
        return DownloadError(
            f"The token may not read {repo} (403). Give it the right to read gated repositories, and accept the "
            f"conditions on {page}."
        )
    if status == 429:
        return DownloadError(f"{place} has had too many requests from here (429). Try again in some minutes.")
    if status is not None:
        return DownloadError(f"{place} answered {status} for {repo}. Try again later, or set HF_ENDPOINT to a mirror.")
    return DownloadError(
        f"{place} cannot be reached ({str(error) or type(error).__name__:.120}). Check the network, or set HF_ENDPOINT "
        "to a mirror. With all files here, HF_HUB_OFFLINE=1 asks nobody."
    )
