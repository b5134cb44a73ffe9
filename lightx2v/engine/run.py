"""One run: the five arrows for one request, measured and cancellable, on an engine that is loaded.

    prompt ─► text encoder ─► denoising (high-noise expert ► low-noise expert) ─► VAE ─► mp4
    image  ─► VAE encoder  ──┘

A Run holds all that belongs to the request, so nothing of it stays behind in the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config.recorded_settings import recorded_settings
from ..config.request import Expert, LoraSpec, Request
from ..cost.memory_plan import Stage, Workload
from ..errors import Cancelled, LightX2VError, OutOfMemory
from ..media.images import load_image
from ..media.video_writer import VideoWriter
from ..models.block import TextStates
from ..models.vae import WanVAE
from ..parallel.mesh import SharedCancel
from ..parallel.vae_bands import Rows
from ..progress import CancelToken, Meter, OnProgress, Timings
from ..sampling import denoise, guided, initial_noise, solver_for, still_warning
from .conditioning import encode_pictures, prepare_pictures
from .engine import LoadedEngine, within_memory
from .result import Result

log = logging.getLogger("lightx2v.run")

T = TypeVar("T")


class Run:
    """`use_loras`, then `video`, which does all the rest; each is called once."""

    def __init__(
        self,
        engine: LoadedEngine,
        request: Request,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        self.engine, self.request, self.placement = engine, request, engine.placement
        self.device = engine.precision.device
        self.meter = Meter(self.device, on_progress)
        self.mesh = engine.mesh
        self.asked = cancel or CancelToken()
        self.cancel = self.asked if self.mesh is None else SharedCancel(self.mesh.world.wire, self.asked)
        self.failure: LightX2VError | None = None
        self.warnings: list[str] = []
        self.tokens: dict[str, int] = {}

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        self.retry_with_offload("denoise", lambda: self.placement.use_loras(specs), "while exchanging LoRAs")

    def video(
        self, path: str | Path | None, metadata: bool, force: bool, return_frames: bool, return_latents: bool
    ) -> Result:
        request = self.request
        if self.mesh is not None:
            self.mesh.count_anew()
        self.placement.prepare(Workload.of(request.latent_shape, guided=any(request.guided)))
        contexts = self.retry_with_offload("text", self.encode_text)
        condition = self.retry_with_offload("image", self.encode_images)
        latents_CTHW = self.denoise(contexts, condition)
        frames = self.retry_with_offload(
            "decode", lambda: self.decode(latents_CTHW, path, metadata, force, return_frames)
        )
        _, _, height, width = latents_CTHW.shape
        timings = self.meter.report()
        return Result(
            path=None if path is None else str(path),
            frames=frames,
            latents=latents_CTHW.cpu() if return_latents else None,
            request=self.request,
            config=self.engine.config,
            height=height * 8,
            width=width * 8,
            device=device_name(self.device),
            attention={
                "self": self.engine.self_attention.name,
                "cross": self.engine.cross_attention.name,
                "reason": self.engine.self_attention.reason,
            },
            timings=timings,
            processes=self.processes(timings),
            text_tokens=self.tokens,
            preset=self.engine.preset,
            file_bytes=None if path is None else Path(path).stat().st_size,
            plan=self.placement.plan,
            warnings=(
                *self.engine.warnings,
                *self.warnings,
                *(text for lora in self.placement.loras for text in lora.report.warnings),
            ),
            loras=tuple(lora.to_json() for lora in self.placement.loras),
        )

    def retry_with_offload(self, stage: Stage, call: Callable[[], T], when: str = "") -> T:
        """`call()`; when memory runs out again with more of the weights off the device, until nothing more helps."""
        if self.mesh is not None:  # not tried again: the memory may have run out on one process only
            return within_memory(call, when or self.size)
        while True:
            try:
                return within_memory(call, when or self.size)
            except OutOfMemory as error:
                failure = error
            # Outside of the handler, where the failed call's tensors are free.
            smaller = self.placement.reduce_memory(stage)
            if smaller is None:
                raise failure
            where = when or f"in the stage {stage}"
            warning = f"The device ran out of memory {where}; the run went on with {smaller}."
            log.warning("%s", warning)
            self.warnings.append(warning)

    @property
    def size(self) -> str:
        return f"at {self.request.width}x{self.request.height}, {self.request.frames} frames"

    def encode_text(self) -> list[Tensor]:
        """The prompt's states (L, D), then the negative prompt's where guidance needs them."""
        texts = {"prompt": self.request.prompt}
        if self.request.negative_text is not None:
            texts["negative_prompt"] = self.request.negative_text
        if self.mesh is None:
            return [states_LD for _, states_LD in self.encode_texts(texts)]
        with self.meter.stage("text"):  # rank 0 does it for all
            states = [states_LD for _, states_LD in self.mesh.world.stream(self.encode_texts(texts))]
            self.tokens = self.mesh.world.wire.tell(self.tokens)
        return states

    def encode_texts(self, texts: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """(name, states) of these texts, and what there is to say about them in `tokens` and `warnings`."""
        with self.meter.stage("text"):
            missing = [text for text in dict.fromkeys(texts.values()) if text not in self.engine.prompts]
            if not missing:
                self.meter.emit("text", 1, 1)
            else:
                with self.placement.text() as encoder:
                    for done, text in enumerate(missing):
                        self.asked.check()
                        self.engine.prompts.put(text, encoder.encode(text))
                        self.meter.emit("text", done + 1, len(missing))
            embeddings = {name: self.engine.prompts.get(text) for name, text in texts.items()}
        for name, embedding in embeddings.items():
            self.tokens[name] = embedding.tokens
            if embedding.truncated:
                self.warnings.append(
                    f"The {name.replace('_', ' ')} has {embedding.tokens} tokens; the model reads the first "
                    f"{self.engine.config.text_len}."
                )
            yield name, embedding.states_LD

    def encode_images(self) -> Tensor | None:
        """The condition (20, T, h, w) of image-to-video; None for text-to-video."""
        request = self.request
        if request.task == "t2v" or request.image_path is None:
            return None
        with self.meter.stage("image"):
            pictures = self.pictures() if self.mesh is None else self.mesh.world.stream(self.pictures())
            first_CHW, *more = [picture_CHW.to(self.device) for _, picture_CHW in pictures]
            bands = self.bands(first_CHW.shape[1] // 8)
            with self.placement.vae() as vae:
                condition = encode_pictures(
                    vae,
                    request.frames,
                    first_CHW,
                    more[0] if more else None,
                    tiling=self.placement.tiling,
                    bands=bands,
                    cancel=self.cancel,
                )
            self.meter.emit("image", 1, 1)
        return condition

    def pictures(self) -> Iterator[tuple[str, Tensor]]:
        """First and last frame as the model sees them, read from their files."""
        request = self.request
        assert request.image_path is not None
        first = load_image(request.image_path)
        last = load_image(request.last_frame_path) if request.last_frame_path else None
        first_CHW, last_CHW = prepare_pictures(
            first, last, height=request.height, width=request.width, mode=request.resize_mode
        )
        yield "first", first_CHW
        if last_CHW is not None:
            yield "last", last_CHW

    def bands(self, height: int) -> Rows | None:
        """How the VAE's pictures are split over the processes; not where one of them works in tiles."""
        return None if self.mesh is None or self.placement.tiling else self.mesh.rows(height)

    def denoise(self, contexts: Sequence[Tensor], condition: Tensor | None) -> Tensor:
        """Noise to latents (16, T, h, w)."""
        request, meter = self.request, self.meter
        height, width = condition.shape[-2:] if condition is not None else request.latent_shape[-2:]
        channels, frames = request.latent_shape[:2]
        noise = initial_noise((channels, frames, height, width), request.seed).to(self.device)
        solver = solver_for(request)
        schedule = solver.schedule
        states: dict[Expert, list[TextStates]] = {}
        guides = dict(zip(("high", "low"), request.guided, strict=True))
        mesh = self.mesh
        # Several processes stop between steps only, where they can agree on it.
        within = self.cancel if mesh is None else None

        def velocity(expert: Expert, latents: Tensor, timestep: float, step: int) -> Tensor:
            following = schedule.experts[step + 1] if step + 1 < schedule.steps else None
            with self.placement.expert(expert, following) as dit:
                dit.split = None if mesh is None else mesh.split(1 + guides[expert])
                if expert not in states:
                    states.clear()  # the other expert's keys and values are not needed again
                    used = list(contexts if guides[expert] else contexts[:1])
                    if mesh is not None:
                        used = mesh.branch(used)
                    states[expert] = [dit.encode_text(context) for context in used]
                branches = dit(latents, timestep, states[expert], condition, within)
            if mesh is not None:
                branches = mesh.both(branches, 1 + guides[expert])
            return guided(branches, expert, request.guidance)

        reached = (0, noise, solver.state())

        def on_step(step: int, latents: Tensor, clean: Callable[[], Tensor]) -> None:
            nonlocal reached
            reached = (step + 1, latents, solver.state())
            preview = lambda: self.engine.preview(clean())  # noqa: E731
            meter.emit("denoise", step + 1, schedule.steps, schedule.experts[step], preview=preview)

        def rest() -> Tensor:
            """From the step that was reached: all of it, unless memory ran out before."""
            start, latents, state = reached
            states.clear()
            solver.restore(state)
            return denoise(
                solver,
                velocity,
                latents,
                start=start,
                on_step=on_step,
                cancel=self.cancel,
                backend=self.engine.self_attention.name,
            )

        with meter.stage("denoise"):
            meter.emit("denoise", 0, schedule.steps, schedule.experts[0])
            return self.retry_with_offload("denoise", rest)

    def decode(
        self, latents_CTHW: Tensor, path: str | Path | None, metadata: bool, force: bool, return_frames: bool
    ) -> np.ndarray | None:
        """Latents to frames, written while the VAE goes on. Returns the frames (T, H, W, C) when asked."""
        _, chunks, height, width = latents_CTHW.shape
        kept: list[np.ndarray] = []
        seen: list[np.ndarray] = []
        engine = self.engine
        settings = recorded_settings(engine.preset, engine.config, self.request, path) if metadata else None
        writer = None

        def open_writer() -> None:
            nonlocal writer
            if path is not None:
                fps = self.request.fps
                writer = VideoWriter(path, width * 8, height * 8, fps, settings, force=force, cancel=self.asked)

        def take(index: int, frames: np.ndarray) -> None:
            if writer is not None:
                writer.write(frames)
            seen.append(frames[:: max(1, len(frames) - 1)])
            if return_frames:
                kept.append(frames)
            self.meter.emit("decode", index + 1, chunks)

        def close_writer() -> None:
            if writer is not None:
                with self.meter.stage("write"):
                    writer.close()
                    self.meter.emit("write", 1, 1)

        try:
            self.in_step(open_writer)
            with self.meter.stage("decode"), self.placement.vae() as vae:
                for index, frames in enumerate(self.frames(vae, latents_CTHW)):
                    self.in_step(lambda index=index, frames=frames: take(index, frames))
            self.in_step(close_writer)
            if self.mesh is not None:
                self.stop_together()
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
        if seen and self.request.frames > 1 and (warning := still_warning(frame for some in seen for frame in some)):
            self.warnings.append(warning)
        return np.concatenate(kept) if kept else None

    def frames(self, vae: WanVAE, latents_CTHW: Tensor) -> Iterator[np.ndarray]:
        """Frames (T, H, W, C) uint8, chunk after chunk; of several processes they come on rank 0 only."""
        tiling, mesh = self.placement.tiling, self.mesh
        if mesh is None:
            for frames_CTHW in vae.decode(latents_CTHW, tiling=tiling, cancel=self.cancel):
                yield to_uint8(frames_CTHW).cpu().numpy()
            return
        bands = self.bands(latents_CTHW.shape[2])
        if bands is None:
            if mesh.world.leads:
                for frames_CTHW in vae.decode(latents_CTHW, tiling=tiling):
                    yield to_uint8(frames_CTHW).cpu().numpy()
            return
        parts = vae.decode(latents_CTHW, bands=bands)
        for _ in range(latents_CTHW.shape[1]):
            self.stop_together()
            rows_HTWC = to_uint8(next(parts)).transpose(0, 1).contiguous()
            if (whole_HTWC := bands.to_first(rows_HTWC)) is not None:
                yield whole_HTWC.transpose(0, 1).contiguous().cpu().numpy()

    def in_step(self, call: Callable[[], None]) -> None:
        """`call()`. Of several processes one that fails here goes on until all can stop: the others wait for it."""
        if self.mesh is None:
            call()
        elif self.failure is None:
            try:
                call()
            except LightX2VError as error:
                self.failure = error
                self.cancel.cancel()

    def stop_together(self) -> None:
        """Where all processes stop if one of them has to: with its error there, and as cancelled elsewhere."""
        try:
            self.cancel.check()
        except Cancelled:
            if self.failure is not None:
                raise self.failure from None
            raise

    def processes(self, timings: Timings) -> tuple[dict[str, Any], ...]:
        """What each of several processes took and sent; nothing for one that works alone."""
        if self.mesh is None:
            return ()
        mine = {
            "rank": self.mesh.world.rank,
            "device": device_name(self.device),
            "timings": timings.to_json(),
            "sent": self.mesh.sent,
        }
        return tuple(self.mesh.world.wire.gather_json(mine))


def to_uint8(frames_CTHW: Tensor) -> Tensor:
    """Frames in [-1, 1] to bytes (T, H, W, C), rounded to the nearest."""
    levels = frames_CTHW.float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
