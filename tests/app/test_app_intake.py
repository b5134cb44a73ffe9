"""Input that a launched page accepts or refuses.

Covered: decompression bombs, images with a false header, truncated files and other types; unusual but valid images;
URLs in place of images, which are never fetched; foreign hosts and sites; bodies that are huge, deep or broken.
"""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from page_events import Keyboard
from patience import PATIENCE, eventually
from PIL import Image
from png_files import png
from studio_app import LEAKS, Page, Refused

from lightx2v.media.mp4 import read_settings

pytestmark = pytest.mark.multi

I2V = {"preset": "demo_i2v_distill_lora", "settings": {"frames": 5}}


def picture(mode: str = "RGB", size: tuple[int, int] = (96, 64), format: str = "PNG", **more: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), 130, np.uint8)).convert(mode).save(data, format, **more)
    return data.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(format="JPEG", exif=exif)


def film(frames: int) -> bytes:
    data = io.BytesIO()
    pictures = [Image.new("L", (32, 32), n % 256) for n in range(frames)]
    pictures[0].save(data, "GIF", save_all=True, append_images=pictures[1:])
    return data.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
REFUSED = {
    "bomb.png": png(20_000, 20_000, 8, 2, bytes(99)),
    "wide.png": png(10_000, 1, 8, 2, bytes(99)),
    "dot.png": picture(size=(1, 1)),
    "cut.png": picture()[:60],
    "empty.png": b"",
    "drawing.svg": SVG,
    "drawing.png": SVG,
    "paper.pdf": b"%PDF-1.7\n1 0 obj\n",
    "film.png": b"\0\0\0\x18ftypmp42" + b"\0" * 64,
    "list.m3u8": b"#EXTM3U\nfile:///etc/passwd\n",
    "phone.heic": b"\0\0\0\x18ftypheic" + b"\0" * 64,
    "film.gif": film(200),
    "half.jpg": picture(format="JPEG")[:200],
}
TAKEN = {
    "palette.png": picture("P"),
    "alpha.png": picture("RGBA"),
    "print.jpg": picture("CMYK", format="JPEG"),
    "rotated.jpg": rotated(),
    "web.webp": picture(format="WEBP"),
    "PNG called.jpg": picture(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_an_image_is_refused_in_one_sentence(page: Page, name: str) -> None:
    image = page.upload(REFUSED[name], name)
    with pytest.raises(Refused) as caught:
        page.ask("generate", prompt="x", image=image, **I2V)
    assert "event: error" in str(caught.value) and not LEAKS.search(str(caught.value))


@pytest.mark.parametrize("name", TAKEN)
def test_unusual_but_valid_images_are_accepted(page: Page, name: str) -> None:
    done = page.make(f"picture {name}", image=page.upload(TAKEN[name], name), **I2V)
    assert done["state"] == "succeeded"
    assert any(e["event"] == "begin" and e["request"]["image_path"] for e in page.painted)


def grey16() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 96 * 64, dtype=np.uint16).reshape(64, 96)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("name", [*TAKEN, "grey16.png"])
def test_a_run_gets_exactly_the_chosen_image(page: Page, keyboard: Keyboard, name: str) -> None:
    data = TAKEN.get(name) or grey16()
    prompt = f"the very {name}"
    form = {"mode": "i2v", "preset_name": I2V["preset"], "frames": 5, "width": 96, "height": 96}
    keyboard.press("generate", prompt=prompt, image_path=page.upload(data, name), **form)
    begun = eventually(lambda: next((e for e in page.painted if e.get("prompt") == prompt and "request" in e), None))
    assert Path(begun["request"]["image_path"]).read_bytes() == data


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_image_is_reported_below_the_fields(page: Page, keyboard: Keyboard, name: str) -> None:
    said = keyboard.press(
        "image_path", "change", mode="i2v", shape="match", image_path=page.upload(REFUSED[name], name)
    )
    assert "problem" in said["crop"]


@pytest.mark.parametrize("size", [{"height": -16}, {"height": 0}, {"width": 10**9}, {"width": None}], ids=str)
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_half_typed_size_does_not_stop_the_page(
    page: Page, keyboard: Keyboard, task: str, size: dict[str, Any]
) -> None:
    session = f"typing {task}"
    form = {"mode": task, "preset_name": f"demo_{task}_distill_lora", "shape": "match" if task == "i2v" else "1:1"}
    keyboard.press("image_path", "change", session=session, image_path=page.upload(picture(), "a.png"), **form)
    said = keyboard.press("height", "input", session=session, versions={"cost": "", "crop": "?"}, **{**form, **size})
    assert "problem" in said["cost"] and "problem" not in str(said["crop"])
    # A page that is opened now has what was typed again.
    opened = keyboard.press("page", "load", **{"lightx2v-studio": said["lightx2v-studio"]})
    assert opened["top"] and all(opened[name] == value for name, value in size.items() if value is not None)


def test_a_restored_run_has_its_image_without_loss(page: Page, keyboard: Keyboard) -> None:
    noise = np.random.default_rng(7).integers(0, 256, (64, 96, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    person = {"lightx2v-studio": {"owner": "p" * 40}}
    form = {"mode": "i2v", "preset_name": I2V["preset"], "frames": 5, "prompt": "a picture of noise", **person}
    keyboard.press("generate", image_path=page.upload(data.getvalue(), "noise.png"), **form)
    begun = eventually(lambda: next((e for e in page.painted if e.get("prompt") == form["prompt"]), None))
    id = Path(begun["request"]["image_path"]).name.partition(".")[0]
    page.wait(id)
    answer = keyboard.answer("history", "act", sent={"act": "restore", "id": id}, **person)
    said = keyboard.values("history", "act", answer)
    with Image.open(said["image_path"]["path"]) as shown:
        assert np.array_equal(np.asarray(shown), noise)
    # The video brings it back too, and does not say where it is kept.
    video = page.folder / f"{id}.mp4"
    assert str(page.folder) not in json.dumps(read_settings(video)["request"])
    dropped = page.upload(video.read_bytes(), "mine.mp4")
    answer = keyboard.answer("restore", "upload", restore=dropped, **person)
    with Image.open(keyboard.values("restore", "upload", answer)["image_path"]["path"]) as shown:
        assert np.array_equal(np.asarray(shown), noise)


def test_an_image_may_arrive_before_its_task(keyboard: Keyboard) -> None:
    """This happens while a browser fills in the fields of a run of the other task."""
    said = keyboard.press("image_path", "change", mode="t2v", preset_name=I2V["preset"])
    assert "preset" in said["preset"] and said["cost"]["__type__"] == "update" and "problem" not in str(said["cost"])


class Listener:
    """A server on this machine that counts its connections."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.visits = self.socket.getsockname()[1], 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self.socket.accept()[0].close()
            except OSError:
                return
            self.visits += 1


@contextmanager
def listening() -> Iterator[Listener]:
    listener = Listener()
    try:
        yield listener
    finally:
        listener.socket.shutdown(socket.SHUT_RDWR)
        listener.socket.close()


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/a.png",
        "http://localhost:{port}/a.png",
        "http://[::ffff:127.0.0.1]:{port}/a.png",
        "http://2130706433:{port}/a.png",
        "http://user@127.0.0.1:{port}/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/a.png",
        "http://[64:ff9b::7f00:1]/a.png",
        "file:///etc/passwd",
        "ftp://127.0.0.1:{port}/a.png",
        "data:image/png;base64,AAAA",
    ],
)
def test_a_url_is_not_an_image_and_is_never_fetched(page: Page, address: str) -> None:
    """The page accepts uploads only, so redirects, DNS rebinding and endless bodies cannot reach it either."""
    with listening() as listener:
        address = address.format(port=listener.port)
        for image in ({"url": address}, {"path": address}, {"path": address, "url": address}):
            with pytest.raises(Refused, match="not an uploaded file"):
                page.ask("generate", prompt="x", image=image, **I2V)
            with pytest.raises(Refused):  # marked as gradio marks files, it is gradio that refuses
                page.ask("generate", prompt="x", image={**image, "meta": {"_type": "gradio.FileData"}}, **I2V)
        assert listener.visits == 0


def test_foreign_hosts_and_sites_are_refused(page: Page) -> None:
    assert page.http.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert page.http.get("/config", headers={"Host": "127.0.0.1.evil.example"}).status_code == 403
    for path in ("queue/join", "upload", "call/generate", "call/v2/generate", "run/predict"):
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            answer = page.http.post(f"/gradio_api/{path}", json={}, headers={"Origin": origin})
            assert answer.status_code == 403, (path, origin)


@pytest.mark.parametrize(
    ("body", "type"),
    [
        (b'{"data": ["' + b"x" * 1_100_000 + b'"]}', "application/json"),
        (b'{"data": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "application/json"),
        (b"{not json", "application/json"),
        (b"a=b", "application/x-www-form-urlencoded"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b'{"data": "x", "no such field": 1}', "application/json"),
    ],
    ids=["large", "deep", "broken", "form", "empty", "list", "unknown"],
)
def test_a_broken_body_is_refused_without_being_echoed(page: Page, body: bytes, type: str) -> None:
    for path in ("call/generate", "call/v2/generate", "queue/join", "run/predict"):
        try:
            with httpx.Client(base_url=page.url, timeout=PATIENCE) as http:
                answer = http.post(f"/gradio_api/{path}", content=body, headers={"Content-Type": type})
        except httpx.TransportError:  # it was answered before all of it was sent, and the line cut
            assert len(body) > 1_000_000
            continue
        assert answer.status_code in (400, 404, 413, 415, 422, 429, 500) or "event_id" in answer.json(), answer.text
        assert not LEAKS.search(answer.text), answer.text[:300]
        assert len(answer.text) < 2000, "the answer does not repeat the body"
    assert "xxxxxxxxxx" not in page.said and "[[[[[" not in page.said


def test_a_low_noise_lora_that_the_page_filled_in_follows_the_high_noise_one(keyboard: Keyboard) -> None:
    def named(**rows: str) -> dict[str, Any]:
        return keyboard.press("lora_0_high", "blur", session="pairs", versions={"cost": ""}, **rows)

    first = named(lora_0_high="styleA_high_noise.safetensors")
    assert first["lora_0_low"]["value"] == "styleA_low_noise.safetensors"
    second = named(lora_0_high="styleB_high_noise.safetensors", lora_0_low="styleA_low_noise.safetensors")
    assert second["lora_0_low"]["value"] == "styleB_low_noise.safetensors"
    own = named(lora_0_high="styleC_high_noise.safetensors", lora_0_low="mine_low_noise.safetensors")
    assert "value" not in str(own.get("lora_0_low", "")) and "two different LoRAs" in own["cost"]
