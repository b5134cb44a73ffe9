"""The parts of a model, where each one may be, and which files a configuration needs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .engine_config import EngineConfig
from .folders import expand, working_folder

_PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent
"""The folder with presets/ and assets/: the checkout, or the data inside an installed package."""

VAE_FILE = "Wan2.1_VAE.pth"
DIFFUSERS_FOLDERS = ("transformer", "transformer_2", "text_encoder", "tokenizer", "vae")
"""Of a whole repository in diffusers' layout; the names of these end in "-Diffusers"."""
SHARED_FOLDERS = ("distill_int8/", "distill_fp8/", "distill_models/", "int8/", "fp8/", "original/", "")
"""Where below the model folder LightX2V looks for the text encoder and the VAE, in its order."""
EXPERT_FOLDERS = {"high": ("high_noise_model/", "transformer/"), "low": ("low_noise_model/", "transformer_2/")}
"""An expert's folder in the official layout, then in that of diffusers."""
ARCHITECTURE_FOLDERS = (
    "",
    "low_noise_model/",
    "high_noise_model/",
    "distill_models/low_noise_model/",
    "original/",
    "transformer/",
)
"""Where below the model folder the DiT's config.json may be."""

RIFE = "Comfy-Org/frame_interpolation/frame_interpolation/rife_v4.25.safetensors"
RIFE_SHA256 = "1505884b9bdae956795430d2a70f7e2317b2abd8f130f8cfdb35a5759f909481"
"""The weights of RIFE 4.25: their name on the Hub, which is also a path below a folder of models, and their hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPart:
    """One part of a model, such as its VAE.

    `path` is the value of the configuration key `key`. Without one, the part is the first of `candidates` that exists
    in the model folder; a folder ends in "/". `name` is the path, or the part in the layout of the model's repository:
    what a download fetches. `file` is the file to take where `path` names a folder.
    """

    title: str
    name: str
    key: str = ""
    path: str | None = None
    candidates: tuple[str, ...]
    file: str = ""


def parts(engine: EngineConfig) -> list[ModelPart]:
    """Both experts, the text encoder, the tokenizer and the VAE.

    Where both experts are named, prebuilt or not, the base model's 114 GB are not needed, only its config.json: that is
    a part of its own then.
    """
    experts = [_expert(engine, which) for which in ("high", "low")]
    if all(expert.path for expert in experts):
        places = [f"{folder}config.json" for folder in ARCHITECTURE_FOLDERS]
        experts.append(_part(engine, "architecture", "", places, official="high_noise_model/config.json"))
    vae = [*(f"{folder}{VAE_FILE}" for folder in SHARED_FOLDERS), "vae/"]
    return [
        *experts,
        _text_encoder(engine),
        _part(engine, "tokenizer", "t5_tokenizer_path", ("google/umt5-xxl/", "tokenizer/")),
        _part(engine, "VAE", "vae_path", vae, official=VAE_FILE, file=VAE_FILE),
    ]


def search_roots(engine: EngineConfig) -> list[Path]:
    """The folders in which a relative path of a configuration is looked for, in this order."""
    roots = [expand(engine.models_dir)] if engine.models_dir else []
    return [*roots, working_folder(), PROJECT]  # the demo presets name `assets/demo/…`, whatever the working folder is


def shard_names(name: str) -> set[str]:
    """All file names of the set that `model-00002-of-00006.safetensors` belongs to; none for any other name."""
    match = re.fullmatch(r"(.*)-[0-9]{5}-of-([0-9]{5})(\.\w+)", name)
    if match is None or int(match[2]) > 10_000:
        return set()
    return {f"{match[1]}-{index:05}-of-{match[2]}{match[3]}" for index in range(1, int(match[2]) + 1)}


def part_names(name: str) -> set[str]:
    """All file names of the model that the file `name` belongs to: several for a split GGUF file, which opens whole."""
    return (shard_names(name) if name.lower().endswith(".gguf") else set()) or {name}


def _expert(engine: EngineConfig, which: str) -> ModelPart:
    """The quantized checkpoint where the configuration asks for one, else the original, else the model's folder."""
    quantized = engine.dit_quantized and getattr(engine, f"{which}_noise_quantized_ckpt")
    key = f"{which}_noise_{'quantized' if quantized else 'original'}_ckpt"
    return _part(engine, f"{which}-noise expert", key, EXPERT_FOLDERS[which])


def _text_encoder(engine: EngineConfig) -> ModelPart:
    """Prebuilt files are made from the bf16 text encoder where there is no quantized one."""
    key = "t5_quantized_ckpt" if engine.t5_quantized_ckpt else "t5_original_ckpt"
    scheme = (engine.t5_quant_scheme or "fp8").partition("-")[0] if engine.t5_quantized else "bf16"
    files = [f"models_t5_umt5-xxl-enc-{kind}.pth" for kind in dict.fromkeys([scheme, "bf16"])]
    if engine.t5_quantized and not engine.build:
        files = files[:1]
    candidates = [f"{folder}{file}" for file in files for folder in SHARED_FOLDERS]
    candidates += ["text_encoder/"] if files[-1].endswith("bf16.pth") else []
    return _part(engine, "text encoder", key, candidates, official=files[-1])


def _part(
    engine: EngineConfig, title: str, key: str, candidates: Sequence[str], *, official: str = "", file: str = ""
) -> ModelPart:
    path = (getattr(engine, key) if key else None) or None
    theirs = [place for place in candidates if place.partition("/")[0] in DIFFUSERS_FOLDERS]
    if theirs and engine.model_path.rstrip("/").lower().endswith("-diffusers"):
        official = theirs[0]
    name = path or f"{engine.model_path}/{official or candidates[0]}"
    return ModelPart(title=title, name=name, key=key, path=path, candidates=tuple(candidates), file=file)
