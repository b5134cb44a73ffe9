"""A launched page with a password, and its start.

Covered: no address that others reach is without a password, except with --public; a wrong or missing password on every
route of the server, with its documentation, files and streams; more requests than a person sends.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from patience import PATIENCE, eventually
from studio_app import LEAKS, Page, launched

pytestmark = pytest.mark.multi

pytestmark = pytest.mark.slow

OPEN = re.compile(
    r"/(login|login_check|token|logout|oauth/\w+|theme\.css|robots\.txt|manifest\.json|favicon\.ico|pwa_icon|pwa_icon/.*"
    r"|static/.*|assets/.*|svelte/.*|gradio_api/(login_check|token|user|theme\.css|app_id|startup-events|dev/reload|heartbeat/.*))?/?"
)
"""Routes that the login form needs, and routes that reveal nothing."""


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page that other machines can reach."""
    with launched(tmp_path_factory.mktemp("locked") / "outputs", "--host", "0.0.0.0") as started:
        yield started


def password(page: Page) -> str:
    return re.findall(r"User studio, password (\S+)", page.said)[0]


@contextmanager
def signed_in(page: Page) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.url, timeout=PATIENCE) as session:
        answer = session.post("/login", data={"username": "studio", "password": password(page)})
        assert answer.status_code == 200, answer.text
        yield session


def test_every_route_asks_for_the_password(locked: Page) -> None:
    routes = json.loads((locked.folder / "routes.json").read_text())
    assert len(routes) > 50, "the routes were listed"
    answers = {}
    for path, methods in routes:
        filled = re.sub(r"\{\w+:path\}", "etc/passwd", path)
        filled = re.sub(r"\{\w+\}", "0" * 32, filled)
        for method in {"GET", "POST", "PUT", "DELETE"} & set(methods):
            if method == "GET" and OPEN.fullmatch(path.replace("{path:path}", "x").replace("{id_or_token}", "x")):
                continue
            with locked.http.stream(method, filled, json={} if method == "POST" else None) as answer:
                answers[method, path.rstrip("/")] = answer.status_code
    wrong = {what: code for what, code in answers.items() if code < 400 or code >= 500}
    assert not wrong, "nothing is served, and nothing breaks"
    ours = {
        what: code for what, code in answers.items() if not what[1].startswith(("/gradio_api", "/login", "/monitoring"))
    }
    assert set(ours.values()) == {401} and list(answers.values()).count(401) > 30


def test_pages_without_a_password_reveal_nothing(locked: Page) -> None:
    page = locked.http.get("/").text
    assert '"auth_required":true' in page
    for told in ("elem_id", "demo_t2v", 'components":[{', str(locked.folder)):
        assert told not in page, told


def test_the_password_is_printed_once(locked: Page) -> None:
    assert locked.said.count(password(locked)) == 1 and len(password(locked)) >= 12


@pytest.mark.parametrize("word", ["", "wrong", "x" * 100_000])
def test_a_wrong_password_is_refused(locked: Page, word: str) -> None:
    answer = locked.http.post("/login", data={"username": "studio", "password": word})
    assert answer.status_code in (400, 401, 413, 422) and not LEAKS.search(answer.text)
    assert not answer.cookies


def test_the_right_password_opens_everything(locked: Page) -> None:
    with signed_in(locked) as session:
        made = locked.ask("generate", session=session, prompt="behind a door", settings={"frames": 5})
        video = eventually(lambda: locked.ask("status", session=session, id=made["id"])["video"])
        assert session.get(f"/{video}").status_code == 200
        assert locked.http.get(f"/{video}").status_code == 401
        assert "elem_id" in session.get("/config").text


def test_a_flood_of_requests_gets_429(locked: Page) -> None:
    with signed_in(locked) as session:
        job = locked.ask("generate", session=session, prompt="a slow one meanwhile", settings={"frames": 5})["id"]
        time.sleep(2)  # the tests before have asked for much, and twenty a second are forgiven

        def post(_: int) -> httpx.Response:
            return session.post("/nothing/of/this/name")

        assert [post(n).status_code for n in range(20)] == [404] * 20, "a burst is served, a flood is not"
        with ThreadPoolExecutor(8) as pool:
            answer = eventually(lambda: next((a for a in pool.map(post, range(80)) if a.status_code == 429), None))
        assert "Wait" in answer.text and answer.headers["retry-after"]
        assert eventually(lambda: locked.ask("status", session=session, id=job)["video"]), "the run continues"


def test_wrong_passwords_are_counted_at_all_doors_together_and_no_header_helps(locked: Page) -> None:
    """The last test of this page: for a minute after it nobody can sign in."""

    def tried(number: int) -> int:
        made_up = {"X-Forwarded-For": f"10.0.0.{number}", "X-Real-IP": f"10.0.1.{number}", "Forwarded": "for=10.0.2.1"}
        ways: list[dict] = [
            {"method": "POST", "url": "/login", "data": {"username": "studio", "password": f"wrong {number}"}},
            {"method": "POST", "url": "/login/", "data": {"username": "studio", "password": f"wrong {number}"}},
            {"method": "GET", "url": "/v1/videos", "auth": ("studio", f"wrong {number}")},
            {"method": "GET", "url": "/docs", "headers": {"X-API-Key": f"wrong {number}"}},
            {"method": "GET", "url": "/metrics", "headers": {"Authorization": f"Bearer wrong {number}"}},
        ]
        way = ways[number % len(ways)]
        return locked.http.request(**{**way, "headers": {**made_up, **way.get("headers", {})}}).status_code

    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(tried, range(60)))
    refused = [code for code in codes if code in (400, 401)]
    assert len(refused) <= 12 and set(codes) <= {400, 401, 429}, "ten, and those of the seconds that this took"
    right = {"username": "studio", "password": password(locked)}
    # The limit on requests of all kinds, which says to wait a few seconds, may hold as well.
    answer = eventually(lambda: "Wait a minute" in (a := locked.http.post("/login", data=right)).text and a)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "60"
    answer = locked.http.get("/v1/videos", auth=("studio", password(locked)))
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "Busy"
    assert locked.http.get("/").status_code == 200 and locked.http.get("/v1/videos").status_code == 401
