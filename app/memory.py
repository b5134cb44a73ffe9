"""How much GPU memory a run will take at its highest: the engine's own planner, asked before anything is loaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from lightx2v.config import PROJECT
from lightx2v.engine_config import EngineConfig
from lightx2v.estimate import DiTShape
from lightx2v.planner import TEXT_WEIGHTS, VAE_WEIGHTS, Machine, Model, Need, Wishes, choose
from lightx2v.request import Request


def bytes_needed(config: EngineConfig, request: Request, *, vram: int, ram: int) -> int:
    """Bytes on a device with `vram` bytes free, under the plan that the engine will choose for it."""
    need = Need.of(request.latent_shape, guided=any(request.guided))
    plan = choose(Machine(vram=vram, ram=ram), _model(config), need, Wishes.of(config))
    return max(plan.bytes.values())


def model_folder(config: EngineConfig) -> Path | None:
    """The model's folder if it is on this machine."""
    path = Path(config.model_path)
    places = [Path(config.models_dir) / path] if config.models_dir else []
    return next((place for place in (*places, path, PROJECT / path) if place.is_dir()), None)


@lru_cache(maxsize=64)
def shape_of(config: EngineConfig) -> DiTShape:
    """The sizes of the model, from its folder; A14B's where it is not here."""
    return DiTShape.of_model(model_folder(config))


@lru_cache(maxsize=64)
def _model(config: EngineConfig) -> Model:
    folder = model_folder(config)
    text, vae = TEXT_WEIGHTS * (1 if config.t5_quantized else 2), VAE_WEIGHTS * 2
    if folder is not None:  # a small model has a small text encoder; its files say how small
        text = min(text, sum(file.stat().st_size for file in folder.glob("models_t5*.pth")) or text)
        vae = min(vae, sum(file.stat().st_size for file in folder.glob("*VAE*.pth")) or vae)
    return Model(dit=shape_of(config), weight=1 if config.dit_quantized else 2, text=text, vae=vae)
