"""Count the bytes that several processes send each other, compare them with the formula, and derive the scaling.

    torchrun --nproc_per_node=4 -m benchmarks.parallel_wire            counts bytes on the wire, on CPUs too
    python -m benchmarks.parallel_wire --model                         the model alone, for A14B

Ulysses sends q, k, v and the result: 4 (S / P) D bytes (P - 1) / P per layer and process, for S tokens of width D. The
model adds that to the counted work of a forward. Bandwidths and rates are arguments; the model measures nothing.
"""

from __future__ import annotations

import argparse
import sys

import torch

from lightx2v.config.environment import Environment
from lightx2v.cost.run_time import dit_flops
from lightx2v.models.dit import DiTConfig, WanDiT

SIZES = {"832x480, 81 frames": (21, 60, 104), "1280x720, 81 frames": (21, 90, 160)}


def formula(tokens: int, width: int, layers: int, size: int, itemsize: int) -> float:
    """Bytes that one process sends in one forward."""
    return layers * 4 * tokens / size * width * itemsize * (size - 1) / size


@torch.inference_mode()
def count(shape: tuple[int, int, int], heads: int, layers: int) -> None:
    """Run one forward of a small DiT on all processes; rank 0 prints the bytes that each of them sent."""
    from lightx2v.parallel.mesh import Mesh
    from lightx2v.parallel.rendezvous import join

    environment = Environment.read()
    size = environment.world_size or 1
    group = join(environment)
    mesh = Mesh(group, 1, size)
    torch.manual_seed(0)
    config = DiTConfig(dim=16 * heads, ffn_dim=32 * heads, text_dim=64, num_heads=heads, num_layers=layers)
    dit = WanDiT(config).eval().to(group.device)
    dit.split = mesh.token_split(1)
    latents = torch.randn(16, *shape, device=group.device)
    dit(latents, 500.0, [dit.encode_text(torch.randn(8, 64, device=group.device))])
    sent = group.all_gather_json(mesh.sent.get("seq", {}))
    if group.is_rank0:
        tokens = shape[0] * shape[1] // 2 * (shape[2] // 2)
        expected = formula(tokens, config.dim, layers, size, 4)
        print(f"{tokens} tokens of width {config.dim}, {heads} heads, {layers} layers, {size} processes, float32")
        print(f"{'process':>8} {'all-to-all':>12} {'formula':>12} {'of it':>7} {'last gather':>12}")
        for rank, kinds in enumerate(sent):
            swap = kinds.get("swap", 0)
            share = f"{swap / expected:7.1%}" if expected else "-"
            print(f"{rank:8} {swap:12} {expected:12.0f} {share:>7} {kinds.get('collect', 0):12}")


def model(rate: float, links: dict[str, float]) -> None:
    """Seconds of a guided step of A14B in bf16 by layout, and the seconds that the exchanges add on each link."""
    dit = DiTConfig()
    print(f"\nModel, not measured: {rate / 1e12:.0f} TFLOP/s a GPU, exchanges not overlapped, two branches a step.")
    heads = f"{'video':<21} {'GPUs':>4} {'layout':>7} {'MB a layer':>11} {'compute s':>10}"
    print(heads + "".join(f"{name:>22}" for name in links))
    for name, (frames, height, width) in SIZES.items():
        tokens = frames * (height // 2) * (width // 2)
        for gpus in (1, 2, 4, 8):
            for cfg in (1, 2) if gpus > 1 else (1,):
                size = gpus // cfg
                branches = 2 // cfg
                compute = branches * dit_flops(dit, tokens) / size / rate
                wire = branches * formula(tokens, dit.dim, dit.num_layers, size, 2)
                cells = "".join(
                    f"{f'+{wire / speed:.2f} s ({compute / (compute + wire / speed):.0%})':>22}"
                    for speed in links.values()
                )
                layer = formula(tokens, dit.dim, 1, size, 2) / 1e6
                print(f"{name:<21} {gpus:4} {f'{cfg}x{size}':>7} {layer:11.0f} {compute:10.2f}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="the scaling model alone")
    parser.add_argument("--latents", type=int, nargs=3, default=(3, 30, 26), metavar=("T", "H", "W"))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tflops", type=float, default=640.0, help="effective rate of a GPU")
    parser.add_argument("--nvlink", type=float, default=300.0, help="GB/s that a GPU sends over NVLink")
    parser.add_argument("--pcie", type=float, default=15.0, help="GB/s that it sends over PCIe")
    args = parser.parse_args()
    if not args.model:
        if not Environment.read().distributed:
            sys.exit("Start it with torchrun --nproc_per_node=N, or ask for the --model alone.")
        count(tuple(args.latents), args.heads, args.layers)
    if Environment.read().rank == 0:
        model(args.tflops * 1e12, {"NVLink": args.nvlink * 1e9, "PCIe": args.pcie * 1e9})


if __name__ == "__main__":
    main()
