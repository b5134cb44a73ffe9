"""The HTML of the page: its content, in both languages, and that text never becomes markup."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import string
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request as HttpRequest

from app.backend.model_files import Download, FilesStatus, FileState
from app.backend.offer import settings_of
from app.form.fields import CONTROLS
from app.strings import TABLES, Words, preferred
from app.views import cards, compare, numbers, panels, report, stage
from app.views.html import button, esc, tag
from app.views.retries import retry_labels, retry_options
from app.views.snippets import snippets
from lightx2v import infer
from lightx2v.config.request import Request
from lightx2v.cost.run_time import Prediction
from lightx2v.jobs.store import Job
from lightx2v.media.framing import framing_of
from lightx2v.progress import Progress
from lightx2v.server.request_bodies import VideoBody, read_body

ROOT = Path(__file__).parents[2]
EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' onmouseover=alert(3) {{7}} ${7}"
ROOM = 19 * 2**30


def job(state: str = "running", **changes: Any) -> Job:
    settings = settings_of("demo_t2v_distill_lora")
    request = Request(prompt=changes.pop("prompt", "a red ball"), **{**settings.request, "seed": 7})
    base: dict[str, Any] = {
        "id": "0" * 32, "state": state, "owner": "o", "preset": "demo_t2v_distill_lora", "client_id": None,
        "config": settings.engine, "request": request, "created": 1.0, "started": 2.0,
    }  # fmt: skip
    if state == "succeeded":
        base |= {"finished": 9.0, "result": result()}
    return Job(**{**base, **changes})


def result(**changes: Any) -> dict[str, Any]:
    timings = {
        "seconds": {"load": 1.0, "text": 0.2, "denoise": 4.0, "decode": 0.7, "write": 0.1},
        "experts": {"high": 2.5, "low": 1.5},
        "steps": [{"expert": e, "seconds": s} for e, s in (("high", 1.5), ("high", 1.0), ("low", 0.75), ("low", 0.75))],
        "total": 6.0,
        "peak_vram": {"denoise": {"allocated": 14 * 2**30, "reserved": 15 * 2**30}},
        "peak_rss": 2**30,
    }
    base = {
        "seed": 7, "width": 96, "height": 96, "frames": 17, "fps": 16.0, "file_bytes": 8123, "device": "cpu",
        "attention": {"self": "torch_sdpa", "cross": "torch_sdpa", "reason": "fastest here"}, "timings": timings,
        "text_tokens": {"prompt": 12}, "warnings": [], "loras": [], "request": {}, "config": {},
    }  # fmt: skip
    return {**base, **changes}


class Outline(HTMLParser):
    """The tags and attributes as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "input", "br", "source"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


FAILURE = {"type": "OutOfMemory", "message": EVIL}
EVERY_PART = {
    "stage": lambda w, j: stage.stage(w, j, sample=False),
    "status": lambda w, j: stage.status(w, j),
    "report": lambda w, j: report.report(w, replace(j, state="succeeded", result=result(device=EVIL, warnings=[EVIL]))),
    "history": lambda w, j: cards.history(w, [replace(j, state="succeeded", result=result())], "", ()),
    "queue": lambda w, j: cards.queue(w, [j, replace(j, id="1" * 32, state="queued", position=1)], ""),
    "compare": lambda w, j: compare.compare(w, [replace(j, state="succeeded", result=result())] * 2),
    "benchmark": lambda w, j: compare.benchmark(w, [replace(j, state="succeeded", result=result(device=EVIL))]),
    "error": lambda w, j: stage.stage(
        w, replace(j, state="failed", error={"type": "X", "message": EVIL}), sample=False
    ),
    "problem": lambda w, j: panels.problem(EVIL),
    "files": lambda w, j: panels.file_list(w, FilesStatus(files=(FileState(name=EVIL, ready=False),), disk_free=1)),
}


@pytest.mark.parametrize("part", EVERY_PART)
@pytest.mark.parametrize("language", TABLES)
def test_text_never_becomes_markup(part: str, language: str) -> None:
    evil = job(prompt=EVIL, progress=Progress(stage="decode", step=1, total=3, message=EVIL))
    html = EVERY_PART[part](Words(language), evil)
    outline = Outline(html)
    assert not outline.open, f"not closed: {outline.open}"
    assert "script" not in outline.tags
    names = {name for name, _ in outline.attributes}
    assert not {name for name in names if name.startswith("on")}, names
    links = [value or "" for name, value in outline.attributes if name in ("src", "href")]
    assert all(re.fullmatch(r"studio/[\w./?=]+", link) for link in links), links


def test_attributes_are_escaped_and_false_ones_left_out() -> None:
    assert tag("a", "x", href='"<', hidden=False, download=True, id=None) == '<a href="&quot;&lt;" download>x</a>'
    assert 'data-id="&quot;"' in button("x", "stop", id='"')
    assert esc("<'&\">") == "&lt;&#x27;&amp;&quot;&gt;"


def test_both_languages_have_all_texts_with_the_same_placeholders() -> None:
    english, chinese = TABLES["en"], TABLES["zh"]
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert text.strip() and chinese[key].strip(), key
        blanks = [{name for _, name, _, _ in string.Formatter().parse(t) if name} for t in (text, chinese[key])]
        assert blanks[0] == blanks[1], key
    han = [key for key, text in chinese.items() if re.search(r"[一-鿿]", text)]
    assert len(han) > 0.95 * len(chinese)


def test_no_text_is_missing_or_unused() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "app").rglob("*.py") if path.name != "strings.py")
    strings = (ROOT / "app" / "strings.py").read_text()
    used = set(re.findall(r'words\(\s*"(\w+)"', source)) | set(re.findall(r'"(\w+)"', source)) | set(CONTROLS)
    prefixes = set(re.findall(r'"(\w+_)" \+', source + strings)) | set(re.findall(r'f"(\w+_)\{', source))
    idle = [
        k
        for k in TABLES["en"]
        if k not in used and not any(k.startswith(p) for p in prefixes) and f'self("{k}")' not in strings
    ]
    assert not idle, idle
    missing = (set(re.findall(r'words\(\s*"(\w+)"\s*[,)]', source)) | set(CONTROLS)) - TABLES["en"].keys()
    assert not missing, missing


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-GB,en", "en"), ("fr,zh-TW;q=0.5", "zh"), ("fr", "en"),
        ("en;q=0.1,zh;q=0.9", "zh"), (";;;q=x,,", "en"), ("a," * 5000, "en"),
    ],
)  # fmt: skip
def test_the_language_follows_the_browser(header: str, language: str) -> None:
    assert preferred(header) == language


def test_the_bar_has_the_phases_of_this_run() -> None:
    request = job().request
    assert stage.phases_of(request, None) == ["load", "text", "high", "low", "decode", "write"]
    image = Request(prompt="x", task="i2v", image_path="a.png")
    downloading = Progress(stage="download", step=1, total=9)
    assert stage.phases_of(image, downloading) == list(stage.PHASES)
    assert stage.phase_fill(request, Progress(stage="denoise", step=1, total=4)) == ("high", 0.5)
    assert stage.phase_fill(request, Progress(stage="denoise", step=3, total=4)) == ("low", 0.5)


def test_progress_only_grows() -> None:
    request = job().request
    events = [
        Progress(stage=s, step=i, total=n)
        for s, n in (("text", 1), ("denoise", 4), ("decode", 5))
        for i in range(n + 1)
    ]
    shares = [stage.overall(request, event) for event in events]
    assert shares == sorted(shares) and 0 < shares[-1] <= 1


def test_a_running_step_is_named_with_its_expert_and_time_left() -> None:
    html = stage.status(Words("en"), job(progress=Progress(stage="denoise", step=2, total=4, eta=9.0, expert="high")))
    assert "Step 3 of 4" in html and "low-noise expert" in html, "the step that runs, not the last that ended"
    assert "9.0" in html and "left" in html and 'role="progressbar"' in html and 'data-act="stop"' in html


@pytest.mark.parametrize(
    ("language", "after", "said"),
    [
        ("en", 2, "went on at step 3 of 4 after a restart"),
        ("en", 4, "went on at decoding after a restart"),
        ("zh", 2, "重启后从第 3/4 步继续"),
        ("zh", 4, "重启后从解码继续"),
    ],
)
def test_a_run_that_went_on_after_a_restart_says_where(language: str, after: int, said: str) -> None:
    words, done = Words(language), job("succeeded", result=result(resumed_after=after))
    assert said in stage.status(words, done) and said in report.report(words, done)
    event = Progress(stage="denoise", step=after, total=4, expert="low", eta=None, resumed_after=after)
    html = stage.status(words, job(progress=event))
    assert said in html and words("a_step", time="") not in html, "no step of this process is done yet"
    for whole in (job("succeeded"), job(progress=Progress(stage="denoise", step=2, total=4))):
        assert words("went_on", step="", total="")[:4] not in stage.status(words, whole)


def test_a_report_holds_every_number() -> None:
    html = report.report(Words("en"), job("succeeded"), predicted=5.5)
    for shown in ("6.0", "0.83", "14.0", "15.0", "5.5", "8.1", "torch_sdpa (fastest here)", "96 × 96", "17 frames"):
        assert shown in html, shown
    assert "peak VRAM" in html
    without = result(timings={**result()["timings"], "peak_vram": None})
    assert "peak VRAM" not in report.report(Words("en"), job("succeeded", result=without))


def test_the_report_has_the_seconds_of_interpolation_and_a_link_to_the_original_that_was_kept() -> None:
    html = report.report(Words("en"), job("succeeded"))
    assert "original.mp4" not in html and "c-interpolate" not in html
    timings = {**result()["timings"], "seconds": {**result()["timings"]["seconds"], "interpolate": 3.25}}
    kept = job("succeeded", result=result(timings=timings, original_path="/videos/x.original.mp4"))
    html = report.report(Words("en"), kept)
    assert f'href="studio/{kept.id}/original.mp4?download"' in html and "/videos/x" not in html
    assert "c-interpolate" in html and "interpolate 3.2" in html


def test_lora_matches_are_in_the_report() -> None:
    lora = {"path": "/a/b/style_high.safetensors", "strength": 1.0, "applied": 400, "total": 402, "expert": "high"}
    html = report.report(Words("en"), job("succeeded", result=result(loras=[lora])))
    assert "style_high.safetensors: 400 of 402 matched" in html and "/a/b" not in html
    lora["notes"] = ["The alpha is from the file's header."]
    html = report.report(Words("en"), job("succeeded", result=result(loras=[lora])))
    assert "400 of 402 matched · The alpha is from the file&#x27;s header." in html


def test_out_of_memory_has_retry_options() -> None:
    failed = job("failed", error={"type": "OutOfMemory", "message": "no room"})
    options = retry_options(failed, offload=True)
    assert [*options] == ["retry_offload", "retry_smaller", "retry_shorter", "retry"]
    assert "retry_offload" not in retry_options(failed, offload=False)
    large = replace(failed, request=Request(prompt="x", height=720, width=1280))
    smaller = retry_options(large, offload=False)
    assert smaller["retry_smaller"][1] == replace(large.request, height=480, width=832)
    assert retry_labels(Words("en"), smaller)["retry_smaller"] == "Try at 832 × 480"
    config, request = options["retry_offload"]
    assert config.cpu_offload is True and request == failed.request
    assert options["retry_shorter"][1].frames == 5
    assert options["retry"] == (failed.config, failed.request)
    for state in ("queued", "running", "succeeded"):
        assert not retry_options(replace(failed, state=state), offload=True)


def test_the_cost_is_green_amber_or_red_and_says_so_in_words() -> None:
    here = FilesStatus(files=(FileState(name="a", ready=True),), disk_free=1)
    words, prediction = Words("en"), Prediction(stages={"denoise": 98.0}, source="measured")
    room = ROOM
    for need, level, said in ((10, "ok", "10.0"), (18.5, "tight", "tight"), (30, "over", "turn offload on")):
        html = panels.cost_line(words, prediction, int(need * 2**30), here, room, 1)
        assert f'class="{level}"' in html and said in html
    assert "98" in html and "nothing to download" in html and "cached" not in html
    states = [FileState(name=name, ready=True, here=100, cached=cached) for name, cached in (("a", 100), ("b", 92))]
    cached = FilesStatus(files=tuple(states), disk_free=1)
    assert "nothing to download, files cached in memory" in panels.cost_line(words, prediction, 1, cached, room, 1)
    missing = FilesStatus(
        files=(FileState(name="a", ready=False, bytes=5_000_000_000, here=1_000_000_000),), disk_free=1
    )
    assert "4.0\u202fGB to download" in panels.cost_line(words, None, None, missing, None, 1)


def test_a_download_shows_speed_and_can_be_cancelled() -> None:
    download = Download(done=10**9, total=4 * 10**9, per_second=5e7, eta=60.0)
    status = FilesStatus(
        files=(FileState(name="a/high_noise_model/", ready=False),), disk_free=10**11, download=download
    )
    html = panels.file_list(Words("en"), status)
    assert "1.0\u202fGB of 4.0\u202fGB · 50.0\u202fMB/s · 60\u202fs left" in html
    assert 'data-act="cancel_download"' in html and "width:25.0%" in html and "High-noise expert" in html


def test_the_crop_preview_is_what_the_model_sees() -> None:
    from PIL import Image

    picture = Image.new("RGB", (1200, 900))
    html = panels.crop_preview(Words("en"), picture, framing_of((1200, 900), 480, 832, "fixed_shape"))
    box = framing_of((1200, 900), 480, 832, "fixed_shape").box
    assert f"top:{100 * box[1] / 900:.3f}%" in html and f"height:{100 * (box[3] - box[1]) / 900:.3f}%" in html
    assert "1200 × 900 → 832 × 480" in html and "bright part" in html
    assert "whole image" in panels.crop_preview(Words("en"), picture, framing_of((1200, 900), 480, 832))


def test_settings_pasted_into_the_command_line_ask_for_the_same_video(capsys: pytest.CaptureFixture[str]) -> None:
    odd = job("succeeded", prompt='it\'s a "ball"; rm -rf $HOME `x`\nsecond line')
    odd = replace(odd, request=replace(odd.request, width=128, guidance=(2.0, 1.0), enable_cfg=True, shift=3.0))
    words = shlex.split(snippets(odd)["CLI"].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "lightx2v.infer"]
    assert infer.main([*words[3:], "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)["request"]
    assert Request.from_json(shown) == odd.request
    compile(snippets(odd)["Python"], "snippet", "exec")
    assert json.loads(snippets(odd)["JSON"])["request"]["prompt"] == odd.request.prompt


@pytest.mark.parametrize("image", [None, "assets/demo/examples/blue_ball_beach.png"])
def test_settings_pasted_into_curl_are_what_the_server_takes(image: str | None) -> None:
    odd = job("succeeded", prompt='@it\'s a "ball"; `x`\nsecond line')
    request = replace(odd.request, width=128, guidance=(2.0, 1.0), enable_cfg=True, shift=3.0, frames=9, fps=8.0)
    if image:
        request = replace(request, task="i2v", image_path=image)
    odd = replace(odd, request=request, config=replace(odd.config, cpu_offload=True))
    words = shlex.split(snippets(odd, address="http://127.0.0.1:7899", key=True)["curl"].replace("\\\n", " "))
    assert words[:4] == ["curl", "http://127.0.0.1:7899/v1/videos", "-H", "Authorization: Bearer $LIGHTX2V_API_KEY"]
    assert set(words[4::2]) == {"-F", "--form-string"}
    files = {"input_reference": (ROOT / image).read_bytes()} if image else {}
    sent = dict(word.split("=", 1) for word in words[5::2])
    assert {name for name, value in sent.items() if value.startswith("@assets")} == set(files)
    form = {name: value if name not in files else (image, files[name]) for name, value in sent.items()}
    parts = [(name, value if isinstance(value, tuple) else (None, value)) for name, value in form.items()]
    message = httpx.Request("POST", "http://x/v1/videos", files=parts)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": message.read(), "more_body": False}

    headers = [(name.lower().encode(), value.encode()) for name, value in message.headers.items()]
    scope = {"type": "http", "method": "POST", "headers": headers}
    body, pictures = asyncio.run(read_body(HttpRequest(scope, receive), VideoBody))
    video = body.video_request(pictures)
    assert video.preset == "demo_t2v_distill_lora" and video.prompt == odd.request.prompt and pictures == files
    assert video.settings == {
        "width": 128, "num_frames": 9, "fps": 8.0, "flow_shift": 3.0, "guidance_scale": [2.0, 1.0],
        "enable_cfg": True, "seed": 7,
    }  # fmt: skip


def test_numbers_read_as_people_write_them() -> None:
    narrow = "\u202f"
    cases = {0.844: "0.84 s", 18.94: "18.9 s", 192.0: "3 min 12 s", 7500.0: "2 h 05 min", 1.3e6: "15 d"}
    assert {value: numbers.seconds(value).replace(narrow, " ") for value in cases} == cases
    assert numbers.memory(14.6 * 2**30) == f"14.6{narrow}GiB" and numbers.size(2.1e6) == f"2.1{narrow}MB"
    assert numbers.seconds(119.99) == f"2{narrow}min 00{narrow}s"


def test_presets_have_a_short_name_in_each_language() -> None:
    assert Words("en").preset("demo_i2v_fp8") == "Demo · 4-step FP8"
    assert Words("zh").preset("t2v_base") == "Wan2.2 · 原始模型"
    assert Words("en").preset("somebody's.json") == "somebody's.json"


def test_a_page_for_others_does_not_say_where_pictures_are_kept() -> None:
    own = settings_of("demo_i2v_distill_lora")
    request = Request(prompt="x", image_path="/srv/pictures/a.png", **{**own.request, "seed": 1})
    done = job("succeeded", config=own.engine, preset="demo_i2v_distill_lora", request=request)
    assert "/srv/pictures" in report.report(Words("en"), done)
    html = report.report(Words("en"), done, paths=False)
    assert "a.png" in html and "/srv/pictures" not in html


def test_a_report_under_another_run_says_so() -> None:
    done = job("succeeded")
    assert "earlier" not in report.report(Words("en"), done)
    html = report.report(Words("en"), done, earlier=True)
    assert "<h2>Report of an earlier run</h2>" in html and 'aria-label="Report of an earlier run"' in html


def test_done_in_is_the_reports_total() -> None:
    done = job("succeeded")
    assert "Done in 6.0\u202fs" in stage.status(Words("en"), done), "not the 7 s from its start to its end"
    assert "6.0\u202fs" in report.report(Words("en"), done)


def test_what_was_measured_is_compared_with_its_like_only() -> None:
    def took(seconds: float, **changes: Any) -> Job:
        done = job("succeeded", result=result(timings={**result()["timings"], "total": seconds + 1.0}))
        return replace(done, request=replace(done.request, **changes))

    base = {"denoising_step_list": None, "boundary_step_index": None}
    runs = [
        took(2.0), took(2.2), took(3.0, **base, steps=20), took(5.0, **base, steps=20, enable_cfg=True),
        took(4.0, **base, steps=20, enable_cfg=True, guidance=(1.0, 4.0)),
    ]  # fmt: skip
    html = compare.benchmark(Words("en"), runs)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)][1:]
    assert [(row[2], row[3], row[6], row[-1]) for row in rows] == [
        ("4", "off", "2.1\u202fs", "2"), ("20", "low noise", "4.0\u202fs", "1"), ("20", "off", "3.0\u202fs", "1"),
        ("20", "on", "5.0\u202fs", "1"),
    ]  # fmt: skip
    assert "2.0\u202fs" in compare.compare(Words("en"), runs[:2]), "loading is left out there as well"


def test_the_cost_names_what_is_not_in_its_seconds() -> None:
    here = FilesStatus(files=(FileState(name="a", ready=True),), disk_free=1)

    def said(stages: dict[str, float], count: int = 1, unknown: tuple[str, ...] = ()) -> str:
        prediction = Prediction(stages=stages, source="measured")
        html = panels.cost_line(Words("en"), prediction, None, here, None, count, unknown=unknown)
        return re.findall("<strong>(.*?)</strong>", html)[0].replace("\u202f", " ")

    assert said({"denoise": 12.0}) == "about 12 s"
    assert said({"denoise": 12.0}, unknown=("load", "image")) == "about 12 s + loading + encoding the image"
    assert said({"load": 8.0, "denoise": 12.0}) == "about 20 s"
    assert said({"load": 8.0, "denoise": 12.0}, count=3) == "3 × about 12 s + loading", "they wait for it once"
