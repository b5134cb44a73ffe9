"""Proxy variables: those that a client can use stay, and no other keeps a program from starting."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import httpx
import httpx2
import pytest

from lightx2v.config.proxies import EXCEPTIONS, PROXIES, use_proxies

USABLE = (
    "http://127.0.0.1:8080",
    "https://user:p%40ss@proxy.example.com:3128/",
    "proxy.example.com:3128",
    "socks5://127.0.0.1:1080",
    "socks5h://me:secret@[::1]:1080",
    "SOCKS5://my_proxy",
)
UNUSABLE = {
    "socks4://127.0.0.1:1080": "SOCKS 4",
    "socks4a://127.0.0.1:1080": "SOCKS 4",
    "Socks4://127.0.0.1": "SOCKS 4",
    "socks6://127.0.0.1:1080": "its kind is 'socks6'",
    "ftp://127.0.0.1": "its kind is 'ftp'",
    "://127.0.0.1": "its kind is ''",
    "socks5://": "not an address",
    "http://:8080": "not an address",
    "http://127.0.0.1:99999": "not an address",
    "http://127.0.0.1:port": "not an address",
    "http://127.0.0.1:0": "not an address",
    "http://[::1": "not an address",
    "http://::1:8080": "not an address",
    "socks5://me:secret@": "not an address",
    "http://a b:80": "not an address",
    "http://a\tb": "not an address",
    "http://ümläut:80": "not an address",
    "http://..": "not an address",
    "  ": "not an address",
    "127.0.0.1:1080:": "not an address",
}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *EXCEPTIONS):
        monkeypatch.delenv(name, raising=False)


def clients_start() -> None:
    for library in (httpx, httpx2):
        library.Client().close()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("address", USABLE)
def test_a_proxy_that_clients_can_use_stays(
    name: str, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, address)
    use_proxies(os.environ)
    assert os.environ[name] == address and not caplog.text
    clients_start()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROXIES)
def test_gnomes_word_for_socks_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "socks://127.0.0.1:7890/")
    use_proxies(os.environ)
    assert os.environ[name] == "socks5://127.0.0.1:7890/"
    clients_start()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize(("address", "said"), UNUSABLE.items())
def test_a_proxy_that_no_client_can_use_is_named_once_and_left_out(
    name: str, address: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, address)
    use_proxies(os.environ)
    use_proxies(os.environ)
    (record,) = caplog.records
    assert name in record.message and said in record.message
    assert "secret" not in record.message
    assert name not in os.environ
    clients_start()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["socks", "socks5", "SOCKS5", "socks5h"])
def test_without_its_package_a_socks_proxy_is_left_out_and_the_package_named(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing: ModuleType | None = None
    monkeypatch.setitem(sys.modules, "socksio", missing)
    monkeypatch.setenv("all_proxy", f"{kind}://127.0.0.1:1080")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:8080")
    use_proxies(os.environ)
    (record,) = caplog.records
    assert "all_proxy" in record.message and "pip install socksio" in record.message
    assert "all_proxy" not in os.environ and os.environ["HTTPS_PROXY"] == "http://127.0.0.1:8080"
    clients_start()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "left", "unread"),
    [
        ("localhost, .local,10.0.0.0/8,*", "localhost,.local,10.0.0.0/8,*", None),
        ("[::1],::1", "::1,::1", None),
        ("localhost,fe80::/10", "localhost", "fe80::/10"),
        ("[::1]:8080,a.b", "a.b", "[::1]:8080"),
        ("::1],bücher.de", "::1", "bücher.de"),
        ("a:80,a.b:http", "a:80", "a.b:http"),
        ("http://a:80,http://[::1]:80,http://::1", "http://a:80,http://[::1]:80", "http://::1"),
        ("a.b,a.b:99999", "a.b", "a.b:99999"),
        ("http://a,http://[", "http://a", "http://["),
    ],
)
def test_exceptions_that_clients_cannot_read_are_left_out_of_the_list(
    given: str, left: str, unread: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in EXCEPTIONS:
        monkeypatch.setenv(name, given)
    use_proxies(os.environ)
    assert [os.environ[name] for name in EXCEPTIONS] == [left, left]
    assert len(caplog.records) == (0 if unread is None else 2)
    assert unread is None or unread in caplog.text
    clients_start()
