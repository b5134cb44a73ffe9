"""RIFE 4.25 written down a second time, from its published description: functions on a dict of arrays, in float64.

Resizing and warping are numpy's; the network of the product uses torch's. `random_rife` makes weights under which every
part matters: flows of some pixels, masks between 0 and 1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS, SCALES = (192, 128, 96, 64, 32), (16, 8, 4, 2, 1)
Weights = dict[str, Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes in the file."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, *shape: int, bias: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, (bias,)

    conv("encode.cnn0", 16, 3, 3, 3, bias=16)
    conv("encode.cnn1", 16, 16, 3, 3, bias=16)
    conv("encode.cnn2", 16, 16, 3, 3, bias=16)
    conv("encode.cnn3", 16, 4, 4, 4, bias=4)
    for index, width in enumerate(WIDTHS):
        block, inputs = f"blocks.{index}", 15 if index == 0 else 28
        conv(f"{block}.conv0.0.0", width // 2, inputs, 3, 3, bias=width // 2)
        conv(f"{block}.conv0.1.0", width, width // 2, 3, 3, bias=width)
        for layer in range(8):
            conv(f"{block}.convblock.{layer}.conv", width, width, 3, 3, bias=width)
            found[f"{block}.convblock.{layer}.beta"] = (1, width, 1, 1)
        conv(f"{block}.lastconv.0", width, 52, 4, 4, bias=52)
    return found


def random_rife(seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in shapes().items():
        scale = 1.0 if len(shape) == 1 else (shape[1] * shape[2] * shape[3]) ** -0.5
        if name.endswith("beta"):
            scale = 0.3
        weights[name] = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale * 0.8).to(dtype)
    return weights


def between(weights: Weights, first: np.ndarray, second: np.ndarray, time: float) -> np.ndarray:
    """The frame at `time` between two frames (3, H, W) in [0, 1] whose sides are multiples of 64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    images = [first.astype(np.float64), second.astype(np.float64)]
    features = [_encode(w, image) for image in images]
    plane = np.full_like(images[0][:1], time)
    flow = np.zeros((4, *images[0].shape[1:]))
    mask = state = None
    for index, scale in enumerate(SCALES):
        if mask is None or state is None:
            flow, mask, state = _block(w, index, [*images, *features, plane], scale)
            continue
        parts = [
            *(_warp(image, flow[2 * side : 2 * side + 2]) for side, image in enumerate(images)),
            *(_warp(feature, flow[2 * side : 2 * side + 2]) for side, feature in enumerate(features)),
            *(plane, mask, state),
        ]
        change, mask, state = _block(w, index, parts, scale, flow)
        flow = flow + change
    assert mask is not None
    share = 1 / (1 + np.exp(-mask))
    return _warp(images[0], flow[:2]) * share + _warp(images[1], flow[2:]) * (1 - share)


def _encode(w: Weights, image: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(image)[None]
    for layer, stride in ((0, 2), (1, 1), (2, 1)):
        x = F.conv2d(x, w[f"encode.cnn{layer}.weight"], w[f"encode.cnn{layer}.bias"], stride, 1)
        x = torch.where(x > 0, x, 0.2 * x)
    return F.conv_transpose2d(x, w["encode.cnn3.weight"], w["encode.cnn3.bias"], 2, 1)[0].numpy()


def _block(
    w: Weights, index: int, parts: list[np.ndarray], scale: int, flow: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    name = f"blocks.{index}"
    planes = [_shrink(part, scale) for part in parts]
    if flow is not None:
        planes.append(_shrink(flow, scale) / scale)
    x = torch.from_numpy(np.concatenate(planes))[None]
    for layer in (0, 1):
        x = F.conv2d(x, w[f"{name}.conv0.{layer}.0.weight"], w[f"{name}.conv0.{layer}.0.bias"], 2, 1)
        x = torch.where(x > 0, x, 0.2 * x)
    for layer in range(8):
        at = f"{name}.convblock.{layer}"
        x = F.conv2d(x, w[f"{at}.conv.weight"], w[f"{at}.conv.bias"], 1, 1) * w[f"{at}.beta"] + x
        x = torch.where(x > 0, x, 0.2 * x)
    x = F.conv_transpose2d(x, w[f"{name}.lastconv.0.weight"], w[f"{name}.lastconv.0.bias"], 2, 1)
    channels, height, width = x.shape[1:]
    x = x.reshape(channels // 4, 2, 2, height, width).permute(0, 3, 1, 4, 2)  # four channels become four pixels
    out = _enlarge(x.reshape(channels // 4, 2 * height, 2 * width).numpy(), scale)
    return out[:4] * scale, out[4:5], out[5:]


def _shrink(x: np.ndarray, scale: int) -> np.ndarray:
    """Bilinear: the mean of the two middle pixels of each `scale`, on both axes."""
    if scale == 1:
        return x
    at = scale // 2
    rows = (x[:, at - 1 :: scale] + x[:, at::scale]) / 2
    return (rows[:, :, at - 1 :: scale] + rows[:, :, at::scale]) / 2


def _enlarge(x: np.ndarray, scale: int) -> np.ndarray:
    for axis in (1, 2):
        size = x.shape[axis]
        place = np.clip((np.arange(size * scale) + 0.5) / scale - 0.5, 0, size - 1)
        low = np.floor(place).astype(int)
        part = (place - low).reshape(-1, *[1] * (2 - axis))
        x = np.take(x, low, axis) * (1 - part) + np.take(x, np.minimum(low + 1, size - 1), axis) * part
    return x


def _warp(x: np.ndarray, flow: np.ndarray) -> np.ndarray:
    _, height, width = x.shape
    across = np.clip(np.arange(width)[None, :] + flow[0], 0, width - 1)
    down = np.clip(np.arange(height)[:, None] + flow[1], 0, height - 1)
    left, top = np.floor(across).astype(int), np.floor(down).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    h, v = across - left, down - top
    upper = x[:, top, left] * (1 - h) + x[:, top, right] * h
    lower = x[:, bottom, left] * (1 - h) + x[:, bottom, right] * h
    return upper * (1 - v) + lower * v
