"""One file from the Hub into the cache: from where it broke off, checked by its hash, there whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..errors import DownloadError, byte_size, short_path
from .listing import Hub, HubFile, explain, failures

if TYPE_CHECKING:
    from .cache import CachedRepo

log = logging.getLogger("lightx2v.hub")

CHUNK = 1 << 20
"""Bytes from the line that are written and hashed at once; at most so much is lost when the process is killed."""
LONGEST_PAUSE = 60.0
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which asking again may help."""


class Broken(Exception):
    """The line or the answer failed in a way that another try may mend. `pause` is what the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Transfer:
    """`run` brings one file. `done` of its bytes are on disk and `note` says what is going on, at any time."""

    def __init__(self, hub: Hub, repo: CachedRepo, file: HubFile, done: int) -> None:
        self.hub, self.repo, self.file = hub, repo, file
        self.done = done
        self.note = ""

    async def run(self, client: Any) -> None:
        """Fetches the rest of the file, over a httpx client; waits where another process is at it."""
        file, repo = self.file, self.repo
        while not repo.has(file.etag, file.size):
            with repo.try_lock(file.etag) as ours:
                if ours and not repo.has(file.etag, file.size):
                    try:
                        with Partial(repo.partial(file.etag), file) as partial:
                            await self._fill(client, partial)
                        os.replace(partial.path, repo.blob(file.etag))
                    except OSError as error:
                        raise not_written(error, repo.partial(file.etag), file, self.done) from None
            if not ours:
                self.note = "another program is downloading it; waiting"
                await asyncio.sleep(0.2)
                self.done = size_of(repo.partial(file.etag))
        self.done, self.note = file.size, ""

    async def _fill(self, client: Any, partial: Partial) -> None:
        """Until the content is there and is the right one."""
        if partial.size:
            self.note = "checking what is here"
            await partial.read_again()
            log.info("%s goes on at %s of %s", self.file.path, byte_size(partial.size), byte_size(self.file.size))
        resumed = partial.size > 0
        failed = 0
        while True:
            self.done, self.note = partial.size, ""
            if partial.size == self.file.size:
                if partial.right:
                    self.note = "writing it to the disk"
                    await asyncio.to_thread(partial.settle)
                    return
                partial.begin()
                if not resumed:
                    raise DownloadError(
                        f"{self.file.path} of {self.file.repo} came with another content than the Hub says it has (its "
                        "checksum differs), so it was thrown away. Try again; if it happens again, a proxy or the "
                        "mirror in HF_ENDPOINT changes files."
                    )
                log.warning("What was here of %s was damaged; it starts over.", self.file.path)
                resumed = False
            before = partial.size
            try:
                await self._stream(client, partial)
            except Broken as broken:
                failed = 0 if partial.size > before else failed + 1
                if failed >= self.hub.tries:
                    raise DownloadError(
                        f"{self.file.path} of {self.file.repo} stopped at {byte_size(partial.size)} of "
                        f"{byte_size(self.file.size)} ({broken}), {failed} times in a row. What came is kept: start "
                        "again to go on from there."
                    ) from None
                pause = max(broken.pause, self.hub.pause * 2 ** max(0, failed - 1))
                self.note = f"{broken}; trying again"
                log.warning("%s: %s; trying again in %.0f s.", self.file.path, broken, min(pause, LONGEST_PAUSE))
                await asyncio.sleep(min(pause, LONGEST_PAUSE))

    async def _stream(self, client: Any, partial: Partial) -> None:
        """One request for what is left. Returns at the file's end; Broken where it comes earlier."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers

        file = self.file
        url = hf_hub_url(file.repo, file.path, revision=file.commit, endpoint=self.hub.endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if partial.size:
            headers["Range"] = f"bytes={partial.size}-"
        clock = asyncio.get_running_loop().time
        try:
            async with (
                asyncio.timeout(self.hub.stall) as patience,
                client.stream("GET", url, headers=headers, timeout=None) as response,
            ):
                await self._check(response, partial)
                waiting = bytearray()
                try:
                    async for piece in response.aiter_raw():
                        patience.reschedule(clock() + self.hub.stall)
                        waiting += piece[: file.size - partial.size - len(waiting)]
                        self.done = partial.size + len(waiting)
                        if len(waiting) >= CHUNK:
                            partial.write(waiting)
                            waiting.clear()
                        if self.done == file.size:  # a longer answer is a lie, and the hash will tell
                            break
                finally:
                    partial.write(waiting)
        except TimeoutError:
            raise Broken(f"no byte for {self.hub.stall:g} seconds") from None
        except failures() as error:
            if isinstance(error, OfflineModeIsEnabled):
                raise explain(error, self.hub, file.repo) from None
            raise Broken(f"the connection broke ({str(error) or type(error).__name__:.100})") from None
        if partial.size < file.size:
            raise Broken("the answer ended early")

    async def _check(self, response: Any, partial: Partial) -> None:
        """The answer's head. Broken, or a DownloadError where asking again would not help."""
        status, file = response.status_code, self.file
        if status >= 400:
            await response.aread()
        if status == 416:
            partial.begin()
            raise Broken("the server refuses to go on there (416), so the file starts over")
        # Signed addresses of a content network expire with 403; the Hub gives a new one when asked again.
        elsewhere = not str(response.url).startswith(self.hub.endpoint)
        if status in BUSY or (status == 403 and elsewhere):
            after = response.headers.get("retry-after", "")
            raise Broken(f"the server answered {status}", float(after) if after.isdecimal() else 0.0)
        if status not in (200, 206):
            from huggingface_hub.utils import hf_raise_for_status

            try:
                hf_raise_for_status(response)
            except failures() as error:
                raise explain(error, self.hub, file.repo) from None
            raise Broken(f"the server answered {status}")
        if status == 200 and partial.size:
            log.info("The server does not go on inside %s; it starts over.", file.path)
            partial.begin()
        span = response.headers.get("content-range", "")
        if status == 206 and span.replace(" ", "") != f"bytes{partial.size}-{file.size - 1}/{file.size}":
            raise Broken(f"the server sends another part than the one asked for ({span:.60})")
        length = response.headers.get("content-length", "")
        if length and length != str(file.size - partial.size):
            raise Broken(f"the server says {length:.20} bytes, the Hub {file.size - partial.size}")


class Partial:
    """The first `size` bytes of a file on disk, and their hash."""

    def __init__(self, path: Path, file: HubFile) -> None:
        self.path = path
        self._file = file
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.size = size_of(path)
        self._hash = self._new_hash()
        if self.size > file.size:
            self.begin()

    def begin(self) -> None:
        """Back to nothing."""
        self._stream.seek(0)
        self._stream.truncate()
        self.size, self._hash = 0, self._new_hash()

    async def read_again(self) -> None:
        """Hashes what an earlier process left; others get their turn meanwhile."""
        self._stream.seek(0)
        left = self.size
        while left and (data := self._stream.read(min(left, CHUNK))):
            self._hash.update(data)
            left -= len(data)
            await asyncio.sleep(0)
        self.size -= left

    def write(self, data: bytes | bytearray) -> None:
        """Appends, at its own place: should a lock not hold, two writers put the same bytes at the same places."""
        view = memoryview(data)
        while view:
            try:
                self._stream.seek(self.size)
                written = self._stream.write(view) or 0
            except OSError as error:
                raise not_written(error, self.path, self._file, self.size) from None
            self._hash.update(view[:written])
            self.size += written
            view = view[written:]

    def settle(self) -> None:
        """Waits until the disk has it: a name must not outlive a power cut that its content does not."""
        os.fsync(self._stream.fileno())

    @property
    def right(self) -> bool:
        return self._hash.hexdigest() == self._file.etag

    def _new_hash(self) -> Any:
        if re.fullmatch(r"[0-9a-f]{64}", self._file.etag):
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)  # as git names a file's content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def not_written(error: OSError, path: Path, file: HubFile, size: int) -> DownloadError:
    return DownloadError(
        f"{file.path} could not be written to {short_path(path.parent, 3)} ({error.strerror or error}) at "
        f"{byte_size(size)} of {byte_size(file.size)}. Free space there, or set HF_HOME to a folder on a larger disk. "
        "What came is kept: start again to go on from there."
    )
