"""Which files a configuration needs, and where relative paths are looked up."""

from __future__ import annotations

from pathlib import Path

from .engine_config import EngineConfig

_PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent
"""The folder with presets/ and assets/: the checkout, or the data inside an installed package."""


def needed_files(engine: EngineConfig) -> list[str]:
    """What has to be there to load `engine`: files and folders (ending in "/"), by Hub name or path, as they are given.

    Named experts, built or not, spare the base model's: 114 GB. Only the architecture is still read from its folder.
    """
    files = []
    named = []
    for expert in ("high", "low"):
        original = getattr(engine, f"{expert}_noise_original_ckpt")
        quantized = getattr(engine, f"{expert}_noise_quantized_ckpt") if engine.dit_quantized else None
        named.append(quantized or original)
        files.append(named[-1] or f"{engine.model_path}/{expert}_noise_model/")
    if all(named):
        files.append(f"{engine.model_path}/high_noise_model/config.json")
    kind = str(engine.t5_quant_scheme).partition("-")[0] if engine.t5_quantized and not engine.build else "bf16"
    text_encoder = engine.t5_quantized_ckpt or engine.t5_original_ckpt
    files += [
        text_encoder or f"{engine.model_path}/models_t5_umt5-xxl-enc-{kind}.pth",
        engine.t5_tokenizer_path or f"{engine.model_path}/google/umt5-xxl/",
        engine.vae_path or f"{engine.model_path}/Wan2.1_VAE.pth",
    ]
    return list(dict.fromkeys(files + [lora.path for lora in engine.lora_configs]))


def search_roots(engine: EngineConfig) -> list[Path]:
    """Where a relative path of a configuration is looked for, in this order."""
    given = [Path(engine.models_dir).expanduser()] if engine.models_dir else []
    return [*given, Path.cwd(), PROJECT]
