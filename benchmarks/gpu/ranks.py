"""Measurements by the processes of one group; parallel.py starts them.

Errors are relative: |difference| / |reference|, both norms over the whole tensor. Seconds are those of the slowest
process, from the moment at which all are ready. Seconds of exchanges include the waiting for other processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lightx2v.config.engine_config import EngineConfig, ParallelConfig
from lightx2v.config.environment import Environment
from lightx2v.config.model_paths import PROJECT
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.engine.engine import load_here
from lightx2v.models.dit import DiTConfig, WanDiT, parameter_dtype
from lightx2v.models.vae import WanVAE
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.process_group import ProcessGroup
from lightx2v.parallel.rendezvous import join
from lightx2v.parallel.single_process import ALONE
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.model_weights import ModelWeights

from ..parallel_wire import formula
from .bench import Bench, forward_flops
from .model import expert, vae
from .presets import roomy, save

Layout = tuple[int, int]
"""Guidance branches x parts of the sequence."""


class Ranks(Bench):
    """A Bench whose rank 0 alone writes and which times a call on all processes at once."""

    def __init__(self, group: ProcessGroup, results: Path, *, tiny: bool, largest: bool) -> None:
        """`largest`: no other group has more processes, so this one also measures what does not depend on their
        number."""
        super().__init__("parallel", results, tiny=tiny)
        self.group, self.device, self.largest = group, group.device, largest

    @property
    def layouts(self) -> list[Layout]:
        half = self.group.size // 2
        return [(1, self.group.size), (2, half)]

    def write(self, name: str, **numbers: Any) -> None:
        if self.group.is_rank0:
            super().write(f"{self.group.size} GPUs: {name}", gpus=self.group.size, **numbers)

    def ready(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.group.all_true(True)

    def together(self, call: Callable[[], object], repeats: int, *, warm_up: int = 1) -> dict[str, Any]:
        """`timed` with the slowest process's seconds, and the fastest process's seconds."""
        taken = []
        for number in range(warm_up + (1 if self.tiny else repeats)):
            self.ready()
            began = time.perf_counter()
            call()
            if self.cuda:
                torch.cuda.synchronize()
            if number >= warm_up:
                taken.append(time.perf_counter() - began)
        everybody = self.group.all_gather_json(taken)
        slowest = sorted(max(times) for times in zip(*everybody, strict=True))
        return {
            "seconds": slowest[len(slowest) // 2],
            "fastest_process": min(map(min, everybody)),
            "repeats": len(taken),
        }


# ---- the same results -----------------------------------------------------------------------------------------------


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@torch.inference_mode()
def check_dit(bench: Ranks) -> None:
    """Compare some blocks of full width with two prompts and a token count that four does not divide."""
    config = replace(bench.sizes.dit, num_layers=2 if bench.tiny else 4)
    shape = (16, 3, 6, 10) if bench.tiny else (16, 9, 60, 106)
    torch.manual_seed(1)
    latents = torch.randn(shape, device=bench.device)
    prompts = [torch.randn(rows, config.text_dim, device=bench.device) for rows in (100, 40)]
    if bench.tiny:
        prompts = [prompt[: config.text_len] for prompt in prompts]
    exact: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        bench.compute = dtype
        dit = narrowed(expert(bench, config), dtype)
        dit.stack_tokens = 0
        alone = dit(latents, 700.0, [dit.encode_text(prompt.to(dtype)) for prompt in prompts])
        exact = exact or alone
        to_float32 = max(map(relative, alone, exact))
        for cfg, seq in bench.layouts:
            mesh = Mesh(bench.group, cfg, seq)
            for branches in (2, 1):
                dit.split = mesh.token_split(branches)
                mine = mesh.local_branches([dit.encode_text(prompt.to(dtype)) for prompt in prompts[:branches]])
                got = mesh.gather_branches(dit(latents, 700.0, mine), branches)
                dit.split = None
                bench.write(
                    f"{cfg}x{seq}, {len(dit.blocks)} blocks, {words(dtype)}, {branches} prompts",
                    layout=f"{cfg}x{seq}",
                    what=f"{len(dit.blocks)} blocks, {branches} prompts",
                    dtype=words(dtype),
                    error=max(map(relative, got, alone)),
                    alone_to_float32=to_float32,
                    to_float32=max(map(relative, got, exact)),
                )
        del dit
        bench.clear()
    bench.compute = torch.bfloat16 if bench.cuda else torch.float32


def narrowed(dit: WanDiT, dtype: torch.dtype) -> WanDiT:
    """The same weights in every dtype: the bf16 values."""
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, torch.bfloat16)).to(parameter_dtype(name, dtype))
    return dit


def words(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.bfloat16: "bf16"}[dtype]


@torch.inference_mode()
def check_vae(bench: Ranks) -> None:
    """Compare decoding and encoding in spatial shards with one process, without TF32."""
    shape = (16, 2, 11, 6) if bench.tiny else (16, 3, 62, 104)
    torch.manual_seed(2)
    latents = torch.randn(shape, device=bench.device)
    picture = torch.rand(3, shape[2] * 8, shape[3] * 8, device=bench.device) * 2 - 1
    for dtype in dict.fromkeys((torch.float32, bench.compute)):
        coder = vae(bench).to(dtype)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            check_shards(bench, coder, latents, picture, words(dtype))
        del coder
        bench.clear()


def check_shards(bench: Ranks, coder: WanVAE, latents: Tensor, picture: Tensor, dtype: str) -> None:
    split = Mesh(bench.group, 1, bench.group.size).spatial_split(latents.shape[2])
    assert split is not None
    difference = 0.0
    for whole, shard in zip(coder.decode(latents), coder.decode(latents, split=split), strict=True):
        parts = split.gather(shard.movedim(2, 0).contiguous())
        if parts is not None:
            difference = max(difference, float((parts.movedim(0, 2) - whole).abs().max()))
    frames = 4 * latents.shape[1] - 3
    encoded = (coder.encode_condition(frames, picture), coder.encode_condition(frames, picture, split=split))
    for what, largest in (("VAE decode", difference), ("VAE encode", float((encoded[0] - encoded[1]).abs().max()))):
        bench.write(f"{what}, {dtype}", layout="bands", what=what, dtype=dtype, largest_difference=largest)


def check_runs(bench: Ranks) -> None:
    """Compare whole runs of the demo model with frames, with LoRAs, 8-bit weights and streamed blocks."""
    picture = str(PROJECT / "assets/demo/examples/blue_ball_beach.png")
    streamed = {"cpu_offload": True, "offload_granularity": "block"}
    exact = {"dtype": "fp32", "vae_dtype": "fp32"}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "t2v base, float32": ("demo_t2v_base", exact),
        "i2v, LoRAs merged, float32": ("demo_i2v_distill_lora", exact),
    }
    if bench.largest:
        cases |= {
            "t2v base, float32, blocks streamed": ("demo_t2v_base", exact | streamed),
            "t2v, LoRAs beside, float32": ("demo_t2v_distill_lora", exact | {"lora_dynamic_apply": True}),
            "t2v base, bf16": ("demo_t2v_base", {}),
            "i2v, FP8, blocks streamed": ("demo_i2v_fp8", streamed),
        }
    for name, (preset, settings) in cases.items():
        resolved = resolve(preset, settings | {"frames": 17})
        request = Request(
            prompt="a blue ball rolls left over sand",
            **resolved.request,
            **({"image_path": picture} if resolved.engine.task == "i2v" else {}),
        )
        run_everywhere(bench, name, resolved.engine, request)


def run_everywhere(bench: Ranks, name: str, config: EngineConfig, request: Request) -> None:
    """Run one request in each process alone, and then on every layout."""
    pipe = LightX2VPipeline()
    pipe._engine = load_here(config, Mesh(ALONE, 1, 1), "", None, None)
    alone = pipe.run(request, return_frames=True, return_latents=True)
    pipe.close()
    for cfg, seq in bench.layouts:
        layout = ParallelConfig(cfg_p_size=cfg, seq_p_size=seq)
        if cfg == 2 and not any(request.guided):
            continue
        with LightX2VPipeline.from_config(replace(config, parallel=layout)) as shared:
            result = shared.run(request, return_frames=True, return_latents=True)
        if result.frames is None or result.latents is None:
            continue
        assert alone.latents is not None and alone.frames is not None
        report = result.report()
        bench.write(
            f"{cfg}x{seq}, {name}",
            layout=f"{cfg}x{seq}",
            what=name,
            error=relative(result.latents, alone.latents),
            largest_difference=float((result.latents - alone.latents).abs().max()),
            levels=int(abs(result.frames.astype(int) - alone.frames.astype(int)).max()),
            processes=[process["timings"]["seconds"] for process in report["processes"]],
            plan=report["plan"] and report["plan"]["mode"],
        )


# ---- how much faster ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def scale_forward(bench: Ranks) -> None:
    """Time one forward of one prompt on all devices, and a guided step in every layout."""
    config = bench.sizes.dit
    dit = expert(bench, config)
    for number, clip in enumerate(bench.sizes.clips):
        times = (1, 0) if number else (2, 1)
        if bench.largest:
            call = call_of(bench, dit, clip, Mesh(bench.group, 1, bench.group.size), 0)
            alone = bench.together(call, times[0], warm_up=times[1])
            bench.write(
                f"{clip}, alone", clip=clip, layout="alone", branches=1, **alone, **rates(bench, clip, alone, 1)
            )
            bench.clear()
        for cfg, seq in bench.layouts:
            for branches in (1, 2):
                if branches < cfg or (branches == 2 and number and not bench.largest):
                    continue
                forward_times(bench, dit, clip, (cfg, seq), branches, *times)
                bench.clear()


def call_of(bench: Ranks, dit: WanDiT, clip: str, mesh: Mesh, branches: int) -> Callable[[], object]:
    """A step with this number of branches on the mesh; with 0, one branch alone."""
    torch.manual_seed(0)
    latents = torch.randn(bench.sizes.latent(clip), device=bench.device)
    states = [torch.randn(bench.sizes.prompt, dit.config.text_dim, device=bench.device).to(bench.compute)]
    split = mesh.token_split(branches) if branches else None
    mine = [dit.encode_text(text) for text in mesh.local_branches(states * max(branches, 1))]

    def call() -> object:
        dit.split = split
        velocities = dit(latents, 900.0, mine)
        return mesh.gather_branches(velocities, branches) if branches else velocities

    return call


def forward_times(
    bench: Ranks, dit: WanDiT, clip: str, layout: Layout, branches: int, repeats: int, warm_up: int
) -> None:
    mesh = Mesh(bench.group, *layout)
    call, split = call_of(bench, dit, clip, mesh, branches), mesh.token_split(branches)
    for _ in range(warm_up):
        call()
    mesh.reset_counts()
    with bench.peak() as peak, exchanges(bench, split, dit) as parts:
        times = bench.together(call, repeats, warm_up=0)
    count = times["repeats"]
    config, tokens = dit.config, bench.sizes.tokens(clip)
    size = 1 if split is None else split.collectives.size
    here = branches * size // mesh.group.size
    layers = here * config.num_layers - (here - 1)  # prompts share the first block's self-attention
    bench.write(
        f"{clip}, {layout[0]}x{layout[1]}, {branches} branches",
        clip=clip,
        layout=f"{layout[0]}x{layout[1]}",
        branches=branches,
        swapped=sum(kinds.get("swap", 0) for kinds in mesh.sent.values()) // count,
        swapped_by_formula=formula(tokens, config.dim, layers, size, 2 if bench.cuda else 4),
        **times,
        **{part: seconds / count for part, seconds in parts.items()},
        **rates(bench, clip, times, branches),
        **peak,
    )


def rates(bench: Ranks, clip: str, times: dict[str, Any], branches: int) -> dict[str, float]:
    return bench.rate(branches * forward_flops(bench.sizes.dit, bench.sizes.tokens(clip)), times["seconds"])


@contextmanager
def exchanges(bench: Ranks, split: Any, dit: WanDiT) -> Iterator[dict[str, float]]:
    """Measure this process's seconds in exchanges and in packing for them."""
    parts: dict[str, float] = {}
    if split is None:
        yield parts
        return
    clock = Clock(bench)
    with (
        patch.object(dit, "self_attention", clock.around("attention", dit.self_attention)),
        patch.object(split.collectives, "all_to_all", clock.around("swap", split.collectives.all_to_all)),
        patch.object(split, "attend", clock.around("attend", split.attend)),
    ):
        yield parts
    seconds = clock.seconds()
    parts["exchange"] = seconds["swap"]
    # Of more processes than heads, some have no attention.
    parts["packing"] = seconds["attend"] - seconds["swap"] - seconds.get("attention", 0.0)


class Clock:
    """Add up the device time of several kinds of calls."""

    def __init__(self, bench: Bench) -> None:
        self._cuda = bench.cuda
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    def around(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            start = self._now()
            result = function(*arguments, **more)
            self._marks.setdefault(kind, []).append((start, self._now()))
            return result

        return timed

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        if not self._cuda:
            return {kind: sum(end - start for start, end in marks) for kind, marks in self._marks.items()}
        torch.cuda.synchronize()
        return {kind: sum(a.elapsed_time(b) for a, b in marks) / 1e3 for kind, marks in self._marks.items()}


@torch.inference_mode()
def scale_vae(bench: Ranks) -> None:
    coder = vae(bench)
    clip = list(bench.sizes.clips)[-1]
    height, width, frames = bench.sizes.clips[clip]
    latents = torch.randn(bench.sizes.latent(clip), device=bench.device)
    picture = torch.rand(3, height, width, device=bench.device) * 2 - 1
    rows = Mesh(bench.group, 1, bench.group.size).spatial_split(latents.shape[2])
    assert rows is not None

    def decode(split: Any) -> None:
        for part in coder.decode(latents, split=split):
            if split is not None:
                split.gather(part.transpose(0, 2).contiguous())

    for what, call in (
        ("decode", decode),
        ("encode", lambda split: coder.encode_condition(frames, picture, split=split)),
    ):
        for split in (None, rows) if bench.largest else (rows,):
            with bench.peak() as peak:
                times = bench.together(lambda call=call, split=split: call(split), 1)
            how = "alone" if split is None else "bands"
            bench.write(f"VAE {what}, {clip}, {how}", clip=clip, coder=what, layout=how, **times, **peak)
            bench.clear()


@torch.inference_mode()
def load(bench: Ranks) -> None:
    """Load an expert of some blocks from the page cache: alone, and with rank 0 reading for all."""
    if not bench.largest:
        return
    config: DiTConfig = replace(bench.sizes.dit, num_layers=bench.sizes.few_layers)
    with tempfile.TemporaryDirectory(dir=roomy()) as folder:
        path = Path(bench.group.broadcast_json(str(Path(folder) / "expert.safetensors")))
        if bench.group.is_rank0:
            save(path, {name: tensor.cpu() for name, tensor in expert(bench, config).state_dict().items()})
        bench.clear()
        bench.ready()
        checkpoint = open_checkpoint(path)
        weights = ModelWeights.of_expert(checkpoint)
        size = path.stat().st_size
        stream = bench.group.broadcast_stream

        def read() -> Iterator[tuple[str, Tensor]]:
            return weights.tensors(dtype_of=lambda name: parameter_dtype(name, bench.compute), device=bench.device)

        def read_by_one() -> None:
            if bench.group.is_rank0:
                drain((name, tensor.to(bench.device)) for name, tensor in read())

        placed = [(name, tensor.to(bench.device)) for name, tensor in read()]
        ways: dict[str, Callable[[], object]] = {
            "rank 0 alone, from the file": read_by_one,
            "every process, from the file": lambda: drain((name, t.to(bench.device)) for name, t in read()),
            "rank 0 for all, from the file": lambda: drain(stream(read())),
            "rank 0 for all, from its device": lambda: drain(stream(iter(placed))),
        }
        for name, call in ways.items():
            times = bench.together(call, 1)
            bench.write(f"load, {name}", way=name, bytes=size, gbytes_per_second=size / times["seconds"] / 1e9, **times)
        bench.ready()


def drain(tensors: Any) -> None:
    for _ in tensors:
        pass


PARTS: Sequence[tuple[Callable[[Ranks], None], bool]] = (
    (check_dit, True),
    (check_vae, True),
    (scale_forward, True),
    (scale_vae, True),
    (load, True),
    (check_runs, False),
)
"""And whether a part is one piece of work: one that loads pipelines is several."""


def main() -> None:
    given = json.loads(sys.argv[1])
    group = join(Environment.read())
    bench = Ranks(group, Path(given["results"]), tiny=given["tiny"], largest=given["largest"])
    for part, whole in PARTS:
        began = time.perf_counter()
        with group.collective() if whole else nullcontext():
            part(bench)
        bench.write(f"part {part.__name__}", part_seconds=time.perf_counter() - began)
        bench.clear()


if __name__ == "__main__":
    main()
