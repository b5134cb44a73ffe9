"""LoRA files in every dialect, with random values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightx2v.config.lora_spec import LoraSpec
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.dit_names import wan_to_diffusers
from lightx2v.weights.model_weights import ModelWeights

RANK = 4


Tensors = dict[str, torch.Tensor]


def base_weights(folder: Path) -> ModelWeights:
    checkpoint = open_checkpoint(folder / "high_noise_model")
    return ModelWeights.of_expert(checkpoint)


def linears(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2]


def random_pairs(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, rank: int = RANK) -> dict[str, Tensors]:
    """{layer: {up, down}} for every matrix of the model."""
    g = torch.Generator().manual_seed(seed)
    return {
        stem: {
            "up": 0.2 * torch.randn(shapes[f"{stem}.weight"][0], rank, generator=g),
            "down": 0.2 * torch.randn(rank, shapes[f"{stem}.weight"][1], generator=g),
        }
        for stem in linears(shapes)
    }


def write(path: Path, pairs: dict[str, Tensors], dialect: str = "lightx2v", alpha: float | None = None) -> Path:
    tensors: Tensors = {}
    for stem, pair in pairs.items():
        name, (up, down) = DIALECTS[dialect](stem)
        tensors[name + up], tensors[name + down] = pair["up"], pair["down"]
        if alpha is not None:
            tensors[name + ".alpha"] = torch.tensor(alpha)
    save_file({k: v.clone() for k, v in tensors.items()}, path)
    return path


STANDARD = (".lora_up.weight", ".lora_down.weight")


PEFT = (".lora_B.weight", ".lora_A.weight")


DIALECTS = {
    "lightx2v": lambda s: (f"diffusion_model.{s}", STANDARD),
    "bare": lambda s: (s, STANDARD),
    "comfy": lambda s: (f"model.diffusion_model.{s}", STANDARD),
    "peft": lambda s: (f"base_model.model.{s}", PEFT),
    "peft-named": lambda s: (f"base_model.model.{s}", (".lora_B.default.weight", ".lora_A.default.weight")),
    "mochi": lambda s: (f"transformer.{s}", (".lora_B", ".lora_A")),
    "diffusers": lambda s: (f"transformer.{wan_to_diffusers(s)}", PEFT),
    "diffusers-v1": lambda s: (f"unet.{wan_to_diffusers(s)}", ("_lora.up.weight", "_lora.down.weight")),
    "diffusers-v3": lambda s: (f"unet.{wan_to_diffusers(s)}", (".lora.up.weight", ".lora.down.weight")),
    "transformers": lambda s: (s, (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")),
    "kohya": lambda s: (f"lora_unet_{s.replace('.', '_')}", STANDARD),
    "kohya-double": lambda s: (f"lora_unet__{s.replace('.', '_')}", STANDARD),
    "kohya-dots": lambda s: (f"lora_unet_{s.replace('.', '_', 1)}", STANDARD),
    "kohya-all-dots": lambda s: (f"lora_unet.{s}", STANDARD),
    "kohya-wrapped": lambda s: (f"lora_unet__orig_mod_{s.replace('.', '_')}", STANDARD),
    "lycoris": lambda s: (f"lycoris_{wan_to_diffusers(s).replace('.', '_')}", STANDARD),
    "diffsynth": lambda s: (f"pipe.dit.{s}", (".lora_B.default.weight", ".lora_A.default.weight")),
    "compiled": lambda s: (f"diffusion_model._orig_mod.{s}", PEFT),
    "data-parallel": lambda s: (f"module.{s}", PEFT),
    "sharded": lambda s: (f"_fsdp_wrapped_module.{s.replace('.', '._fsdp_wrapped_module.', 1)}", PEFT),
    "second-transformer": lambda s: (f"transformer_2.{s}", PEFT),
    "average": lambda s: (f"ema_model.{s}", PEFT),
    "kohya-wan": lambda s: (f"lora_wan_{s.replace('.', '_')}", STANDARD),
    "kohya-diffusers": lambda s: (f"lora_transformer_{wan_to_diffusers(s).replace('.', '_')}", STANDARD),
}


def spec(path: Path, expert: str = "high", strength: float = 1.0) -> LoraSpec:
    return LoraSpec(expert=expert, path=str(path), strength=strength)  # type: ignore[arg-type]


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
