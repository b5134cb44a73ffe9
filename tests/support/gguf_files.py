"""GGUF files for tests: written by the `gguf` package, quantised by it or made of random blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from tiny import DiTSizes, T5Sizes, build_tiny

from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.gguf_blocks import FORMATS, BlockFormat

Tensors = Mapping[str, torch.Tensor | tuple[np.ndarray, str]]
"""Float tensors, or (bytes [rows, bytes of a row], format)."""

FloatTensors = dict[str, torch.Tensor]

EXPERTS = ("high", "low")
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"

FLOAT16_PLACES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)} | dict.fromkeys(
    ("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)
)


def random_blocks(form: BlockFormat, rows: int, columns: int, *, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    """uint8 [rows, bytes]: every code may occur; scales are small finite numbers, with zeros and a subnormal one."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * columns // form.size, form.nbytes), generator=g, dtype=torch.uint8)
    for start in FLOAT16_PLACES.get(form.name, (0,)):
        values = (size * torch.randn(len(raw), 1, generator=g)).half()
        values[:3, 0] = torch.tensor([0.0, -0.0, 6e-8]).half()
        raw[:, start : start + 2] = values.view(torch.uint8)
    return raw.view(rows, -1)


def quantised(weight: torch.Tensor, name: str) -> tuple[np.ndarray, str]:
    """A matrix in a format that the package can make: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16."""
    return quants.quantize(weight.float().numpy(), GGMLQuantizationType[name]), name


def in_blocks(weight: torch.Tensor, name: str, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """A matrix of this shape in any format: of the package's own quantisation, or else of random blocks of a size that
    keeps activations near one."""
    try:
        return quantised(weight, name)
    except NotImplementedError:
        blocks = random_blocks(FORMATS[name], *weight.shape, seed=seed)
        sizes = reference(blocks.numpy(), name).std()
        return random_blocks(FORMATS[name], *weight.shape, seed=seed, size=weight.std().item() / sizes).numpy(), name


def reference(blocks: np.ndarray, name: str) -> np.ndarray:
    """The package's float32 weights."""
    return quants.dequantize(blocks, GGMLQuantizationType[name]).astype(np.float32)


def write_gguf(path: Path, tensors: Tensors, *, architecture: str | None = "wan", **metadata: Any) -> Path:
    """Write a file as a converter does. A keyword's `__` stands for a dot; values are text, numbers or lists."""
    writer = GGUFWriter(path, architecture or "none")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    for key, value in metadata.items():
        key = key.replace("__", ".")
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=GGMLQuantizationType[tensor[1]])
        elif tensor.dtype == torch.bfloat16:
            values = quants.quantize(tensor.float().numpy(), GGMLQuantizationType.BF16)
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expert(folder: Path, which: str) -> FloatTensors:
    return dict(open_checkpoint(folder / f"{which}_noise_model").tensors())


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and name.endswith("weight") and "embedding.embedding" not in name


def stored(tensors: FloatTensors, form: str | Callable[[str], str]) -> tuple[Tensors, FloatTensors]:
    """Every matrix in a format (or in that of its name), as a converter stores it, and their float32 weights as the
    `gguf` package computes them."""
    written: dict[str, object] = {}
    floats: FloatTensors = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        kind = form if isinstance(form, str) else form(name)
        if is_matrix(name, tensor) and kind != "F32":
            blocks = in_blocks(tensor, kind, seed=seed)
            written[name], floats[name] = blocks, torch.from_numpy(reference(*blocks))
        else:
            written[name] = floats[name] = tensor.float()
    return written, floats  # type: ignore[return-value]


LLAMA = {
    "token_embedding.weight": "token_embd.weight", "norm.weight": "enc.output_norm.weight", "norm1": "attn_norm",
    "norm2": "ffn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_o",
    "pos_embedding.embedding": "attn_rel_b", "ffn.gate.0": "ffn_gate", "ffn.fc1": "ffn_up", "ffn.fc2": "ffn_down",
}  # fmt: skip


def llama_name(name: str) -> str:
    if name in LLAMA:
        return LLAMA[name]
    _, index, rest = name.split(".", 2)
    return f"enc.blk.{index}.{LLAMA[rest.removesuffix('.weight')]}.weight"


def build_wide(folder: Path) -> Path:
    """A tiny model whose rows hold blocks of 256, and whose width shows its heads."""
    t5 = T5Sizes(width=256, heads=4, head_dim=64, ffn=256, layers=2)
    return build_tiny(folder, dit=DiTSizes(dim=256, ffn_dim=512, freq_dim=256), t5=t5)


def make(folder: Path, source: Path, form: str | Callable[[str], str]) -> tuple[dict[str, object], dict[str, object]]:
    """Settings that name GGUF files, and settings that name float files of the same weights."""
    ours: dict[str, object] = {}
    theirs: dict[str, object] = {}
    for which in EXPERTS:
        written, floats = stored(expert(source, which), form)
        ours[f"{which}_noise_original_ckpt"] = str(write_gguf(folder / f"{which}.gguf", written))
        save_file(floats, folder / f"{which}.safetensors")
        theirs[f"{which}_noise_original_ckpt"] = str(folder / f"{which}.safetensors")
    written, floats = stored(dict(open_checkpoint(source / T5_FILE).tensors()), form)
    renamed = {llama_name(name): tensor for name, tensor in written.items()}
    ours["t5_original_ckpt"] = str(write_gguf(folder / "t5.gguf", renamed, architecture="t5encoder"))
    torch.save(floats, folder / "t5.pth")
    theirs["t5_original_ckpt"] = str(folder / "t5.pth")
    return ours, theirs


def q4_k_m(name: str) -> str:
    """The mix of that name, with a token table in Q8_0 and some layers outside of the blocks in 16 bits."""
    if name.startswith("token_embedding"):
        return "Q8_0"
    if "embedding." in name or name.startswith("time_projection"):
        return "F16"
    return "Q6_K" if name.endswith((".v.weight", "ffn.2.weight", "fc2.weight")) else "Q4_K"
