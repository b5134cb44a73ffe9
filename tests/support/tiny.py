"""Whole models of Wan2.2's architecture that take a second to make: random weights in the official folder layout.

`build_tiny(folder, task)` writes both experts as sharded safetensors with index and config.json, T5 and VAE as .pth,
and a tokenizer folder. Tests get two of them from the fixture `tiny`; benchmarks ask for their own sizes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DiTSizes:
    """The keys of Wan's config.json that carry a size."""

    dim: int = 24
    ffn_dim: int = 48
    freq_dim: int = 32
    num_heads: int = 2
    num_layers: int = 2
    out_dim: int = 16
    text_len: int = 512


@dataclass(frozen=True, kw_only=True)
class T5Sizes:
    width: int = 32
    heads: int = 4
    head_dim: int = 8
    ffn: int = 64
    layers: int = 2


def build_tiny(
    folder: Path,
    task: str = "t2v",
    *,
    dit: DiTSizes | None = None,
    t5: T5Sizes | None = None,
    vae: VAEConfig | None = None,
    shards: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes a model for `task` (t2v, i2v or flf2v) into `folder` and returns it. Same arguments, same bytes."""
    dit, t5, vae = dit or DiTSizes(), t5 or T5Sizes(), vae or VAEConfig(dim=8, res_blocks=1)
    in_dim = dit.out_dim if task == "t2v" else 2 * dit.out_dim + 4
    for offset, expert in enumerate(("high_noise_model", "low_noise_model")):
        weights = random_dit(dit, in_dim, t5.width, seed=seed + offset)
        write_shards(folder / expert, {name: tensor.to(dtype) for name, tensor in weights.items()}, shards)
        config = {"_class_name": "WanModel", "model_type": task, "in_dim": in_dim, "eps": 1e-6, **asdict(dit)}
        (folder / expert / "config.json").write_text(json.dumps(config))
    vocabulary = write_tokenizer(folder / "google" / "umt5-xxl")
    torch.save(random_t5(t5, vocabulary, seed=seed + 2), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(random_vae(vae, seed=seed + 3), folder / "Wan2.1_VAE.pth")
    return folder


def random_dit(sizes: DiTSizes, in_dim: int, text_dim: int, *, seed: int) -> Tensors:
    """One expert's tensors under the official names."""
    dim = sizes.dim
    layers = {
        "patch_embedding": (dim, in_dim, 1, 2, 2),
        "text_embedding.0": (dim, text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, sizes.freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (4 * sizes.out_dim, dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, dim)}
    for block in (f"blocks.{index}" for index in range(sizes.num_layers)):
        shapes[f"{block}.modulation"] = (1, 6, dim)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (dim,)
        for attention in ("self_attn", "cross_attn"):
            layers |= {f"{block}.{attention}.{leaf}": (dim, dim) for leaf in "qkvo"}
            shapes |= {f"{block}.{attention}.norm_{leaf}.weight": (dim,) for leaf in "qk"}
        layers |= {f"{block}.ffn.0": (sizes.ffn_dim, dim), f"{block}.ffn.2": (dim, sizes.ffn_dim)}
    for layer, shape in layers.items():
        shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return _random(shapes, seed)


def random_t5(sizes: T5Sizes, vocabulary: int, *, seed: int) -> Tensors:
    """The text encoder's tensors under the official names, in bfloat16 as released."""
    width, inner = sizes.width, sizes.heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocabulary, width), "norm.weight": (width,)}
    for block in (f"blocks.{index}" for index in range(sizes.layers)):
        shapes |= {f"{block}.norm{index}.weight": (width,) for index in (1, 2)}
        shapes |= {f"{block}.attn.{leaf}.weight": (inner, width) for leaf in "qkv"}
        shapes |= {f"{block}.attn.o.weight": (width, inner), f"{block}.ffn.fc2.weight": (width, sizes.ffn)}
        shapes |= {f"{block}.ffn.{leaf}.weight": (sizes.ffn, width) for leaf in ("gate.0", "fc1")}
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, sizes.heads)
    return {name: tensor.bfloat16() for name, tensor in _random(shapes, seed).items()}


def random_vae(config: VAEConfig, *, seed: int) -> Tensors:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanVAE(config).state_dict()


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Weights of the size that keeps activations near one: norms about 1, matrices by their inputs, biases small."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            result[name] = 1 + 0.1 * values
        elif len(shape) == 1:
            result[name] = 0.1 * values
        else:
            fan_in = shape[-1] if "embedding.weight" in name and len(shape) == 2 else values[0].numel()
            result[name] = values * (1.0 if name == "token_embedding.weight" else fan_in**-0.5)
    return result


def write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    """Safetensors shards with an index, named as diffusers names them."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for index in range(shards):
        file = f"diffusion_pytorch_model-{index + 1:05}-of-{shards:05}.safetensors"
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content, indent=1))


def write_tokenizer(folder: Path) -> int:
    """A Unigram tokenizer of UMT5's kind: special tokens, one piece per byte, some words. Returns how many tokens."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    words = "a an the of in on and red green blue yellow ball cat dog circle square moves left right up down over grass"
    pieces = [
        *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-",
        *(f"▁{word}" for word in words.split()),
        *"一个红色的球在草地上",
    ]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    vocabulary += [("▁", -3.0), *((piece, -4.0 - len(piece) / 8) for piece in dict.fromkeys(pieces))]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return tokenizer.get_vocab_size()
