"""While a model loads, the person who waits sees bytes, their rate and the time that is left."""

from __future__ import annotations

import logging
import os
import re
import struct
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from safetensors.torch import save_file

from lightx2v.config.presets import resolve
from lightx2v.engine import engine as engine_module
from lightx2v.engine import load_progress
from lightx2v.engine.load_progress import LoadProgress
from lightx2v.errors import Cancelled
from lightx2v.loading.model_files import locate
from lightx2v.loading.networks import Precision
from lightx2v.models.fused import Dims
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Meter, Progress, read_words
from lightx2v.weights.checkpoint import open_checkpoint


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
    assert re.search(r"Read [\d.]+ MB in \d+\.\d s( from the page cache|), \d+\.\d GB/s\.", caplog.text)


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


def test_kernels_are_compiled_on_the_device_of_the_model_while_it_loads(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Dims, torch.dtype, str]] = []
    begun, loaded = threading.Event(), threading.Event()

    def compile_for(device: torch.device, dims: Dims, compute: torch.dtype, formats: set[torch.dtype]) -> None:
        begun.set()
        loaded.wait(10)
        seen.append((str(device), dims, compute, threading.current_thread().name))
        assert not formats

    monkeypatch.setattr(engine_module, "compile_for", compile_for)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    config = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, {}).engine
    on_cpu = Precision.of(config)
    with engine_module.compiling(locate(config), config, replace(on_cpu, device=torch.device("cuda", 1))):
        assert begun.wait(10)
        assert not seen
        loaded.set()
    assert seen == [("cuda:1", Dims(2, 12, 48), on_cpu.compute, "lightx2v-kernels_0")]
    with engine_module.compiling(locate(config), config, on_cpu):
        pass
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("known", "cached", "fetched", "source"),
    [
        (100, 100, 0, "page cache"),
        (100, 99, 1, "page cache"),
        (100, 0, 100, "disk"),
        (100, 0, 0, "disk"),  # of a network, perhaps
        (100, 15, 101, "disk"),  # 15 were fetched ahead
        (100, 40, 60, "both"),
        (60, 60, 0, "unknown"),
    ],
)
def test_the_report_says_where_the_weights_came_from(
    known: int, cached: int, fetched: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([1000, 1000 + fetched])
    monkeypatch.setattr(load_progress, "bytes_from_disk", lambda: next(counts))
    progress = LoadProgress(Meter(), None)
    progress.watch.on_total(100)
    progress.watch.on_bytes(100)
    progress.watch.on_source(cached, known - cached)
    read = progress.result()
    assert (read.nbytes, read.source) == (100, source)
    assert read_words(read.to_json() | {"bytes": 68.4e9, "seconds": 4.0}).startswith(
        {
            "page cache": "68.4 GB in 4.0 s from the page cache, 17.1",
            "disk": "68.4 GB in 4.0 s from the disk, 17.1",
            "both": "68.4 GB in 4.0 s from page cache and disk, 17.1",
            "unknown": "68.4 GB in 4.0 s, 17.1",
        }[source]
    )


def test_a_model_that_was_just_written_comes_from_the_page_cache_and_then_from_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"w{n}": torch.randn(1 << 20) for n in range(16)}, path)
    sources = []
    for drop in (False, True):
        if drop:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        progress = LoadProgress(Meter(), None)
        progress.watch.on_total(64 << 20)
        for _ in open_checkpoint(path).tensors(watch=progress.watch):
            pass
        sources.append(progress.result().source)
    if sources[0] == "unknown":
        pytest.skip("this file system does not tell")
    assert sources == ["page cache", "disk"]
