"""Times, memory peaks and events of a run; a callback never harms the run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lightx2v import progress as progress_module
from lightx2v.errors import Cancelled
from lightx2v.progress import CancelToken, Meter, Peak, Progress, StepTime, log_duration, peak_rss


class Clock:
    """time.perf_counter under the test's control."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress_module.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class FakeCuda:
    """torch.cuda's memory counters: `use` raises the peak since the last reset."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.synchronised = 0
        self.ready = False

    def init(self) -> None:
        self.ready = True

    def use(self, allocated: int, reserved: int) -> None:
        self.allocated, self.reserved = max(self.allocated, allocated), max(self.reserved, reserved)

    def synchronize(self, device: object) -> None:
        self.synchronised += 1

    def max_memory_allocated(self, device: object) -> int:
        return self.allocated

    def max_memory_reserved(self, device: object) -> int:
        return self.reserved

    def reset_peak_memory_stats(self, device: object) -> None:
        assert self.ready, "torch refuses this before CUDA is initialised"
        self.allocated = self.reserved = 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake))
    return fake


def test_stages_add_up_in_the_order_of_a_run(clock: Clock) -> None:
    meter = Meter()
    with meter.stage("decode"):
        clock.pass_(3)
    clock.pass_(0.5)
    for seconds in (1, 2):
        with meter.stage("text"):
            clock.pass_(seconds)
    timings = meter.report()
    assert timings.seconds == {"text": 3, "decode": 3}
    assert list(timings.seconds) == ["text", "decode"]
    assert timings.total == 6.5


def test_a_nested_stage_counts_once(clock: Clock) -> None:
    meter = Meter()
    with meter.stage("decode"):
        clock.pass_(1)
        with meter.stage("write"):
            clock.pass_(10)
        clock.pass_(2)
    timings = meter.report()
    assert timings.seconds == {"decode": 3, "write": 10}
    assert sum(timings.seconds.values()) == timings.total


def test_steps_are_timed_per_expert_without_the_loading_between(clock: Clock) -> None:
    meter = Meter()
    with meter.stage("denoise"):
        for step, (expert, seconds) in enumerate([("high", 2), ("high", 1), ("low", 4)], 1):
            if step == 3:
                with meter.stage("load"):
                    clock.pass_(100)
            clock.pass_(seconds)
            meter.emit("denoise", step, 3, expert)
    timings = meter.report()
    assert timings.steps == (
        StepTime(expert="high", seconds=2),
        StepTime(expert="high", seconds=1),
        StepTime(expert="low", seconds=4),
    )
    assert timings.experts == {"high": 3, "low": 4}
    assert timings.seconds == {"load": 100, "denoise": 7}


def test_a_stage_that_fails_still_counts_and_the_error_passes(clock: Clock) -> None:
    meter = Meter()
    with pytest.raises(ZeroDivisionError), meter.stage("text"):
        clock.pass_(5)
        raise ZeroDivisionError
    with meter.stage("text"):
        clock.pass_(1)
    assert meter.report().seconds == {"text": 6}


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="download, load"), Meter().stage("lunch"):
        pass


def test_time_left_is_unknown_before_the_first_step_and_then_goes_down(clock: Clock) -> None:
    events: list[Progress] = []
    meter = Meter("cpu", events.append)
    with meter.stage("denoise"):
        meter.emit("denoise", 0, 4, "high")
        for step, seconds in enumerate([20, 2, 2, 2], 1):  # the first step warms up
            clock.pass_(seconds)
            meter.emit("denoise", step, 4, "high")
    assert events[0].eta is None
    assert [event.eta for event in events[1:]] == [60.0, 4.0, 2.0, 0.0]


def test_time_left_starts_afresh_when_a_stage_begins_again(clock: Clock) -> None:
    events: list[Progress] = []
    meter = Meter("cpu", events.append)
    with meter.stage("decode"):
        for step in (1, 2, 3, 1, 2):
            clock.pass_(1)
            meter.emit("decode", step, 4)
    etas = [event.eta for event in events]
    assert None not in etas and all(eta >= 0 for eta in etas if eta is not None)
    assert etas[-1] == 2.0


def test_memory_peaks_are_per_stage_and_the_overall_one_is_kept(cuda: FakeCuda) -> None:
    events: list[Progress] = []
    meter = Meter("cuda:0", events.append)
    with meter.stage("denoise"):
        cuda.use(70, 80)
        meter.emit("denoise", 1, 2, "high")
        cuda.use(10, 80)
    with meter.stage("decode"):
        cuda.use(30, 90)
        with meter.stage("write"):
            cuda.use(5, 6)
        meter.emit("decode", 1, 1)
    timings = meter.report()
    assert timings.peak_vram == {
        "denoise": Peak(allocated=70, reserved=80),
        "decode": Peak(allocated=30, reserved=90),
        "write": Peak(allocated=5, reserved=6),
    }
    assert timings.peak_vram_overall == Peak(allocated=70, reserved=90)
    assert [event.vram_peak for event in events] == [70, 70]


def test_the_device_is_synchronised_where_stages_and_steps_end_only(cuda: FakeCuda) -> None:
    meter = Meter("cuda")
    with meter.stage("denoise"):
        before = cuda.synchronised
        meter.emit("denoise", 0, 2)
        assert cuda.synchronised == before
        meter.emit("denoise", 1, 2)
        assert cuda.synchronised == before + 1
    assert cuda.synchronised == before + 2


@pytest.mark.gpu
@pytest.mark.skipif("torch" not in sys.modules or not sys.modules["torch"].cuda.is_available(), reason="no CUDA device")
def test_peaks_on_a_real_device_are_those_of_the_stage() -> None:
    import torch

    device = torch.device("cuda")
    meter = Meter(device)
    meter.emit("download", 1, 1)
    with meter.stage("denoise"):
        torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
        with meter.stage("load"):
            torch.empty(16 * 2**20, dtype=torch.uint8, device=device)
    peaks = meter.report().peak_vram
    assert peaks is not None and peaks["denoise"].allocated >= 64 * 2**20 > peaks["load"].allocated >= 16 * 2**20
    assert peaks["load"].reserved >= peaks["load"].allocated


def test_a_cpu_run_does_not_touch_cuda(cuda: FakeCuda) -> None:
    meter = Meter("cpu")
    with meter.stage("text"):
        meter.emit("denoise", 1, 1)
    timings = meter.report()
    assert cuda.synchronised == 0
    assert timings.peak_vram is None and timings.peak_vram_overall is None


def test_resident_memory_is_in_bytes() -> None:
    assert 10 * 2**20 < peak_rss() < 2**40


@pytest.mark.slow
def test_the_peak_of_memory_is_not_the_parents() -> None:
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from lightx2v.progress import peak_rss; print(peak_rss())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(child.stdout) < 200 << 20 < len(ballast)


def test_a_report_is_plain_json(clock: Clock, cuda: FakeCuda) -> None:
    meter = Meter("cuda")
    with meter.stage("denoise"):
        clock.pass_(1)
        meter.emit("denoise", 1, 1, "low")
    data = json.loads(json.dumps(meter.report().to_json()))
    assert data["steps"] == [{"expert": "low", "seconds": 1.0}]
    assert data["experts"] == {"low": 1.0}
    assert data["peak_vram"]["denoise"] == {"allocated": 0, "reserved": 0}
    assert set(data) == {"seconds", "steps", "experts", "total", "peak_vram", "peak_rss"}


def test_the_logs_have_the_lines_that_people_grep_for(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightx2v")
    with log_duration("Total Cost"):
        meter = Meter()
        for stage, seconds in (("load", 9), ("text", 1), ("denoise", 2.5)):
            with meter.stage(stage):
                clock.pass_(seconds)
        with meter.stage("decode"):
            for _ in range(20):
                clock.pass_(0.2)
                with meter.stage("write"):
                    clock.pass_(0.1)
        meter.report()
        meter.report()
    assert [record.getMessage() for record in caplog.records] == [
        "Load models cost 9.000000 seconds",
        "Run Text Encoder cost 1.000000 seconds",
        "Run DiT cost 2.500000 seconds",
        "Run VAE Decoder cost 4.000000 seconds",
        "Save video cost 2.000000 seconds",
        "RUN pipeline cost 18.500000 seconds",
        "Total Cost cost 18.500000 seconds",
    ]


def test_the_log_names_the_memory_peak(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightx2v")
    meter = Meter("cuda")
    with meter.stage("denoise"):
        cuda.use(3 * 2**30, 4 * 2**30)
    assert "Run DiT cost" in caplog.text and "peak 3.00 GiB (4.00 GiB reserved)" in caplog.text


def test_a_callback_that_raises_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def broken(event: Progress) -> None:
        calls.append(event.step)
        raise RuntimeError("listener is gone")

    meter = Meter("cpu", broken)
    for step in range(5):
        meter.emit("denoise", step)
    assert calls == [0] and len(meter.report().steps) == 4
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_slow_callback_costs_its_own_time_only(clock: Clock) -> None:
    meter = Meter("cpu", lambda event: clock.pass_(2))
    with meter.stage("text"):
        for step in range(5):
            meter.emit("text", step, 5)
    assert meter.report().seconds == {"text": 10} and meter.report().total == 10


def test_interrupting_from_a_callback_is_not_swallowed() -> None:
    def interrupt(event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Meter("cpu", interrupt).emit("text")


def test_a_preview_costs_nothing_until_it_is_called() -> None:
    looked: list[Progress] = []
    meter = Meter("cpu", looked.append)
    meter.emit("denoise", 1, 2, preview=lambda: pytest.fail("nobody asked"))
    assert looked[0].preview is not None


def test_a_cancelled_token_stays_cancelled() -> None:
    token = CancelToken()
    token.check()
    token.cancel()
    token.cancel()
    assert token.cancelled
    with pytest.raises(Cancelled):
        token.check()


def test_the_module_needs_the_standard_library_only() -> None:
    code = (
        "import sys, lightx2v.progress as p\n"
        "m = p.Meter('cuda:0')\n"
        "with m.stage('text'): m.emit('text', 1, 1)\n"
        "assert m.report().peak_vram is None\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
