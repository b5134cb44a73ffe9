"""Image to video in 4 steps with FP8 experts, from a fresh process to the frames: the files are in the page cache.

The files are written first, at full size and with random weights, into memory where that is large enough. Three runs in
one process: the first one has imports, loading and the first use of every kernel in it; the last one is larger. Frames
come back as an array; writing the mp4 is not included.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image

from lightx2v.models.umt5 import build_stack, wan_name
from lightx2v.weights.quant import SCALE, is_text_matrix, quantise
from lightx2v.weights.write import write_safetensors

from .bench import Bench
from .model import FP8, expert, vae, write_tokenizer

NEEDED = 40e9
"""Bytes of the files and some room."""


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(dir=roomy()) as name:
        folder = Path(name)
        began = time.perf_counter()
        write_model(bench, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        bench.write("files written", seconds=time.perf_counter() - began, bytes=size)
        bench.clear()
        for clip, (height, width, _) in bench.sizes.clips.items():
            Image.effect_noise((width, height), 60).convert("RGB").save(folder / f"{clip}.png")
        settings = {"folder": name, "device": bench.device.type, "clips": bench.sizes.clips}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.cold", json.dumps(settings | {"began": time.time()})],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_CACHE_DIR": str(folder / "triton")},
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                numbers = json.loads(line)
                bench.write(f"{numbers['clip']}, {numbers.pop('name')}", **numbers)
        if process.wait():
            sys.exit(f"The fresh process ended with status {process.returncode}.")


def roomy() -> Path | None:
    """Memory that takes files, if it takes these; None for the usual folder."""
    memory = Path("/dev/shm")  # noqa: S108
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > NEEDED else None


def write_model(bench: Bench, folder: Path) -> None:
    """A preset's files: FP8 experts with scales, the text encoder in FP8, the VAE, a tokenizer."""
    config = replace(bench.sizes.dit, in_dim=bench.sizes.in_dim_i2v)
    for seed, which in enumerate(("high", "low")):
        tensors = dict(expert(bench, config, fp8=True, seed=seed).state_dict())
        save(folder / which / f"{which}.safetensors", tensors)
        told = {**asdict(config), "model_type": "i2v", "_class_name": "WanModel"}
        (folder / f"{which}_noise_model").mkdir(exist_ok=True)
        (folder / f"{which}_noise_model" / "config.json").write_text(json.dumps(told))
        del tensors
        bench.clear()
    vocabulary = write_tokenizer(folder / "google" / "umt5-xxl")
    save(folder / "t5.safetensors", text_tensors(bench, vocabulary))
    torch.save({name: tensor.cpu() for name, tensor in vae(bench).state_dict().items()}, folder / "Wan2.1_VAE.pth")


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    groups = {name: [(name, tuple(tensor.shape), tensor.dtype)] for name, tensor in tensors.items()}
    write_safetensors(path, groups, lambda name: [(name, tensors[name].cpu())], metadata={"made": "random"})


def text_tensors(bench: Bench, vocabulary: int) -> dict[str, torch.Tensor]:
    """The text encoder under the official names, its matrices in FP8 with scales. The table is as long as released."""
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
        if is_text_matrix(called, shape):
            tensors[called], tensors[called.removesuffix(".weight") + SCALE] = quantise(values, FP8)
    return tensors


def main() -> None:
    """The fresh process."""
    from lightx2v.config import resolve
    from lightx2v.pipeline import LightX2VPipeline
    from lightx2v.request import Request

    given = json.loads(sys.argv[1])
    folder = Path(given["folder"])
    settings = resolve(
        {
            "model_cls": "wan2.2_moe_distill",
            "task": "i2v",
            "model_path": str(folder),
            "device": given["device"],
            "dit_quantized": True,
            "dit_quant_scheme": "fp8-sgl",
            "high_noise_quantized_ckpt": str(folder / "high" / "high.safetensors"),
            "low_noise_quantized_ckpt": str(folder / "low" / "low.safetensors"),
            "t5_quantized": True,
            "t5_quant_scheme": "fp8-sgl",
            "t5_quantized_ckpt": str(folder / "t5.safetensors"),
            "denoising_step_list": [1000, 750, 500, 250],
            "boundary_step_index": 2,
            "enable_cfg": False,
        },
        {},
    )
    small, large = list(given["clips"])[0], list(given["clips"])[-1]
    with LightX2VPipeline.from_config(settings.engine) as pipe:
        for name, clip in (("cold", small), ("warm", small), ("warm", large)):
            began = given["began"] if name == "cold" else time.time()
            height, width, frames = given["clips"][clip]
            size = {"height": height, "width": width, "frames": frames, "seed": 1}
            prompt = f"a red ball rolls left, {name}, {clip}"
            request = Request(**settings.request | size | {"prompt": prompt, "image_path": str(folder / f"{clip}.png")})
            result = pipe.run(request, return_frames=True)
            assert result.frames is not None and result.frames.shape[0] == request.frames
            assert pipe._engine is not None
            report = result.report()
            peaks = report["timings"]["peak_vram"] or {}
            found = {"name": name, "clip": clip, "seconds": time.time() - began, "load": pipe._engine.load_seconds}
            found |= {"stages": report["timings"]["seconds"], "attention": report["attention"]["self"]}
            found |= {"steps_seconds": [step["seconds"] for step in report["timings"]["steps"]]}
            found |= {"peaks": peaks, "plan": report["plan"] and report["plan"]["mode"]}
            found |= {"counted": report["plan"] and report["plan"]["bytes"], "peak_rss": report["timings"]["peak_rss"]}
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
