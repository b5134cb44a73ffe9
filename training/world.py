"""The demo model's world: one bright toy that moves in front of a landscape, drawn on whatever device torch has.

A clip has five attributes: what it is, its colour, its motion, the ground and the time of day. Everything else (size,
place, hills, clouds, stars) is random. A clip is periodic with 17 frames, so that it loops without a jump.
Landscapes are pale or dark and toys are saturated: the eye and the detector tell them apart.

Shapes: B clips, T frames, H height, W width; video is B,3,T,H,W float32 in [-1, 1]. Lengths are fractions of H; y
points down. All chance is drawn on the CPU from one generator, so a seed gives the same clips on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FRAMES = 17
SIZE = 96

KINDS = ("ball", "box", "triangle", "star", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "spin", "bounce")
GROUNDS = ("grass", "sand", "snow", "sea")
TIMES = ("day", "sunset", "night")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": COLOURS,
    "motion": MOTIONS,
    "ground": GROUNDS,
    "time": TIMES,
}
COMBINATIONS = len(KINDS) * len(COLOURS) * len(MOTIONS) * len(GROUNDS) * len(TIMES)

PALETTE = torch.tensor(
    [
        [0.92, 0.13, 0.16],
        [0.99, 0.52, 0.05],
        [0.99, 0.86, 0.08],
        [0.07, 0.68, 0.22],
        [0.08, 0.82, 0.86],
        [0.13, 0.33, 0.94],
        [0.54, 0.20, 0.86],
        [0.99, 0.36, 0.70],
    ]
)

SKY = torch.tensor(  # time x (top, middle, horizon) x rgb
    [
        [[0.60, 0.78, 0.90], [0.74, 0.87, 0.95], [0.90, 0.95, 0.97]],
        [[0.56, 0.52, 0.74], [0.90, 0.70, 0.69], [0.99, 0.86, 0.72]],
        [[0.04, 0.06, 0.16], [0.09, 0.12, 0.25], [0.17, 0.21, 0.36]],
    ]
)
GROUND = torch.tensor(  # ground x (far, near) x rgb, by day
    [
        [[0.70, 0.84, 0.60], [0.56, 0.74, 0.46]],
        [[0.96, 0.90, 0.76], [0.89, 0.80, 0.64]],
        [[0.84, 0.90, 0.96], [0.95, 0.97, 0.99]],
        [[0.58, 0.76, 0.83], [0.42, 0.64, 0.71]],
    ]
)
LIGHT = torch.tensor(  # time x ground x rgb, multiplies the ground
    [
        [[1.0, 1.0, 1.0]] * 4,
        [[1.0, 0.87, 0.84], [0.99, 0.88, 0.94], [1.0, 0.87, 0.84], [1.0, 0.87, 0.84]],
        [[0.32, 0.45, 0.44], [0.46, 0.41, 0.42], [0.36, 0.43, 0.56], [0.26, 0.36, 0.50]],
    ]
)


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The contents of B clips: the five attributes as indices, and the random sizes and places. All tensors are on the
    CPU."""

    kind: Tensor
    colour: Tensor
    motion: Tensor
    ground: Tensor
    time: Tensor
    x: Tensor
    floor: Tensor  # y of the point the toy stands on
    radius: Tensor
    phase: Tensor  # fraction of the loop at frame 0; 0 in the model's world, anything in the VAE's
    scenery: Tensor  # B x 64 uniform numbers for horizon, hills, sun, clouds and stars

    def __len__(self) -> int:
        return self.kind.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Clips:
        return Clips(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def combination(self) -> Tensor:
        """One number for the five attributes."""
        index = torch.zeros_like(self.kind)
        for name, values in ATTRIBUTES.items():
            index = index * len(values) + getattr(self, name)
        return index

    def words(self, i: int) -> dict[str, str]:
        return {name: values[int(getattr(self, name)[i])] for name, values in ATTRIBUTES.items()}


def split_combination(index: Tensor) -> dict[str, Tensor]:
    """The inverse of `Clips.combination`."""
    parts: dict[str, Tensor] = {}
    for name, values in reversed(ATTRIBUTES.items()):
        parts[name] = index % len(values)
        index = index // len(values)
    return parts


def held_out(combination: Tensor) -> Tensor:
    """True for the 15 % of combinations that are held out of training: a fixed hash, the same on every machine."""
    mixed = (combination.long() * 2654435761) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    return (mixed ^ (mixed >> 13)) % 100 < 15


def sample_clips(count: int, generator: torch.Generator, *, split: str = "train", random_phase: bool = False) -> Clips:
    """Clips of the combinations in `split`: "train", "held_out" or "all"."""
    every = torch.arange(COMBINATIONS)
    chosen = {"train": every[~held_out(every)], "held_out": every[held_out(every)], "all": every}[split]
    combination = chosen[torch.randint(len(chosen), (count,), generator=generator)]
    return place_clips(combination, generator, random_phase=random_phase)


def place_clips(combination: Tensor, generator: torch.Generator, *, random_phase: bool = False) -> Clips:
    """Draw everything about the clips except their attributes."""
    count = len(combination)
    uniform = torch.rand(count, 4, generator=generator)
    return Clips(
        **split_combination(combination),
        x=0.38 + 0.24 * uniform[:, 0],
        floor=0.80 + 0.08 * uniform[:, 1],
        radius=0.18 + 0.07 * uniform[:, 2],
        phase=uniform[:, 3] * random_phase,
        scenery=torch.rand(count, 64, generator=generator),
    )


# ---- shapes: signed distance in units of the radius, negative inside; each about as large to the eye


def _ball(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - 0.95


def _box(x: Tensor, y: Tensor) -> Tensor:
    rounding = 0.12
    dx, dy = x.abs() - (0.86 - rounding), y.abs() - (0.86 - rounding)
    outside = (dx.clamp(min=0).square() + dy.clamp(min=0).square()).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0) - rounding


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return ((x * x + y * y).sqrt() - 0.71).abs() - 0.28


def _polygon(corners: Sequence[tuple[float, float]], rounding: float) -> Callable[[Tensor, Tensor], Tensor]:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        nearest = torch.full_like(x, 1e9)
        sign = torch.ones_like(x)
        for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            nearest = torch.minimum(nearest, (px - ex * along).square() + (py - ey * along).square())
            above, below, cross = y >= ay, y < by, ex * py - ey * px
            crosses = (above & below & (cross > 0)) | (~above & ~below & (cross < 0))
            sign = torch.where(crosses, -sign, sign)
        return sign * nearest.sqrt() - rounding

    return distance


def _star_corners() -> list[tuple[float, float]]:
    angles = torch.arange(10) * torch.pi / 5 - torch.pi / 2
    reach = torch.tensor([1.08, 0.50]).repeat(5)
    return list(zip((reach * angles.cos()).tolist(), (reach * angles.sin() + 0.06).tolist(), strict=True))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs above a point: exact distance of the classic heart (unit square turned by 45 degrees with discs)."""
    scale = 1.72
    x, y = (x / scale).abs(), (0.96 - y) / scale
    lobe = ((x - 0.25).square() + (y - 0.75).square()).sqrt() - 0.35355
    toward = 0.5 * (x + y).clamp(min=0)
    body = torch.minimum(x.square() + (y - 1).square(), (x - toward).square() + (y - toward).square()).sqrt()
    body = body * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, body) * scale


SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _ball,
    _box,
    _polygon([(0.0, -1.0), (1.0, 0.74), (-1.0, 0.74)], 0.10),
    _polygon(_star_corners(), 0.05),
    _heart,
    _ring,
)
FOOT = torch.tensor([0.95, 0.86, 0.84, 0.99, 0.96, 0.99])  # how far the lowest point lies below the centre, in radii
GROW = 1.65
SHRINK = 0.58
HOP = 0.27


@dataclass(frozen=True, kw_only=True)
class Track:
    """Where the toy is in each frame: B x T."""

    x: Tensor
    y: Tensor
    radius: Tensor
    width: Tensor  # of 1: a coin that spins gets narrow
    height: Tensor  # above the floor


def track(clips: Clips, frames: int) -> Track:
    phase = (clips.phase[:, None] + torch.arange(frames) / FRAMES) % 1.0
    is_motion = {name: (clips.motion == i)[:, None] for i, name in enumerate(MOTIONS)}
    zero = torch.zeros_like(phase)

    # 3/4 of the loop changes the size, 1/4 brings it back
    swell = torch.where(phase < 0.76, phase / 0.76, (1 - phase) / 0.24)
    swell = swell * swell * (3 - 2 * swell)
    radius = clips.radius[:, None] * torch.where(
        is_motion["grow"], 1 + (GROW - 1) * swell, torch.where(is_motion["shrink"], 1 + (SHRINK - 1) * swell, zero + 1)
    )
    foot = FOOT[clips.kind][:, None] * radius
    hop = HOP * 4 * phase * (1 - phase)
    turn = (2 * torch.pi * phase).cos().abs().clamp(min=0.16)

    x = clips.x[:, None] + zero
    y = clips.floor[:, None] - foot
    margin = 1.0 * radius
    lap = phase * (1 + 2 * margin)
    x = x + lap * (is_motion["right"].float() - is_motion["left"].float())
    y = y + lap * (is_motion["down"].float() - is_motion["up"].float())
    x = (x + margin) % (1 + 2 * margin) - margin
    y = (y + margin) % (1 + 2 * margin) - margin
    y = torch.where(is_motion["bounce"], y - hop, y)
    width = torch.where(is_motion["spin"], turn, zero + 1)
    return Track(x=x, y=y, radius=radius, width=width, height=clips.floor[:, None] - foot - y)


def render(clips: Clips, frames: int = FRAMES, size: int = SIZE, device: torch.device | str = "cpu") -> Tensor:
    """Video B,3,T,H,W in [-1, 1]."""
    device = torch.device(device)
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    y, x = axis[:, None], axis[None, :]
    video = _landscape(clips, x, y, size)[:, :, None].expand(-1, -1, frames, -1, -1).contiguous()
    path = track(clips, frames)
    where = [getattr(path, name).to(device)[:, :, None, None] for name in ("x", "y", "radius", "width", "height")]
    _shade(video, clips, where, x, y)
    for kind, shape in enumerate(SHAPES):
        members = (clips.kind == kind).nonzero()[:, 0].to(device)
        if len(members):
            colour = PALETTE[clips.colour].to(device)[members]
            video[members] = _paint(video[members], shape, colour, [value[members] for value in where], x, y, size)
    return video.mul_(2).sub_(1)


def _shade(video: Tensor, clips: Clips, where: list[Tensor], x: Tensor, y: Tensor) -> None:
    """Draw a soft shadow on the floor under the toy, fainter for a higher toy; in place."""
    centre, _, radius, width, height = where
    floor = clips.floor.to(video.device)[:, None, None, None]
    reach = ((x - centre) / (radius * (0.25 + 0.75 * width))).square() + ((y - floor) / (0.22 * radius)).square()
    strength = 0.42 * torch.exp(-(height / 0.22).square()) * torch.exp(-1.3 * reach)
    video.mul_(1 - strength[:, None])


def _paint(
    video: Tensor,
    shape: Callable[[Tensor, Tensor], Tensor],
    colour: Tensor,
    where: list[Tensor],
    x: Tensor,
    y: Tensor,
    size: int,
) -> Tensor:
    centre_x, centre_y, radius, width, _ = where
    u, v = (x - centre_x) / (radius * width), (y - centre_y) / radius
    distance = shape(u, v) * radius * width.sqrt()
    cover = (0.5 - distance * size).clamp(0, 1)[:, None]
    light = 1.03 - 0.11 * v.clamp(-1, 1) - 0.06 * u.clamp(-1, 1)
    light = light * (0.86 + 0.14 * width)
    shine = 0.22 * torch.exp(-((u + 0.32).square() + (v + 0.38).square()) / 0.10)
    base = (colour[:, :, None, None, None] * light[:, None]).clamp(max=1)
    base = base + (1 - base) * shine[:, None]
    return video + (base - video) * cover


# ---- landscape


def _landscape(clips: Clips, x: Tensor, y: Tensor, size: int) -> Tensor:
    """B,3,H,W in [0, 1]."""
    device = x.device
    chance = clips.scenery.to(device)[..., None, None]
    time, ground = clips.time.to(device), clips.ground.to(device)
    horizon = 0.53 + 0.08 * chance[:, 0]
    night, sunset, day = ((time == TIMES.index(name))[:, None, None].float() for name in ("night", "sunset", "day"))

    top, middle, low = SKY.to(device)[time].unbind(1)
    rise = (y / horizon).clamp(0, 1)[:, None]
    picture = torch.lerp(top[..., None, None], middle[..., None, None], (2 * rise).clamp(max=1))
    picture = torch.lerp(picture, low[..., None, None].expand_as(picture), (2 * rise - 1).clamp(min=0))
    picture = picture.expand(-1, -1, size, size)

    disc_x = torch.where(sunset > 0, 0.15 + 0.7 * chance[:, 1], 0.12 + 0.76 * chance[:, 1])
    disc_y = torch.where(sunset > 0, horizon - 0.04 - 0.06 * chance[:, 2], 0.12 + 0.08 * chance[:, 2])
    away = ((x - disc_x).square() + (y - disc_y).square()).sqrt()
    disc = (0.5 - (away - torch.where(sunset > 0, 0.10, 0.065)) * size).clamp(0, 1)
    glow = torch.exp(-(away / 0.22).square()) * (0.55 * sunset + 0.22 * night)
    bright = torch.where(sunset[:, None] > 0, _rgb(1.0, 0.95, 0.82, device), _rgb(0.93, 0.93, 0.87, device))
    picture = picture + (bright - picture) * (glow * 0.5 + disc * (1 - glow * 0.5))[:, None] * (sunset + night)[:, None]

    stars = torch.zeros_like(away)
    for i in range(9):
        at_x, at_y, power = chance[:, 3 + 3 * i], 0.46 * chance[:, 4 + 3 * i], 0.45 + 0.5 * chance[:, 5 + 3 * i]
        near = (x - at_x).square() + (y - at_y).square()
        stars = torch.maximum(stars, power * torch.exp(-near / (2 * 0.0075**2)))
    picture = picture + (_rgb(0.95, 0.95, 0.90, device) - picture) * (stars * (1 - disc) * night)[:, None]

    clouds = torch.zeros_like(away)
    for i in range(2):
        at_x, at_y = (0.5 * i) + 0.5 * chance[:, 31 + 3 * i], 0.10 + 0.22 * chance[:, 32 + 3 * i]
        scale = 0.045 + 0.025 * chance[:, 33 + 3 * i]
        for dx, dy, reach in ((-1.3, 0.25, 0.8), (0.0, -0.15, 1.15), (1.35, 0.25, 0.85)):
            away = ((x - at_x - dx * scale).square() + (y - at_y - dy * scale).square()).sqrt() - reach * scale
            flat = y - at_y - 0.75 * scale
            clouds = torch.maximum(clouds, (0.5 - torch.maximum(away, flat) * size / 1.5).clamp(0, 1))
    tone = torch.where(sunset[:, None] > 0, _rgb(0.99, 0.86, 0.82, device), _rgb(0.99, 0.99, 1.0, device))
    picture = picture + (tone - picture) * (clouds * (0.85 * day + 0.45 * sunset))[:, None]

    return _land(picture, ground, time, horizon, chance, x, y, size)


def _land(
    picture: Tensor, ground: Tensor, time: Tensor, horizon: Tensor, chance: Tensor, x: Tensor, y: Tensor, size: int
) -> Tensor:
    device = x.device
    light = LIGHT.to(device)[time, ground][..., None, None]
    far, near = (GROUND.to(device)[ground].unbind(1)[i][..., None, None] * light for i in range(2))
    grass, sand, snow, sea = ((ground == i)[:, None, None].float() for i in range(4))

    def edge(line: Tensor) -> Tensor:
        return (0.5 + (y - line) * size).clamp(0, 1)[:, None]

    # far away: mountains behind snow, rolling hills behind grass, dunes behind sand, a straight line for the sea
    waves = torch.sin(2 * torch.pi * (x * (1.0 + chance[:, 40]) + chance[:, 41]))
    peaks = ((x * (1.6 + 0.8 * chance[:, 42]) + chance[:, 43]) % 1.0 - 0.5).abs() * 2
    line = horizon + grass * 0.030 * waves + sand * 0.022 * waves.abs() - snow * (0.11 * peaks - 0.02)
    middle = far * (1 - 0.10 * snow[:, None])
    picture = picture + (middle - picture) * edge(line)

    swell = torch.sin(2 * torch.pi * (x * (0.7 + 0.6 * chance[:, 44]) + chance[:, 45]))
    front = horizon + 0.075 + (1 - sea) * 0.028 * swell - 0.075 * sea
    depth = ((y - front) / (1 - front)).clamp(0, 1)[:, None]
    body = far + (near - far) * (0.35 + 0.65 * depth)
    body = torch.where(sea[:, None] > 0, far + (near - far) * depth.sqrt(), body)
    ripple = torch.sin(2 * torch.pi * ((y - horizon).clamp(min=0).sqrt() * 9 + chance[:, 46]) + 3 * waves)
    body = body * (1 + 0.055 * (sea * ripple)[:, None] + 0.020 * (sand * ripple)[:, None])
    return (picture + (body - picture) * edge(front)).clamp(0, 1)


def _rgb(red: float, green: float, blue: float, device: torch.device) -> Tensor:
    return torch.tensor([red, green, blue], device=device)[None, :, None, None]


def to_frames(video_BCTHW: Tensor) -> Tensor:
    """B,T,H,W,3 uint8, as the engine returns frames."""
    return ((video_BCTHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
