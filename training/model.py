"""The demo's diffusion transformer for training: the engine's WanDiT, with two of its steps swapped for faster ones.

In training on a GPU, positions are rotated in real arithmetic, which compilers support, and a prompt's padding counts
as one repeated row instead of 480 rows. Both give the same numbers (tests/training/test_training.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightx2v.attention.sdpa import sdpa_repeated_last
from lightx2v.models import block
from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.models.pointwise import rms_norm
from lightx2v.models.rope import rotations

T2V = DiTConfig(in_dim=16, dim=160, ffn_dim=512, freq_dim=256, text_dim=64, text_len=512, num_heads=5, num_layers=5)
I2V = DiTConfig(in_dim=36, dim=160, ffn_dim=512, freq_dim=256, text_dim=64, text_len=512, num_heads=5, num_layers=5)
LATENT = (16, 5, 12, 12)
GRID = (5, 6, 6)


def norm_rotate_real(x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P2: Tensor) -> Tensor:
    """pointwise.norm_rotate in real arithmetic; the rotations' last axis is (cosine, sine)."""
    normed = rms_norm(x_BLD, weight_D, eps).unflatten(-1, (-1, 2 * rotations_L1P2.shape[-2]))
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotations_L1P2.unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
    return turned.flatten(-2).to(x_BLD.dtype)


def attend_to_text(
    q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, padding: int, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """block.attend_to_text, with the repeated row on every device."""
    if padding > 1:
        return sdpa_repeated_last(q_BLNH, k_BLNH, v_BLNH, padding)
    return attention(q_BLNH, k_BLNH, v_BLNH)


def speed_up_training() -> None:
    """Swap the two steps in this process."""
    block.norm_rotate = norm_rotate_real
    block.attend_to_text = attend_to_text


def new_dit(config: DiTConfig = T2V, device: torch.device | str = "cpu") -> WanDiT:
    """Starts as the identity: gates and the last layer are zero, as is usual for diffusion transformers."""
    dit = WanDiT(config)
    for name, parameter in dit.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02 if name.startswith(("time", "text")) else parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.xavier_uniform_(dit.patch_embedding.weight.flatten(1))
    for layer in (dit.head.head, dit.time_projection[1]):
        nn.init.zeros_(layer.weight)
    for layer in dit.blocks:
        with torch.no_grad():
            layer.modulation.mul_(0.2)
    return fast(dit, device)


def fast(dit: WanDiT, device: torch.device | str) -> WanDiT:
    """To the device, with the table of rotations that `norm_rotate_real` needs."""
    dit.to(device)
    table = torch.view_as_real(rotations(GRID, dit.config.head_dim, device)).contiguous()
    dit.rotary = lambda grid, where: table  # pyright: ignore[reportAttributeAccessIssue]
    return dit


def widen(dit: WanDiT, config: DiTConfig = I2V) -> WanDiT:
    """An image-to-video model that does what the text-to-video one does: the new input channels start at zero."""
    device = dit.patch_embedding.weight.device
    wide = WanDiT(config)
    state = {name: value.detach().cpu().clone() for name, value in dit.state_dict().items()}
    old = state["patch_embedding.weight"]
    weight = torch.zeros_like(wide.patch_embedding.weight)
    weight[:, : old.shape[1]] = old
    wide.load_state_dict(state | {"patch_embedding.weight": weight})
    return fast(wide, device)


def matrices(dit: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The blocks' matrices, for Muon, and everything else, for AdamW."""
    inside, rest = [], []
    for name, parameter in dit.named_parameters():
        (inside if name.startswith("blocks.") and parameter.dim() == 2 else rest).append(parameter)
    return inside, rest


class Lora(nn.Module):
    """A frozen linear layer plus up(down(x)); with alpha = rank the LoRA's strength is 1."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.normal_(self.down.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))

    # WanDiT reads these of its layers
    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor:
        return self.linear.bias


def add_lora(dit: WanDiT, rank: int) -> list[nn.Parameter]:
    """Put a LoRA on the ten matrices of every block, freeze the rest, and return the trainable parameters."""
    dit.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for layer in dit.blocks:
        for parent, names in ((layer.self_attn, "qkvo"), (layer.cross_attn, "qkvo"), (layer.ffn, "02")):
            for name in names:
                lora = Lora(getattr(parent, name), rank)
                setattr(parent, name, lora)
                trained += [lora.down.weight, lora.up.weight]
    return trained


def lora_state_dict(dit: WanDiT) -> dict[str, Tensor]:
    """In LightX2V's naming, with alpha = rank."""
    state = {}
    for name, module in dit.named_modules():
        if isinstance(module, Lora):
            state[f"diffusion_model.{name}.lora_down.weight"] = module.down.weight.detach()
            state[f"diffusion_model.{name}.lora_up.weight"] = module.up.weight.detach()
            state[f"diffusion_model.{name}.alpha"] = torch.tensor(float(module.down.out_features))
    return state
