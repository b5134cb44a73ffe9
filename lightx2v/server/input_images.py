"""InputImages: reads an image that a client sends as a data URL, base64, a URL, or the name of a file on the server."""

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from ..errors import BadRequest, quoted
from ..media.images import MAX_BYTES
from ..media.web_images import ImageFetcher

DATA_TYPES = ("", "application/octet-stream", "binary/octet-stream")
"""Media types of a data URL besides image/…: they claim nothing, and the content decides."""
_DATA_URL = re.compile(r'data:((?:"[^"]*"|[^",]++)*+),(.*)', re.IGNORECASE | re.DOTALL)
"""The head, in which a quoted value may hold a comma, and the content."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}={0,2}\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputImages:
    """`folder` holds the files that clients may name; without it they can name none."""

    fetcher: ImageFetcher = field(default_factory=ImageFetcher)
    folder: Path | None = None

    def read(self, source: str) -> bytes:
        """The bytes of the image, not yet decoded. BadRequest if the source cannot be an image."""
        source = source.strip()
        if re.match(r"https?:", source, re.IGNORECASE):
            return self.fetcher.image(source)
        if source[:5].lower() == "data:":
            return _from_data_url(source)
        if _BASE64.fullmatch(source) and not (self.folder is not None and self._file(source)):
            return _decoded(source)
        return self._named(source)

    def _named(self, name: str) -> bytes:
        if self.folder is None:
            raise BadRequest(
                "The image is neither a URL nor base64. To use files on the server, start it with --input_dir FOLDER."
            )
        file = self._file(name)
        if file is None:
            raise BadRequest("There is no image with this name in the server's input folder.")
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)

    def _file(self, name: str) -> Path | None:
        """The file with this name inside the folder, after following links; None if there is none."""
        assert self.folder is not None
        try:
            folder = self.folder.resolve()
            path = (folder / name).resolve()
            return path if path.is_relative_to(folder) and path.is_file() else None
        except (OSError, ValueError):  # the name is too long or contains NUL
            return None


def _from_data_url(url: str) -> bytes:
    """The content of data:[TYPE][;PARAMETER=VALUE …][;base64],CONTENT, as RFC 2397 defines it."""
    match = _DATA_URL.fullmatch(url)
    if match is None:
        raise BadRequest("The data URL has no comma, and so no content. Expected data:image/png;base64,…")
    head, content = match.groups()
    kind, *parameters = (unquote(part).strip().lower() for part in head.split(";"))
    if kind not in DATA_TYPES and not kind.startswith("image/"):
        raise BadRequest(f"The data URL holds {quoted(kind)}; expected an image, as in data:image/png;base64,…")
    if "base64" in parameters[-1:]:
        return _decoded(unquote(content))
    return unquote_to_bytes(content)


def _decoded(text: str) -> bytes:
    if len(text) > MAX_BYTES * 3 // 2:
        raise BadRequest(f"The image is larger than {MAX_BYTES // 2**20} MB.")
    try:
        plain = "".join(text.split()).translate(str.maketrans("-_", "+/"))
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest("The image is not valid base64.") from None
