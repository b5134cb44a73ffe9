"""Predicts how long a video will take: its estimated cost over the rate that was measured on this machine.

`estimate_cost` is pure arithmetic from a Request and the sizes of the model. `Rates` stores the times of earlier runs
in a small JSON file, by device and engine, and fits seconds = calls x (a + b x size) for each stage. So the sizes of
earlier runs predict a new size, and every run corrects the next prediction. Before the first run a few GPUs have an
assumed rate, and the prediction carries that source.
"""

import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config.architecture import PATCH, DiTConfig
from ..config.magcache import forwards_of
from ..config.request import Request
from ..media.frame_times import frame_times

log = logging.getLogger("lightx2v.estimate")

Source = Literal["measured", "scaled", "assumed"]
"""From runs of this engine, from runs of another engine on the same device, or from a table."""

ASSUMED_FLOPS = (("H100", 580e12), ("H200", 580e12), ("H800", 580e12), ("A100", 220e12), ("RTX 4090", 150e12))
"""Effective bf16 rate of a whole forward: measured on an H100, which H200 and H800 equal; reported for others."""

KEPT = 12
"""Samples stored per stage: enough sizes for the fit, few enough that the times of an old driver fade."""

VERSION = 2
"""Version of the rates file. Files of another version count other things; since 2 the VAE's calls are its chunks."""

OVERHEAD = {"denoise": 4e8, "decode": 1.2e11, "image": 7e10, "write": 6e5}
"""The cost of starting a call (kernels, or ffmpeg for "write"), as the size that takes as long: so it holds on slow and
fast machines, and full sizes make it vanish. Measured with the demo model on a CPU; runs of different sizes replace
it."""

RIFE_FLOPS = 41_400.0
"""Operations of RIFE for each pixel of a new frame, with the features of one of its neighbours."""
RIFE_ALIGN = 64
"""RIFE works on whole blocks of this side."""

DOUBT = 0.02
"""Weight of OVERHEAD against the measured times: about (4 % noise / 30 %) squared."""

CACHED = 1e-3
"""Seconds: a faster stage found its result in a cache, which does not predict the next prompt."""

CACHED_TEXT = 0.01
"""Share of the slowest known text: on a busy machine a cached text takes some milliseconds, a new one seconds."""

FAR = 8
"""A fitted line holds up to this many times the largest measured size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """The work of one run, by stage: `calls`, each with `size` operations. `rates` names the rate of a stage that has
    another one than the stage's own."""

    calls: dict[str, int]
    size: dict[str, float]
    rates: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds by stage and in total, and the source of the denoising rate."""

    stages: dict[str, float]
    source: Source

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def dit_flops(shape: DiTConfig, tokens: int) -> float:
    """Operations of one DiT forward with one text; a multiply-add counts as two."""
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


def estimate_cost(request: Request, shape: DiTConfig | None = None) -> RunCost:
    """The work of `request` by a model of this shape, A14B's by default."""
    height, width = request.height, request.width
    tokens = request.latent_shape[1] * (height // 16) * (width // 16)
    forwards = forwards_of(request)
    pixels, chunks = float(height * width * request.frames), request.latent_shape[1]
    written, rates = float(height * width * request.video_frames), dict[str, str]()
    # A step is one call: both texts of guidance go through the blocks together. Without blocks it takes no time.
    steps = sum(map(any, forwards.runs))
    calls = {"text": 1 + (request.negative_text is not None), "denoise": steps, "decode": chunks, "write": 1}
    work = {"text": 1.0, "write": written, "decode": 8.5e6 * pixels / chunks}
    work["denoise"] = dit_flops(shape or DiTConfig(), tokens) * forwards.computed / steps
    if request.task != "t2v":
        # The grey tail of the condition clip is not encoded again once its encoding is constant: about 20 frames count.
        calls["image"] = min(chunks, 6)
        work["image"] = 5.1e6 * height * width * min(request.frames, 21) / calls["image"]
    if request.interpolator is not None:
        times = frame_times(request.frames, request.fps, request.video_fps)
        calls["interpolate"] = max(1, sum(1 for _, part in times if part))
        if request.interpolator == "rife":
            work["interpolate"] = RIFE_FLOPS * -(-height // RIFE_ALIGN) * -(-width // RIFE_ALIGN) * RIFE_ALIGN**2
        else:
            work["interpolate"], rates["interpolate"] = float(height * width), "interpolate by ffmpeg"
    return RunCost(calls=calls, size=work, rates=rates)


class Rates:
    """Times of runs on this machine, in one JSON file: device -> engine -> stage -> [[calls, size, seconds], …].

    An engine is any text that names the loaded model and its settings. Several threads of a process may use it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._data: dict[str, dict[str, dict[str, list[list[float]]]]] = self._read()

    def record(self, device: str, engine: str, work: RunCost, seconds: Mapping[str, float]) -> None:
        """Store the times of one finished run: `seconds` by stage, as in Timings, with "load" if the run loaded."""
        with self._lock:
            stages = self._data.setdefault(device, {}).setdefault(engine, {})
            for stage, took in seconds.items():
                if took < CACHED or (stage not in work.calls and stage != "load"):
                    continue
                calls, size = work.calls.get(stage, 1), work.size.get(stage, 1.0)
                kept = work.rates.get(stage, stage)
                known = stages.get(kept, [])
                if stage == "text" and any(took < CACHED_TEXT * new for _, _, new in known):
                    continue
                stages[kept] = [*known, [calls, size, took]][-KEPT:]
            self._write()

    def predict(self, device: str, engine: str, work: RunCost, *, loaded: bool) -> Prediction | None:
        """Predict the seconds of `work`; None if nothing is known. A loaded engine has no load stage."""
        with self._lock:
            engines = self._data.get(device, {})
            own, others = engines.get(engine, {}), [e for name, e in engines.items() if name != engine]
            rate = next((flops for name, flops in ASSUMED_FLOPS if name in device), None)
            stages: dict[str, float] = {}
            sources: dict[str, Source] = {}
            for stage, calls in {**({} if loaded else {"load": 1}), **work.calls}.items():
                size, kept = work.size.get(stage, 1.0), work.rates.get(stage, stage)
                if samples := own.get(kept):
                    stages[stage], sources[stage] = _fit(stage, samples, calls, size), "measured"
                elif borrowed := [s for e in others for s in e.get(kept, []) if stage != "load"]:
                    stages[stage], sources[stage] = _fit(stage, borrowed, calls, size), "scaled"
                elif rate is not None and kept in ("denoise", "decode", "image", "interpolate"):
                    # Convolutions reach about a third of the rate of matrix products.
                    stages[stage] = calls * size / (rate if stage == "denoise" else rate / 3)
                    sources[stage] = "assumed"
                elif stage == "denoise":
                    return None  # the other stages take a few seconds, against minutes of denoising
        return Prediction(stages=stages, source=sources["denoise"])

    def _read(self) -> dict[str, Any]:
        try:
            read = json.loads(self._path.read_text(encoding="utf-8"))
            devices = read["devices"] if read["version"] == VERSION else {}
            stages = [stage for engines in devices.values() for engine in engines.values() for stage in engine.values()]
            numbers = [number for samples in stages for calls, size, took in samples for number in (calls, size, took)]
            if not all(type(number) in (int, float) and CACHED <= number < 1e30 for number in numbers):
                raise ValueError("not a measured sample")
            return devices
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log.warning("Cannot read the measured times in %s; they are measured again.", self._path.name)
            return {}

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        try:
            new.write_text(json.dumps({"version": VERSION, "devices": self._data}), encoding="utf-8")
            os.replace(new, self._path)
        except OSError as error:
            log.warning("Could not store the measured times: %s", error.strerror)


def _fit(stage: str, samples: Iterable[list[float]], calls: int, size: float) -> float:
    """Seconds for `calls` of `size`, from t = calls (a + b size) with a, b >= 0; least squares of the relative error.

    DOUBT keeps a near b OVERHEAD while the sizes are close to each other: a line through two equal ones would carry
    their noise to any distance. Far beyond the largest measured size, time is proportional to the size.
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
