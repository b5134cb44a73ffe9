"""The trainers' own parts: swapped steps equal the engine's, folding keeps reconstructions, LoRAs load as LoRAs do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightx2v.models import block, pointwise
from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.models.rope import rotations
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.sampling.euler import Euler
from training import model
from training.distill import SUBSTEPS, teacher_schedule
from training.model import GRID, LATENT, add_lora, fast, lora_state_dict, norm_rotate_real, widen
from training.optim import orthogonalise
from training.sample import DISTILL
from training.text import Text
from training.vae import fold_statistics, new_vae

SMALL = DiTConfig(dim=64, ffn_dim=96, freq_dim=32, text_dim=16, text_len=40, num_heads=2, num_layers=2)


def random_dit(config: DiTConfig = SMALL) -> WanDiT:
    torch.manual_seed(0)
    return WanDiT(config).requires_grad_(False)


def test_real_rotation_equals_the_complex_one() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(2, 180, 160), torch.rand(160)
    table = rotations(GRID, 32)
    expected = pointwise.norm_rotate(x, weight, 1e-6, table)
    assert torch.allclose(norm_rotate_real(x, weight, 1e-6, torch.view_as_real(table)), expected, atol=1e-6)


@pytest.mark.slow
def test_swapped_steps_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    dit = random_dit()
    torch.manual_seed(2)
    x, times, context = torch.randn(2, *LATENT), torch.tensor([1000.0, 300.0]), torch.randn(2, 7, 16)
    expected = dit.forward_batch(x, times, context)
    monkeypatch.setattr(block, "norm_rotate", norm_rotate_real)
    monkeypatch.setattr(block, "attend_to_text", model.attend_to_text)
    assert torch.allclose(fast(dit, "cpu").forward_batch(x, times, context), expected, atol=1e-5)


@pytest.mark.slow
def test_a_widened_model_ignores_its_new_channels_at_first() -> None:
    dit = random_dit()
    torch.manual_seed(3)
    x, times, context = torch.randn(1, *LATENT), torch.tensor([500.0]), torch.randn(1, 5, 16)
    expected = dit.forward_batch(x, times, context)
    wide = widen(dit, dataclasses.replace(SMALL, in_dim=36))
    wide.rotary = dit.rotary
    given = torch.randn(1, 20, *LATENT[1:])
    assert torch.allclose(wide.requires_grad_(False).forward_batch(x, times, context, given), expected, atol=1e-5)


def test_lora_starts_as_nothing_and_is_named_as_lightx2v_names_it() -> None:
    dit = random_dit()
    torch.manual_seed(4)
    x, times, context = torch.randn(1, *LATENT), torch.tensor([500.0]), torch.randn(1, 5, 16)
    expected = dit.forward_batch(x, times, context)
    trained = add_lora(dit, 4)
    assert torch.allclose(dit.forward_batch(x, times, context), expected)
    assert len(trained) == 2 * 10 * SMALL.num_layers
    state = lora_state_dict(dit)
    assert state["diffusion_model.blocks.1.ffn.2.lora_up.weight"].shape == (64, 4)
    assert state["diffusion_model.blocks.0.self_attn.q.lora_down.weight"].shape == (4, 64)
    assert state["diffusion_model.blocks.0.cross_attn.o.alpha"] == 4


@pytest.mark.slow
def test_folding_normalises_latents_and_keeps_reconstructions() -> None:
    torch.manual_seed(5)
    vae = new_vae(VAEConfig(dim=4, res_blocks=1)).requires_grad_(False)
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    before = vae.decode_clip(vae.encode_clip(video)[0])
    fold_statistics(vae, [video])
    latents, _ = vae.encode_clip(video)
    assert torch.allclose(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3)
    assert torch.allclose(vae.decode_clip(latents), before, atol=1e-4)


def test_whole_clip_training_equals_streamed_inference() -> None:
    torch.manual_seed(6)
    vae = WanVAE(VAEConfig(dim=4, res_blocks=1)).requires_grad_(False)
    video = torch.rand(3, 9, 32, 32) * 2 - 1
    assert torch.allclose(vae.encode_clip(video[None])[0][0], vae.encode(video), atol=1e-5)


def test_text_rows_of_padding_are_zero_and_change_nothing() -> None:
    torch.manual_seed(7)
    text = Text(50).requires_grad_(False)
    short = torch.tensor([[5, 6, 1]])
    padded = torch.tensor([[5, 6, 1, 0, 0]])
    states = text(padded)
    assert not states[:, 3:].any()
    assert torch.allclose(states[:, :3], text(short), atol=1e-5)


def test_text_weights_have_the_names_of_wans_file() -> None:
    names = set(Text(50).wan_state_dict())
    assert {"token_embedding.weight", "norm.weight", "blocks.1.ffn.gate.0.weight"} <= names
    assert "blocks.0.pos_embedding.embedding.weight" in names
    assert not any(name.startswith(("encoder", "block.", "shared")) for name in names)


def test_orthogonalised_matrices_are_about_orthogonal() -> None:
    torch.manual_seed(8)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 60)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_teacher_passes_through_the_students_levels() -> None:
    schedule, reached = teacher_schedule(0.875)
    assert schedule.steps == sum(SUBSTEPS)
    assert [round(schedule.sigmas[i], 4) for i in reached] == [round(sigma, 4) for sigma in DISTILL.sigmas[1:]]
    assert schedule.experts[0] == "high"
    assert schedule.experts[-1] == "low"
    assert Euler(DISTILL).schedule.experts == ("high", "high", "low", "low")
