"""GGUF weights: speed and bits of the kernels, and forwards in turns with bf16: kept on the device, streamed, with a
LoRA.

The mix is Q4_K_M: Q6_K for the attentions' values and the feed-forward's second matrix, Q4_K for the others. A GPU's
clock changes with its temperature, so every round runs all ways, once in each order, and ratios are taken within a
round.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.models.gguf_linear import GGUFLinear, dequantise_on, same_weights, swap_for_blocks
from lightx2v.offload.device_copies import copies_for
from lightx2v.offload.weight_streamer import StreamedModule, WeightStreamer
from lightx2v.weights.gguf_blocks import FORMATS, BlockFormat
from lightx2v.weights.lora_delta import Pair
from lightx2v.weights.quant_layout import is_expert_matrix

from .bench import Bench
from .forward import call_of
from .model import attention, expert

HALVES = {"Q4_K": ((0, 1.0), (2, 7.5)), "Q6_K": ((208, 1.0),), "Q8_0": ((0, 1.0),), "Q4_0": ((0, 1.0),)}
"""{format: (place of a float16 in a block, its size)}; the offset of Q4_K makes its weights zero on average."""
WEIGHTS = 14e9
"""Of one expert."""
RANK = 64


@torch.inference_mode()
def run(bench: Bench) -> None:
    kernels(bench)
    forwards(bench, "480p", rounds=3)


def kernels(bench: Bench) -> None:
    """Every format: whether the weights are those of the plain function, and the seconds for a whole expert."""
    rows, columns = (13824, 5120) if bench.cuda else (8, 512)
    for form in FORMATS.values():
        raw = torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8, device=bench.device)
        dequantise = dequantise_on(bench.device, form)
        times = bench.timed(lambda form=form, raw=raw, call=dequantise: call(raw, form, bench.compute), 20, warm_up=3)
        bench.write(
            f"dequantise {form.name}",
            form=form.name,
            kernel=dequantise.__module__.rpartition(".")[2],
            same=same_weights(dequantise, form, bench.device),
            expert_seconds=times["seconds"] * WEIGHTS / (rows * columns),
        )


def forwards(bench: Bench, clip: str, *, rounds: int) -> None:
    config = bench.sizes.dit
    plain, packed = expert(bench, config), in_blocks(bench, config)
    streamed = {"high": StreamedModule(module=packed, blocks=list(packed.blocks))}
    streamer = WeightStreamer(streamed, copies_for(bench.device), bench.device, resident=config.num_layers)
    ways = {
        "bf16": (plain, 0, False),
        "Q4_K_M": (packed, config.num_layers, False),
        "Q4_K_M, streamed": (packed, 0, False),
    }
    ways["Q4_K_M with a LoRA"] = (packed, config.num_layers, True)
    loras = {layer: pair(layer, bench.device) for layer in packed.modules() if isinstance(layer, GGUFLinear)}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, dict[str, int]] = {way: {} for way in ways}
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            dit, resident, lora = ways[way]
            for layer, delta in loras.items():
                layer.merged = [delta] if lora else []
            if dit is plain:
                taken[way].append(bench.timed(call_of(bench, dit, clip), 2)["seconds"])
                continue
            streamer.resize(resident)
            with streamer.use("high"), bench.peak() as peak:
                taken[way].append(bench.timed(call_of(bench, dit, clip), 2)["seconds"])
            peaks[way] = peak
    streamer.close()
    for way, seconds in taken.items():
        ratios = [mine / whole for mine, whole in zip(seconds, taken["bf16"], strict=True)]
        spread = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        named = {"clip": clip, "way": way, "attention": attention(bench).name, "blocks": config.num_layers}
        bench.write(
            f"{clip}, {way}", **named, seconds=statistics.median(seconds), rounds=seconds, **spread, **peaks[way]
        )


def in_blocks(bench: Bench, config: DiTConfig) -> WanDiT:
    """An expert whose matrices are random blocks. Rows that no block of 256 fits get formats of 32."""
    dit = expert(bench, config)
    usual, special = ("Q4_K", "Q6_K") if config.dim % 256 == 0 else ("Q4_0", "Q8_0")
    shapes = {name: tuple(p.shape) for name, p in dit.named_parameters() if is_expert_matrix(name, tuple(p.shape))}
    forms = {name: FORMATS[special if name.endswith((".v.weight", "ffn.2.weight")) else usual] for name in shapes}
    swap_for_blocks(dit, forms, dit.blocks)
    for name, (rows, columns) in shapes.items():
        layer = dit.get_submodule(name.removesuffix(".weight"))
        layer.weight = nn.Parameter(random_blocks(forms[name], rows, columns, bench.device), requires_grad=False)
        layer.bias = nn.Parameter(torch.zeros(rows, dtype=bench.compute, device=bench.device), requires_grad=False)
    return dit


def random_blocks(form: BlockFormat, rows: int, columns: int, device: torch.device) -> Tensor:
    """uint8 [rows, bytes]: random codes, and scales that keep activations near one."""
    raw = torch.randint(0, 256, (rows * columns // form.size, form.nbytes), dtype=torch.uint8, device=device)
    largest = {"Q4_K": 200.0, "Q6_K": 1400.0, "Q8_0": 74.0, "Q4_0": 4.6}[form.name]  # the spread of scale 1
    for place, size in HALVES[form.name]:
        value = torch.tensor([size * columns**-0.5 / largest], dtype=torch.float16, device=device)
        raw[:, place : place + 2] = value.view(torch.uint8)
    return raw.view(rows, -1)


def pair(layer: GGUFLinear, device: torch.device) -> Pair:
    up = torch.randn(layer.out_features, RANK, device=device)
    return Pair(up, torch.randn(RANK, layer.in_features, device=device), 1e-4)
