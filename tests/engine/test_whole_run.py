"""Whole runs, from the words to the pixels, against diffusers' pipelines over transformers' text encoder.

The same files are read apart from the engine; only the noise is handed over. Everything between has to agree: cleaning,
tokens, padding, both experts and the step between them, guidance, solver, the picture's condition, decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyModels
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from dit_reference import expert_in_diffusers
from PIL import Image
from transformers import AutoTokenizer
from umt5_reference import same_in_transformers
from vae_reference import same_in_diffusers

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.engine.result import Result
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.sampling import initial_noise

pytestmark = pytest.mark.slow

HEIGHT, WIDTH, FRAMES, STEPS, SHIFT = 32, 48, 9, 6, 5.0
TASKS = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline, "flf2v": WanImageToVideoPipeline}
PICTURES = {"t2v": (), "i2v": ("image",), "flf2v": ("image", "last_image")}
WORDS = {"prompt": "a red  ball moves &amp; turns\nleft", "negative_prompt": "grey"}


class OfficialGrid(UniPCMultistepScheduler):
    """diffusers' solver on the levels of the official code, 0.999 to 0 before the shift. Its own end elsewhere."""

    def set_timesteps(self, num_inference_steps: int, device: object = None) -> None:
        levels = np.linspace(float(np.float32(0.999)), 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=levels, device=device)


class DistilledSteps(FlowMatchEulerDiscreteScheduler):
    """Euler steps at 1000, 750, 500 and 250 of the training steps, before the shift."""

    def set_timesteps(self, num_inference_steps: int, device: object = None) -> None:
        super().set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], device=device)


def in_diffusers(folder: Path, task: str, scheduler: Any, boundary: float) -> Any:
    text = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth")
    vae = WanVAE(VAEConfig(dim=8, res_blocks=1))
    vae.load_state_dict(torch.load(folder / "Wan2.1_VAE.pth"))
    pipe = TASKS[task](
        tokenizer=AutoTokenizer.from_pretrained(folder / "google" / "umt5-xxl"),
        text_encoder=same_in_transformers({name: tensor.float() for name, tensor in text.items()}),
        vae=same_in_diffusers(vae),
        scheduler=scheduler,
        transformer=expert_in_diffusers(folder / "high_noise_model"),
        transformer_2=expert_in_diffusers(folder / "low_noise_model"),
        boundary_ratio=boundary,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check(ours: Result, pipe: Any, task: str, folder: Path, **options: Any) -> None:
    """The run again in diffusers, from the same noise and files: the same latents, the same levels of every pixel."""
    noise = initial_noise(ours.request.latent_shape, ours.seed)[None]
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    pictures = {name: Image.open(folder / f"{name}.png") for name in PICTURES[task]}
    options |= WORDS | size | pictures | {"latents": noise}
    latents = pipe(**options, output_type="latent").frames[0]
    video = pipe(**options, output_type="np").frames[0]
    assert ours.latents is not None and ours.frames is not None
    assert (ours.latents - latents).norm() / latents.norm() <= 1e-5
    assert np.abs(ours.frames - 255 * video).max() <= 0.53  # half a level of rounding, and 1e-4 of 255


def run(folder: Path, task: str, pictures: Path, **settings: Any) -> Result:
    size = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "shift": SHIFT}
    resolved = resolve({"model_path": str(folder), "device": "cpu", "task": task}, size | settings)
    for seed, name in enumerate(PICTURES[task]):
        pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{name}.png")
    names = ("image_path", "last_frame_path")
    shown = {key: str(pictures / f"{name}.png") for key, name in zip(names, PICTURES[task], strict=False)}
    request = Request(**dict(resolved.request) | WORDS | shown | {"seed": 5})
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        return pipe.run(request, return_latents=True, return_frames=True)


@pytest.mark.parametrize(("task", "boundary"), [("t2v", 0.875), ("i2v", 0.9), ("flf2v", 0.9)])
def test_guided_runs_equal_diffusers(task: str, boundary: float, tiny: TinyModels, tmp_path: Path) -> None:
    folder = tiny.t2v if task == "t2v" else tiny.i2v
    ours = run(folder, task, tmp_path, steps=STEPS, guidance=[4.0, 3.0], boundary=boundary)
    scheduler = OfficialGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    theirs = in_diffusers(folder, task, scheduler, boundary)
    scales = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    check(ours, theirs, task, tmp_path, num_inference_steps=STEPS, **scales)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_distilled_runs_equal_diffusers(task: str, tiny: TinyModels, tmp_path: Path) -> None:
    folder = tiny.t2v if task == "t2v" else tiny.i2v
    steps = {"denoising_step_list": [1000, 750, 500, 250], "boundary_step_index": 2, "enable_cfg": False}
    ours = run(folder, task, tmp_path, **steps)
    # The experts change between 937.5 and 833.3: diffusers knows a level for it, not a step.
    theirs = in_diffusers(folder, task, DistilledSteps(shift=SHIFT), 0.9)
    check(ours, theirs, task, tmp_path, num_inference_steps=4, guidance_scale=1.0)
