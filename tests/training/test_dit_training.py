"""Training the DiT: batches, gradients as diffusers', islands of float32 under autocast."""

from __future__ import annotations

import pytest
import torch
from dit_reference import COND, TINY, UNCOND, draw, make, pad, relative
from torch import Tensor

from benchmarks.diffusers_twin import diffusers_twin
from lightx2v.models.dit import CHUNK, DiTConfig
from lightx2v.weights.dit_names import wan_to_diffusers


def batch() -> tuple[Tensor, Tensor, Tensor]:
    context = torch.stack([pad(COND, 9), pad(UNCOND, 9)])
    return draw(2, 16, 3, 8, 12, seed=5), torch.tensor([900.0, 123.4]), context


def test_a_batch_of_samples_equals_each_sample_alone() -> None:
    dit, (latents, timesteps, context) = make(), batch()
    got = dit.forward_batch(latents, timesteps, context)
    assert got.shape == latents.shape and got.requires_grad
    for n, prompt in enumerate((COND, UNCOND)):
        with torch.no_grad():
            (alone,) = dit(latents[n], timesteps[n].item(), [dit.encode_text(prompt)])
        assert relative(got[n].detach(), alone) <= 1e-5
    with torch.no_grad():
        assert relative(dit.forward_batch(latents, timesteps, context), got.detach()) <= 1e-5


def test_a_batch_takes_a_condition() -> None:
    config = DiTConfig(in_dim=36, dim=48, ffn_dim=80, freq_dim=32, text_dim=24, text_len=20, num_heads=2, num_layers=1)
    dit, (latents, timesteps, context) = make(config), batch()
    condition = draw(2, 20, 3, 8, 12, seed=6)
    with torch.no_grad():
        got = dit.forward_batch(latents, timesteps, context, condition)
        (alone,) = dit(latents[1], 123.4, [dit.encode_text(UNCOND)], condition[1])
    assert relative(got[1], alone) <= 1e-5


@pytest.mark.parametrize("chunk", [CHUNK, 10])
def test_gradients_equal_diffusers_for_every_parameter(chunk: int) -> None:
    dit, (latents, timesteps, context) = make(chunk=chunk), batch()
    twin = diffusers_twin(make()).requires_grad_()
    target = draw(*latents.shape, seed=7)
    latents.requires_grad_()
    (dit.forward_batch(latents, timesteps, context) - target).square().mean().backward()
    ours = latents.grad
    latents.grad = None
    padded = torch.nn.functional.pad(context, (0, 0, 0, TINY.text_len - context.shape[1]))
    (twin(latents, timesteps, padded).sample - target).square().mean().backward()
    assert ours is not None and latents.grad is not None and relative(ours, latents.grad) <= 1e-5
    theirs = dict(twin.named_parameters())
    for name, parameter in dit.named_parameters():
        got, expected = parameter.grad, theirs[wan_to_diffusers(name)].grad
        assert got is not None and expected is not None
        # A key's bias hardly matters to a softmax: its gradient is what is left when larger ones cancel.
        assert relative(got, expected) <= (2e-4 if name.endswith(".k.bias") else 2e-5), name


def test_training_after_inference_works_on_the_same_model() -> None:
    dit, (latents, timesteps, context) = make(), batch()
    with torch.inference_mode():
        dit(latents[0], 900.0, [dit.encode_text(COND)])
    dit.train().forward_batch(latents, timesteps, context).square().mean().backward()
    assert all(parameter.grad is not None for parameter in dit.parameters())


def test_autocast_keeps_the_islands_in_float32() -> None:
    dit, (latents, timesteps, context) = make(), batch()
    seen: dict[str, torch.dtype] = {}
    for name in ("time_embedding.0", "time_projection.1", "head.head", "blocks.1.ffn.0", "blocks.0"):
        dit.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: (out[0] if isinstance(out, list) else out).dtype})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dit.forward_batch(latents, timesteps, context)
    got.square().mean().backward()
    assert seen.pop("blocks.1.ffn.0") == torch.bfloat16
    assert set(seen.values()) == {torch.float32} and len(seen) == 4
    assert relative(got.detach(), dit.forward_batch(latents, timesteps, context).detach()) <= 2e-2
