"""Run: one request from prompt to mp4 on a loaded engine, with timings, progress events and cancel.

    prompt ─► text encoder ─► denoising (high-noise expert ► low-noise expert) ─► VAE ─► mp4
    image  ─► VAE encoder  ──┘

A Run holds all state of its request, so no request leaves a trace in the engine. It saves its step from time to time,
and a Run in another process goes on from there to the same video.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config.lora_spec import LoraSpec
from ..config.magcache import forwards_of
from ..config.recorded_settings import recorded_settings
from ..config.request import Request
from ..cost.memory_plan import Stage, workload_of
from ..errors import Cancelled
from ..hub import find
from ..media.images import load_image
from ..media.video_writer import VideoWriter, original_path
from ..models.vae import WanVAE
from ..parallel.shared_cancel import SharedCancel
from ..parallel.spatial_shards import SpatialShards
from ..progress import CancelToken, Meter, OnProgress, Timings, went_on
from ..sampling.checks import is_finite, not_finite
from ..step_file import StepStore
from .conditioning import encode_condition, prepare_images
from .denoising import Denoising, OnResidual
from .engine import LoadedEngine
from .frame_sink import FrameSink
from .interpolation import frames_between
from .memory_retry import retry_with_offload
from .result import Result
from .saved_step import SavedStep, made_by
from .step_saver import StepSaver

log = logging.getLogger("lightx2v.run")

T = TypeVar("T")


class Run:
    """Call `use_loras`, then `video`, each once."""

    def __init__(
        self,
        engine: LoadedEngine,
        request: Request,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        store: StepStore | None = None,
        saved: SavedStep | None = None,
    ) -> None:
        """Rank 0 saves steps to `store` and goes on from the `saved` one; the other processes have neither."""
        self.engine, self.request, self.placement = engine, request, engine.placement
        self.device = engine.precision.device
        self.meter = Meter(self.device, on_progress)
        self.mesh, self.group = engine.mesh, engine.mesh.group
        self.token = cancel or CancelToken()
        self.cancel = SharedCancel(self.group, self.token)
        self.warnings: list[str] = []
        self.tokens: dict[str, int] = {}
        self.saved, self.saver = saved, StepSaver(store, self.newest_step)
        self.made_by: dict[str, Any] = {}
        self.denoising: Denoising | None = None

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        if self.saver.active:
            self.made_by = made_by(self.engine, self.request, specs)
        self.retry_with_offload("denoise", lambda: self.placement.use_loras(specs), "while exchanging LoRAs")

    def video(
        self, path: str | Path | None, metadata: bool, force: bool, return_frames: bool, return_latents: bool
    ) -> Result:
        try:
            return self.make(path, metadata, force, return_frames, return_latents)
        except Cancelled:
            if self.token.suspended:
                self.saver.save_at_stop()
            raise
        finally:
            self.saver.close()

    def make(
        self, path: str | Path | None, metadata: bool, force: bool, return_frames: bool, return_latents: bool
    ) -> Result:
        request = self.request
        self.mesh.reset_counts()
        self.placement.prepare(workload_of(request))
        latents_CTHW = self.denoise(self.shared_saved_step())
        frames = self.retry_with_offload(
            "decode", lambda: self.decode(latents_CTHW, path, metadata, force, return_frames)
        )
        _, _, height, width = latents_CTHW.shape
        timings = self.meter.report()
        return Result(
            path=None if path is None else str(path),
            original_path=str(original_path(path)) if path is not None and request.keeps_original else None,
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
            processes=self.process_reports(timings),
            resumed_after=self.meter.resumed_after,
            forwards=forwards_of(request).to_json(),
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
            files=tuple(self.files),
            load=self.engine.read,
        )

    def retry_with_offload(self, stage: Stage, call: Callable[[], T], when: str = "") -> T:
        """Run `call`, again with less on the device after each out-of-memory error; each retry adds a warning."""
        where = when or f"in the stage {stage}"

        def warn(summary: str) -> None:
            self.warn(f"The device ran out of memory {where}; the run went on with less on it: {summary}.")

        return retry_with_offload(call, when or self.size, lambda: self.placement.reduce_memory(stage), warn)

    def warn(self, warning: str) -> None:
        """Log a warning, and put it into the report."""
        log.warning("%s", warning)
        self.warnings.append(warning)

    @property
    def size(self) -> str:
        return f"at {self.request.width}x{self.request.height}, {self.request.frames} frames"

    def encode_text(self) -> list[Tensor]:
        """The prompt's states (L, D), then the negative prompt's where guidance needs them. Rank 0 encodes for all."""
        with self.meter.stage("text"):
            texts = self.encode_texts(self.request.texts)
            states = [states_LD for _, states_LD in self.group.broadcast_stream(texts)]
            self.tokens = self.group.broadcast_json(self.tokens)
        return states

    def encode_texts(self, texts: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, states) of these texts. Records their token counts, and a warning for each that is too long."""
        missing = [text for text in dict.fromkeys(texts.values()) if text not in self.engine.prompts]
        if not missing:
            self.meter.emit("text", 1, 1)
        else:
            with self.placement.text() as encoder:
                for done, text in enumerate(missing):
                    self.token.check()
                    self.engine.prompts.add(text, encoder)
                    self.meter.emit("text", done + 1, len(missing))
        embeddings = {name: self.engine.prompts[text] for name, text in texts.items()}
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
            images = self.group.broadcast_stream(self.images())
            first_CHW, *more = [image_CHW.to(self.device) for _, image_CHW in images]
            with self.placement.vae() as vae:
                condition = encode_condition(
                    vae,
                    request.frames,
                    first_CHW,
                    more[0] if more else None,
                    motion=request.motion_amplitude,
                    tiling=self.placement.tiling,
                    split=self.spatial_split(first_CHW.shape[1] // 8),
                    cancel=self.cancel,
                )
            if not is_finite(condition):
                raise not_finite("VAE", "the picture")
            self.meter.emit("image", 1, 1)
        return condition

    def images(self) -> Iterator[tuple[str, Tensor]]:
        """Read the first and the last frame from their files, as the model sees them."""
        request = self.request
        assert request.image_path is not None
        first = load_image(request.image_path)
        last = load_image(request.last_frame_path) if request.last_frame_path else None
        first_CHW, last_CHW = prepare_images(
            first, last, height=request.height, width=request.width, mode=request.resize_mode
        )
        yield "first", first_CHW
        if last_CHW is not None:
            yield "last", last_CHW

    def spatial_split(self, height: int) -> SpatialShards | None:
        """How the processes split the VAE's frames: not at all if the VAE works in tiles."""
        return None if self.placement.tiling else self.mesh.spatial_split(height)

    def shared_saved_step(self) -> SavedStep | None:
        """The saved step on all processes, from that of rank 0."""
        head, tensors = self.saved.parts() if self.saved is not None else (None, {})
        self.saved = None  # frees its memory on the host
        if (head := self.group.broadcast_json(head)) is None:
            return None
        received = self.group.broadcast_stream(tensors.items())
        return SavedStep.from_parts(head, {name: tensor.to(self.device) for name, tensor in received})

    def newest_step(self) -> SavedStep | None:
        """The newest step that a run can go on from, in host memory; None before the first one."""
        now = self.denoising
        if now is None or not now.resumable[0]:
            return None
        step, latents, solver_state = now.resumable
        return SavedStep(
            step=step,
            steps=now.schedule.steps,
            latents=latents,
            solver_state=solver_state,
            contexts=now.contexts,
            condition=now.condition,
            made_by=self.made_by,
            tokens=self.tokens,
            warnings=self.warnings,
        ).on(Tensor.cpu)

    def make_latents(self, see: OnResidual) -> Tensor:
        """The latents only, with all forwards; `see` gets what the blocks add in each."""
        work = workload_of(self.request)
        self.placement.prepare(replace(work, residuals=work.branches))
        return self.denoise(None, see)

    def denoise(self, saved: SavedStep | None, see: OnResidual | None = None) -> Tensor:
        """Noise to latents (16, T, h, w), from the beginning or the saved step. Out of memory repeats one step only."""
        if saved is None:
            contexts = self.retry_with_offload("text", self.encode_text)
            condition = self.retry_with_offload("image", self.encode_images)
        else:
            contexts, condition, self.tokens = saved.contexts, saved.condition, saved.tokens
            self.warnings += saved.warnings
        with self.meter.stage("denoise"):
            denoising = self.denoising = Denoising(
                self.engine, self.request, contexts, condition, self.meter, self.cancel, self.saver.save_if_due, see
            )
            if saved is not None:
                denoising.go_on_from(saved.step, saved.latents, saved.solver_state)
                log.info("The run %s", went_on(saved.step, saved.steps))
            elif (warning := denoising.expert_order_warning()) and self.group.is_rank0:
                self.warn(warning)
            begin, steps, experts = denoising.step, denoising.schedule.steps, denoising.schedule.experts
            self.meter.resumed_after = begin
            went = went_on(begin, steps) if saved is not None else ""
            message = ", ".join(filter(None, [went, denoising.forwards.summary]))
            self.meter.emit("denoise", begin, steps, experts[min(begin, steps - 1)], message=message)
            return self.retry_with_offload("denoise", denoising.finish)

    def decode(
        self, latents_CTHW: Tensor, path: str | Path | None, metadata: bool, force: bool, return_frames: bool
    ) -> np.ndarray | None:
        """Latents to frames, written while the VAE decodes. Returns the frames (T, H, W, C) with `return_frames`."""
        sink, postpone = FrameSink(self.meter, keep=return_frames), self.cancel.postpone
        try:
            if path is not None:
                postpone(self.open_writer, sink, path, latents_CTHW, metadata, force)
            with self.meter.stage("decode"), self.placement.vae() as vae:
                if path is not None or return_frames:
                    postpone(self.open_between, sink)
                for index, frames in enumerate(self.frames(vae, latents_CTHW)):
                    postpone(sink.add, frames)
                    postpone(self.meter.emit, "decode", index + 1, latents_CTHW.shape[1])
                    self.saver.save_if_due()
                postpone(sink.finish)
            if path is not None:
                postpone(self.close_writer, sink)
            self.cancel.check_failure()
        except BaseException:
            sink.abort()
            raise
        if self.request.frames > 1 and (warning := sink.still_warning()):
            self.warnings.append(warning)
        return sink.frames

    def open_writer(self, sink: FrameSink, path: str | Path, latents_CTHW: Tensor, metadata: bool, force: bool) -> None:
        height, width = latents_CTHW.shape[-2:]
        settings = self.settings(path) if metadata else None

        def writer(path: str | Path, fps: float) -> VideoWriter:
            return VideoWriter(path, width * 8, height * 8, fps, settings, force=force, cancel=self.token)

        sink.writer = writer(path, self.request.video_fps)
        if self.request.keeps_original:
            sink.original = writer(original_path(path), self.request.fps)

    def open_between(self, sink: FrameSink) -> None:
        if self.request.interpolator is not None:
            with self.meter.stage("interpolate"):
                sink.between = frames_between(self.engine, self.request, self.token)

    def settings(self, path: str | Path) -> dict[str, Any]:
        engine = self.engine
        return recorded_settings(engine.preset, engine.config, self.request, path, self.files)

    @property
    def files(self) -> list[dict[str, Any]]:
        """The model's files and the LoRAs of this run."""
        config, own = self.engine.config, self.request.loras
        specs = config.lora_configs if own is None else own
        return self.engine.files.to_json(filter(None, (find(spec.path, config) for spec in specs)))

    def close_writer(self, sink: FrameSink) -> None:
        with self.meter.stage("write"):
            sink.close()
            self.meter.emit("write", 1, 1)

    def frames(self, vae: WanVAE, latents_CTHW: Tensor) -> Iterator[np.ndarray]:
        """Yield frames (T, H, W, C) uint8, chunk after chunk, on rank 0 only."""
        split, tiling = self.spatial_split(latents_CTHW.shape[2]), self.placement.tiling
        parts = vae.decode(latents_CTHW, tiling=tiling, split=split, cancel=self.group.local_cancel(self.cancel))
        for _ in range(latents_CTHW.shape[1]):
            self.cancel.check()
            # With tiles, or with too few rows to split, rank 0 decodes alone.
            part = next(parts) if split is not None or self.group.is_rank0 else None
            if self.group.any_true(part is not None and not is_finite(part)):
                raise not_finite("VAE", "the latents")
            frames = None if part is None else to_uint8(part)
            if split is not None and frames is not None:
                whole_HTWC = split.gather(frames.transpose(0, 1).contiguous())
                frames = None if whole_HTWC is None else whole_HTWC.transpose(0, 1).contiguous()
            if frames is not None:
                yield frames.cpu().numpy()

    def process_reports(self, timings: Timings) -> tuple[dict[str, Any], ...]:
        """Timings and bytes sent of each of several processes; empty for one."""
        if self.group.size == 1:
            return ()
        report = {
            "rank": self.group.rank,
            "device": device_name(self.device),
            "timings": timings.to_json(),
            "sent": self.mesh.sent,
        }
        return tuple(self.group.all_gather_json(report))


def to_uint8(frames_CTHW: Tensor) -> Tensor:
    """Convert frames in [-1, 1] to bytes (T, H, W, C), rounded to the nearest level."""
    levels = frames_CTHW.float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
