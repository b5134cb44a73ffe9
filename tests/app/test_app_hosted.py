"""A launched page as on a Space, with and without ZeroGPU; here without any GPU.

Covered: it starts, hides its machine, and names its limits; on ZeroGPU the visitor's own request reserves GPU time,
runs the engine, and ends the run when the visitor leaves.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from page_engine import Painter
from patience import eventually
from studio_app import ROOT, Page, Refused, launched

pytestmark = pytest.mark.multi

HIDDEN = {"files", "offload", "attention", "add_lora"}


def shown(config: dict[str, Any]) -> set[str]:
    return {c["props"].get("elem_id") for c in config["components"] if c["props"].get("visible", True) is True}


def test_a_space_shows_nothing_of_its_machine(space: Page) -> None:
    config = space.http.get("/config").json()
    assert {"prompt", "generate", "preset"} <= shown(config)
    assert not HIDDEN & shown(config)
    text = json.dumps([c["props"] for c in config["components"]])
    assert str(space.folder) not in text and str(ROOT) not in text and "models_dir" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "x" * 2001}, "allows 2000"),
        ({"prompt": "x", "settings": {"frames": 121}}, "allows 81"),
        (
            {"prompt": "x", "preset": "t2v_distill_lora", "settings": {"height": 720, "width": 1344, "frames": 5}},
            "allows 921600",
        ),
        ({"prompt": "x", "preset": "demo_t2v_base", "settings": {"steps": 60}}, "allows 50"),
    ],
)
def test_a_space_has_limits_and_names_them(space: Page, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        space.ask("generate", **changes)


def test_a_space_takes_no_large_upload(space: Page) -> None:
    small = space.http.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 1_000_000)})
    assert small.status_code == 200
    large = space.http.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 33_500_000)})
    assert large.status_code == 413


SPACES = '''"""Replaces Hugging Face's package of this name: lends a GPU to a generator function."""
import inspect
import pathlib


def GPU(duration):
    def lend(function):
        assert inspect.signature(duration).parameters == inspect.signature(function).parameters

        def lent(*arguments):
            pathlib.Path(__file__).with_name("lent.txt").open("a").write(f"{duration(*arguments)}\\n")
            yield from function(*arguments)

        return lent

    return lend
'''


@pytest.fixture(scope="module")
def zerogpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("zerogpu")
    (folder / "spaces.py").write_text(SPACES)
    variables: dict[str, Any] = {"SPACE_ID": "someone/studio", "SPACES_ZERO_GPU": "true", "PYTHONPATH": str(folder)}
    with launched(folder / "outputs", LIGHTX2V_PRESET="demo_t2v_distill_lora", **variables) as started:
        yield started


def test_zerogpu_has_one_preset_and_runs_it_in_the_visitors_request(zerogpu: Page) -> None:
    assert [preset["name"] for preset in zerogpu.ask("presets")] == ["demo_t2v_distill_lora"]
    config = zerogpu.http.get("/config").json()
    assert not HIDDEN & shown(config)
    seen = list(generate(zerogpu, config, "a red ball rolls left over green grass at night"))
    states = [state for text in seen for state in ("running", "done") if f'data-state=\\"{state}\\"' in text]
    assert states[0] == "running" and states[-1] == "done"
    assert any("preview.jpg?step=" in text for text in seen), "each step is shown"
    lent = (zerogpu.folder.parent / "lent.txt").read_text().split()
    assert lent and 20 <= int(lent[-1]) <= 300
    assert list(zerogpu.folder.glob("*.mp4"))


def test_on_zerogpu_only_the_page_makes_videos(zerogpu: Page) -> None:
    with pytest.raises(Refused, match="Open the page"):
        zerogpu.ask("generate", prompt="a red ball")


def test_a_visitor_who_leaves_gives_the_gpu_back(zerogpu: Page) -> None:
    """The run of a closed tab ends at its next step, long before it is done."""
    config, prompt = zerogpu.http.get("/config").json(), "a slow ball that nobody waits for"
    videos = set(zerogpu.folder.glob("*.mp4"))
    many = ", ".join(str(1000 - 10 * step) for step in range(40))
    for line in generate(zerogpu, config, prompt, denoising_step_list=many):
        if "preview.jpg?step=" in line:
            break  # the connection is closed with the tab
    ended = eventually(lambda: [e for e in zerogpu.painted if e["event"] == "end" and e["prompt"] == prompt])
    began = next(e for e in zerogpu.painted if e["event"] == "begin" and e["prompt"] == prompt)
    assert ended[0]["at"] - began["at"] < 0.5 * 40 * Painter.slow_seconds
    assert set(zerogpu.folder.glob("*.mp4")) == videos, "no video was written"
    list(generate(zerogpu, config, "the next one has the GPU"))


def generate(page: Page, config: dict[str, Any], prompt: str, **values: Any) -> Iterator[str]:
    """The messages that the Generate button's event sends to the browser."""
    components = {c["id"]: c for c in config["components"]}
    names = {id: component["props"].get("elem_id") for id, component in components.items()}
    button = next(id for id, name in names.items() if name == "generate")
    event = next(d for d in config["dependencies"] if any(t == [button, "click"] for t in d["targets"]))
    values = {"prompt": prompt, **values}
    data = [values.get(names[id], components[id]["props"].get("value")) for id in event["inputs"]]
    session = secrets.token_hex(6)
    body = {"data": data, "fn_index": event["id"], "session_hash": session}
    assert page.http.post("/gradio_api/queue/join", json=body).status_code == 200
    with page.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            yield line
            if "process_completed" in line:
                assert '"success":true' in line.replace(" ", ""), line[:500]
                return


def test_a_local_page_shows_what_a_space_hides(page: Page) -> None:
    assert shown(page.http.get("/config").json()) >= {"files", "offload"}
