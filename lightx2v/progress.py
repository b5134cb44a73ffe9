"""Progress events, cancellation, and all timing and memory measurement of a run.

`Progress` is one event, `CancelToken` stops a run, `Meter` times the stages and reads the memory peaks. The page, the
command line, the server and the benchmarks show the numbers of this file.
"""

import contextlib
import gc
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .errors import Cancelled, byte_size

log = logging.getLogger("lightx2v.progress")

STAGES = ("download", "load", "text", "image", "denoise", "decode", "interpolate", "write")
"""The stages of a run in their order."""

MOST = 0.98
"""The share from which on a model counts as read from one source."""

BYTES = ("download", "load")
"""The stages whose steps are bytes; their events have a message with gigabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One event: `step` of `total` steps of `stage` are done.

    `seconds` have passed since the run began; `eta` seconds are left of the stage. `expert` is "high" or "low" while
    denoising. `vram_peak` is in bytes, None without CUDA. `preview` returns a small uint8 (H, W, 3) picture of the
    latents; it costs nothing until it is called. Of the denoising steps, an earlier process did the first
    `resumed_after`.
    """

    stage: str
    step: int = 0
    total: int = 0
    expert: str | None = None
    seconds: float = 0.0
    eta: float | None = None
    vram_peak: int | None = None
    message: str = ""
    resumed_after: int = 0
    preview: Callable[[], Any] | None = field(default=None, compare=False, repr=False)


OnProgress = Callable[[Progress], None]


def went_on(after: int, total: int) -> str:
    """What a run says that an earlier process has begun: `after` of the `total` denoising steps were done."""
    where = f"step {after + 1} of {total}" if after < total else "decoding"
    return f"went on at {where} after a restart"


class CancelToken:
    """A flag that another thread may set. The engine calls `check` between steps, blocks and VAE chunks."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.suspended = False

    def cancel(self) -> None:
        self._event.set()

    def suspend(self) -> None:
        """Cancel a run that is to go on later: it saves its step."""
        self.suspended = True
        self.cancel()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled once `cancel` was called."""
        if self._event.is_set():
            raise Cancelled("The run was cancelled.")


@dataclass(frozen=True, slots=True)
class LoadWatch:
    """What loading asks and tells while it reads: whether to stop, the bytes of each tensor that has arrived, and first
    the bytes of all. `on_source` gets the bytes that the page cache had and those that it had not, where the system
    tells."""

    cancel: CancelToken | None = None
    on_bytes: Callable[[int], None] = lambda _: None
    on_total: Callable[[int], None] = lambda _: None
    on_source: Callable[[int, int], None] = lambda cached, missed: None

    def check(self) -> None:
        if self.cancel is not None:
            self.cancel.check()


UNWATCHED = LoadWatch()


@dataclass(frozen=True, slots=True)
class WeightsRead:
    """The bytes of a model that were read, in how many seconds; of those whose source is known, what the page cache
    had; and the bytes that the system fetched from disks for this process meanwhile."""

    nbytes: int = 0
    seconds: float = 0.0
    known: int = 0
    cached: int = 0
    fetched: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.nbytes, "seconds": self.seconds, "source": self.source}

    @property
    def source(self) -> Literal["page cache", "disk", "both", "unknown"]:
        """Where nearly all came from. The page cache also has what the system has just fetched ahead from the disk."""
        if not self.nbytes or self.known < MOST * self.nbytes:
            return "unknown"
        share = min(self.cached, self.nbytes - self.fetched) / self.nbytes
        return "page cache" if share >= MOST else "disk" if share <= 1 - MOST else "both"


def read_words(read: Mapping[str, Any]) -> str:
    """What a report's "load" says, e.g. "68.4 GB in 3.9 s from the page cache, 17.5 GB/s"."""
    size, seconds = read["bytes"], read["seconds"]
    where = {"page cache": " from the page cache", "disk": " from the disk", "both": " from page cache and disk"}
    rate = f", {size / seconds / 1e9:.1f} GB/s" if seconds else ""
    return f"{byte_size(size)} in {seconds:.1f} s{where.get(read['source'], '')}{rate}"


def peak_rss() -> int:
    """Largest resident memory of this process since it started, or since `reset_peak_rss`, in bytes.

    On Linux from /proc: a process inherits getrusage's number from its parent.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Begin a new measurement of `peak_rss`, where the system can (Linux); else it goes on from the program's start."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def bytes_from_disk() -> int:
    """The bytes that the system has fetched from disks for this process; 0 where it does not tell."""
    try:
        with open("/proc/self/io", encoding="ascii") as counts:
            return next(int(line.split()[1]) for line in counts if line.startswith("read_bytes:"))
    except (OSError, StopIteration, ValueError):
        return 0


LOG_NAMES = {
    "download": "Download models",
    "load": "Load models",
    "text": "Run Text Encoder",
    "image": "Run VAE Encoder",
    "denoise": "Run DiT",
    "decode": "Run VAE Decoder",
    "interpolate": "Interpolate frames",
    "write": "Save video",
}
"""LightX2V's names of the stages in its logs. Its "Run DiT" includes decoding and saving; ours is the loop alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One denoising step: its expert and its duration without loading."""

    expert: str | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """CUDA memory in bytes: `allocated` by tensors, `reserved` by torch's cache."""

    allocated: int
    reserved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Time and memory of a run. The stages never overlap: with the unmeasured rest their seconds add up to `total`."""

    seconds: dict[str, float]
    steps: tuple[StepTime, ...]
    total: float
    peak_vram: dict[str, Peak] | None
    peak_rss: int

    @property
    def experts(self) -> dict[str, float]:
        """Seconds of denoising per expert."""
        sums: dict[str, float] = {}
        for step in self.steps:
            if step.expert is not None:
                sums[step.expert] = sums.get(step.expert, 0.0) + step.seconds
        return sums

    @property
    def peak_vram_overall(self) -> Peak | None:
        """The largest of the stages' peaks."""
        return _highest(self.peak_vram.values()) if self.peak_vram else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"steps": [asdict(step) for step in self.steps], "experts": self.experts}


class Meter:
    """Times the stages of one run, reads the memory peaks and sends progress events.

    Stages may follow each other, repeat and nest. The time and memory of a nested stage count for it alone, so writing
    frames while decoding counts as writing. On CUDA the meter synchronises the device at the end of a stage and of a
    denoising step; otherwise it would time the launches.

    One thread drives a meter. The callback runs in that thread and is dropped when it raises. Set `resumed_after`
    where an earlier process did that many denoising steps: they take no time here.
    """

    def __init__(self, device: object = "cpu", on_progress: OnProgress | None = None) -> None:
        self._cuda = _cuda(device)
        self._device = device
        self._on_progress = on_progress
        self._stack: list[str] = []
        self._seconds: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._peaks: dict[str, Peak] = {}
        self._steps: list[StepTime] = []
        self._denoised = 0.0
        self._pace: dict[str, tuple[int, float]] = {}
        self._timings: Timings | None = None
        self.resumed_after = 0
        self._started = self._tick = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time and memory of the block for stage `name`, one of STAGES."""
        if name not in STAGES:
            raise ValueError(f"Unknown stage {name!r}; the stages are {', '.join(STAGES)}.")
        self._charge()
        self._stack.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        except BaseException:
            self._charge(synchronize=False)  # the device may be what failed
            self._stack.pop()
            raise
        self._charge()
        self._stack.pop()
        if not self._stack:
            self._log_stages()

    def emit(
        self,
        stage: str,
        step: int = 0,
        total: int = 0,
        expert: str | None = None,
        *,
        message: str = "",
        work: tuple[int, int] | None = None,
        preview: Callable[[], Any] | None = None,
    ) -> None:
        """Send one event. Call it at the end of each step with the number of finished steps: that times the steps.

        `work` is done and to be done in all, where steps take different times; the time left follows from it.
        """
        skipped = self.resumed_after if stage == "denoise" else 0
        stepped = stage == "denoise" and step > skipped
        self._charge(synchronize=stepped)
        if stepped:
            done = self._seconds.get("denoise", 0.0)
            self._steps.append(StepTime(expert=expert, seconds=done - self._denoised))
            self._denoised = done
        overall = _highest(self._peaks.values()) if self._peaks else None
        event = Progress(
            stage=stage,
            step=step,
            total=total,
            expert=expert,
            seconds=self._tick - self._started,
            eta=self._eta(stage, *(work or (step - skipped, total - skipped))),
            vram_peak=overall.allocated if overall else None,
            message=message,
            resumed_after=skipped,
            preview=preview,
        )
        try:
            if self._on_progress is not None:
                self._on_progress(event)
        except Exception:  # a broken listener must not cost an hour of GPU time
            self._on_progress = None
            log.warning("A progress callback failed and is not called again; the run continues.", exc_info=True)

    def report(self) -> Timings:
        """End the measurement. The first call logs the run's total; later calls return the same timings."""
        if self._timings is None:
            self._charge()
            self._timings = Timings(
                seconds={name: self._seconds[name] for name in STAGES if name in self._seconds},
                steps=tuple(self._steps),
                total=self._tick - self._started,
                peak_vram={name: self._peaks[name] for name in STAGES if name in self._peaks} if self._cuda else None,
                peak_rss=peak_rss(),
            )
            _log_duration("RUN pipeline", self._timings.total, self._timings.peak_vram_overall)
        return self._timings

    def _charge(self, *, synchronize: bool = True) -> None:
        """Count the time and the memory peak since the last call for the running stage."""
        if self._cuda and synchronize:
            self._cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self._seconds[name] += now - self._tick
            if self._cuda:
                peak = Peak(
                    allocated=self._cuda.max_memory_allocated(self._device),
                    reserved=self._cuda.max_memory_reserved(self._device),
                )
                self._peaks[name] = _highest([peak, self._peaks.get(name, peak)])
        if self._cuda:
            self._cuda.reset_peak_memory_stats(self._device)
        self._tick = now

    def _eta(self, stage: str, step: int, total: int) -> float | None:
        """Seconds left of this stage at its pace since the end of its first step, which warms up."""
        if not 0 < step <= total:
            return None
        now = self._seconds.get(stage, 0.0)
        first_step, first_now = self._pace.get(stage, (step, now))
        if step <= first_step:  # the stage's first step, or the stage began again
            self._pace[stage] = (step, now)
            if stage in BYTES:  # the first bytes of a small file say nothing about gigabytes
                return None
            pace = now / step
        else:
            pace = (now - first_now) / (step - first_step)
        return pace * (total - step)

    def _log_stages(self) -> None:
        for name in STAGES:
            seconds = self._seconds.get(name, 0.0)
            new = seconds - self._logged.get(name, 0.0)
            if new > 0:
                _log_duration(LOG_NAMES[name], new, self._peaks.get(name))
                self._logged[name] = seconds


@contextmanager
def log_duration(name: str) -> Iterator[None]:
    """Log the duration of the block in LightX2V's format. A command line wraps all its work in "Total Cost"."""
    started = time.perf_counter()
    yield
    _log_duration(name, time.perf_counter() - started, None)


def _log_duration(name: str, seconds: float, peak: Peak | None) -> None:
    memory = f", peak {peak.allocated / 2**30:.2f} GiB ({peak.reserved / 2**30:.2f} GiB reserved)" if peak else ""
    log.info("%s cost %.6f seconds%s", name, seconds, memory)


def _highest(peaks: Iterable[Peak]) -> Peak:
    every = list(peaks)
    return Peak(allocated=max(p.allocated for p in every), reserved=max(p.reserved for p in every))


def _cuda(device: object) -> Any:
    """torch.cuda where `device` is a CUDA device, else None. Never imports torch: the caller's device did."""
    torch = sys.modules.get("torch")
    if torch is None or not str(device).startswith("cuda"):
        return None
    torch.cuda.init()  # the memory counters cannot be reset before
    return torch.cuda


def free_memory() -> None:
    """Collect garbage and return cached memory, also of the CUDA device if one is in use."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
