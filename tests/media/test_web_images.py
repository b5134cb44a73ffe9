"""Images by URL: no request reaches the own network, and no server can block ours."""

from __future__ import annotations

import ipaddress
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_http import BadHTTP, Plan
from patience import PATIENCE

from lightx2v.errors import BadRequest
from lightx2v.media.web_images import ImageFetcher, is_public

PICTURE = {"Content-Type": "image/png"}
LOCAL = ImageFetcher(is_allowed=lambda address: address.is_loopback, seconds=PATIENCE)
"""Accepts the loopback server of the tests as public."""


@pytest.fixture
def web() -> Iterator[BadHTTP]:
    with BadHTTP({"/a.png": Plan(body=b"picture", headers=PICTURE)}) as web:
        yield web


@pytest.mark.parametrize(
    "address",
    """
    127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1
    192.0.0.8 192.0.0.171 192.88.99.1 3fff::1 4000::1 5f00::1 ::ffff:0:7f00:1 2001:20::1
    224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: fe80::1 fc00::1 fd12::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
    ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b:1::1 2002:7f00:1:: 2001:0:1:: 2001:db8::1 fec0::1
    """.split(),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_nothing_on_loopback_is_connected_to_under_any_of_its_names(web: BadHTTP) -> None:
    for host in (
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0",
    ):
        with pytest.raises(BadRequest):
            ImageFetcher().image(web.url("/a.png", host))
    with pytest.raises(BadRequest, match="public internet"):
        ImageFetcher(resolve=lambda host, port: ["1.1.1.1", "127.0.0.1"]).image(web.url("/a.png", "rebind.example"))
    assert web.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://127.0.0.1:6379/_x",
        "//example.org/a.png",
        "http:/a.png",
        "http://",
        "http://user@example.org/a.png",
        "http://user:password@example.org/a.png",
        "http://example.org\\@127.0.0.1/",
        "http://example.org/a b.png",
        "http://example.org/a\r\nHost: other",
        "http://[::1/a.png",
        "http://example.org:99999/",
        "http://example.org:0/",
        "http://[fe80::1%25eth0]/",
        "http://exämple.org/",
        "http://example.org/" + "a" * 3000,
    ],
)
def test_ambiguous_urls_are_refused_without_a_request(url: str) -> None:
    asked: list[str] = []
    fetcher = ImageFetcher(resolve=lambda host, port: asked.append(host) or ["127.0.0.1"], is_allowed=lambda _: True)
    with pytest.raises(BadRequest):
        fetcher.image(url)
    assert not asked


def test_an_image_is_fetched_from_the_checked_address_after_one_look_up(web: BadHTTP) -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    asked: list[str] = []

    def changing(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    fetcher = ImageFetcher(resolve=changing, is_allowed=lambda address: str(address) == "127.0.0.1")
    assert fetcher.image(web.url("/a.png", "cats.example")) == b"picture"
    assert asked == ["cats.example"] and web.asked == ["/a.png"]


def test_redirects_are_followed_to_public_addresses_only(web: BadHTTP) -> None:
    web.plans["/there"] = Plan(status=302, headers={"Location": "/a.png"})
    web.plans["/round"] = Plan(status=302, headers={"Location": "/round"})
    web.plans["/file"] = Plan(status=302, headers={"Location": "file:///etc/passwd"})
    assert LOCAL.image(web.url("/there")) == b"picture"
    with pytest.raises(BadRequest, match="redirects more than"):
        LOCAL.image(web.url("/round"))
    with pytest.raises(BadRequest, match="must begin with"):
        LOCAL.image(web.url("/file"))
    with BadHTTP({"/secret": Plan(body=b"secret", headers=PICTURE)}) as inside:
        web.plans["/in"] = Plan(status=302, headers={"Location": inside.url("/secret", "inside.example")})
        fetcher = ImageFetcher(
            resolve=lambda host, port: ["127.0.0.2"] if host == "inside.example" else ["127.0.0.1"],
            is_allowed=lambda address: str(address) == "127.0.0.1",
        )
        with pytest.raises(BadRequest, match="public internet"):
            fetcher.image(web.url("/in"))
        assert inside.connections == 0


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        (Plan(status=404), "status 404"),
        (Plan(body=b"<html>", headers={"Content-Type": "text/html"}), "not an image"),
        (Plan(body=b"x", headers=PICTURE | {"Content-Encoding": "gzip"}), "compressed"),
        (Plan(body=b"x", headers=PICTURE, length=10**9), "larger than"),
        (Plan(body=b"short", headers=PICTURE, length=50), "could not be fetched"),
        (Plan(body=b"x" * 2000, headers=PICTURE, length=""), "larger than"),
        (Plan(headers=PICTURE, length="", endless=True), "larger than"),
    ],
)
def test_responses_that_are_not_an_image_or_too_large_are_refused(web: BadHTTP, plan: Plan, word: str) -> None:
    web.plans["/b"] = plan
    with pytest.raises(BadRequest, match=word):
        ImageFetcher(is_allowed=lambda address: True, max_bytes=1000, seconds=PATIENCE).image(web.url("/b"))


@pytest.mark.slow
def test_a_slow_response_is_cut_at_the_deadline(web: BadHTTP) -> None:
    web.plans["/slow"] = Plan(body=b"x" * 1000, headers=PICTURE, drip=0.05)
    with pytest.raises(BadRequest, match=r"within 1\.5 seconds"):
        ImageFetcher(is_allowed=lambda address: True, seconds=1.5).image(web.url("/slow"))


@pytest.mark.slow
def test_https_goes_to_the_checked_address_and_verifies_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = tmp_path / "cats.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=cats.example"]
    made += ["-addext", "subjectAltName=DNS:cats.example", "-keyout", str(pem), "-out", str(tmp_path / "cert.pem")]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", pem)
    fetcher = ImageFetcher(resolve=lambda host, port: ["127.0.0.1"], is_allowed=lambda address: True, seconds=PATIENCE)
    with BadHTTP({"/a.png": Plan(body=b"picture", headers=PICTURE)}, tls=context) as web:
        with pytest.raises(BadRequest, match="could not be fetched"):  # its certificate is not trusted yet
            fetcher.image(f"https://cats.example:{web.port}/a.png")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert fetcher.image(f"https://cats.example:{web.port}/a.png") == b"picture"
        with pytest.raises(BadRequest, match="could not be fetched"):
            fetcher.image(f"https://dogs.example:{web.port}/a.png")
        assert web.asked == ["/a.png"]


def test_a_resolver_that_never_answers_ends_at_the_deadline(web: BadHTTP) -> None:
    over = threading.Event()
    fetcher = ImageFetcher(resolve=lambda host, port: over.wait(30) and [] or [], seconds=0.1)
    with pytest.raises(BadRequest, match="Could not resolve"):
        fetcher.image(web.url("/a.png", "slow.example"))
    over.set()
