"""Merging a LoRA into an expert while it loads, against two usual ways: all in memory, and peft's merge.

    python -m benchmarks.lora_merge [--dim 5120] [--blocks 2] [--rank 64] [--repeats 3] [--threads 2]

Every run is a process of its own. It starts from two files (bf16 weights, and a rank-64 LoRA on every matrix of the
blocks) and ends with merged weights in bf16; the ways take turns. Imports are not timed. Memory is the peak resident
memory above the value after the imports (their own peak is reset first); "merged" is the share of the merged weights.
The error is relative to a merge in float64. On a machine with other work compare CPU seconds. In models much narrower
than A14B malloc keeps freed memory, so the memory column means little.

    ours     one tensor at a time: read, added up in float32, rounded once
    naive    the state dict in memory, then W += alpha/rank * up @ down layer by layer
    peft     the model in memory, adapters beside its layers, merge_and_unload()
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v.models.dit import DiTConfig, WanDiT, parameter_dtype
from lightx2v.progress import peak_rss
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.lora_match import match_lora
from lightx2v.weights.model_weights import ModelWeights
from lightx2v.weights.module_loader import stream_into
from lightx2v.weights.quant_layout import is_expert_matrix
from lightx2v.weights.value_check import ValueCheck

BF16 = torch.bfloat16
TARGETS = r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])"
Merged = dict[str, Tensor]


def empty_model(config: DiTConfig) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config).eval().requires_grad_(False)


def dtype_of(name: str) -> torch.dtype:
    return parameter_dtype(name, BF16)


def ours(base: Path, lora: Path, config: DiTConfig) -> Merged:
    checkpoint = open_checkpoint(base)
    weights = ModelWeights.of_expert(checkpoint)
    merged = weights.with_loras([match_lora(lora, weights.plain_shapes)])
    dit = empty_model(config)
    stream_into(dit, merged.tensors(dtype_of=dtype_of), dtype_of=dtype_of, device="cpu", check=ValueCheck("base"))
    return dict(dit.state_dict())


def naive(base: Path, lora: Path, config: DiTConfig) -> Merged:
    state, pairs = load_file(base), load_file(lora)
    for key in [key for key in pairs if key.endswith(".lora_up.weight")]:
        stem = key.removesuffix(".lora_up.weight").removeprefix("diffusion_model.")
        up, down = pairs[key].float(), pairs[key.replace("lora_up", "lora_down")].float()
        alpha = pairs[key.replace("lora_up.weight", "alpha")].item()
        state[f"{stem}.weight"] = (state[f"{stem}.weight"].float() + alpha / down.shape[0] * (up @ down)).to(BF16)
    dit = empty_model(config)
    dit.load_state_dict(state, assign=True)
    dit.cast(BF16)
    return dict(dit.state_dict())


def peft(base: Path, lora: Path, config: DiTConfig) -> Merged:
    from peft import LoraConfig, get_peft_model

    dit: Any = empty_model(config)
    dit.load_state_dict(load_file(base), assign=True)
    dit.cast(BF16)
    pairs = load_file(lora)
    key = next(key for key in pairs if key.endswith("lora_down.weight"))
    rank, alpha = pairs[key].shape[0], pairs[key.replace("lora_down.weight", "alpha")].item()
    wrapped: Any = get_peft_model(dit, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            for half, matrix in (("up", module.lora_B), ("down", module.lora_A)):
                matrix["default"].weight.data = pairs[f"diffusion_model.{name}.lora_{half}.weight"]
    return dict(wrapped.merge_and_unload().state_dict())


WAYS: dict[str, Callable[[Path, Path, DiTConfig], Merged]] = {"ours": ours, "naive": naive, "peft": peft}


def child(way: str, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    config = DiTConfig(**json.loads((folder / "config.json").read_text()))
    if way == "peft":
        import peft as _  # noqa: F401
    torch.ones(512, 64).addmm_(torch.ones(512, 64), torch.ones(64, 64)).to(BF16).isfinite().all()
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak, which is that of the imports
    before, started, cpu = peak_rss(), time.perf_counter(), time.process_time()
    merged = WAYS[way](folder / "base.safetensors", folder / "lora.safetensors", config)
    for tensor in merged.values():  # a memory map is not read before it is touched
        tensor.view(-1)[:: max(1, 4096 // tensor.itemsize)].sum()
    seconds, cpu, peak = time.perf_counter() - started, time.process_time() - cpu, peak_rss() - before
    errors = []
    base, pairs = load_file(folder / "base.safetensors"), load_file(folder / "lora.safetensors")
    for stem in ("blocks.0.self_attn.q", "blocks.0.ffn.2"):
        up, down = (pairs[f"diffusion_model.{stem}.lora_{half}.weight"].double() for half in ("up", "down"))
        alpha = pairs[f"diffusion_model.{stem}.alpha"].item()
        exact = base[f"{stem}.weight"].double() + alpha / down.shape[0] * up @ down
        errors.append(((merged[f"{stem}.weight"].double() - exact).norm() / exact.norm()).item())
    size = sum(tensor.numel() * tensor.itemsize for tensor in merged.values())
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak, "size": size, "error": max(errors)}))


def write_files(folder: Path, config: DiTConfig, rank: int) -> int:
    """Write a base in bf16 and a LoRA; return the bytes of the base."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.02  # noqa: E731
    shapes = {name: tuple(p.shape) for name, p in empty_model(config).named_parameters()}
    base = {name: draw(*shape).to(BF16) for name, shape in shapes.items()}
    pairs: Merged = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes.items() if is_expert_matrix(n, s)):
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        pairs |= {f"{stem}.lora_up.weight": draw(rows, rank).to(BF16), f"{stem}.alpha": torch.tensor(rank / 2)}
        pairs[f"{stem}.lora_down.weight"] = draw(rank, columns).to(BF16)
    save_file(base, folder / "base.safetensors")
    save_file(pairs, folder / "lora.safetensors")
    return sum(tensor.numel() * tensor.itemsize for tensor in base.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=5120)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.threads)
        return
    sizes = {"dim": args.dim, "ffn_dim": args.dim * 27 // 10 // 8 * 8, "num_heads": args.dim // 128}
    sizes["num_layers"] = args.blocks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(sizes))
        size = write_files(folder, DiTConfig(**sizes), args.rank) / 1e9
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.lora_merge", "--threads", str(args.threads)]
                done = subprocess.run([*command, "--child", way, name], capture_output=True, text=True, check=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{size:.2f} GB of bf16, rank {args.rank}, {args.threads} threads, {args.repeats} runs each, medians")
    print(f"{'':8}{'seconds':>9}{'cpu':>7}{'GB/s':>7}{'cpu / ours':>12}{'peak GB':>9}{'merged GB':>11}{'error':>10}")
    middle = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
    for way, row in middle.items():
        ratio = row["cpu"] / middle["ours"]["cpu"]
        print(
            f"{way:8}{row['seconds']:9.2f}{row['cpu']:7.2f}{size / row['seconds']:7.2f}{ratio:12.2f}"
            f"{row['peak'] / 1e9:9.2f}{row['size'] / 1e9:11.2f}{row['error']:>10.1e}"
        )


if __name__ == "__main__":
    main()
