"""Download one file into the cache: resumable, checked by its hash, visible only when it is complete."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import DownloadError, byte_size, short_path
from .cache import CachedRepo
from .listing import Hub, HubFile, explain, request_errors

log = logging.getLogger("lightx2v.hub")

CHUNK = 1 << 20
"""Bytes of a partial file that are read and hashed at once."""
LONGEST_PAUSE = 60.0
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which another try may help."""


class Broken(Exception):
    """A connection or a response failed in a way that another try may mend. `pause` is the server's Retry-After."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Transfer:
    """The download of one file. `done` of its bytes are on disk; `note` says what happens now."""

    def __init__(self, hub: Hub, repo: CachedRepo, file: HubFile, done: int) -> None:
        self.hub, self.repo, self.file = hub, repo, file
        self.done = done
        self.note = ""

    async def run(self, client: Any) -> None:
        """Download the rest of the file with an httpx client. Wait while another process downloads it."""
        file, repo = self.file, self.repo
        path = repo.partial(file.etag)
        while not repo.has(file.etag, file.size):
            with repo.try_lock(file.etag) as locked:
                if locked and not repo.has(file.etag, file.size):
                    try:
                        with closing(PartialFile(path, file)) as partial:
                            await self._complete(client, partial)
                        os.replace(path, repo.blob(file.etag))
                    except OSError as error:
                        raise _not_written(error, path, file, self.done) from None
            if not locked:
                self.note = "another program is downloading it; waiting"
                await asyncio.sleep(0.2)
                self.done = path.stat().st_size if path.exists() else 0
        self.done, self.note = file.size, ""

    async def _complete(self, client: Any, partial: PartialFile) -> None:
        """Send requests until the content is complete and has the right hash."""
        file = self.file
        if partial.size:
            self.note = "checking the partial file"
            await partial.hash_again()
            log.info("Continuing %s at %s of %s", file.path, byte_size(partial.size), byte_size(file.size))
        resumed = partial.size > 0
        failed = 0
        while True:
            self.done, self.note = partial.size, ""
            if partial.size == file.size:
                if partial.hash_matches:
                    self.note = "writing it to the disk"
                    await asyncio.to_thread(partial.flush)
                    return
                partial.clear()
                if not resumed:
                    raise DownloadError(
                        f"{file.path} from {file.repo} does not have the checksum that the Hub lists for it, so it was "
                        "deleted. Try again. If it happens again, a proxy or the mirror in HF_ENDPOINT changes files."
                    )
                log.warning("The partial file of %s was damaged; downloading it from the start.", file.path)
                resumed = False
            before = partial.size
            try:
                await self._request(client, partial)
            except Broken as broken:
                failed = 0 if partial.size > before else failed + 1
                if failed >= self.hub.tries:
                    raise DownloadError(
                        f"{file.path} from {file.repo} stopped at {byte_size(partial.size)} of {byte_size(file.size)} "
                        f"({broken}), {failed} times in a row. The downloaded bytes are kept: start again to continue."
                    ) from None
                pause = min(max(broken.pause, self.hub.pause * 2 ** max(0, failed - 1)), LONGEST_PAUSE)
                self.note = f"{broken}; trying again"
                log.warning("%s: %s; trying again in %.0f s.", file.path, broken, pause)
                await asyncio.sleep(pause)

    async def _request(self, client: Any, partial: PartialFile) -> None:
        """Send one request for the rest of the file. Return at the file's end; raise Broken where it stops earlier."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers

        file = self.file
        url = hf_hub_url(file.repo, file.path, revision=file.commit, endpoint=self.hub.endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if partial.size:
            headers["Range"] = f"bytes={partial.size}-"
        now = asyncio.get_running_loop().time
        try:
            async with (
                asyncio.timeout(self.hub.stall) as silence,
                client.stream("GET", url, headers=headers, timeout=None) as response,
            ):
                await self._check_head(response, partial)
                async for data in response.aiter_raw():
                    silence.reschedule(now() + self.hub.stall)
                    partial.write(data[: file.size - partial.size])
                    self.done = partial.size
                    if self.done == file.size:  # drop the rest of a longer response; the hash checks the file
                        return
        except TimeoutError:
            raise Broken(f"no byte for {self.hub.stall:g} seconds") from None
        except request_errors() as error:
            if isinstance(error, OfflineModeIsEnabled):
                raise explain(error, self.hub, file.repo) from None
            raise Broken(f"the connection broke ({str(error) or type(error).__name__:.100})") from None
        if partial.size < file.size:  # a file of 0 bytes has no data to wait for
            raise Broken("the response ended early")

    async def _check_head(self, response: Any, partial: PartialFile) -> None:
        """Check status and headers. Raise Broken, or a DownloadError where another try would not help."""
        status, file = response.status_code, self.file
        if status >= 400:
            await response.aread()
        if status == 416:
            partial.clear()
            raise Broken("the server refuses to continue there (416), so the file starts over")
        # Signed addresses of a content network expire with 403. Another request to the Hub gets a new one.
        from_cdn = not str(response.url).startswith(self.hub.endpoint)
        if status in BUSY or (status == 403 and from_cdn):
            after = response.headers.get("retry-after", "")
            raise Broken(f"the server answered {status}", float(after) if after.isdecimal() else 0.0)
        if status not in (200, 206):
            from huggingface_hub.utils import hf_raise_for_status

            try:
                hf_raise_for_status(response)
            except request_errors() as error:
                raise explain(error, self.hub, file.repo) from None
            raise Broken(f"the server answered {status}")
        if status == 200 and partial.size:
            log.info("The server sends %s from the start.", file.path)
            partial.clear()
        span = response.headers.get("content-range", "")
        if status == 206 and span.replace(" ", "") != f"bytes{partial.size}-{file.size - 1}/{file.size}":
            raise Broken(f"the server sends another range than the requested one ({span:.60})")
        length = response.headers.get("content-length", "")
        if length and length != str(file.size - partial.size):
            raise Broken(f"the server announces {length:.20} bytes, the Hub lists {file.size - partial.size}")


class PartialFile:
    """The first `size` bytes of a file on disk, and their hash."""

    def __init__(self, path: Path, file: HubFile) -> None:
        self.path, self._file = path, file
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.size = path.stat().st_size
        self._hash = self._new_hash()
        if self.size > file.size:
            self.clear()

    def clear(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self.size, self._hash = 0, self._new_hash()

    async def hash_again(self) -> None:
        """Hash the bytes of an earlier process. The other transfers get their turn in between."""
        self._stream.seek(0)
        left = self.size
        while left and (data := self._stream.read(min(left, CHUNK))):
            self._hash.update(data)
            left -= len(data)
            await asyncio.sleep(0)
        self.size -= left

    def write(self, data: bytes) -> None:
        """Append `data` at its own offset: should a lock not hold, two writers put the same bytes in the same place."""
        view = memoryview(data)
        while view:
            try:
                self._stream.seek(self.size)
                written = self._stream.write(view) or 0
            except OSError as error:  # here and not in the caller, which takes an OSError for a network failure
                raise _not_written(error, self.path, self._file, self.size) from None
            self._hash.update(view[:written])
            self.size += written
            view = view[written:]

    def flush(self) -> None:
        """Wait until the content is on the disk: after a power cut, a complete name must not have a partial content."""
        os.fsync(self._stream.fileno())

    @property
    def hash_matches(self) -> bool:
        return self._hash.hexdigest() == self._file.etag

    def _new_hash(self) -> Any:
        if re.fullmatch(r"[0-9a-f]{64}", self._file.etag):
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)  # git's name of a file's content

    def close(self) -> None:
        self._stream.close()


def _not_written(error: OSError, path: Path, file: HubFile, size: int) -> DownloadError:
    return DownloadError(
        f"{file.path} could not be written to {short_path(path.parent, 3)} ({error.strerror or error}) at "
        f"{byte_size(size)} of {byte_size(file.size)}. Free space there, or set HF_HOME to a folder on a larger disk. "
        "The downloaded bytes are kept: start again to continue."
    )
