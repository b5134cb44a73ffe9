"""How often keys may be guessed: by one address, by many, in each of three spellings; and which keys need no limit."""

from __future__ import annotations

import math
import secrets
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from served import serve

from lightx2v.config.environment import Environment
from lightx2v.config.presets import resolve
from lightx2v.server import command, limits
from lightx2v.server.guess_limit import GuessLimit, is_strong
from lightx2v.server.metrics import Metrics

WEAK = "a-key-of-some-length"
STRONG = "8f14e45fceea167a5a36dedd4bea2543"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def count(guesses: GuessLimit, address: str, tries: int = 500) -> int:
    """How many of these guesses are let through."""
    return sum(guesses.take(address) for _ in range(tries))


def test_an_address_guesses_ten_times_and_then_ten_times_a_minute(clock: SimpleNamespace) -> None:
    guesses = GuessLimit()
    assert count(guesses, "192.0.2.1") == 10
    clock.seconds += 60
    assert count(guesses, "192.0.2.1") == 10
    clock.seconds += 86_400
    assert count(guesses, "192.0.2.1") == 10, "what is not used in a day does not add up"
    assert count(guesses, "192.0.2.2") == 10, "another address has guesses of its own"


@pytest.mark.slow
def test_all_addresses_together_guess_a_hundred_times_and_then_once_a_second(clock: SimpleNamespace) -> None:
    guesses = GuessLimit()
    assert sum(count(guesses, f"192.0.{n // 256}.{n % 256}", 10) for n in range(5000)) == 100
    clock.seconds += 60
    assert sum(count(guesses, f"198.51.{n // 256}.{n % 256}", 10) for n in range(5000)) == 60


def test_addresses_that_one_owner_has_in_masses_count_as_one(clock: SimpleNamespace) -> None:
    guesses = GuessLimit()
    assert sum(count(guesses, f"2001:db8:0:1::{n:x}", 5) for n in range(100)) == 10
    assert count(guesses, "2001:db8:0:2::1") == 10
    assert sum(count(guesses, address, 10) for address in ("192.0.2.9", "::ffff:192.0.2.9", "::ffff:c000:209")) == 10
    assert count(guesses, "::1") == 10 and count(guesses, "fe80::1%eth0") == 10 and count(guesses, "") == 10


def test_a_right_secret_is_no_guess(clock: SimpleNamespace) -> None:
    guesses = GuessLimit()
    for _ in range(1000):
        assert guesses.take("192.0.2.1")
        guesses.give_back("192.0.2.1")
    assert count(guesses, "192.0.2.1") == 10
    guesses.give_back("192.0.2.1")
    assert count(guesses, "192.0.2.1") == 1


def spellings(key: str) -> list[dict[str, Any]]:
    return [{"headers": {"Authorization": f"Bearer {key}"}}, {"headers": {"X-API-Key": key}}, {"auth": ("me", key)}]


@pytest.mark.slow
def test_every_spelling_of_a_key_and_every_path_share_one_limit(tmp_path: Path, clock: SimpleNamespace) -> None:
    with serve(tmp_path, keys=[WEAK]) as served:
        made_up = {"X-Forwarded-For": "203.0.113.9", "X-Real-IP": "203.0.113.9", "Forwarded": "for=203.0.113.9"}
        served.client.headers.update(made_up)
        paths = ("/v1/videos", "/docs", "/health", "/nothing", "/metrics")
        codes = []
        for number in range(100):
            way = spellings(f"wrong {number}")[number % 3]
            served.client.headers["X-Forwarded-For"] = f"203.0.113.{number}"
            codes.append(served.client.get(paths[number % 5], **way).status_code)
        assert codes == [401] * 10 + [429] * 90
        for way in spellings(WEAK):
            answer = served.client.get("/v1/videos", **way)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "60"
            assert "openssl" in answer.json()["error"]["message"] and WEAK not in answer.text
        assert served.client.get("/v1/videos").status_code == 401, "nothing was guessed"
        clock.seconds += 60
        for way in spellings(WEAK) * 20:
            assert served.client.get("/v1/videos", **way).status_code == 200
        assert served.client.post("/v1/videos", json={}, headers={"X-API-Key": WEAK}).status_code == 422


@pytest.mark.slow
def test_a_key_of_128_bits_works_while_others_are_guessed(tmp_path: Path, clock: SimpleNamespace) -> None:
    with serve(tmp_path, keys=[WEAK, STRONG]) as served:
        codes = [served.client.get("/v1/videos", auth=("", f"wrong {n}")).status_code for n in range(50)]
        assert codes == [401] * 10 + [429] * 40
        for way in spellings(STRONG):
            assert served.client.get("/v1/videos", **way).status_code == 200
    with serve(tmp_path, keys=[STRONG]) as served:
        codes = [served.client.get("/v1/videos", auth=("", f"wrong {n}")).status_code for n in range(50)]
        assert codes == [401] * 50, "where nobody can guess, nothing is counted"


@pytest.mark.parametrize(
    ("secret", "strong"),
    [
        ("8f14e45fceea167a5a36dedd4bea2543", True),
        ("8F14E45FCEEA167A5A36DEDD4BEA2543", True),
        ("8f14e45fceea167a5a36dedd4bea254", False),  # 31 x 4 = 124
        ("kq3Zb0Xw9LmT7sVd2RfYhJ", True),  # 22 x log2(62) = 130.99
        ("kq3Zb0Xw9LmT7sVd2RfYh", False),  # 125.04
        ("71830264957710386529401837562938471056", False),  # 38 x log2(10) = 126.2
        ("718302649577103865294018375629384710562", True),  # 129.6
        ("a-key-of-some-length", False),
        ("0123456789abcdef" * 2, False),
        ("password" * 10, False),
        ("ab" * 100, False),
        ("", False),
        ("ключ" * 40, False),
    ],
)
def test_the_bits_of_a_key_are_its_length_times_those_of_a_character(secret: str, strong: bool) -> None:
    assert is_strong(secret) is strong


def test_keys_drawn_as_the_documents_say_are_strong() -> None:
    assert all(is_strong(secrets.token_hex(16)) for _ in range(2000))
    assert 16 * math.log2(256) == 128 and not any(is_strong(secrets.token_urlsafe(12)) for _ in range(200))


@pytest.mark.slow
def test_the_address_of_a_client_counts_behind_a_proxy_that_is_trusted_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's own way of starting uvicorn, with the variable and without."""
    started: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: started.append(self.config))

    def guesses() -> list[int]:
        with serve(tmp_path, keys=[WEAK]) as served:
            options = command._parser().parse_args(["--preset", "demo_t2v_base"])
            trusted = Environment.read().trusted_proxies
            command._serve(options, served.jobs, Metrics(), resolve("demo_t2v_base"), [WEAK], trusted)
            config = started.pop()
            config.load()
            client = TestClient(config.loaded_app, base_url="http://127.0.0.1", client=("127.0.0.1", 5))
            codes = []
            for number in range(30):
                headers = {"X-Forwarded-For": f"203.0.113.{number}", "X-API-Key": f"wrong {number}"}
                codes.append(client.get("/v1/videos", headers=headers).status_code)
            return codes

    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    assert 429 in guesses()
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    assert guesses() == [401] * 30, "thirty clients of the proxy"
