"""Fetch images from URLs of users, without letting a URL reach this machine or its network (SSRF).

Each host, also that of a redirect, is resolved once and refused unless all its addresses are public. The connection
then goes to such an address, so a name that resolves differently the second time gains nothing. Size, time, redirects
and content type are limited, and the environment's proxies are not used. Every failure is a BadRequest that reveals
nothing about the network.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from ..errors import BadRequest
from .images import MAX_BYTES

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL = 2048
REDIRECTS = 3
CHUNK = 1 << 16
SPECIAL = [
    *map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")),
    *map(ipaddress.IPv6Network, ("2001::/32", "2002::/16", "3fff::/20")),
]
"""Ranges with a special purpose that not every Python's `is_global` knows, and ranges that embed an IPv4 address."""
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All public IPv6 addresses are in it. Outside are, among others, the other ranges that embed an IPv4 address."""


def is_public(address: IPAddress) -> bool:
    """Whether an address is on the public internet: not loopback, private, link-local, shared or multicast."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address not in GLOBAL_UNICAST:
            return False
    special = any(address in network for network in SPECIAL)
    return not special and address.is_global and not address.is_multicast and not address.is_reserved


def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a host name, from the system's resolver."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFetcher:
    """Fetches one image. `seconds` limits all of it, with redirects; tests replace `resolve` and `is_allowed`."""

    resolve: Callable[[str, int], Sequence[str]] = resolve_host
    is_allowed: Callable[[IPAddress], bool] = is_public
    max_bytes: int = MAX_BYTES
    seconds: float = 10.0

    def image(self, url: str) -> bytes:
        """The bytes of an http or https URL. BadRequest if they cannot be fetched within the limits."""
        deadline = time.monotonic() + self.seconds
        for _ in range(REDIRECTS + 1):
            parts = _checked(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            addresses = self._addresses(str(parts.hostname), port, deadline)
            body = self._get(parts, port, addresses, deadline)
            if isinstance(body, bytes):
                return body
            url = urljoin(url, body)
        raise BadRequest(f"The image URL redirects more than {REDIRECTS} times. Give the final URL.")

    def _addresses(self, host: str, port: int, deadline: float) -> list[str]:
        """The addresses of a host. The resolver has no time limit of its own, so its thread may be left behind."""
        answers: list[str] = []

        def look_up() -> None:
            with suppress(OSError, UnicodeError):
                answers.extend(self.resolve(host, port))

        thread = threading.Thread(target=look_up, daemon=True, name="lightx2v-look-up")
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        addresses = list(dict.fromkeys(answers))
        if thread.is_alive() or not addresses:
            raise BadRequest("Could not resolve the image URL's host. Check its spelling.")
        try:
            allowed = all(self.is_allowed(ipaddress.ip_address(address)) for address in addresses)
        except ValueError:  # an IPv6 address with a zone is link-local
            allowed = False
        if not allowed:
            raise BadRequest("The image URL is not on the public internet. Upload the image instead.")
        return addresses

    def _get(self, parts: SplitResult, port: int, addresses: list[str], deadline: float) -> bytes | str:
        """The body of the response, or the URL of a redirect."""
        try:
            with _connected(parts, port, addresses, deadline) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                accepted = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "lightx2v-studio"}
                connection.request("GET", target, headers=accepted)
                return self._body(connection.getresponse(), deadline)
        except (OSError, http.client.HTTPException, ValueError):
            raise _unfetched(self.seconds) from None

    def _body(self, response: http.client.HTTPResponse, deadline: float) -> bytes | str:
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return location
        if response.status != 200:
            raise BadRequest(f"The image URL answered with status {response.status}. Check it in a browser.")
        kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind not in ("", "application/octet-stream", "binary/octet-stream"):
            raise BadRequest("The image URL leads to something that is not an image. Give the URL of the file itself.")
        if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
            raise BadRequest("The image URL answers with compressed data. Upload the image instead.")
        if response.length is not None and response.length > self.max_bytes:
            raise self._too_large()
        promised, body = response.length, bytearray()
        while chunk := response.read1(CHUNK):
            body += chunk
            if len(body) > self.max_bytes:
                raise self._too_large()
            if time.monotonic() > deadline:
                raise _unfetched(self.seconds)
        if promised is not None and len(body) != promised:
            raise _unfetched(self.seconds)
        return bytes(body)

    def _too_large(self) -> BadRequest:
        return BadRequest(f"The image at the URL is larger than {self.max_bytes / 2**20:.0f} MB. Give a smaller one.")


@contextmanager
def _connected(
    parts: SplitResult, port: int, addresses: list[str], deadline: float
) -> Iterator[http.client.HTTPConnection]:
    """A connection to the first address that answers, cut at the deadline, however slowly data arrives."""
    left = lambda: max(0.01, deadline - time.monotonic())  # noqa: E731
    plain = _first(addresses, port, left)
    current = plain

    def cut() -> None:
        with suppress(OSError):
            current.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(left(), cut)
    timer.daemon = True
    timer.start()
    try:
        host = str(parts.hostname)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            current = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            current.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.auto_open = 0  # it would resolve the name again
        connection.sock = current
        yield connection
    finally:
        timer.cancel()
        current.close()


def _first(addresses: list[str], port: int, left: Callable[[], float]) -> socket.socket:
    failure = OSError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=left())
        except OSError as error:
            failure = error
    raise failure


def _checked(url: str) -> SplitResult:
    """The parts of an acceptable URL. Refuses everything that two parsers could read differently."""
    if not isinstance(url, str) or len(url) > MAX_URL or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise BadRequest(f"The image URL must have at most {MAX_URL} plain ASCII characters.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # an invalid port, or brackets that do not match
        parts, port = urlsplit(""), None
    if port == 0 or not parts.hostname or "%" in parts.hostname or parts.scheme not in ("http", "https"):
        raise BadRequest("The image URL must begin with https:// (or http://) and name a host.")
    if "@" in parts.netloc:
        raise BadRequest("The image URL must not hold a user or a password. Upload the image instead.")
    return parts


def _unfetched(seconds: float) -> BadRequest:
    return BadRequest(f"The image could not be fetched from its URL within {seconds:g} seconds. Upload it instead.")
