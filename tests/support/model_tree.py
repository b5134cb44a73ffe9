"""A folder tree like ComfyUI's, with the demo model's files under the names that people's files have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

DEMO = Path(__file__).parents[2] / "assets" / "demo"
T2V, I2V = (DEMO / f"Wan2.2-{task}-Demo" for task in ("T2V", "I2V"))
EXPERT = "diffusion_pytorch_model.safetensors"
LORA = "wan2.2_{}_demo_{}_noise_lora_rank16_4step.safetensors"


def comfy_tree(root: Path) -> Path:
    """`root`/ComfyUI/models with a T2V pair, an I2V pair, a text encoder, a VAE, LoRAs, and a folder of the tokenizer.
    The folder of models."""
    models = root / "ComfyUI" / "models"
    for task, source in (("t2v", T2V), ("i2v", I2V)):
        for expert in ("high", "low"):
            put(
                source / f"{expert}_noise_model" / EXPERT,
                models / f"diffusion_models/wan2.2_{task}_{expert}_noise_demo.safetensors",
            )
            lora = LORA.format(task, expert)
            put(DEMO / "loras" / lora, models / "loras" / lora.replace("lora_rank16", "lightx2v_lora"))
    put(T2V / "models_t5_umt5-xxl-enc-bf16.pth", models / "text_encoders/umt5_demo_bf16.pth")
    put(T2V / "Wan2.1_VAE.pth", models / "vae/wan_2.1_vae.pth")
    for task, source in (("t2v", T2V), ("i2v", I2V)):
        put(source / "high_noise_model/config.json", models / f"configs/{task}/high_noise_model/config.json")
        shutil.copytree(source / "google", models / f"configs/{task}/google")
    return models


def style_lora(models: Path, name: str = "watercolour.safetensors", metadata: Mapping[str, str] | None = None) -> Path:
    """A LoRA of one's own in `models`/loras: the demo's high-noise one, with trigger words, a picture and a note."""
    path = models / "loras" / name
    tensors = load_file(DEMO / "loras" / LORA.format("t2v", "high"))
    save_file(tensors, path, dict(metadata or {"modelspec.trigger_phrase": "wtrclr style"}))
    note = {"trainedWords": ["soft wash"], "baseModel": "Wan Video 2.2 T2V-A14B"}
    path.with_suffix(".civitai.info").write_text(json.dumps(note))
    shutil.copy(DEMO / "examples" / "blue_ball_beach.png", path.with_suffix(".preview.png"))
    return path


def put(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target
