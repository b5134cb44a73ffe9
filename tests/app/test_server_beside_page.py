"""The API on the page's port: the same job manager, the page's password as its key, and no API on a public page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_engine import Garage
from patience import eventually
from served import SIZE
from starlette.applications import Starlette
from starlette.testclient import TestClient
from studio_app import Page

from app.backend.studio import Studio
from app.exposure import PUBLIC_LIMITS, Exposure
from app.web import limits
from app.web.api_routes import api_routes


@pytest.mark.multi
def test_the_page_and_the_api_share_a_port_and_a_queue(page: Page) -> None:
    assert "gradio" in page.http.get("/").text
    assert page.http.get("/health").json() == {"status": "ok"}
    models = page.http.get("/v1/models").json()["data"]
    assert models[0]["id"] == "demo_t2v_distill_lora" and len(models) > 5
    made = page.http.post("/v1/videos", json={"prompt": "from the api", **SIZE})
    assert made.status_code == 200, made.text
    id = made.json()["id"]
    eventually(lambda: page.http.get(f"/v1/videos/{id}").json()["status"] == "completed")
    assert page.http.get(f"/v1/videos/{id}/content").content[4:8] == b"ftyp"
    assert any(event.get("prompt") == "from the api" for event in page.painted)
    theirs = page.ask("generate", prompt="from the page")["id"]
    assert page.http.get(f"/v1/videos/{theirs}").status_code == 404
    assert "/v1/videos/{id}/events" in page.http.get("/openapi.json").json()["paths"]
    big = {"prompt": "x", "input_reference": "A" * 3_000_000}
    assert page.http.post("/v1/videos", json=big).status_code == 422  # read, and no picture


def client(folder: Path, exposure: Exposure, **variables: str) -> tuple[Studio, TestClient]:
    lend_gpu: Any = (lambda duration: lambda run: run) if exposure.zerogpu else None
    studio = Studio(Garage(), folder, exposure, lend_gpu=lend_gpu)
    return studio, TestClient(Starlette(routes=api_routes(studio, variables)))


def test_the_pages_password_is_the_key(tmp_path: Path) -> None:
    exposure = Exposure(open_to_others=True, user="studio", password="of-the-page", limits=PUBLIC_LIMITS)
    studio, http = client(tmp_path, exposure)
    try:
        assert http.get("/v1/videos").status_code == 401
        assert http.get("/v1/videos", auth=("studio", "of-the-page")).status_code == 200
        body = {"prompt": "a cat", **SIZE, "num_frames": 101}
        refused = http.post("/v1/videos", json=body, headers={"X-API-Key": "of-the-page"})
        assert refused.status_code == 422 and "this page allows 81" in refused.json()["error"]["message"]
    finally:
        studio.close()


def test_only_the_operators_key_opens_the_workers_and_the_pages_password_does_not(tmp_path: Path) -> None:
    exposure = Exposure(open_to_others=True, user="studio", password="of-the-page")
    studio, http = client(tmp_path, exposure, LIGHTX2V_OPERATOR_KEY="of-the-operator")
    try:
        assert http.get("/v1/workers", auth=("studio", "of-the-page")).status_code == 403
        answer = http.get("/v1/workers", auth=("", "of-the-operator"))
        assert [worker["id"] for worker in answer.json()["data"]] == ["this machine"]
    finally:
        studio.close()


@pytest.mark.parametrize(
    ("exposure", "variables", "there"),
    [
        (Exposure(open_to_others=True), {}, False),
        (Exposure(open_to_others=True), {"LIGHTX2V_API_KEY": "one-long-enough"}, True),
        (Exposure(open_to_others=True, hosted=True, zerogpu=True), {"LIGHTX2V_API_KEY": "one-long-enough"}, False),
        (Exposure(), {}, True),
    ],
)
def test_a_public_page_has_no_api_without_a_key(
    tmp_path: Path, exposure: Exposure, variables: dict[str, str], there: bool
) -> None:
    studio, http = client(tmp_path, exposure, **variables)
    try:
        key = {"Authorization": f"Bearer {variables['LIGHTX2V_API_KEY']}"} if variables else {}
        assert http.get("/v1/models", headers=key).status_code == (200 if there else 404)
        assert http.get("/v1/models").status_code == (404 if not there else 401 if variables else 200)
    finally:
        studio.close()


def test_a_body_beyond_the_limit_is_refused_by_the_api_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BODY", 1_000_000)
    studio = Studio(Garage(), tmp_path, Exposure())
    app = Starlette(routes=api_routes(studio, {}), middleware=[limits.page_limits(studio.exposure, set())])
    try:
        chunks = (b"x" * 100_000 for _ in range(20))
        response = TestClient(app).post("/v1/videos", content=chunks, headers={"Content-Type": "application/json"})
        assert response.status_code == 413 and "at most 1 MB" in response.json()["error"]["message"]
    finally:
        studio.close()
