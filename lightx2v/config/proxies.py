"""Proxies from the environment: those that no HTTP client here can use are left out, with one sentence each.

httpx, which gradio and huggingface_hub use, raises while a client is made: for a SOCKS proxy without the package
socksio, for a kind of proxy that it does not know, for an address that it cannot read, and for such an entry of
NO_PROXY. A page would end at its start because of a variable that it may not need.
"""

import contextlib
import importlib
import ipaddress
import logging
import os
import re
from collections.abc import Mapping, MutableMapping
from urllib.parse import urlsplit

from ..errors import quoted

log = logging.getLogger("lightx2v.proxies")

PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "http_proxy", "https_proxy")
EXCEPTIONS = ("NO_PROXY", "no_proxy")
ADDRESS = r"(?:[a-z0-9_-]+\.)*[a-z0-9_-]+\.?|\[[0-9a-f:.]+\]"
PORT = r"(?::[0-9]{0,5})?"


def use_proxies(variables: MutableMapping[str, str] = os.environ) -> None:
    """Take out of `variables` what would stop every HTTP client, and log what to do. Requests then go without it.

    `socks://`, which GNOME writes, becomes `socks5://`.
    """
    for name in PROXIES:
        text = variables.get(name, "")
        if re.match("socks://", text, re.IGNORECASE):
            variables[name] = text = f"socks5{text[len('socks') :]}"
        if text and (problem := _problem(text)):
            del variables[name]
            log.warning("The proxy in %s is not used: %s", name, problem)
    for name in EXCEPTIONS:
        entries = {entry: _readable(entry) for entry in map(str.strip, variables.get(name, "").split(",")) if entry}
        for entry in (entry for entry, readable in entries.items() if not readable):
            log.warning("%s in %s is not used: expected a name, an address or a network.", quoted(entry), name)
        if entries:
            variables[name] = ",".join(filter(None, entries.values()))


def proxies_in_use(variables: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the variables that name a proxy, for a message about a network that does not answer."""
    return [name for name in PROXIES if variables.get(name)]


def _problem(text: str) -> str:
    """Why no client can use a proxy, and what to do; "" if one can. Never repeats the address: it may hold a
    password."""
    kind, _, rest = text.partition("://") if "://" in text else ("http", "", text)
    kind = kind.lower()
    if kind in ("socks4", "socks4a"):
        return "SOCKS 4 is not supported. Give the same server as socks5:// if it speaks SOCKS 5, or an http:// proxy."
    if kind not in ("http", "https", "socks5", "socks5h"):
        return (
            f"its kind is {quoted(kind)}; expected http, https, socks5 or socks5h. Correct the variable, or unset it."
        )
    if not _is_address(rest):
        return f"it is not an address such as {kind}://127.0.0.1:1080. Correct the variable, or unset it."
    if kind.startswith("socks") and not _has_socksio():
        return "SOCKS needs one more package. Install it with: pip install socksio"
    return ""


def _is_address(rest: str) -> bool:
    """Whether this is `user:password@host:port/`, of which only the host is necessary."""
    try:
        parts = urlsplit(f"//{rest}")
        port = parts.port
    except ValueError:  # brackets that do not match, a port that is no number or too large
        return False
    host = parts.netloc.rpartition("@")[2]
    plain = rest.isascii() and rest.isprintable() and " " not in rest
    return plain and port != 0 and re.fullmatch(f"(?:{ADDRESS}){PORT}", host, re.IGNORECASE) is not None


def _has_socksio() -> bool:
    try:
        importlib.import_module("socksio")
    except ImportError:
        return False
    return True


def _readable(entry: str) -> str:
    """An entry of NO_PROXY as httpx reads it: an IPv6 address without brackets. "" where it would fail on it."""
    if "://" not in entry and entry.count(":") > 1:
        with contextlib.suppress(ValueError):
            return str(ipaddress.IPv6Address(entry.strip("[]")))
        return ""
    try:
        _ = urlsplit(f"//{entry.rpartition('://')[2]}").port
    except ValueError:  # a port that is no number, brackets that do not match
        return ""
    return entry if entry.isascii() else ""
