"""While a model loads, the person who waits sees bytes, their rate and the time that is left."""

from __future__ import annotations

import logging
import re
import struct
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TinyModels

from lightx2v.config.presets import resolve
from lightx2v.engine import engine as engine_module
from lightx2v.engine import load_progress
from lightx2v.engine.load_progress import LoadProgress
from lightx2v.errors import Cancelled
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Meter, Progress


def tensor_bytes(path: Path) -> int:
    """The bytes after a safetensors file's header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - struct.unpack("<Q", file.read(8))[0]


@pytest.mark.slow
def test_loading_counts_the_bytes_of_all_parts(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load_progress, "EVERY", 0.0)
    events: list[Progress] = []
    config = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, {}).engine
    with caplog.at_level(logging.INFO, "lightx2v.engine"):
        LightX2VPipeline.from_config(config, on_progress=events.append).close()
    counted = [event for event in events if event.stage == "load" and event.total]
    experts = sum(tensor_bytes(path) for path in tiny.t2v.glob("*_noise_model/*.safetensors"))
    text = torch.load(tiny.t2v / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    vae = torch.load(tiny.t2v / "Wan2.1_VAE.pth", weights_only=True)
    sizes = [tensor.nbytes for name, tensor in (*text.items(), *vae.items()) if name != "token_embedding.weight"]
    assert counted[-1].step == counted[-1].total == experts + sum(sizes)
    assert [event.step for event in counted] == sorted({event.step for event in counted})
    assert re.fullmatch(r"\d\.\d\d of \d\.\d\d GB, \d+\.\d GB/s", counted[-1].message)
    assert re.search(r"Read [\d.]+ MB in \d+\.\d s \(\d+\.\d GB/s\)", caplog.text)


def test_a_second_try_counts_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "EVERY", 0.0)
    events: list[Progress] = []
    watch = LoadProgress(Meter(on_progress=events.append), None).watch
    for total, parts in ((100, [40]), (60, [20, 40])):
        watch.on_total(total)
        for part in parts:
            watch.on_bytes(part)
    assert [(event.step, event.total) for event in events] == [(40, 100), (20, 60), (60, 60)]


def test_loading_is_cancelled_between_two_tensors(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "EVERY", 0.0)
    cancel = CancelToken()

    def stop(event: Progress) -> None:
        if event.total:
            cancel.cancel()

    config = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, {}).engine
    with pytest.raises(Cancelled):
        LightX2VPipeline.from_config(config, on_progress=stop, cancel=cancel)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lightx2v-read")]


@pytest.mark.slow
def test_threads_take_short_turns_while_a_model_loads(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "EVERY", 0.0)
    usual, seen = sys.getswitchinterval(), set()
    config = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, {}).engine
    LightX2VPipeline.from_config(config, on_progress=lambda _: seen.add(sys.getswitchinterval())).close()
    assert max(seen) < usual / 5 and sys.getswitchinterval() == usual


def test_kernels_are_compiled_on_the_device_of_the_model_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    begun, loaded = threading.Event(), threading.Event()

    def kernels_for(device: torch.device) -> None:
        begun.set()
        loaded.wait(10)
        seen.append((str(device), threading.current_thread().name))

    monkeypatch.setattr(engine_module, "kernels_for", kernels_for)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with engine_module.compiling(torch.device("cuda", 1)):
        assert begun.wait(10)
        assert not seen
        loaded.set()
    assert seen == [("cuda:1", "lightx2v-kernels")]
    with engine_module.compiling(torch.device("cpu")):
        pass
    assert len(seen) == 1
