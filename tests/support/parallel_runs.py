"""Cases for the parallel tests: whole runs on several processes, compared with one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from lightx2v.config.engine_config import EngineConfig, ParallelConfig
from lightx2v.config.environment import Environment
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.cost.memory_plan import MemoryPlan
from lightx2v.engine import run as run_module
from lightx2v.errors import LightX2VError
from lightx2v.offload.device_copies import HostCopies
from lightx2v.offload.placement import load_offloaded
from lightx2v.offload.resident import LoadInputs
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.rendezvous import join
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights import checkpoint as checkpoint_module
from lightx2v.weights.checkpoint import Checkpoint

Named = dict[str, tuple[EngineConfig, Request]]

STREAMED = MemoryPlan(mode="stream", resident_blocks=1, prefetch_slots=2, text="stream", vae="move", keep_experts=False)


MAG: dict[str, Any] = {
    "steps": 12, "sampler": "euler", "feature_caching": "Mag", "magcache_retention_ratio": 0.2, "magcache_K": 2,
    "magcache_ratios": ((0.99,) * 12, (1.0,) * 8 + (0.9,) * 4),
}  # fmt: skip
"""MagCache with tables that make some steps compute one branch only."""


def requests_of(root: Path) -> Named:
    """Requests for the tiny models: 30 tokens and 10 latent rows, so that 4 processes have uneven shards."""
    size = {"height": 80, "width": 48, "frames": 5, "prompt": "a red ball", "seed": 3}
    base = {"steps": 3, "shift": 5.0}
    distilled = {"denoising_step_list": (1000, 750, 500, 250), "boundary_step_index": 2, "enable_cfg": False}
    picture = str(root / "first.png")
    i2v = {"task": "i2v", "image_path": picture}
    configs = {
        task: {"model_path": str(root / folder), "task": task, "device": "cpu", "dtype": "fp32"}
        for task, folder in (("t2v", "t2v"), ("i2v", "i2v"), ("flf2v", "i2v"))
    }
    distill = {task: config | {"model_cls": "wan2.2_moe_distill"} for task, config in configs.items()}
    found: dict[str, tuple[dict[str, Any], Request]] = {
        "base": (configs["t2v"], Request(**size, **base)),
        "one_guided": (configs["t2v"], Request(**size, **base, guidance=(4.0, 1.0), negative_prompt="blue")),
        "distilled": (distill["t2v"], Request(**size, **distilled)),
        "i2v": (configs["i2v"], Request(**size, **base, **i2v)),
        "i2v_distilled": (distill["i2v"], Request(**size, **distilled, **i2v)),
        "flf2v": (configs["flf2v"], Request(**size, **base, **i2v | {"task": "flf2v", "last_frame_path": picture})),
        "mag": (configs["t2v"], Request(**size, **base | MAG)),
        "nag": (distill["t2v"], Request(**size, **distilled, nag_scale=11.0, negative_prompt="blue")),
        "flat": (configs["t2v"], Request(**(size | {"height": 32}), **base)),
        "tiles": (configs["t2v"] | {"use_tiling_vae": True}, Request(**size, **base)),
    }
    return {name: (EngineConfig(**config), request) for name, (config, request) in found.items()}


def demo_requests(root: Path) -> Named:
    """Requests for the demo model: its presets with fewer frames, and fewer steps where these may be chosen."""
    picture = Path(__file__).parents[2] / "assets/demo/examples/blue_ball_beach.png"
    found: Named = {}
    for task in ("t2v", "i2v"):
        shown = {"image_path": str(picture)} if task == "i2v" else {}
        for variant in ("base", "distill_lora", "fp8"):
            fewer = {"steps": 3} if variant == "base" else {}
            resolved = resolve(f"demo_{task}_{variant}", {"device": "cpu", "frames": 5, **fewer})
            request = Request(prompt="a blue ball rolls left over sand", **resolved.request, **shown)
            found[f"{task}_{variant}"] = (resolved.engine, request)
    dynamic, request = found["t2v_distill_lora"]
    found["t2v_dynamic_lora"] = (replace(dynamic, lora_dynamic_apply=True), request)
    return found


ALL = {"tiny": requests_of, "demo": demo_requests}


def make(root: str, kind: str, names: list[str], layouts: list[list[int]]) -> list[Any]:
    """Run these requests on these layouts, or alone without one. Rank 0 saves latents, frames and videos in the folder.

    It loads a model once for all layouts: loading a tiny one takes ten times as long as running it.
    """
    requests, ends, loaded = ALL[kind](Path(root)), [], {}
    with ExitStack() as stack:
        for name in names:
            config, request = requests[name]
            if config not in loaded:
                loaded[config] = stack.enter_context(LightX2VPipeline.from_config(config))
            pipe = loaded[config]
            if not layouts:
                ends.append({"name": name} | kept(pipe, request, Path(root) / f"{kind}-{name}"))
            for cfg, seq in layouts:
                layout = replace(config, parallel=ParallelConfig(cfg_p_size=cfg, seq_p_size=seq))
                pipe._engine = replace(pipe._engine, config=layout, mesh=Mesh(join(Environment.read()), cfg, seq))
                label = f"{name}-{cfg}x{seq}"
                ends.append({"name": label} | kept(pipe, request, Path(root) / f"{kind}-{label}"))
    return ends


def kept(pipe: LightX2VPipeline, request: Request, where: Path) -> dict[str, Any]:
    """One run's report with a digest of its latents. Saves them in the folder if the run has frames."""
    path = where.with_suffix(".mp4") if "base" in where.name else None  # ffmpeg takes longer than the tiny model
    result = pipe.run(request, save_result_path=path, return_frames=True, return_latents=True)
    assert result.latents is not None
    if result.frames is not None:
        np.savez(where.with_suffix(".npz"), latents=result.latents.numpy(), frames=result.frames)
    return {"digest": digest(result.latents), "has_frames": result.frames is not None} | result.report()


def digest(latents: torch.Tensor | None) -> str:
    assert latents is not None
    return hashlib.sha256(latents.numpy().tobytes()).hexdigest()


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes of tensors and the images that this process reads from files inside."""
    read = {"tensors": 0, "pictures": 0}

    def mapped(self: Any, name: str) -> Any:
        tensor = memory_map(self, name)
        read["tensors"] += tensor.numel() * tensor.itemsize
        return tensor

    def streamed(places: Any, *more: Any, **settings: Any) -> Any:
        every = list(places)
        read["tensors"] += sum(place.nbytes for place in every)
        return read_tensors(every, *more, **settings)

    def picture(path: Any) -> Any:
        read["pictures"] += 1
        return load(path)

    load, memory_map, read_tensors = run_module.load_image, Checkpoint.memory_map, checkpoint_module.read_tensors
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(checkpoint_module, "read_tensors", streamed))
        stack.enter_context(mock.patch.object(Checkpoint, "memory_map", mapped))
        stack.enter_context(mock.patch.object(run_module, "load_image", picture))
        yield read


def reads(root: str, loras: list[str]) -> dict[str, Any]:
    """What each process reads while it loads, runs and exchanges LoRAs, merged and beside the weights."""
    found: dict[str, Any] = {}
    config, request = demo_requests(Path(root))["i2v_distill_lora"]
    config = replace(config, parallel=ParallelConfig(seq_p_size=dist_size()))
    specs = tuple(LoraSpec(expert="high", path=path, strength=0.5) for path in loras)
    for name, dynamic in (("merged", False), ("dynamic", True)):
        with counted() as read, LightX2VPipeline.from_config(replace(config, lora_dynamic_apply=dynamic)) as pipe:
            found[f"{name}: load"] = read["tensors"]
            before = digest(pipe.run(request, return_latents=True).latents)
            found[f"{name}: pictures"] = read["pictures"]
            pipe.switch_lora(list(specs))
            found[f"{name}: exchange"] = read["tensors"] - found[f"{name}: load"]
            assert digest(pipe.run(request, return_latents=True).latents) != before
            pipe.switch_lora(list(config.lora_configs))
            assert digest(pipe.run(request, return_latents=True).latents) == before
    return found


def streamed(root: str, lazy: bool, mag: bool) -> list[Any]:
    """The same video with everything on the device, and with the experts' blocks streamed from host memory or disk.
    With `mag` each process has a branch of its own, and skips other forwards."""
    config, request = demo_requests(Path(root))["t2v_base"]
    layout = ParallelConfig(cfg_p_size=2) if mag else ParallelConfig(seq_p_size=dist_size())
    config, request = replace(config, parallel=layout), replace(request, **MAG) if mag else request
    with LightX2VPipeline.from_config(config) as pipe:
        expected = digest(pipe.run(request, return_latents=True).latents)
    with counted() as read, LightX2VPipeline.from_config(config) as pipe:
        assert pipe._engine is not None
        parts = (pipe._engine.placement, pipe._engine.mesh)
        placement = offloaded_again(config, lazy, parts[1])
        pipe._engine = replace(pipe._engine, placement=placement)
        before = read["tensors"]
        ends = [digest(pipe.run(request, return_latents=True).latents) == expected for _ in range(2)]
    return [*ends, read["tensors"] - before]


def offloaded_again(config: EngineConfig, lazy: bool, mesh: Any) -> Any:
    from lightx2v.engine.engine import choose_attention
    from lightx2v.loading.model_files import locate
    from lightx2v.loading.networks import Precision

    files, precision = locate(config), Precision.of(config)
    plan = replace(STREAMED, from_disk=lazy)
    inputs = LoadInputs(files, config, precision, *choose_attention(config, files, precision), group=mesh.group)
    return load_offloaded(inputs, MemoryLadder(plan, retry=False), copies=HostCopies(poison=True))


def dist_size() -> int:
    return Environment.read().world_size or 1


def again_and_again(root: str) -> list[Any]:
    """After each of some loads and runs, count the store's keys, torch.distributed's groups and our collectives."""
    config, request = requests_of(Path(root))["base"]
    group, left = join(Environment.read()), []
    for _ in range(3):
        with LightX2VPipeline.from_config(config) as pipe:
            for seed in range(2):
                pipe.run(replace(request, seed=seed, frames=1))
        group._store.num_keys()  # waits for an answer, so this process's writes have arrived
        group.all_true(True)
        left.append([group._store.num_keys(), len(dist.distributed_c10d._world.pg_map), len(group._all_collectives)])
        group.all_true(True)
    return left


def serving(root: str) -> list[Any]:
    """Rank 0 runs one request after another and changes the model, like a server; the others follow."""
    if LightX2VPipeline.follow():
        return []
    ends: list[Any] = []
    for name in ("base", "i2v"):
        config, request = requests_of(Path(root))[name]
        pipe = LightX2VPipeline.from_config(replace(config, max_tokens=60))
        for each in (request, replace(request, frames=1), replace(request, enable_cfg=False), request):
            result = pipe.run(each, return_latents=True)
            ends.append([digest(result.latents), sorted(result.report()["processes"][0]["sent"])])
        try:
            pipe.run(replace(request, frames=17))
        except LightX2VError as error:
            ends.append(type(error).__name__)
        pipe.switch_lora([])
        pipe.close()
    join(Environment.read()).send_command("exit")
    return ends
