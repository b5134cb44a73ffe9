"""Access to the server: keys, host names, origins, body sizes and rates; and what error messages reveal."""

from __future__ import annotations

import json
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import Garage, Script
from fastapi.routing import iter_route_contexts
from patience import PATIENCE
from served import SIZE, Served, listening, serve

from lightx2v.config.model_paths import PROJECT
from lightx2v.server import limits, submit
from lightx2v.server.limits import MAX_BODY, RequestLimits

KEY = "a-key-of-some-length"
STRONG = "8f14e45fceea167a5a36dedd4bea2543"
"""A key that nobody can guess, so wrong ones are not counted."""
GOOD = {"prompt": "a cat", **SIZE}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


def every_route(served: Served) -> list[tuple[str, str]]:
    """(method, path) of all routes, the hidden ones too."""
    found = []
    for route in iter_route_contexts(served.client.app.routes):
        path = re.sub(r"\{[^}]+\}", "x", str(route.path))
        found += [(method, path) for method in sorted(route.methods or ()) if method != "HEAD"]
    return found


@pytest.mark.slow
def test_without_the_key_every_route_answers_401(tmp_path: Path) -> None:
    with serve(tmp_path, keys=[STRONG]) as served:
        routes = every_route(served)
        assert {"/docs", "/openapi.json", "/metrics", "/health", "/v1/videos", "/v1/files/download/x"} <= {
            p for _, p in routes
        }
        wrong: list[dict[str, str]] = [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Bearer {STRONG[:-1]}"},
            {"Authorization": "Basic !!!"},
            {"Authorization": STRONG},
            {"X-API-Key": "\xff"},
        ]
        for headers in wrong:
            encoded = {name: value.encode("latin1") for name, value in headers.items()}
            for method, path in [*routes, ("GET", "/nothing"), ("POST", "/v1/nothing")]:
                answer = served.client.request(method, path, headers=encoded, follow_redirects=False)
                assert answer.status_code == 401, (method, path, headers)
        assert not served.jobs.list()


def test_the_key_is_accepted_in_three_ways(tmp_path: Path) -> None:
    with serve(tmp_path, keys=["another-long-key", KEY]) as served:
        ways: list[dict] = [
            {"headers": {"Authorization": f"Bearer {KEY}"}},
            {"headers": {"X-API-Key": KEY}},
            {"auth": ("me", KEY)},
        ]
        for way in ways:
            assert served.client.get("/docs", **way).status_code == 200
            assert served.client.get("/v1/videos", **way).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "testserver.evil.example:8000"])
def test_foreign_host_names_are_refused(served: Served, host: str) -> None:
    assert served.client.get("/v1/videos", headers={"Host": host}).status_code == 403


@pytest.mark.slow
@pytest.mark.parametrize(
    "headers",
    [
        *({"Origin": origin} for origin in ("https://evil.example", "null", "", "http://[", "http://testserver:3000")),
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_other_sites_cannot_make_a_browser_post(served: Served, headers: dict[str, str]) -> None:
    assert served.client.post("/v1/videos", json=GOOD, headers=headers).status_code == 403
    assert served.client.delete("/v1/tasks/all/running", headers=headers).status_code == 403
    assert served.client.post("/v1/videos", json=GOOD, headers={"Origin": "http://testserver"}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
def test_only_json_and_forms_are_accepted(served: Served, kind: str) -> None:
    answer = served.client.post("/v1/videos", content=b'{"prompt": "a cat"}', headers={"Content-Type": kind})
    assert answer.status_code == 415


@pytest.mark.slow
def test_large_bodies_are_refused_with_and_without_a_content_length(served: Served) -> None:
    announced = served.client.post(
        "/v1/videos", content=b"x", headers={"Content-Length": str(100 * 2**20), "Content-Type": "application/json"}
    )
    assert announced.status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 2**20 + 2):
            yield b"x" * 2**20

    answer = served.client.post("/v1/videos", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_body_with_very_many_values_does_not_block_the_server(served: Served) -> None:
    """Parsing all of them took ten seconds, in which the server answered no other request."""
    body = b'{"prompt": "a", "more": [' + b"[]," * (MAX_BODY // 3 - 20) + b"0]}"
    started = time.process_time()
    answer = served.client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and time.process_time() - started < 2


@pytest.mark.slow
def test_slow_bodies_time_out_and_delay_no_other_client(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.client.app = RequestLimits(served.client.app, body_seconds=2)
        with listening(served) as client:
            head = "POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            slow = [socket.create_connection((client.base_url.host, client.base_url.port), PATIENCE) for _ in range(50)]
            try:
                for connection in slow:
                    connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
                assert client.post("/v1/videos", json=GOOD).status_code == 200
                for connection in slow:
                    assert b" 408 " in connection.recv(1000).partition(b"\r\n")[0]
            finally:
                for connection in slow:
                    connection.close()


@pytest.mark.slow
def test_large_bodies_wait_unread_until_there_is_memory_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred of them at once took six gigabytes."""
    monkeypatch.setattr(submit, "LARGE_BODIES", MAX_BODY)
    large = json.dumps({**GOOD, "input_reference": "A" * 2_000_000}).encode()  # for a model that takes no image
    head = "POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    with serve(tmp_path) as served, listening(served) as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as first, socket.create_connection(address) as second:
            first.sendall(f"{head}{MAX_BODY}\r\n\r\n{{".encode())
            assert client.post("/v1/videos", json=GOOD).status_code == 200, "small ones do not wait"
            second.sendall(f"{head}{len(large)}\r\n\r\n".encode())
            threading.Thread(target=second.sendall, args=(large,), daemon=True).start()
            second.settimeout(1)
            with pytest.raises(TimeoutError):
                second.recv(1000)
            first.close()  # which frees its memory
            second.settimeout(PATIENCE)
            assert b" 422 " in second.recv(1000).partition(b"\r\n")[0]


@pytest.mark.slow
def test_responses_may_take_longer_than_bodies(tmp_path: Path) -> None:
    hold = threading.Event()
    with serve(tmp_path, Garage(script={"held": Script(hold=hold)})) as served:
        id = served.submit("held")
        served.client.app = RequestLimits(served.client.app, body_seconds=0.5)
        with listening(served) as client, client.stream("GET", f"/v1/videos/{id}/events") as stream:
            assert served.garage.started.wait(PATIENCE)
            threading.Timer(1, hold.set).start()
            assert "event: video" in stream.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"prompt": ' + b'{"a":' * 10_000,
        b"\xff\xfe",
        b"",
        b"null",
        b"[]",
        b'{"prompt": "a", "prompts": 1}',
        b'{"prompt": "a", "seed": 1e400}',
        b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
        b'{"prompt": "a", "fps": NaN}',
        b'{"prompt": "a", "fps": Infinity, "seconds": 5}',
        b'{"prompt": "a", "fps": -1e308, "seconds": 600}',
        b'{"prompt": "a", "seed": true}',
        b'{"prompt": "a", "seed": "7"}',
        b'{"prompt": "a", "num_frames": 5.5}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "size": "64x64", "height": 64}',
        '{"prompt": "a", "size": "６４x64"}'.encode(),
        '{"prompt": "a", "size": "64x٦٤"}'.encode(),
        b'{"prompt": "a", "input_reference": "data:image/png;base64,bm8="}',
    ],
)
def test_invalid_bodies_are_refused_and_stay_out_of_the_log(
    served: Served, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightx2v")
    answer = served.client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert set(answer.json()) == {"error"} and not served.jobs.list()
    assert not [record for record in caplog.records if record.name.startswith("lightx2v")]


@pytest.mark.slow
def test_a_client_that_posts_without_pause_gets_429_and_can_still_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    served.client.app = RequestLimits(served.client.app)
    answers = [served.client.post("/v1/videos", json={"prompt": ""}).status_code for _ in range(160)]
    assert answers == [422] * 100 + [429] * 60
    assert served.client.get("/health").status_code == 200


PLACES = [str(Path.home()), tempfile.gettempdir(), str(PROJECT), "site-packages", KEY]
SECRETS = re.compile(r"Traceback|\.py\b|" + "|".join(map(re.escape, PLACES)))


@pytest.mark.slow
def test_errors_reveal_no_paths_no_tracebacks_and_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    garage = Garage(script={"burst": Script(error=RuntimeError(f"at {tmp_path} with {KEY}"))})
    with serve(tmp_path, garage, keys=[KEY]) as served:
        served.client.headers["Authorization"] = f"Bearer {KEY}"
        texts = [served.client.request(method, path).text for method, path in every_route(served) if "docs" not in path]
        for body in (
            {},
            {"prompt": 3},
            {"prompt": "a", "model": "other"},
            {"prompt": "a", "input_reference": str(tmp_path)},
        ):
            texts += [served.client.post(path, json=body).text for path in ("/v1/videos", "/v1/tasks/video/")]
        failed = served.end_of(served.submit("burst"))
        assert failed["status"] == "failed" and failed["error"]["type"] == "RuntimeError"
        texts += [str(failed), served.client.get(f"/v1/videos/{failed['id']}/events").text]
        monkeypatch.setattr(served.jobs, "list", lambda *more, **options: 1 / 0)
        broken = served.client.get("/v1/videos")
        assert broken.status_code == 500 and broken.json()["error"]["type"] == "InternalError"
        texts.append(broken.text)
    assert len(texts) > 30
    assert not [text for text in texts if SECRETS.search(text)]
