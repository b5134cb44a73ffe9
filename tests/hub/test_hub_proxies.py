"""Downloads through the proxies of the environment: used where they can be, named where they cannot."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hub_models import assert_whole, download, environment, small_hub
from hub_server import HubServer, serving

from lightx2v.config.proxies import EXCEPTIONS, PROXIES

PRESET = "i2v_distill_merged"

pytestmark = [pytest.mark.slow]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serving(small_hub()) as started:
        yield started


@contextmanager
def proxy(answers: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """A SOCKS 5 server after RFC 1928 for IPv4: its address, and the first bytes of every client. Where `answers` has
    one it sends that instead and hangs up."""
    seen: list[bytes] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client:
            seen.append(client.recv(100))
            client.sendall(answers[0] if answers else b"\x05\x00")
            if answers:
                return
            request = client.recv(100)
            assert request[:4] == b"\x05\x01\x00\x01", "CONNECT to an IPv4 address"
            address = socket.inet_ntoa(request[4:8]), int.from_bytes(request[8:10])
            with socket.create_connection(address) as target:
                client.sendall(b"\x05\x00\x00\x01" + bytes(6))
                back = threading.Thread(target=pump, args=(target, client), daemon=True)
                back.start()
                pump(client, target)
                back.join()

    def listen() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=listen, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", seen


def without_proxies(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    env = environment(server, home)
    return {name: value for name, value in env.items() if name not in (*PROXIES, *EXCEPTIONS)} | more


@pytest.mark.parametrize(("name", "kind"), [("ALL_PROXY", "socks"), ("http_proxy", "socks5")])
def test_files_come_through_a_socks_proxy(name: str, kind: str, server: HubServer, tmp_path: Path) -> None:
    with proxy([]) as (address, seen):
        done = download(without_proxies(server, tmp_path, **{name: f"{kind}://{address}"}), PRESET)
    assert done.returncode == 0, done.stderr
    assert seen and all(greeting[0] == 5 for greeting in seen)
    assert_whole(tmp_path, server)


def test_without_socksio_files_come_directly_and_the_package_is_named(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "socksio.py").write_text("raise ImportError")
    more = {"ALL_PROXY": "socks5://127.0.0.1:9", "PYTHONPATH": str(tmp_path / "hidden")}
    done = download(without_proxies(server, tmp_path / "home", **more), PRESET)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ALL_PROXY") == 1 and "pip install socksio" in done.stderr
    assert_whole(tmp_path / "home", server)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x05\xff", b"\x00"])
def test_a_proxy_that_refuses_is_named(answer: bytes, server: HubServer, tmp_path: Path) -> None:
    with proxy([answer]) as (address, _):
        done = download(without_proxies(server, tmp_path, all_proxy=f"socks5://{address}"), PRESET)
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr and "the proxy in all_proxy" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_proxy_that_is_gone_is_named(server: HubServer, tmp_path: Path) -> None:
    done = download(without_proxies(server, tmp_path, HTTP_PROXY="http://127.0.0.1:9"), PRESET)
    assert done.returncode == 1 and "the proxy in HTTP_PROXY" in done.stderr
