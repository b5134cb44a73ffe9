"""The page's own events, sent by hand as an attacker would who has read its configuration.

Covered: text never becomes a path; hidden events accept only what the page offers; one visitor neither sees nor
touches another's runs, even with the same prompt and image name; forged browser storage gives access to nothing.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from page_events import Keyboard
from patience import eventually
from studio_app import PRESET, Page

pytestmark = pytest.mark.multi


def visitor() -> dict[str, Any]:
    return {"owner": secrets.token_urlsafe(32), "language": "en"}


def began(page: Page, prompt: str) -> bool:
    return any(event.get("prompt") == prompt for event in page.painted)


def test_all_events_but_four_are_private(keyboard: Keyboard) -> None:
    public = [d for d in keyboard.config["dependencies"] if d.get("api_visibility") == "public"]
    assert sorted(d["api_name"] for d in public) == ["cancel", "generate", "presets", "status"]


def test_an_event_sent_by_hand_makes_a_video(page: Page, keyboard: Keyboard) -> None:
    said = keyboard.press("generate", prompt="pressed by hand", **{"lightx2v-studio": visitor()})
    assert "problem" not in str(said["cost"])
    assert eventually(lambda: began(page, "pressed by hand"))


@pytest.mark.parametrize(
    "changes",
    [
        {"offload": "../../etc"},
        {"mode": "v2t"},
        {"width": "/etc/passwd"},
        {"width": 10**9},
        {"width": 33},
        {"frames": 16},
        {"frames": 10**6},
        {"fps": -1},
        {"videos": 1000},
        {"seed": 2**70},
        {"denoising_step_list": "1000; rm -rf /"},
        {"attention": "os.system"},
        {"lora_0_high": "/etc/shadow\x00"},
        {"image_path": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}},
        {"image_path": {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}},
        {"prompt": "x" * 10_001},
        {"prompt": ""},
    ],
    ids=str,
)
def test_hidden_events_accept_only_what_the_page_offers(
    page: Page, keyboard: Keyboard, changes: dict[str, Any]
) -> None:
    prompt = f"out of range {secrets.token_hex(4)}"
    said = keyboard.press("generate", **{"prompt": prompt, "lightx2v-studio": visitor(), **changes})
    assert not said or "problem" in str(said["cost"]), "the cost line shows a refusal"
    assert not began(page, prompt)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**20])
def test_a_number_with_twenty_digits_is_refused_with_a_message(keyboard: Keyboard, number: int) -> None:
    said = keyboard.press("generate", prompt="a red ball", seed=number, **{"lightx2v-studio": visitor()})
    assert "problem" in said["cost"] and "seed is" in said["cost"]


def test_a_lone_surrogate_in_the_prompt_is_dropped(page: Page, keyboard: Keyboard) -> None:
    said = keyboard.press("generate", prompt="half a \ud83d ball", **{"lightx2v-studio": visitor()})
    assert "problem" not in said["cost"] and eventually(lambda: began(page, "half a  ball"))


WRONG = [None, [], {"a": 1}, "x", "\ud83d", -1.5, float("nan"), float("inf"), 10**400, "x" * 300_000]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:9].encode("ascii", "replace").decode())
def test_values_of_a_wrong_type_cause_no_traceback(page: Page, keyboard: Keyboard, wrong: Any) -> None:
    me = {"lightx2v-studio": visitor()}
    keyboard.press("generate", prompt="a run to click on", **me)
    seen = eventually(lambda: 'data-id="' in str(s := keyboard.press("timer", "tick", **me)) and str(s))
    id = seen.split('data-id="')[1][:32]
    before = page.said.count("Traceback")
    fields = {"mode", "size", "shape", "length", "preset_name", "prompt", "offload", "attention", "enable_cfg"}
    fields |= {"width", "fps", "seed", "videos", "per_line", "denoising_step_list", "lora_0_high"}
    sent: list[tuple[str, str, dict[str, Any]]] = [("timer", "tick", {name: wrong}) for name in sorted(fields)]
    sent += [(name, "input", {name: wrong}) for name in ("mode", "size", "shape", "length", "height")]
    sent += [("generate", "click", {name: wrong, "width": 33}) for name in ("mode", "preset_name", "offload")]
    sent += [("preset", "pick", {"sent": {"name": wrong}}), ("timer", "tick", {"versions": wrong})]
    clicks = [wrong, {"act": wrong, "id": id}, {"act": "restore", "id": wrong}]
    clicks += [
        {"act": act, "id": id, "name": wrong, "text": wrong, "picture": wrong} for act in ("language", "example")
    ]
    sent += [("history", "act", {"sent": click}) for click in clicks]
    kept = [wrong, {"preset": PRESET}, *({"preset": PRESET, "task": "t2v", name: wrong} for name in ("prompt", "size"))]
    for form in kept:
        sent.append(("page", "load", {"lightx2v-studio": {**visitor(), "form": form}}))
    for target, kind, changes in sent:
        answer = keyboard.answer(target, kind, **{**me, **changes})
        assert answer.status_code == 200, (target, kind, str(changes)[:200], answer.text[:200])
        assert len(answer.content) < 200_000, "long text is cut wherever the page shows it"
    assert page.said.count("Traceback") == before


def test_two_visitors_do_not_see_each_others_runs(page: Page, keyboard: Keyboard) -> None:
    """The same prompt and settings from two visitors make two runs, each with its own file."""
    alice, bob = visitor(), visitor()
    runs = {}
    for person in (alice, bob):
        made = keyboard.press("generate", prompt="the same secret garden", **{"lightx2v-studio": person})
        look = {"lightx2v-studio": made["lightx2v-studio"]}
        seen = eventually(
            lambda look=look: 'data-state="done"' in str(s := keyboard.press("timer", "tick", **look)) and s
        )
        runs[person["owner"]] = seen
    a, b = (str(seen["history"]) for seen in runs.values())
    assert a.count('data-act="show"') == b.count('data-act="show"') == 1
    ids = [text.split('data-id="')[1][:32] for text in (a, b)]
    assert ids[0] != ids[1] and ids[0] not in b and ids[1] not in a
    assert all((page.folder / f"{id}.mp4").is_file() for id in ids)

    # Bob knows Alice's id by some accident. Each of these would show or change her run.
    for act in (
        "show",
        "stop",
        "cancel",
        "delete",
        "restore",
        "same_seed",
        "again",
        "last_frame",
        "compare",
        "edit",
        "up",
    ):
        said = keyboard.press("history", "act", sent={"act": act, "id": ids[0]}, **{"lightx2v-studio": bob})
        assert "no longer exists" in str(said["cost"]) and "secret garden" not in str(said.get("prompt")), act
    for claim in ({"job": ids[0], "pinned": True}, {"compared": [ids[0], ids[0]]}, {"editing": ids[0]}):
        said = keyboard.press("timer", "tick", **{"lightx2v-studio": {**bob, **claim}})
        shown = {name: html for name, html in said.items() if name != "lightx2v-studio"}
        assert ids[0] not in str(shown), "only what Bob himself sent comes back"
    assert (page.folder / f"{ids[0]}.mp4").is_file()


@pytest.mark.parametrize("text", ["/etc/passwd", "../jobs.sqlite", {"path": "/etc/passwd"}], ids=str)
def test_the_text_of_a_field_never_becomes_a_path(page: Page, keyboard: Keyboard, text: Any) -> None:
    said = keyboard.press("generate", prompt=text, negative_prompt="/etc/shadow", **{"lightx2v-studio": visitor()})
    assert said and eventually(lambda: began(page, str(text)))
    request = next(e["request"] for e in page.painted if e.get("prompt") == str(text) and "request" in e)
    assert request["image_path"] is None and request["prompt"] == str(text)


def test_a_preset_name_never_becomes_a_path(keyboard: Keyboard) -> None:
    pressed = [
        keyboard.press("shape", "input", shape="1:1", size=None, preset_name=name)
        for name in (PRESET, "presets/t2v_base.json")
    ]
    assert pressed[0]["height"] and pressed[0]["height"] == pressed[1]["height"]


def test_an_image_path_in_forged_storage_is_not_read(keyboard: Keyboard) -> None:
    form = {"preset": "demo_i2v_distill_lora", "task": "i2v", "prompt": "kept"}
    form |= dict.fromkeys(("image_path", "last_frame_path"), "assets/screenshots/running.webp")
    said = keyboard.press("page", "load", **{"lightx2v-studio": {**visitor(), "form": form}})
    assert said["prompt"] == "kept" and "running" not in str(said) and "<img" not in said["crop"]
    assert not any("path" in (said[name] or {}) for name in ("image_path", "last_frame_path"))


@pytest.mark.parametrize("stored", [None, [], "x", {"owner": ""}, {"owner": "short"}, {"owner": ["a"] * 40}], ids=str)
def test_forged_storage_starts_a_new_session_without_runs(page: Page, keyboard: Keyboard, stored: Any) -> None:
    page.make("somebody's", settings={"frames": 5})
    seen = keyboard.press("timer", "tick", **{"lightx2v-studio": stored})
    assert "restore" not in str(seen["history"]).split("drop_hint")[0].split("</header>")[-1]
    assert len(seen["lightx2v-studio"]["owner"]) >= 32


def test_an_open_page_does_not_grow_in_memory(page: Page, keyboard: Keyboard) -> None:
    def resident() -> int:
        status = Path(f"/proc/{page.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024

    sent = {"session": "stays open", "lightx2v-studio": visitor()}

    def grown(looks: int) -> int:
        before = resident()
        for _ in range(looks):
            keyboard.press("timer", "tick", **sent)
        return resident() - before

    grown(30)
    # What else the page does meanwhile may take some once; what is kept of every look is taken every time.
    assert any(grown(80) < 10 for _ in range(4)), "MB; one copy of every field per tick would take 20"
