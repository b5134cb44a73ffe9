"""The shipped presets, each in a process of its own, from its start to the closed mp4.

First it writes the files at full size with random weights, into memory if that is large enough, so loading reads the
page cache. They are smaller than the released files: both experts and both tasks share one file with the blocks'
matrices, which is written once and read once per expert. Matrices are bf16 or FP8; the original models' files are
float32 and twice as large. Runs of 40 steps are cut to two unless all are requested.

Presets with results are not run again. With `--models` the files stay, so that another call, or one on another GPU at
the same time, need not write them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from lightx2v.models.dit import WanDiT
from lightx2v.models.umt5 import build_stack
from lightx2v.weights.quant_layout import SCALE, is_expert_matrix, is_text_matrix
from lightx2v.weights.quantization import quantise
from lightx2v.weights.safetensors_writer import write_safetensors
from lightx2v.weights.umt5_names import wan_name

from .bench import Bench
from .model import FP8, expert, vae, write_tokenizer
from .offload import Watched

NEEDED = 62e9
"""Bytes of the files and some room."""

RUNS = (
    "t2v_distill_lora_offload",
    "i2v_distill_merged",
    "i2v_distill_lora",
    "i2v_distill_merged_offload",
    "i2v_distill_lora_offload",
    "i2v_distill_fp8",
    "i2v_distill_fp8_offload",
    "t2v_distill_lora",
    "t2v_base",
    "i2v_base",
    "t2v_base_offload",
    "i2v_base_offload",
)
TWICE = ("t2v_distill_lora", "t2v_distill_lora_offload", "i2v_distill_merged", "i2v_distill_fp8")
"""Run once more in the same process, for the time of a warm run."""
CUT = 2
"""Steps of a run of 40."""

MODELS = {"t2v": "Wan-AI/Wan2.2-T2V-A14B", "i2v": "Wan-AI/Wan2.2-I2V-A14B"}
DISTILLED = "lightx2v/Wan2.2-Distill-Models/wan2.2_i2v_A14b_{}_noise_{}lightx2v_4step.safetensors"
LORA = "lightx2v/Wan2.2-Distill-Loras/wan2.2_{}_A14b_{}_noise_lora_rank64_lightx2v_4step_{}.safetensors"
RANK = 64


def run(bench: Bench) -> None:
    presets = bench.wanted.presets or RUNS
    if unknown := set(presets) - set(RUNS):
        sys.exit(f"There is no preset {min(unknown)} here. Presets: {', '.join(RUNS)}.")
    done = bench.measured("preset")
    with models(bench) as folder:
        for preset in presets:
            if preset not in done and (bench.cuda or not preset.endswith("offload")):
                fresh(bench, folder, preset)


@contextmanager
def models(bench: Bench) -> Iterator[Path]:
    """The folder with the files; write them if they are missing."""
    kept = bench.wanted.models
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(dir=roomy()) as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "whole"
        with FileLock(folder / "lock"):
            if not whole.exists():
                began = time.perf_counter()
                write_models(bench, folder)
                size = sum(path.stat().st_size for path in folder.rglob("*") if not path.is_symlink())
                bench.write("files written", seconds=time.perf_counter() - began, bytes=size)
                bench.clear()
                whole.touch()
        yield folder


def fresh(bench: Bench, folder: Path, preset: str) -> None:
    """Run one process, or one per GPU, and write a line for each video."""
    task, large, gpus = preset.partition("_")[0], "t2v_distill" not in preset, bench.wanted.gpus
    clip = bench.wanted.clip or list(bench.sizes.clips)[large]
    height, width, frames = bench.sizes.clips[clip]
    picture = folder / f"{preset}.png"
    Image.effect_noise((width, height), 60).convert("RGB").save(picture)
    given: dict[str, Any] = {"models_dir": str(folder), "device": bench.device.type}
    if bench.tiny or bench.wanted.clip:
        given |= {"height": height, "width": width, "frames": frames}
    if "base" in preset and not bench.wanted.whole:
        given |= {"steps": CUT}
    asked = {"preset": preset, "given": given, "image_path": None if task == "t2v" else str(picture)}
    asked |= {"times": 1 + (preset in TWICE and gpus == 1), "folder": str(folder), "began": time.time()}
    command = [sys.executable, "-m"]
    if gpus > 1:
        command += ["torch.distributed.run", f"--nproc_per_node={gpus}", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=localhost:0", "-m"]
    with bench.readings("memory.used") as used:
        process = subprocess.Popen(
            [*command, "benchmarks.gpu.presets", json.dumps(asked)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_CACHE_DIR": str(folder / "triton" / preset)},
        )
        assert process.stdout is not None
        found = [json.loads(line) for line in process.stdout if line.startswith("{")]
        status = process.wait()
    together = {"gpus": gpus} if gpus > 1 else {}
    where = f" at {clip}" * bool(bench.wanted.clip) + f" on {gpus} GPUs" * bool(together)
    for number, numbers in enumerate(found):
        memory = {"smi_mib": max(value for (value,) in used)} if used and not number else {}
        name = f"{preset}{where}, {'warm' if number else 'cold'}"
        bench.write(name, preset=preset, where=where, clip=clip, **numbers, **memory, **together)
    if status:
        bench.write(f"{preset}{where} failed", status=status)


def main() -> None:
    """In the fresh process: do what `python -m lightx2v.infer --preset` does, and measure it."""
    from lightx2v.loading import preload

    preload.start()
    from lightx2v.config.environment import Environment
    from lightx2v.config.presets import resolve
    from lightx2v.config.request import Request
    from lightx2v.pipeline import LightX2VPipeline

    asked = json.loads(sys.argv[1])
    settings = resolve(asked["preset"], asked["given"])
    leads = Environment.read().rank == 0
    watched: list[Watched] = []

    def copies_for(device: torch.device) -> Watched:
        watched.append(Watched(device))
        return watched[0]

    with (
        patch("lightx2v.offload.placement.copies_for", copies_for),
        LightX2VPipeline.from_config(settings.engine, preset=settings.preset.name) as pipe,
    ):
        for number in range(asked["times"]):
            began = time.time() if number else asked["began"]
            shows = {"prompt": f"a red ball rolls left, {number}", "negative_prompt": "blurred", "seed": 1}
            shows |= {"image_path": asked["image_path"]}
            request = Request(**settings.request | {key: value for key, value in shows.items() if value is not None})
            for copies in watched:
                copies.waits.clear()
            path = Path(asked["folder"]) / f"{asked['preset']}_{number}.mp4" if leads else None
            report = pipe.run(request, save_result_path=path, force=True).report()
            seconds = time.time() - began
            if not leads:
                continue
            assert pipe._engine is not None
            timings, plan = report["timings"], report["plan"] or {}
            found = {"seconds": seconds, "load": pipe._engine.load_seconds, "total": timings["total"]}
            found |= {
                "stages": timings["seconds"],
                "attention": report["attention"]["self"],
                "bytes": report["file_bytes"],
            }
            found |= {"steps_seconds": [step["seconds"] for step in timings["steps"]]}
            found |= {"peaks": timings["peak_vram"], "mode": plan.get("mode"), "lazy": plan.get("lazy")}
            found |= {"counted": plan.get("bytes"), "peak_rss": timings["peak_rss"]}
            found |= {"exposed": watched[0].exposed() if watched else None}
            found |= {"steps": len(timings["steps"]), "warnings": report["warnings"]}
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


# ---- files ----------------------------------------------------------------------------------------------------------


def roomy() -> Path | None:
    """A folder in memory if the files fit there, or else None."""
    memory = Path("/dev/shm")  # noqa: S108
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > NEEDED else None


def write_models(bench: Bench, folder: Path) -> None:
    """Write the files that the presets name below `folder`. FP8 parts are in folder/fp8, with links to them."""
    jobs = [*expert_files(bench, folder, fp8=False), *expert_files(bench, folder, fp8=True), *lora_files(bench, folder)]
    base, other = (folder / model for model in MODELS.values())
    vocabulary = write_tokenizer(base / "google" / "umt5-xxl")
    for name, fp8 in ((base / "models_t5_umt5-xxl-enc-bf16.pth", False), (folder / "fp8" / "t5.safetensors", True)):
        jobs.append((name, text_tensors(bench, vocabulary, fp8=fp8)))
    torch.save({name: tensor.cpu() for name, tensor in vae(bench).state_dict().items()}, base / "Wan2.1_VAE.pth")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda job: save(*job), jobs))
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google"):
        link(other / name, base / name)
    link(folder / "lightx2v/Encoders/models_t5_umt5-xxl-enc-fp8.pth", folder / "fp8" / "t5.safetensors")


Job = tuple[Path, Mapping[str, Tensor]]


def expert_files(bench: Bench, folder: Path, *, fp8: bool) -> Iterable[Job]:
    """Make a folder for each expert of each task: a link to the shared file of matrices, and a file with the rest."""
    matrices = folder / ("fp8" if fp8 else "bf16") / "matrices.safetensors"
    for task, in_dim in (("t2v", bench.sizes.dit.in_dim), ("i2v", bench.sizes.in_dim_i2v)):
        if fp8 and task == "t2v":
            continue
        config = replace(bench.sizes.dit, in_dim=in_dim)
        for seed, which in enumerate(("high", "low")):
            one = expert(bench, replace(config, num_layers=1), fp8=fp8, seed=seed)
            whole = repeated({name: tensor.cpu() for name, tensor in one.state_dict().items()}, config.num_layers)
            shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
            large = {name: tensor for name, tensor in whole.items() if is_expert_matrix(name, shapes[name])}
            if task == "i2v" and which == "high":
                yield matrices, large
            at = folder / MODELS[task] / f"{which}_noise_model"
            if fp8:
                at = folder / DISTILLED.format(which, "scaled_fp8_e4m3_")
            elif task == "i2v":
                link(folder / DISTILLED.format(which, ""), at)
            at.mkdir(parents=True)
            link(at / "matrices.safetensors", matrices)
            yield at / "others.safetensors", {name: tensor for name, tensor in whole.items() if name not in large}
            told = {**asdict(config), "model_type": task, "_class_name": "WanModel"}
            (at / "config.json").write_text(json.dumps(told))


def repeated(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """All blocks from the first one."""
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.")}
    first = {name.removeprefix("blocks.0."): tensor for name, tensor in tensors.items() if name not in found}
    return found | {f"blocks.{i}.{name}": tensor for i in range(layers) for name, tensor in first.items()}


def lora_files(bench: Bench, folder: Path) -> Iterable[Job]:
    """One LoRA file under the four names, with pairs for all matrices of the blocks."""
    pairs = {}
    for name, (out, into) in matrix_shapes(bench).items():
        stem = name.removesuffix(".weight")
        pairs[f"{stem}.lora_down.weight"] = torch.randn(RANK, into).bfloat16() * into**-0.5
        pairs[f"{stem}.lora_up.weight"] = torch.randn(out, RANK).bfloat16() * 0.01
    path = folder / "lora.safetensors"
    yield path, repeated(pairs, bench.sizes.dit.num_layers)
    for task, date in (("t2v", 1217), ("i2v", 1022)):
        for which in ("high", "low"):
            link(folder / LORA.format(task, which, date), path)


def matrix_shapes(bench: Bench) -> dict[str, tuple[int, ...]]:
    """Of the first block."""
    with torch.device("meta"):
        dit = WanDiT(replace(bench.sizes.dit, num_layers=1))
    shapes = {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()}
    return {name: shape for name, shape in shapes.items() if is_expert_matrix(name, shape)}


def text_tensors(bench: Bench, vocabulary: int, *, fp8: bool) -> dict[str, Tensor]:
    """The text encoder under the official names, with a table of the released length."""
    sizes = bench.sizes.text
    rows = max(sizes.vocab, vocabulary)
    tensors = {"token_embedding.weight": torch.zeros(rows, sizes.width, dtype=torch.bfloat16)}
    tensors["token_embedding.weight"][:vocabulary] = torch.randn(vocabulary, sizes.width)
    for name, parameter in build_stack(sizes).named_parameters():
        shape, called = tuple(parameter.shape), wan_name(f"encoder.{name}")
        if "norm" in called:
            tensors[called] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        values = torch.empty(shape, dtype=torch.bfloat16, device=bench.device).normal_(0, shape[-1] ** -0.5)
        tensors[called] = values
        if fp8 and is_text_matrix(called, shape):
            tensors[called], tensors[called.removesuffix(".weight") + SCALE] = quantise(values, FP8)
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    groups = {name: [(name, tuple(tensor.shape), tensor.dtype)] for name, tensor in tensors.items()}
    write_safetensors(path, groups, lambda name: [(name, tensors[name])], metadata={"made": "random"})


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


if __name__ == "__main__":
    main()
