"""Write the trained parts to assets/demo in the official Wan2.2 layout, with example images and checksums.

    python -m training.export --runs training/runs --to assets/demo

Parts that are not trained yet are left out and listed. Weights have 16 bits: float16, but bfloat16 in the text encoder,
as its file's name says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from lightx2v.models.dit import DiTConfig

from .captions import CHINESE_FILLERS, FILLERS, LANGUAGES, PUNCTUATION, TAGS
from .latents import encode, open_vae
from .model import I2V, T2V
from .text import Text
from .tokenizer import save_tokenizer
from .world import ATTRIBUTES, place_clips, render, sample_clips, to_frames

FOLDERS = {"t2v": "Wan2.2-T2V-Demo", "i2v": "Wan2.2-I2V-Demo"}
CONFIGS = {"t2v": T2V, "i2v": I2V}
PICTURE = 192  # pixels; the engine reduces pictures to the video's 96

EXAMPLES = (  # prompts for the page, all of them within the world
    "A red ball rolls left over green grass at night.",
    "a golden star bounces on the beach at sunset",
    "A pink heart grows in the snow by day.",
    "a cyan ring spins over the sea in the moonlight",
    "a purple box moves to the right in the desert at dusk",
    "夜晚的草地上，一个红色的球向左滚动",
    "日落时的海面上，一颗粉色的爱心慢慢变大",
    "白天的雪地上，一个绿色的方块上下跳动",
)
PICTURES = (  # file name, what it shows, prompts that go with it
    (
        "blue_ball_beach.png",
        ("ball", "blue", "bounce", "sand", "day"),
        "a blue ball bounces on the beach by day",
        "蓝色的球在沙滩上跳动",
    ),
    (
        "red_heart_sunset.png",
        ("heart", "red", "grow", "sea", "sunset"),
        "a red heart grows over the sea at sunset",
        "日落时的海面上，红色的爱心变大",
    ),
    (
        "yellow_star_night.png",
        ("star", "yellow", "spin", "snow", "night"),
        "a yellow star spins in the snow at night",
        "夜晚的雪地上，黄色的星星旋转",
    ),
    (
        "green_box_meadow.png",
        ("box", "green", "left", "grass", "day"),
        "a green box moves left on the grass by day",
        "白天的草地上，绿色的方块向左移动",
    ),
)


def export(runs: Path, target: Path) -> list[str]:
    """Return the names of missing parts."""
    missing = []
    target.mkdir(parents=True, exist_ok=True)
    for task, name in FOLDERS.items():
        folder = target / name
        folder.mkdir(exist_ok=True)
        _vae(runs / "vae" / "vae.safetensors", folder)
        save_tokenizer(folder / "google" / "umt5-xxl")
        missing += _text(runs / task / "text.safetensors", folder)
        for which in ("high", "low"):
            missing += _expert(runs / task / f"{which}.safetensors", folder / f"{which}_noise_model", task)
            source = runs / task / f"{which}_lora.safetensors"
            lora = target / "loras" / f"wan2.2_{task}_demo_{which}_noise_lora_rank16_4step.safetensors"
            lora.parent.mkdir(exist_ok=True)
            if source.exists():
                save_file(load_file(source), lora, {"format": "pt", "steps": "4", "expert": f"{which}_noise"})
            else:
                missing.append(str(source))
    _world(target / "world.json")
    _pictures(target / "examples")
    _checksums(target)
    return missing


def _vae(source: Path, folder: Path) -> None:
    torch.save(load_file(source), folder / "Wan2.1_VAE.pth")
    factors = _latent_rgb(source)
    (folder / "latent_rgb.json").write_text(json.dumps(factors) + "\n")


@torch.no_grad()
def _latent_rgb(source: Path) -> dict[str, list]:
    """The least-squares map from a latent pixel to the mean colour of its pixels, over whole clips."""
    device = torch.device("cpu")
    vae = open_vae(source, device)
    known, wanted = [], []
    for seed in range(6):
        video = render(sample_clips(4, torch.Generator().manual_seed(seed), split="train"))
        latents = encode(vae, video)
        blocks = F.avg_pool3d(video[:, :, 1:], (4, 8, 8))
        colours = torch.cat([F.avg_pool3d(video[:, :, :1], (1, 8, 8)), blocks], dim=2)
        known.append(latents.permute(0, 2, 3, 4, 1).flatten(0, 3))
        wanted.append(colours.permute(0, 2, 3, 4, 1).flatten(0, 3))
    rows = torch.cat(known).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(rows, torch.cat(wanted).double()).solution
    table = [[round(value, 5) for value in row] for row in solution.tolist()]
    return {"factors": table[:-1], "bias": table[-1]}


def _text(source: Path, folder: Path) -> list[str]:
    if not source.exists():
        return [str(source)]
    tensors = load_file(source)
    text = Text(*tensors["embedding.weight"].shape)
    text.load_state_dict({name: value.float() for name, value in tensors.items()})
    state = {name: value.bfloat16().clone() for name, value in text.wan_state_dict().items()}
    torch.save(state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return []


def _expert(source: Path, folder: Path, task: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config_json(CONFIGS[task], task), indent=2) + "\n")
    if not source.exists():
        return [str(source)]
    save_file(load_file(source), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return []


def _config_json(config: DiTConfig, task: str) -> dict[str, object]:
    """The keys of the official file."""
    names = (
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "num_heads",
        "num_layers",
        "out_dim",
        "text_len",
        "text_dim",
    )
    return {"_class_name": "WanModel", "model_type": task} | {name: getattr(config, name) for name in names}


def _world(path: Path) -> None:
    """The demo's words by attribute and language, and prompts that work, for the page's hints."""
    words = {
        language: {
            attribute: {
                value: list(dict.fromkeys((*phrases, *TAGS[language].get(attribute, {}).get(value, ()))))
                for value, phrases in values.items()
            }
            for attribute, values in tables.items()
        }
        for language, tables in LANGUAGES.items()
    }
    data = {
        "attributes": {name: list(values) for name, values in ATTRIBUTES.items()},
        "words": words,
        "fillers": {"en": list(dict.fromkeys(FILLERS)), "zh": list(CHINESE_FILLERS)},
        "punctuation": PUNCTUATION,
        "examples": list(EXAMPLES),
        "pictures": [{"file": f"examples/{file}", "prompts": [en, zh]} for file, _, en, zh in PICTURES],
    }
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def _pictures(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for seed, (file, words, _, _) in enumerate(PICTURES):
        index = 0
        for (_, values), word in zip(ATTRIBUTES.items(), words, strict=True):
            index = index * len(values) + values.index(word)
        clips = place_clips(torch.tensor([index]), torch.Generator().manual_seed(seed))
        picture = to_frames(render(clips, 1, PICTURE))[0, 0]
        Image.fromarray(picture.numpy()).save(folder / file, optimize=True)


def _checksums(target: Path) -> None:
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "README.md"))
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(target).as_posix()}" for p in files]
    (target / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("training/runs"))
    parser.add_argument("--to", type=Path, default=Path("assets/demo"))
    args = parser.parse_args()
    if args.to.exists() and not (args.to / FOLDERS["t2v"]).exists() and any(args.to.iterdir()):
        raise SystemExit(f"{args.to} is not empty and holds no demo model")
    for name in export(args.runs, args.to):
        print(f"missing: {name}")
    sizes = [p.stat().st_size for p in args.to.rglob("*") if p.is_file()]
    print(f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
