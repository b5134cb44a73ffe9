"""How long a video will take, before it is made: counted work over the rate measured on this machine.

`count` is pure arithmetic from a Request and the sizes of the model. `Rates` keeps what earlier runs took in a small
JSON file, by device and engine, and fits seconds = calls x (a + b x work) for each stage; so a size never run before is
predicted from those that were, and every run corrects the next prediction. Without any run, a few GPUs have an
assumed rate, and the prediction says that it is assumed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config.request import Request
from ..config.schedule import schedule_of
from .architecture import PATCH, DiTConfig

log = logging.getLogger("lightx2v.estimate")

Source = Literal["measured", "scaled", "assumed"]
"""From this engine's runs, from another engine's on the same device, or from a table."""

ASSUMED_FLOPS = (("H100", 580e12), ("H200", 580e12), ("H800", 580e12), ("A100", 220e12), ("RTX 4090", 150e12))
"""Effective bf16 rate of a whole forward: measured on an H100, like which H200 and H800 compute; others by reports."""

KEPT = 12
"""Samples kept per stage: enough sizes for the fit, few enough that an old driver's times fade."""

VERSION = 2
"""Of the file of rates; since 2 the VAE's calls are its chunks. Another version's counts are not these."""

OVERHEAD = {"denoise": 4e8, "decode": 1.2e11, "image": 7e10, "write": 6e5}
"""What starting a call costs (kernels, or for "write" ffmpeg), as the size that takes as long: so it holds on a slow
machine and on a fast one, and full sizes make it vanish. From the demo model on a CPU, for as long as runs of different
sizes do not tell better."""

DOUBT = 0.02
"""Weight of OVERHEAD against the measured times: about (4 % of noise / 30 %) squared."""

CACHED = 1e-3
"""Seconds: a stage that took less found its result in a cache, which says nothing about the next prompt."""

CACHED_TEXT = 0.01
"""Of the slowest known one: on a busy machine a text from the cache takes some milliseconds, and a new one seconds."""

FAR = 8
"""How many times the largest measured size a fitted line is believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """What one run has to do: `calls` of a stage, each with `size` operations, by stage."""

    calls: dict[str, int]
    size: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds by stage and in all. `source` is the weakest of what the parts rest on."""

    stages: dict[str, float]
    source: Source

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def dit_flops(shape: DiTConfig, tokens: int) -> float:
    """Operations of one DiT forward with one text (a multiply-add is two)."""
    d, text = shape.dim, shape.text_len
    block = (
        8.0 * tokens * d * d  # self-attention q, k, v, o
        + 4.0 * tokens * tokens * d
        + 4.0 * tokens * d * d + 4.0 * text * d * d  # cross-attention q, o and k, v
        + 4.0 * tokens * text * d
        + 4.0 * tokens * d * shape.ffn_dim
    )  # fmt: skip
    ends = 2.0 * tokens * d * PATCH**2 * (shape.in_dim + shape.out_dim) + 2.0 * text * d * (shape.text_dim + d)
    return shape.num_layers * block + ends


def estimate_cost(request: Request, shape: DiTConfig | None = None, size: tuple[int, int] | None = None) -> RunCost:
    """The work of `request`. `size` is the video's (height, width) where an input picture changes it."""
    height, width = size or (request.height, request.width)
    tokens = request.latent_shape[1] * (height // 16) * (width // 16)
    high = schedule_of(request).high_noise_steps
    guided_high, guided_low = request.guided
    forwards = high * (1 + guided_high) + (request.steps - high) * (1 + guided_low)
    pixels, chunks = float(height * width * request.frames), request.latent_shape[1]
    # A step is one call: both texts of guidance go through the blocks together.
    calls = {"text": 1 + (request.negative_text is not None), "denoise": request.steps, "decode": chunks, "write": 1}
    work = {"text": 1.0, "write": pixels, "decode": 8.5e6 * pixels / chunks}
    work["denoise"] = dit_flops(shape or DiTConfig(), tokens) * forwards / request.steps
    if request.task != "t2v":
        # The grey tail of the condition clip is not recomputed once its encoding is constant: about 20 frames count.
        calls["image"] = min(chunks, 6)
        work["image"] = 5.1e6 * height * width * min(request.frames, 21) / calls["image"]
    return RunCost(calls=calls, size=work)


class Rates:
    """What runs took on this machine, in one JSON file: device -> engine -> stage -> [[calls, size, seconds], …].

    An engine is any text that names what was loaded and how. Safe to use from several threads of one process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._data: dict[str, dict[str, dict[str, list[list[float]]]]] = self._read()

    def record(self, device: str, engine: str, work: RunCost, seconds: Mapping[str, float]) -> None:
        """Learns from one finished run: `seconds` by stage, as Timings has them; "load" counts where it happened."""
        with self._lock:
            stages = self._data.setdefault(device, {}).setdefault(engine, {})
            for stage, took in seconds.items():
                if took < CACHED or (stage not in work.calls and stage != "load"):
                    continue
                calls, size, known = work.calls.get(stage, 1), work.size.get(stage, 1.0), stages.get(stage, [])
                if stage == "text" and any(took < CACHED_TEXT * new for _, _, new in known):
                    continue
                stages[stage] = [*known, [calls, size, took]][-KEPT:]
            self._write()

    def predict(self, device: str, engine: str, work: RunCost, *, loaded: bool) -> Prediction | None:
        """Seconds that `work` will take, None where nothing is known. A loaded engine has no load stage."""
        with self._lock:
            engines = self._data.get(device, {})
            own, others = engines.get(engine, {}), [e for name, e in engines.items() if name != engine]
            stages: dict[str, float] = {}
            sources: set[Source] = set()
            wanted = dict(work.calls) if loaded else {"load": 1, **work.calls}
            for stage, calls in wanted.items():
                size = work.size.get(stage, 1.0)
                if samples := own.get(stage):
                    stages[stage], source = _fit(stage, samples, calls, size), "measured"
                elif borrowed := [s for e in others for s in e.get(stage, []) if stage != "load"]:
                    stages[stage], source = _fit(stage, borrowed, calls, size), "scaled"
                else:
                    rate = next((flops for name, flops in ASSUMED_FLOPS if name in device), None)
                    if stage == "denoise" and rate is None:
                        return None
                    if rate is None or stage not in ("denoise", "decode", "image"):
                        continue  # seconds at most, beside minutes of denoising
                    # Convolutions reach about a third of what matrix products do.
                    stages[stage], source = calls * size / (rate if stage == "denoise" else rate / 3), "assumed"
                if stage == "denoise":
                    sources.add(source)
        return Prediction(stages=stages, source=min(sources, key=("assumed", "scaled", "measured").index))

    def _read(self) -> dict[str, Any]:
        try:
            read = json.loads(self._path.read_text(encoding="utf-8"))
            return _checked(read["devices"]) if read["version"] == VERSION else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log.warning("The measured times in %s cannot be read; measuring again.", self._path.name)
            return {}

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        try:
            new.write_text(json.dumps({"version": VERSION, "devices": self._data}), encoding="utf-8")
            os.replace(new, self._path)
        except OSError as error:
            log.warning("The measured times could not be kept: %s", error.strerror)


def _checked(devices: dict[str, Any]) -> dict[str, Any]:
    """`devices` as they are; an error where a file that somebody wrote by hand has other shapes or values."""
    stages = [stage for engines in devices.values() for engine in engines.values() for stage in engine.values()]
    numbers = [number for samples in stages for calls, size, took in samples for number in (calls, size, took)]
    if not all(type(number) in (int, float) and CACHED <= number < 1e30 for number in numbers):
        raise ValueError("a sample that nobody measured")
    return devices


def _fit(stage: str, samples: Iterable[list[float]], calls: int, size: float) -> float:
    """Seconds for `calls` of `size`, from t = calls (a + b size), a, b >= 0, least squares of the relative error.

    DOUBT keeps a near b OVERHEAD as long as the sizes are too close to each other to tell: a line through two equal
    ones would carry their noise to any distance. Far beyond the largest measured size time is proportional to the work.
    """
    rows = [(c / t, c * s / t) for c, s, t in samples]
    sizes = [y / x for x, y in rows]
    aa, bb = sum(x * x for x, _ in rows), sum(y * y for _, y in rows)
    ab, a1, b1 = sum(x * y for x, y in rows), sum(x for x, _ in rows), sum(y for _, y in rows)
    start, doubt = OVERHEAD.get(stage, 0.0), DOUBT * aa  # one more equation, of that weight: a = b start
    p, q, r = aa + doubt, ab - doubt * start, bb + doubt * start * start
    determinant = p * r - q * q
    a, b = (a1 * r - b1 * q) / determinant, (b1 * p - a1 * q) / determinant
    if a < 0:
        a, b = 0.0, b1 / bb
    elif b < 0:
        a, b = a1 / aa, 0.0
    near = min(size, FAR * max(sizes))
    return calls * (a + b * near) * (size / near)
