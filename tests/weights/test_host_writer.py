"""Tensors of a GPU reach the host's memory whole, whatever their size, and only after the GPU has copied them."""

from __future__ import annotations

import threading

import pytest
import torch

from lightx2v.weights import host_writer
from lightx2v.weights.host_writer import HostWriter


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to pinned buffers, as the CPU makes them, with an event that another thread waits for."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: real(*size, **more))

    class Stream:
        def record_event(self) -> threading.Event:
            event = threading.Event()
            event.synchronize = event.wait  # type: ignore[attr-defined]
            threading.Timer(0.002, event.set).start()
            return event

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (700, 512), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_every_byte_arrives(
    gpu: None, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_writer, "PIECE", 1 << 16)
    sources = [torch.randn(shape).to(dtype) for _ in range(5)]
    targets = [torch.zeros(shape).to(dtype) for _ in range(5)]
    with HostWriter() as writer:
        for target, source in zip(targets, sources, strict=True):
            writer.write(target, source)
        writer.finish()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8))


def test_few_buffers_serve_many_pieces(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_writer, "PIECE", 1 << 10)
    source, target = torch.randn(1 << 16), torch.zeros(1 << 16)
    with HostWriter() as writer:
        writer.write(target, source)
        writer.finish()
        assert len(writer._free) <= 2 * host_writer.THREADS
    assert torch.equal(target, source)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lightx2v-write")]
