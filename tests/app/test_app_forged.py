"""Requests to gradio's own API as no browser sends them: refused in one line each."""

from __future__ import annotations

import json
import secrets
from typing import Any

import httpx
import pytest
from page_events import Keyboard
from patience import eventually
from studio_app import LEAKS, Page

pytestmark = pytest.mark.multi

FILE = {"_type": "gradio.FileData"}
PATHS: list[Any] = [
    *(
        {"path": path, "meta": FILE}
        for path in ("/etc/passwd", "../jobs.sqlite", "/proc/self/mem", "http://127.0.0.1:1/a.png", "a\0b", "\ud83d")
    ),
    {"path": "x" * 5000, "meta": FILE},
    {"path": "data:image/png;base64,AAAA", "meta": FILE},
    {"url": "http://127.0.0.1:1/a.png", "meta": FILE},
    [{"path": "/etc/passwd", "meta": FILE}],
    {"x": {"y": [{"path": "/etc/passwd", "meta": FILE}]}},
    {"__type__": "update", "value": {"path": "/etc/passwd", "meta": FILE}},
]


def post(page: Page, path: str, body: Any) -> httpx.Response:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return eventually(
        lambda: (r := page.http.post(f"/gradio_api/{path}", content=text, headers=headers)).status_code != 429 and r
    )


def said_by(page: Page, answer: Any) -> list[str]:
    """Warnings and tracebacks in the log since `answer` was asked for."""
    before = len(page.said)
    answer()
    return [
        line for line in page.said[before:].splitlines() if "WARNING" in line or line.startswith(("Traceback", "ERROR"))
    ]


@pytest.mark.parametrize("value", PATHS, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode())
def test_a_path_in_place_of_any_value_is_refused_in_one_line(page: Page, keyboard: Keyboard, value: Any) -> None:
    event = keyboard.event("generate", "click")
    wrong = []
    for place in range(0, len(event["inputs"]), 7):
        data = [keyboard.components()[id]["props"].get("value") for id in event["inputs"]]
        data[place] = value
        body = {"data": data, "fn_index": event["id"], "session_hash": secrets.token_hex(6), "event_data": value}
        answers: list[httpx.Response] = []
        lines = said_by(page, lambda body=body, answers=answers: answers.append(post(page, "run/predict", body)))
        answer = answers[0]
        refused = answer.status_code == 422 and len(lines) == 1 and "a request was refused: " in lines[0]
        if not (refused or answer.status_code == 200 and not lines) or len("".join(lines)) > 400:
            wrong.append((place, answer.status_code, lines))
        assert not LEAKS.search(answer.text)
    assert not wrong


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("run/predict", {"data": [], "fn_index": 2}),
        ("run/predict", {"data": [], "fn_index": 10**9}),
        ("run/predict", {"data": "x", "fn_index": 2}),
        ("queue/join", {"data": [], "fn_index": 10**9, "session_hash": "s"}),
        ("call/nothing", {"data": []}),
        ("call/v2/nothing", {}),
        ("call/v2/generate", {}),
        ("call/v2/generate", {"prompt": "x", "meta": FILE}),
        ("call/v2/generate", {"nothing": 1}),
        ("call/v2/generate", {"prompt": "x", "steps": 5}),
        ("call/v2/generate", {"prompt": "x", "loras": [{"path": "x"}]}),
        ("call/v2/status", {}),
        ("call/v2/presets", {"prompt": "x"}),
        ("api/nothing", {"data": []}),
        ("cancel", b'{"data":[1e999]}'),
        ("reset", b'{"data":[1e999]}'),
        ("component_server", {"component_id": 10**9, "fn_name": "x", "data": [], "session_hash": "s"}),
    ],
    ids=str,
)
def test_events_that_do_not_exist_or_do_not_fit_are_refused(page: Page, path: str, body: Any) -> None:
    answers: list[httpx.Response] = []
    lines = said_by(page, lambda: answers.append(post(page, path, body)))
    assert 400 <= answers[0].status_code < 500, answers[0].text[:300]
    assert len(lines) <= 1 and "Traceback" not in str(lines) and not LEAKS.search(answers[0].text)


@pytest.mark.parametrize(
    "wrong", [[], {}, 7, True, [["x"]], {"path": 7}, "x" * 5000], ids=lambda wrong: str(wrong)[:20]
)
def test_the_four_endpoints_refuse_values_of_a_wrong_type_by_name(page: Page, wrong: Any) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [("status", {"id": wrong}), ("cancel", {"id": wrong})]
    calls += [("generate", {"prompt": "x", name: wrong}) for name in ("preset", "image", "settings", "negative_prompt")]
    before = page.said.count("Traceback")
    for endpoint, values in calls:
        if values.get("settings") == {}:
            continue  # which is none
        event = post(page, f"call/v2/{endpoint}", values).json().get("event_id")
        answer = page.http.get(f"/gradio_api/call/{endpoint}/{event}").text
        assert "event: error" in answer or values.get("image") == {} or values.get("negative_prompt"), (
            endpoint,
            values,
        )
        assert not LEAKS.search(answer) and len(answer) < 6000
    assert page.said.count("Traceback") == before


@pytest.mark.parametrize(
    "address",
    [
        *(
            f"proxy={tail}"
            for tail in ("/etc/passwd%00.mp4", "%00", "http://x:port/a", "https://%C3%A4%E2%80%8B.hf.space/a")
        ),
        *(f"{route}a%00" for route in ("file=", "stream/", "theme.css/", "upload_progress?upload_id=")),
        "file=http://x%00/a.mp4",
    ],
)
def test_an_address_that_no_file_has_is_refused_in_one_line(page: Page, address: str) -> None:
    answers: list[httpx.Response] = []
    lines = said_by(page, lambda: answers.append(page.http.get(f"/gradio_api/{address}")))
    assert 400 <= answers[0].status_code < 500, answers[0].text[:300]
    assert len(lines) <= 1 and "Traceback" not in str(lines) and not LEAKS.search(answers[0].text)
