"""Exposure: every way to start the page gives an address, a password or a refusal."""

from __future__ import annotations

import argparse

import pytest

from app.exposure import PUBLIC_LIMITS, Exposure, Limits, add_flags, decide
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest, ConfigError


def started(*flags: str, **variables: str) -> Exposure:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return decide(parser.parse_args(flags), variables)


def test_without_flags_it_is_this_machine_alone_and_asks_for_nothing() -> None:
    exposure = started()
    assert exposure.host == "127.0.0.1"
    assert exposure.auth is None and not exposure.share and not exposure.open_to_others
    assert exposure.shows_paths and exposure.limits == Limits()
    assert exposure.hosts is not None and "127.0.0.1" in exposure.hosts and "evil.example" not in exposure.hosts


@pytest.mark.parametrize("flags", [("--share",), ("--host", "0.0.0.0"), ("--host", "192.168.1.5"), ("--host", "::")])
def test_a_page_for_others_gets_a_new_password_at_each_start(flags: tuple[str, ...]) -> None:
    first, second = started(*flags), started(*flags)
    assert first.auth is not None and second.auth is not None
    assert first.password != second.password and len(first.password) >= 12
    assert first.open_to_others and not first.shows_paths and first.limits == PUBLIC_LIMITS
    assert first.password not in repr(first), "a password must not reach a log"


def test_public_is_the_only_way_without_a_password() -> None:
    assert started("--share", "--public").auth is None
    assert started("--host", "0.0.0.0", "--public").auth is None
    assert started("--share", "--auth", "me:secret").auth == ("me", "secret")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--public",), "--share"),
        (("--share", "--public", "--auth", "a:b"), "--public"),
        (("--share", "--auth", "nocolon"), "--auth"),
        (("--share", "--auth", ":b"), "--auth"),
        (("--share", "--auth", "a:b\nc"), "cannot be printed"),
        (("--share", "--auth", "a:b\0"), "cannot be printed"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        started(*flags)


def test_gradios_variable_sets_the_port_unless_a_flag_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7999")
    assert started().port == 7999 and started("--port", "8123").port == 8123
    monkeypatch.setenv("GRADIO_SERVER_PORT", "")
    assert started().port is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.5", "::1", "[::1]"])
def test_loopback_in_any_spelling_is_this_machine(host: str) -> None:
    assert not started("--host", host).open_to_others


def test_a_space_is_public_and_hides_its_machine() -> None:
    space = started(SPACE_ID="someone/studio")
    assert space.hosted and space.open_to_others and not space.shows_paths and not space.zerogpu
    assert space.host is None and not space.share, "the platform chooses the address"
    assert started(SPACE_ID="someone/studio", SPACES_ZERO_GPU="true").zerogpu


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": "x" * 2001}, "prompt"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt"),
        ({"frames": 121}, "frames"),
        ({"height": 1088, "width": 1920, "frames": 33}, "size"),
        ({"steps": 100}, "steps"),
    ],
)
def test_a_page_for_others_names_its_limits(changes: dict[str, object], named: str) -> None:
    request = Request(**{"prompt": "x", **changes})  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=named):
        PUBLIC_LIMITS.check(request)
    Limits().check(request)
