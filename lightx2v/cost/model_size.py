"""The sizes of a configuration's model: from its files where they are on this machine, else from their names."""

import re
from functools import lru_cache
from pathlib import Path

from ..config.architecture import DiTConfig
from ..config.engine_config import EngineConfig
from ..config.gguf_formats import bytes_per_weight, is_gguf, mix_of
from ..config.model_paths import part_names
from ..hub import find, model_folder
from .memory_bytes import block_weights, outside_weights
from .memory_plan import ATTENTION_BYTES, TABLE_WEIGHTS, TEXT_WEIGHTS, VAE_WEIGHTS, ModelSize

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
USUAL_RANK = 64
"""Of a LoRA whose name says none."""


@lru_cache(maxsize=64)
def shape_of(config: EngineConfig) -> DiTConfig:
    """The architecture from the model's folder; A14B's if the folder is not on this machine."""
    return DiTConfig.from_folder(model_folder(config))


@lru_cache(maxsize=64)
def model_size(config: EngineConfig, default: int) -> ModelSize:
    """`default`: bytes per value where the configuration leaves the dtype to the device."""
    compute, vae_element = (SIZES.get(dtype, default) for dtype in (config.dtype, config.vae_dtype))
    vae, shape = VAE_WEIGHTS * vae_element, shape_of(config)
    if (folder := model_folder(config)) is not None:  # the file of a small model, in 16 bits
        vae = min(vae, _file_bytes(folder, "*VAE*.pth") * vae_element // 2 or vae)
    expert = (config.dit_quantized and config.high_noise_quantized_ckpt) or config.high_noise_original_ckpt
    gguf = is_gguf(expert, config.dit_quant_scheme)
    varying = any(lora.varies for lora in config.lora_configs)
    loras = sum(_lora_bytes(lora.path, config, shape) for lora in config.lora_configs) if gguf or varying else 0
    return ModelSize(
        dit=shape,
        weight=_gguf_weight(expert, config, shape, compute) if gguf else 1 if config.dit_quantized else compute,
        dequantised=gguf,
        compute=compute,
        vae_element=vae_element,
        text=_text_bytes(config, folder, compute),
        vae=vae,
        loras=loras,
        loras_beside=varying or gguf and config.lora_dynamic_apply,
        attention=ATTENTION_BYTES.get(config.self_attn_1_type, 0),
    )


def _gguf_weight(name: str | None, config: EngineConfig, shape: DiTConfig, otherwise: float) -> float:
    """Bytes of a weight of the blocks. A file has the other weights in 16 bits, more or less."""
    if size := _named_bytes(name, config):
        return max(0.0, size - 2 * sum(outside_weights(shape))) / (block_weights(shape) * shape.num_layers)
    return _mix_bytes(name, config.dit_quant_scheme, otherwise)


def _text_bytes(config: EngineConfig, folder: Path | None, compute: int) -> int:
    """The text encoder without its token table."""
    name = config.t5_quantized_ckpt or config.t5_original_ckpt
    if is_gguf(name, config.t5_quant_scheme):
        if size := _named_bytes(name, config):
            return size * TEXT_WEIGHTS // (TEXT_WEIGHTS + TABLE_WEIGHTS)
        return int(TEXT_WEIGHTS * _mix_bytes(name, config.t5_quant_scheme, compute))
    element = 1 if config.t5_quantized else compute
    text = TEXT_WEIGHTS * element
    if folder is not None:  # the file of a small model, in 16 bits
        text = min(text, _file_bytes(folder, "models_t5*.pth") * element // 2 or text)
    return text


def _lora_bytes(name: str, config: EngineConfig, shape: DiTConfig) -> int:
    """The size of a LoRA's file. Before it is here: in float32, with the rank in its name."""
    rank = int(match[1]) if (match := re.search(r"rank_?([0-9]{1,4})", name)) else USUAL_RANK
    pairs = 8 * 2 * shape.dim + 2 * (shape.dim + shape.ffn_dim)
    return _named_bytes(name, config) or 4 * rank * pairs * shape.num_layers


def _mix_bytes(name: str | None, scheme: str | None, otherwise: float) -> float:
    """Bytes of a weight in a GGUF file of this name; `otherwise` if neither the name nor the scheme says its mix."""
    mix = mix_of(name or "") or mix_of(scheme or "")
    return bytes_per_weight(mix) if mix else otherwise


def _named_bytes(name: str | None, config: EngineConfig) -> int:
    """The size of a file of the configuration, with all its parts; 0 if it is not on this machine."""
    place = find(name, config) if name else None
    if place is None:
        return 0
    files = [place.parent / part for part in part_names(place.name)]
    return sum(file.stat().st_size for file in files if file.is_file())


def _file_bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))
