"""The detector: reads kind, colour, motion, ground and time of day from the frames of a clip, to judge the demo model.

It learns nothing: toys are the only saturated things in the demo world, so a threshold finds them. It compares the
outline with drawn ones, the hue with the palette, the path with each motion, and the rest with the landscape's
colours. Works on batches (B clips, T frames, H height, W width) on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import ATTRIBUTES, FRAMES, GROUND, LIGHT, MOTIONS, PALETTE, SHAPES, Clips

SATURATED = 0.385  # chroma (largest minus smallest channel): landscapes stay below .33, toys above .41
OUTLINE = 0.6  # least overlap with any outline, below which a toy is of no kind
GRID = 32  # outlines are compared at GRID x GRID


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One index per attribute and clip, -1 if nothing fits; tensors of length B on the CPU."""

    kind: Tensor
    colour: Tensor
    motion: Tensor
    ground: Tensor
    time: Tensor
    outlines: Tensor
    """B x kinds: how well the toy's outline overlaps each kind's, 0..1. Drawn clips reach .95."""
    path: Tensor
    """How far the toy's edges move from frame to frame, added up over the loop: 1 is the side of the picture."""

    def matches(self, clips: Clips) -> dict[str, Tensor]:
        """Which clips show what they should, by attribute and for "all" at once."""
        right = {name: getattr(self, name) == getattr(clips, name) for name in ATTRIBUTES}
        right["all"] = torch.stack(list(right.values())).all(0)
        return right

    def crispness(self, clips: Clips) -> Tensor:
        """Overlap with the outline of the wanted kind."""
        return self.outlines.gather(1, clips.kind[:, None])[:, 0]


def detect(video_BCTHW: Tensor) -> Reading:
    """Reads clips of one loop (17 frames or more; only the first 17 count) in [-1, 1]."""
    video = ((video_BCTHW[:, :, :FRAMES].float().clamp(-1, 1) + 1) / 2).transpose(1, 2)  # B T C H W
    mask = _largest_mask(video)
    boxes = _boxes(mask)
    outlines = _outline_overlaps(mask, boxes).cpu()
    return Reading(
        kind=torch.where(outlines.amax(1) > OUTLINE, outlines.argmax(1), -1),
        outlines=outlines,
        colour=_colour(video, mask).cpu(),
        motion=_motion(mask, boxes).cpu(),
        path=_path(boxes).cpu(),
        **_scene(video, mask),
    )


def score(video_BCTHW: Tensor, clips: Clips) -> dict[str, float]:
    """Share of clips that show the wanted attributes."""
    return {name: right.float().mean().item() for name, right in detect(video_BCTHW).matches(clips).items()}


def _largest_mask(video: Tensor) -> Tensor:
    """B T H W bool: saturated pixels, without specks."""
    chroma = video.amax(2) - video.amin(2)
    mask = (chroma > SATURATED).float()
    support = F.avg_pool2d(mask, 3, stride=1, padding=1)
    return (mask > 0) & (support > 0.4)


@dataclass(frozen=True, kw_only=True)
class _Boxes:
    """Per frame, as fractions of the frame: B T."""

    left: Tensor
    right: Tensor
    top: Tensor
    bottom: Tensor
    area: Tensor

    @property
    def x(self) -> Tensor:
        return (self.left + self.right) / 2

    @property
    def y(self) -> Tensor:
        return (self.top + self.bottom) / 2

    @property
    def width(self) -> Tensor:
        return self.right - self.left

    @property
    def height(self) -> Tensor:
        return self.bottom - self.top

    @property
    def seen(self) -> Tensor:
        return self.area > 0.004

    @property
    def whole(self) -> Tensor:
        """The toy touches no edge of the picture."""
        inside = (self.left > 0.015) & (self.right < 0.985) & (self.top > 0.015) & (self.bottom < 0.985)
        return self.seen & inside


def _boxes(mask: Tensor) -> _Boxes:
    def span(line: Tensor) -> tuple[Tensor, Tensor]:
        """First and one past the last row (or column) in which at least two pixels are set."""
        length = line.shape[-1]
        place = torch.arange(length, device=line.device)
        low = torch.where(line, place, length).amin(-1)
        high = torch.where(line, place + 1, 0).amax(-1)
        return low / length, high / length

    left, right = span(mask.sum(-2) > 1)
    top, bottom = span(mask.sum(-1) > 1)
    return _Boxes(left=left, right=right, top=top, bottom=bottom, area=mask.float().mean((-1, -2)))


def _outline_overlaps(mask: Tensor, boxes: _Boxes) -> Tensor:
    """B x kinds, the mean over the clip's three best views: whole, wide and large."""
    narrow = (boxes.width / boxes.height.clamp(min=1e-3)).clamp(max=1)
    quality = boxes.area * narrow * torch.where(boxes.whole, 1.0, 0.05)
    best = quality.topk(3, dim=1).indices
    return torch.stack([_overlaps(mask, boxes, best[:, i]) for i in range(3)]).mean(0)


def _overlaps(mask: Tensor, boxes: _Boxes, frame: Tensor) -> Tensor:
    """Intersection over union of one frame's outline with each kind's, both stretched to the same box: B x kinds."""
    rows = torch.arange(mask.shape[0], device=mask.device)
    picture = mask[rows, frame].float()[:, None]
    left, right, top, bottom = (getattr(boxes, n)[rows, frame] for n in ("left", "right", "top", "bottom"))
    theta = torch.zeros(len(rows), 2, 3, device=mask.device)
    theta[:, 0, 0], theta[:, 0, 2] = right - left, right + left - 1
    theta[:, 1, 1], theta[:, 1, 2] = bottom - top, bottom + top - 1
    grid = F.affine_grid(theta, [len(rows), 1, GRID, GRID], align_corners=False)
    seen = F.grid_sample(picture, grid, align_corners=False)[:, 0] > 0.5
    drawn = _outlines().to(mask.device)
    both = (seen[:, None] & drawn).float().sum((-1, -2))
    either = (seen[:, None] | drawn).float().sum((-1, -2))
    return both / either.clamp(min=1)


@lru_cache(maxsize=1)
def _outlines() -> Tensor:
    """Each kind's outline stretched to its bounding box: kinds x GRID x GRID bool."""
    axis = (torch.arange(600) + 0.5) / 200 - 1.5
    drawn = []
    for shape in SHAPES:
        inside = shape(axis[None, :].expand(600, 600), axis[:, None].expand(600, 600)) < 0
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        crop = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()
        drawn.append(F.interpolate(crop[None, None], (GRID, GRID), mode="area")[0, 0] > 0.5)
    return torch.stack(drawn)


def _colour(video: Tensor, mask: Tensor) -> Tensor:
    """The palette colour of nearest hue to the toy's mean colour."""
    core = mask.float()[:, :, None]
    mean = (video * core).sum((1, 3, 4)) / core.sum((1, 3, 4)).clamp(min=1)
    close = (_hue(mean)[:, None] * _hue(PALETTE.to(video.device))).sum(-1)
    return torch.where(mask.flatten(1).sum(1) > 30, close.argmax(1), -1)


def _hue(rgb: Tensor) -> Tensor:
    """Unit vector on the colour circle."""
    red, green, blue = rgb.unbind(-1)
    plane = torch.stack([red - (green + blue) / 2, (green - blue) * 3**0.5 / 2], -1)
    return F.normalize(plane, dim=-1)


def _motion(mask: Tensor, boxes: _Boxes) -> Tensor:
    """Steps between frames in which the toy is whole tell the direction; the outline's size and width the rest."""
    pair = boxes.whole[:, 1:] & boxes.whole[:, :-1]
    pairs = pair.sum(1)
    step_x, step_y = ((value[:, 1:] - value[:, :-1]) * pair for value in (boxes.x, boxes.y))

    def share(condition: Tensor) -> Tensor:
        return (condition & pair).sum(1) / pairs.clamp(min=1)

    moves = 0.03
    found = {
        "left": share(step_x < -moves),
        "right": share(step_x > moves),
        "up": share(step_y < -moves),
        "down": share(step_y > moves),
    }
    area = torch.where(boxes.seen, boxes.area, torch.nan)
    largest, smallest = area.nan_to_num(0).amax(1), area.nan_to_num(1).amin(1)
    narrow = torch.where(boxes.whole, boxes.width / boxes.height.clamp(min=1e-3), 9).amin(1)
    # frames rise for three quarters of the loop when the toy grows, fall for three quarters when it shrinks
    size = boxes.height * boxes.width
    growing = ((size[:, 1:] > size[:, :-1] * 1.02).sum(1) - (size[:, 1:] < size[:, :-1] * 0.98).sum(1)).float()
    swells = (largest > 1.7 * smallest) & (narrow > 0.62)
    still = boxes.whole.float().mean(1) > 0.7
    lift = (boxes.y.amax(1) - boxes.y.amin(1)) > 0.13

    votes = torch.zeros(mask.shape[0], len(MOTIONS), device=mask.device)
    for name, value in found.items():
        votes[:, MOTIONS.index(name)] = torch.where((value > 0.7) & (pairs >= 2), value, 0)
    straight = votes.amax(1) > 0
    votes[:, MOTIONS.index("grow")] = (swells & (growing > 3) & ~straight).float()
    votes[:, MOTIONS.index("shrink")] = (swells & (growing < -3) & ~straight).float()
    votes[:, MOTIONS.index("spin")] = (still & (narrow < 0.62) & ~straight).float()
    hops = (found["up"] > 0.12) & (found["down"] > 0.12) & lift & (largest < 1.6 * smallest)
    votes[:, MOTIONS.index("bounce")] = (hops & ~straight & (narrow > 0.62)).float()
    return torch.where(votes.amax(1) > 0, votes.argmax(1), -1)


def _path(boxes: _Boxes) -> Tensor:
    """The length of the edges' mean path, over the pairs of frames in which the toy is seen: also for a toy that grows,
    or turns and so becomes narrow."""
    edges = torch.stack([boxes.left, boxes.right, boxes.top, boxes.bottom])
    steps = (edges[..., 1:] - edges[..., :-1]).abs().mean(0)
    return (steps * (boxes.seen[:, 1:] & boxes.seen[:, :-1])).sum(1)


def _scene(video: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Ground and time of day from the mean colours of the lowest and highest parts of the picture without the toy."""
    free = ~F.max_pool2d(mask.float(), 5, stride=1, padding=2).bool()[:, :, None]
    height = video.shape[3]

    def mean(rows: slice) -> Tensor:
        weight = free[:, :, :, rows].float()
        return (video[:, :, :, rows] * weight).sum((1, 3, 4)) / weight.sum((1, 3, 4)).clamp(min=1)

    below, above = mean(slice(int(0.78 * height), height)), mean(slice(0, int(0.4 * height)))
    lightness = above.mean(-1)
    warmth = above[:, 0] - above[:, 2]
    time = torch.where(lightness < 0.4, 2, torch.where(warmth > -0.06, 1, 0))
    far, near = GROUND[:, 0], GROUND[:, 1]
    expected = (0.3 * far + 0.7 * near)[None] * LIGHT  # time x ground x rgb
    distance = (below[:, None] - expected.to(video.device)[time]).square().sum(-1)
    # the toy's shadow darkens the floor a little: brightness counts less than tint
    tint = F.normalize(below, dim=-1)[:, None] - F.normalize(expected.to(video.device)[time], dim=-1)
    ground = (0.5 * distance + tint.square().sum(-1)).argmin(1)
    return {"ground": ground.cpu(), "time": time.cpu()}
