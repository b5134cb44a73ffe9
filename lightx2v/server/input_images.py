"""An input picture, however a client sends it: uploaded bytes, a data URL, base64, an address, or a file laid ready."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadRequest
from ..media.images import MAX_BYTES
from ..media.web_images import Fetcher

_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}={0,2}\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputImages:
    """`folder` holds files that clients may name; without one no path is read."""

    fetcher: Fetcher = field(default_factory=Fetcher)
    folder: Path | None = None

    def read(self, given: str) -> bytes:
        """The picture's bytes, not yet decoded. BadRequest for what cannot be one."""
        if re.match(r"https?:", given, re.IGNORECASE):
            return self.fetcher.image(given)
        if given[:5].lower() == "data:":
            head, comma, body = given.partition(",")
            if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", head, re.IGNORECASE):
                raise BadRequest("The data URL is not an image in base64: data:image/png;base64,…")
            return _decoded(body)
        if _BASE64.fullmatch(given) and not (self.folder is not None and self._file(given)):
            return _decoded(given)
        return self._named(given)

    def _named(self, name: str) -> bytes:
        if self.folder is None:
            raise BadRequest(
                "The image is neither a URL nor base64. Files of the server are only read from a folder that it was "
                "started with (--input_dir)."
            )
        file = self._file(name)
        if file is None:
            raise BadRequest("There is no such image in the server's input folder.")
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)

    def _file(self, name: str) -> Path | None:
        """The file of this name inside the folder, links followed; None if there is none."""
        assert self.folder is not None
        try:
            folder = self.folder.resolve()
            path = (folder / name).resolve()
            return path if path.is_relative_to(folder) and path.is_file() else None
        except (OSError, ValueError):  # too long, or a NUL in it
            return None


def _decoded(text: str) -> bytes:
    if len(text) > MAX_BYTES * 3 // 2:
        raise BadRequest(f"The image is larger than {MAX_BYTES // 2**20} MB.")
    try:
        plain = "".join(text.split()).translate(str.maketrans("-_", "+/"))
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest("The image is not valid base64.") from None
