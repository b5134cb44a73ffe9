"""Rotary position embedding: a token's place in time, height and width, as rotations of its queries and keys.

Legend: B batch, L tokens, N heads, H head dim, T frames.

The angles are computed in float64, as in the official code: at position 80 a float32 angle is off by 4e-6 already. The
rotations e^(i·angle) are kept as complex64, because one complex product rotates a pair in a single pass over memory (in
place on two CPU cores: 0.3 ms, against 3.8 ms with cosines and sines on strided halves).
"""

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions rotate with time, height and width: 44, 42, 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotations(grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """The rotations (L, 1, H/2) complex64 of all tokens in a (T, height, width) grid of patches, in token order."""
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, axis_dims(head_dim), strict=True)):
        frequencies = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(torch.polar(torch.ones_like(angle), angle).to(torch.complex64).view(shape))
    # The table of one axis is small. Only expanding it over the grid is large, so that happens on the device.
    spread = [table.to(device).expand(*grid, -1) for table in angles]
    return torch.cat(spread, dim=-1).view(-1, 1, head_dim // 2)


class RotaryTable:
    """Keeps the rotations of the grid in use, one per model: 39 MB for a 720p clip with 81 frames."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._kept: tuple[tuple[int, int, int], torch.device, Tensor] | None = None

    def __call__(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        kept = self._kept
        if kept is not None and kept[:2] == (grid, device):
            return kept[2]
        # A table made under inference_mode could not be used in training later.
        with torch.inference_mode(False):
            table = rotations(grid, self.head_dim, device)
        self._kept = (grid, device, table)
        return table


def rotate(x_BLNH: Tensor, rotations_L1P: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3) ... of every head; float32. With gradients disabled, x itself is rotated."""
    pairs = torch.view_as_complex(x_BLNH.unflatten(-1, (-1, 2)))
    if torch.is_grad_enabled():
        return torch.view_as_real(pairs * rotations_L1P).flatten(-2)
    pairs.mul_(rotations_L1P)
    return x_BLNH
