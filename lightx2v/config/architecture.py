"""The sizes that the networks and the estimates of their memory and time share. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, quoted, short_path

PATCH = 2
"""Height and width of a patch; in time a patch is one latent frame."""

INPUT_CHANNELS = {"t2v": 16, "i2v": 36, "flf2v": 36}
"""Of an expert for each task: the noisy latent has 16; an image adds its latent of 16 and a mask of 4."""

MODEL_KIND = {16: "text-to-video", 36: "image-to-video"}
"""What an expert with that many input channels makes."""

CHUNK = 16384
"""Tokens in the feed-forward at once: its tensors then are smaller than the attention's, and a device is still full."""

TILE_SIZE = 32
"""The largest side of a VAE tile in latent pixels: 256 video pixels."""

TILE_OVERLAP = 8
"""The least overlap of two tiles in latent pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """The architecture. Defaults are those of one text-to-video expert; image-to-video has 36 input channels."""

    in_dim: int = 16
    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    out_dim: int = 16
    num_heads: int = 40
    num_layers: int = 40
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_checkpoint(cls, config_json: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
        """The architecture of tensors with these shapes; `config_json` adds what shapes do not show.

        `config_json` may use Wan's or diffusers' names. Raises CheckpointError if it contradicts the tensors.
        """
        try:
            sizes = {
                "in_dim": shapes["patch_embedding.weight"][1],
                "dim": shapes["patch_embedding.weight"][0],
                "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
                "freq_dim": shapes["time_embedding.0.weight"][1],
                "text_dim": shapes["text_embedding.0.weight"][1],
                "out_dim": shapes["head.head.weight"][0] // PATCH**2,
                "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            }
        except (KeyError, IndexError, ValueError) as missing:
            raise CheckpointError(
                f"These are not the weights of a Wan video model: no usable tensor {missing}. Expected tensors such as "
                "patch_embedding.weight and blocks.0.ffn.0.weight; check that the path points at an expert's weights."
            ) from None
        written = _wan_names(_checked(config_json or {}))
        for key, value in sizes.items():
            if key in written and written[key] != value:
                raise CheckpointError(
                    f"config.json says {key} is {written[key]}, the tensors say {value}. The two belong to different "
                    "models: put the config.json of these weights beside them, or remove it."
                )
        heads = written.get("num_heads") or _released_heads(sizes["dim"])
        if sizes["dim"] % heads or sizes["dim"] // heads % 2:
            raise CheckpointError(
                f"A width of {sizes['dim']} cannot be split into {heads} heads of even size. "
                "Correct num_heads in config.json."
            )
        more = {key: written[key] for key in ("text_len", "eps") if key in written}
        return cls(**sizes, num_heads=heads, **more)

    @classmethod
    def from_folder(cls, folder: Path | None) -> DiTConfig:
        """The architecture in a model folder's config.json; A14B's sizes where the file or a key is missing."""
        for place in ("high_noise_model", "low_noise_model", "."):
            file = folder / place / "config.json" if folder else None
            if file and file.is_file():
                written = _wan_names(read_config(file))
                sizes = [name for name in cls.__dataclass_fields__ if isinstance(written.get(name), int)]
                return cls(**{name: written[name] for name in sizes})
        return cls()


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json. CheckpointError where it cannot be read or its sizes are no numbers."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{short_path(path)} is not valid JSON ({error!s:.100}). Download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{short_path(path)} holds no JSON object. Download it again.")
    return _checked(content, short_path(path))


def _checked(config: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The same if every size in it is a whole number above zero, and eps a small number."""
    for key, value in config.items():
        if value is None or key not in _SIZES and key != "eps":
            continue
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
        small = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1
        if not (small if key == "eps" else whole):
            expected = "a number between 0 and 1" if key == "eps" else "a whole number above zero"
            raise CheckpointError(
                f"{source} says {key} is {quoted(value)}, expected {expected}. Download it again, or correct it."
            )
    return dict(config)


_SIZES = frozenset(
    "in_dim dim ffn_dim freq_dim text_dim text_len out_dim num_heads num_layers in_channels out_channels "
    "num_attention_heads attention_head_dim".split()
)


def _wan_names(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "num_attention_heads": "num_heads",
        "rope_max_seq_len": None,
    }
    written = {names.get(key, key): value for key, value in config.items() if value is not None}
    if "attention_head_dim" in written and "num_heads" in written:
        written.setdefault("dim", written["attention_head_dim"] * written["num_heads"])
    return written


def _released_heads(dim: int) -> int:
    """Every released Wan model has heads of 128 channels."""
    if dim % 128:
        raise CheckpointError(
            f"A width of {dim} does not show the number of heads. Put a config.json with num_heads beside the weights."
        )
    return dim // 128


def tile_count(side: int, size: int = TILE_SIZE, overlap: int = TILE_OVERLAP) -> int:
    """How many tiles of at most `size` cover a side, with at least `overlap` in common."""
    return max(1, ceil((side - overlap) / (size - overlap)))


def tile_side(side: int, size: int = TILE_SIZE, overlap: int = TILE_OVERLAP) -> int:
    """The side of each tile: as few tiles as possible, all equal, and no longer than the overlap requires."""
    count = tile_count(side, size, overlap)
    return ceil((side + (count - 1) * overlap) / count)
