"""The most memory that a run takes of a GPU under `vram_gb`, for bf16, FP8 and GGUF experts of full width.

    python -m benchmarks.gpu.limits [--layers 12] [--limits 8,12,16,24] [--seconds 170] [--tiny]

Each engine loads random weights from files and makes one video of two steps, whole: text, denoising, decoding. What
does not depend on the number of blocks (one block, activations, the VAE) is that of the released model; blocks that
stay on the device fill what the limit leaves. A thread reads the device's used memory all the while, so the CUDA
context counts. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.gguf_blocks import FORMATS
from lightx2v.weights.quant_layout import is_expert_matrix

from .bench import FULL, TINY
from .model import expert, vae, write_tokenizer
from .presets import link, repeated, roomy, save, text_tensors

GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--limits", default="8,12,16,24")
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    began, cuda = time.monotonic(), torch.cuda.is_available()
    sizes = TINY if options.tiny else FULL
    sizes = replace(
        sizes,
        dit=replace(sizes.dit, num_layers=options.layers),
        text=replace(sizes.text, layers=min(6, options.layers)),
    )
    device = torch.device("cuda" if cuda else "cpu")
    bench: Any = SimpleNamespace(sizes=sizes, device=device, compute=torch.bfloat16 if cuda else torch.float32)
    with tempfile.TemporaryDirectory(dir=roomy()) as name:
        folder = Path(name)
        write(bench, folder, "Q8_0" if options.tiny else "Q4_K")
        tell(files_written=time.monotonic() - began)
        runs = product(
            map(float, options.limits.split(",")), (("t2v", "480p"), ("i2v", "720p")), ("bf16", "fp8", "gguf")
        )
        for limit, (task, clip), kind in runs:
            if time.monotonic() - began > options.seconds:
                tell(task=task, kind=kind, limit=limit, skipped="no time left")
            else:
                measure(bench, folder, task, clip, kind, limit)


def measure(bench: Any, folder: Path, task: str, clip: str, kind: str, limit: float) -> None:
    height, width, frames = bench.sizes.clips[clip]
    picture = folder / "picture.png"
    Image.effect_noise((width, height), 60).convert("RGB").save(picture)
    place, began = folder / kind / task, time.monotonic()
    part = "original" if kind == "bf16" else "quantized"
    quantised = {"dit_quantized": True, "dit_quant_scheme": {"fp8": "fp8-sgl", "gguf": "gguf-Q4_K_M"}.get(kind)}
    files = {
        f"{half}_noise_{part}_ckpt": str(next((place / half).glob("*.gguf"), place / half)) for half in ("high", "low")
    }
    config = EngineConfig(
        model_cls="wan2.2_moe_distill", task=task, model_path=str(folder / "other"), device=bench.device.type,
        t5_original_ckpt=str(folder / "other/t5.safetensors"), vae_path=str(folder / "other/Wan2.1_VAE.pth"),
        t5_tokenizer_path=str(folder / "other/google/umt5-xxl"), vram_gb=limit,
        **files, **({} if kind == "bf16" else quantised),
    )  # fmt: skip
    image = {} if task == "t2v" else {"image_path": str(picture)}
    request = Request(
        task=task, prompt="a red ball", height=height, width=width, frames=frames, steps=2, seed=1,
        denoising_step_list=(1000, 500), boundary_step_index=1, enable_cfg=False, **image,
    )  # fmt: skip
    told: dict[str, Any] = {"task": task, "clip": clip, "kind": kind, "limit_gib": limit}
    try:
        with watched(bench.device) as peak, LightX2VPipeline.from_config(config) as pipe:
            report = pipe.run(request, save_result_path=folder / "video.mp4", force=True).report()
        told |= {"peak_gib": peak, "below": peak["used"] < limit, "warnings": report["warnings"]}
        told |= {"plan": (report["plan"] or {}).get("reason"), "stages": report["timings"]["seconds"]}
    except Exception as error:
        told |= {"failed": f"{type(error).__name__}: {error}"[:300]}
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    tell(**told, seconds=time.monotonic() - began)


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """The most GiB that were used of the device, by anyone, and that the allocator held, once the block has ended."""
    found, done = {"used": 0.0, "reserved": 0.0}, threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            free, total = torch.cuda.mem_get_info(device)
            found["used"] = max(found["used"], (total - free) / GIB)

    if device.type != "cuda":
        yield found
        return
    torch.cuda.reset_peak_memory_stats(device)
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["reserved"] = torch.cuda.max_memory_reserved(device) / GIB


def tell(**values: Any) -> None:
    print(json.dumps({key: round(v, 2) if isinstance(v, float) else v for key, v in values.items()}), flush=True)


# ---- files ----------------------------------------------------------------------------------------------------------


def write(bench: Any, folder: Path, form: str) -> None:
    """The matrices of a kind are one file for both experts of both tasks; those of GGUF files are equal."""
    other = folder / "other"
    vocabulary = write_tokenizer(other / "google" / "umt5-xxl")
    save(other / "t5.safetensors", {k: v.cpu() for k, v in text_tensors(bench, vocabulary, fp8=False).items()})
    torch.save({name: tensor.cpu() for name, tensor in vae(bench).state_dict().items()}, other / "Wan2.1_VAE.pth")
    for kind in ("bf16", "fp8", "gguf"):
        for task, in_dim in (("t2v", bench.sizes.dit.in_dim), ("i2v", bench.sizes.in_dim_i2v)):
            config = replace(bench.sizes.dit, in_dim=in_dim)
            for seed, half in enumerate(("high", "low")):
                one = expert(bench, replace(config, num_layers=1), fp8=kind == "fp8", seed=seed)
                tensors = repeated({name: tensor.cpu() for name, tensor in one.state_dict().items()}, config.num_layers)
                large = {
                    name: tensor for name, tensor in tensors.items() if is_expert_matrix(name, tuple(tensor.shape))
                }
                place = folder / kind / task / half
                place.mkdir(parents=True)
                (place / "config.json").write_text(json.dumps({**asdict(config), "_class_name": "WanModel"}))
                if kind == "gguf":
                    write_gguf(place / f"model-{form}.gguf", tensors, form)
                    continue
                if not (matrices := folder / kind / "matrices.safetensors").exists():
                    save(matrices, large)
                link(place / "matrices.safetensors", matrices)
                save(place / "others.safetensors", {name: t for name, t in tensors.items() if name not in large})


def write_gguf(path: Path, tensors: Mapping[str, Tensor], form: str) -> None:
    """Matrices in random blocks of one format with small scales, the rest in float32."""
    block, infos, parts, place = FORMATS[form], [], [], 0
    made: dict[tuple[int, ...], bytes] = {}
    for name, tensor in tensors.items():
        shape, number = tuple(tensor.shape), 0
        if is_expert_matrix(name, shape):
            number = block.number
            if shape not in made:
                raw = torch.randint(0, 256, (tensor.numel() // block.size, block.nbytes), dtype=torch.uint8)
                raw[:, :2] = torch.tensor([1e-4]).half().view(torch.uint8)
                raw[:, 2:4] = 0 if form == "Q4_K" else raw[:, 2:4]
                made[shape] = raw.numpy().tobytes()
            data = made[shape]
        else:
            data = tensor.float().contiguous().numpy().tobytes()
        text = name.encode()
        infos.append(struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape)))
        infos.append(struct.pack(f"<{len(shape)}QIQ", *shape[::-1], number, place))
        parts.append(data + bytes(-len(data) % 32))
        place += len(parts[-1])
    key, value = b"general.architecture", b"wan"
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + struct.pack("<Q", len(key)) + key
    head += struct.pack("<IQ", 8, len(value)) + value + b"".join(infos)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        file.writelines(parts)


if __name__ == "__main__":
    main()
