"""The page refuses bad requests before gradio sees them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.exposure import Exposure, Limits
from app.web.limits import MAX_JSON, page_limits
from lightx2v.server import limits
from lightx2v.server.limits import RateLimit

HERE = "http://127.0.0.1:7860"


async def read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def client(exposure: Exposure, *, origins: frozenset[str] = frozenset()) -> TestClient:
    routes = [Route(path, read, methods=["GET", "POST"]) for path in ("/", "/gradio_api/upload")]
    return TestClient(Starlette(routes=routes, middleware=[page_limits(exposure, set(origins))]), base_url=HERE)


@pytest.fixture
def here() -> TestClient:
    return client(Exposure(hosts=frozenset({"127.0.0.1", "localhost"}), limits=Limits(upload=5_000_000)))


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:7860"])
def test_a_foreign_host_name_is_refused_on_loopback(here: TestClient, host: str) -> None:
    assert here.get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "localhost:1", "LOCALHOST"])
def test_our_own_names_are_answered(here: TestClient, host: str) -> None:
    assert here.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:7860"])
def test_a_post_from_another_site_is_refused(here: TestClient, origin: str) -> None:
    assert here.post("/", headers={"Origin": origin}).status_code == 403


def test_a_post_from_our_page_or_from_a_script_is_taken(here: TestClient) -> None:
    assert here.post("/", headers={"Origin": HERE}).status_code == 200
    assert here.post("/").status_code == 200
    assert here.post("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_the_share_link_is_our_page_too() -> None:
    shared = client(Exposure(share=True), origins=frozenset({"abc.gradio.live"}))
    assert shared.post("/", headers={"Origin": "https://abc.gradio.live"}).status_code == 200
    assert shared.post("/", headers={"Origin": "https://other.gradio.live"}).status_code == 403


def test_a_large_body_is_refused_whether_or_not_it_says_so(here: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    assert here.post("/", content=b"x" * (MAX_JSON + 1)).status_code == 413
    assert here.post("/", content=endless()).status_code == 413
    assert here.post("/", headers={"Content-Length": "-5"}, content=b"").status_code == 413
    assert here.post("/gradio_api/upload", content=endless()).status_code == 200


def test_a_refusal_repeats_nothing_of_what_was_sent(here: TestClient) -> None:
    answer = here.post("/", content=b"SECRET" * MAX_JSON, headers={"Origin": "https://evil.example"})
    assert "SECRET" not in answer.text and "evil" not in answer.text


@pytest.mark.slow
def test_one_client_cannot_send_a_hundred_requests_a_second(here: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now))
    assert [here.post("/").status_code for _ in range(150)] == [200] * 100 + [429] * 50
    now += 1
    assert [here.post("/").status_code for _ in range(30)] == [200] * 20 + [429] * 10
    assert here.get("/").status_code == 200, "GET requests are not limited"


def test_clients_do_not_share_a_bucket() -> None:
    bucket = RateLimit(per_second=0.001, burst=2)
    assert [bucket.take("a") for _ in range(3)] == [True, True, False]
    assert bucket.take("b")


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EIO, 500)])
def test_an_upload_to_a_full_disk_gets_507(number: int, status: int) -> None:
    async def full(request: Request) -> PlainTextResponse:
        raise OSError(number, "of the disk", "/somebody/uploads/a.png")

    app = Starlette(
        routes=[Route("/gradio_api/upload", full, methods=["POST"])], middleware=[page_limits(Exposure(), set())]
    )
    answer = TestClient(app, base_url=HERE, raise_server_exceptions=False).post("/gradio_api/upload", content=b"x")
    assert answer.status_code == status and "somebody" not in answer.text
    assert ("disk of the server is full" in answer.text) == (status == 507)
