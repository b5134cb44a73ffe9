"""What the processes of the parallel tests run. Each case makes everything itself and returns JSON types."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightx2v.config import Environment
from lightx2v.engine_config import EngineConfig, ParallelConfig
from lightx2v.errors import LightX2VError
from lightx2v.jobs import JobManager
from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.models.vae import VAEConfig, WanVAE
from lightx2v.parallel.world import Mesh, join
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress
from lightx2v.request import LoraSpec, Request


def enter(cfg: int, seq: int) -> Mesh:
    return join(Environment.read()).mesh(cfg, seq)


def dit_of(seed: int, heads: int) -> WanDiT:
    torch.manual_seed(seed)
    config = DiTConfig(
        in_dim=16,
        dim=12 * heads,
        ffn_dim=96,
        freq_dim=32,
        text_dim=32,
        text_len=24,
        out_dim=16,
        num_heads=heads,
        num_layers=2,
    )
    return WanDiT(config).eval()


@torch.inference_mode()
def dit(cfg: int, seq: int, heads: int, shapes: list[list[int]]) -> dict[str, Any]:
    """Velocities of two prompts over the mesh, against those of this process alone."""
    mesh = enter(cfg, seq)
    alone, shared = dit_of(0, heads), dit_of(0, heads)
    shared.split = mesh.sequence
    differences = []
    for stack in (2048, 0):
        alone.stack_tokens = shared.stack_tokens = stack
        for number, shape in enumerate(shapes):
            generator = torch.Generator().manual_seed(number)
            latents = torch.randn(16, *shape, generator=generator)
            contexts = [torch.randn(rows, 32, generator=generator) for rows in (5, 24)]
            expected = alone(latents, 700.0, [alone.encode_text(context) for context in contexts])
            mine = mesh.branch([shared.encode_text(context) for context in contexts])
            got = mesh.both(shared(latents, 700.0, mine), 2)
            differences.append(max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)))
    return {"differences": differences, "sent": mesh.sent}


@torch.inference_mode()
def vae(size: int, shapes: list[list[int]]) -> dict[str, Any]:
    """Decoding and encoding in bands, against this process alone; largest differences."""
    mesh = enter(1, size)
    torch.manual_seed(3)
    model = WanVAE(VAEConfig(dim=8, res_blocks=1)).eval()
    decoded, encoded = [], []
    for number, (frames, height, width) in enumerate(shapes):
        bands = mesh.rows(height)
        assert bands is not None
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(16, frames, height, width, generator=generator)
        for whole, band in zip(model.decode(latents), model.decode(latents, bands=bands), strict=True):
            parts = bands.to_first(band.movedim(2, 0).contiguous())
            if parts is not None:
                decoded.append(float((parts.movedim(0, 2) - whole).abs().max()))
        first, last = torch.rand(2, 3, 8 * height, 8 * width, generator=generator) * 2 - 1
        for end in (None, last) if frames > 1 else (None,):
            whole = model.encode_condition(4 * frames - 3, first, end)
            again = model.encode_condition(4 * frames - 3, first, end, bands=bands)
            encoded.append(float((whole - again).abs().max()))
    return {"decoded": decoded, "encoded": encoded, "sent": mesh.sent}


def engine(root: str, layouts: list[list[int]], names: list[str]) -> list[Any]:
    """These requests of `requests_of` on every layout; rank 0 leaves latents and frames in the folder."""
    ends: list[Any] = []
    for cfg, seq in layouts:
        for name in names:
            config, request = requests_of(Path(root))[name]
            parallel = ParallelConfig(cfg_p_size=cfg, seq_p_size=seq)
            if cfg == 2 and not any(request.guided):
                continue
            with LightX2VPipeline.from_config(EngineConfig(**config, parallel=parallel)) as pipe:
                where = Path(root) / f"{name}-{cfg}x{seq}"
                result = pipe.run(
                    request, save_result_path=where.with_suffix(".mp4"), return_frames=True, return_latents=True
                )
                assert result.latents is not None
                digest = hashlib.sha256(result.latents.numpy().tobytes()).hexdigest()
                if result.frames is not None:
                    np.savez(where.with_suffix(".npz"), latents=result.latents.numpy(), frames=result.frames)
                report = result.report()
                ends.append({"name": where.name, "digest": digest, "has_frames": result.frames is not None} | report)
    return ends


def requests_of(root: Path) -> dict[str, tuple[dict[str, Any], Request]]:
    """What is made on every layout: 30 tokens per latent frame, so that 4 processes have uneven runs."""
    size = {"height": 96, "width": 80, "frames": 5, "prompt": "a red ball", "seed": 3}
    base = {"steps": 4, "shift": 5.0}
    distilled = {"denoising_step_list": (1000, 750, 500, 250), "boundary_step_index": 2, "enable_cfg": False}
    picture = str(root / "first.png")
    i2v = {"task": "i2v", "image_path": picture}
    low_only = {"guidance": (4.0, 1.0), "negative_prompt": "blue"}
    configs = {
        task: {"model_path": str(root / folder), "task": task, "device": "cpu", "dtype": "fp32"}
        for task, folder in (("t2v", "t2v"), ("i2v", "i2v"), ("flf2v", "i2v"))
    }
    distill = {task: config | {"model_cls": "wan2.2_moe_distill"} for task, config in configs.items()}
    return {
        "base": (configs["t2v"], Request(**size, **base)),
        "one_guided": (configs["t2v"], Request(**size, **base, **low_only)),
        "distilled": (distill["t2v"], Request(**size, **distilled)),
        "i2v": (configs["i2v"], Request(**size, **base, **i2v)),
        "i2v_distilled": (distill["i2v"], Request(**size, **distilled, **i2v)),
        "flf2v": (
            configs["flf2v"],
            Request(**size, **base, task="flf2v", image_path=picture, last_frame_path=picture),
        ),
        "flat": (configs["t2v"], Request(**(size | {"height": 32}), **base)),
        "tiles": (configs["t2v"] | {"use_tiling_vae": True}, Request(**size, **base)),
    }


def troubles(root: str) -> list[Any]:
    """What people do wrong, and cancelling: it ends the same way on both processes, and the next run is as ever."""
    config, request = requests_of(Path(root))["base"]
    ends: list[Any] = []
    rank = Environment.read().rank

    def attempt(request: Request, **more: Any) -> None:
        try:
            result = pipe.run(request, return_latents=True, **more)
        except LightX2VError as error:
            ends.append([type(error).__name__, str(error)])
        else:
            assert result.latents is not None
            ends.append(hashlib.sha256(result.latents.numpy().tobytes()).hexdigest())

    def cancelled(stage: str, step: int, who: int) -> None:
        """Process `who` asks to stop where it is told of this step; notes the last step of denoising here."""
        token, steps = CancelToken(), []

        def seen(event: Progress) -> None:
            if event.stage == "denoise":
                steps.append(event.step)
            if (event.stage, event.step, rank) == (stage, step, who):
                token.cancel()

        attempt(request, cancel=token, on_progress=seen)
        ends[-1].append(steps[-1])

    stopped = CancelToken()
    if rank == 0:
        stopped.cancel()
    small = EngineConfig(**config, parallel=ParallelConfig(seq_p_size=2), max_tokens=80)
    try:
        LightX2VPipeline.from_config(small, cancel=stopped)
    except LightX2VError as error:
        ends.append(type(error).__name__)
    with LightX2VPipeline.from_config(small) as pipe:
        attempt(request)
        attempt(replace(request, frames=9) if rank == 0 else request)
        attempt(request, save_result_path=Path(root) / "no folder" / "x.mp4")
        cancelled("denoise", 2, 0)
        cancelled("denoise", 1, 1)
        cancelled("decode", 1, 0)
        attempt(replace(request, loras=(LoraSpec(expert="high", path="missing.safetensors"),)))
        attempt(request)
        attempt(replace(request, seed=-1))
    try:
        LightX2VPipeline.from_config(EngineConfig(**config, parallel=ParallelConfig(seq_p_size=4)))
    except LightX2VError as error:
        ends.append([type(error).__name__, str(error)])
    return ends


def failing(root: str, how: str) -> None:
    """Process 1 fails in its second denoising step, in the middle of what all do together."""
    config, request = requests_of(Path(root))["base"]

    with LightX2VPipeline.from_config(EngineConfig(**config, parallel=ParallelConfig(seq_p_size=2))) as pipe:
        assert pipe._engine is not None and pipe._engine.mesh is not None
        if Environment.read().rank == 1:
            split = pipe._engine.mesh.sequence
            assert split is not None
            attend, calls = split.attend, []

            def breaking(*arguments: Any) -> torch.Tensor:
                calls.append(1)
                if len(calls) == 4:
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if how == "stop":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    raise MemoryError("no room for the tokens")
                return attend(*arguments)

            split.attend = breaking  # type: ignore[method-assign]
        pipe.run(request)


def queue(root: str) -> list[Any]:
    """Rank 0 works on a queue. The first time, process 1 is killed in the second job; the group is started again."""
    environment = Environment.read()
    if environment.rank and not environment.restart:
        kill_at_step(5)
    if LightX2VPipeline.follow():
        return []
    config, request = requests_of(Path(root))["base"]

    def open_engine(config: EngineConfig, **more: Any) -> LightX2VPipeline:
        return LightX2VPipeline.from_config(config, **more)

    manager = JobManager(open_engine, Path(root) / "queue")
    if not environment.restart:
        for seed in range(3):
            manager.submit(EngineConfig(**config, parallel=ParallelConfig(seq_p_size=2)), replace(request, seed=seed))
    jobs = [manager.wait(job.id, 60) for job in manager.list()]
    if not environment.restart:
        time.sleep(60)  # the watch ends this process long before
    manager.close()
    return [[job.request.seed, job.state] for job in jobs]


def kill_at_step(step: int) -> None:
    """This process is killed in the middle of what all do together, in its `step`th forward."""
    forward, calls = WanDiT.forward, []

    def dying(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*arguments, **more)

    WanDiT.forward = dying  # type: ignore[method-assign]


def serving(root: str) -> list[Any]:
    """Rank 0 runs one request after another as a server does, and changes the model; the others follow."""
    if LightX2VPipeline.follow():
        return []
    ends: list[Any] = []
    for name in ("base", "i2v"):
        config, request = requests_of(Path(root))[name]
        pipe = LightX2VPipeline.from_config(EngineConfig(**config, parallel=ParallelConfig(cfg_p_size=2)))
        for each in (request, replace(request, frames=1), request):
            result = pipe.run(each, return_latents=True)
            assert result.latents is not None
            ends.append(hashlib.sha256(result.latents.numpy().tobytes()).hexdigest())
        try:
            pipe.run(replace(request, enable_cfg=False))
        except LightX2VError as error:
            ends.append(type(error).__name__)
        pipe.switch_lora([])
        pipe.close()
    return ends
