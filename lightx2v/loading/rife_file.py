"""The file with RIFE's weights: where it comes from, which one it is, and the network that is made of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..config.engine_config import EngineConfig
from ..config.model_paths import RIFE, RIFE_SHA256
from ..errors import CheckpointError, DownloadError, short_path
from ..hub import ensure, find
from ..models.rife import Rife
from ..progress import CancelToken, Meter, OnProgress
from ..weights.checkpoint import open_checkpoint
from ..weights.module_loader import load_into


def fetch_rife(
    config: EngineConfig, *, on_progress: OnProgress | None = None, cancel: CancelToken | None = None
) -> None:
    """Download the file if it is not on this machine. DownloadError also names the way without it."""
    try:
        ensure(config, also=(RIFE,), meter=Meter(on_progress=on_progress), cancel=cancel)
    except DownloadError as error:
        raise DownloadError(f"{error} Or choose interpolation ffmpeg, which needs no file.") from None


def load_rife(config: EngineConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Rife:
    """The network. CheckpointError for a file with another content: its frames would be those of another network."""
    path = find(RIFE, config)
    if path is None:
        raise CheckpointError(f"{short_path(RIFE)} is gone. Run again: it is downloaded before the run begins.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != RIFE_SHA256:
        raise CheckpointError(
            f"{short_path(path)} is not the file of RIFE 4.25: its SHA-256 is {digest[:12]}…, expected "
            f"{RIFE_SHA256[:12]}…. Delete it, and it is downloaded again."
        )
    return rife_of(path, device, dtype)


def rife_of(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Rife:
    """The network with the weights of a file. CheckpointError names every tensor that does not fit."""
    with torch.device("meta"):
        rife = Rife()
    load_into(rife, open_checkpoint(path), dtype_of=lambda _: dtype, device=device)
    return rife.eval()
