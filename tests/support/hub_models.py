"""Small model files in the Hub's layout, and the real client connected to the server that has them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from patience import PATIENCE

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.hub import Hub

ROOT = Path(__file__).parents[2]
BASE, DISTILLED = "Wan-AI/Wan2.2-I2V-A14B", "lightx2v/Wan2.2-Distill-Models"
EXPERT = "wan2.2_i2v_A14b_{}_noise_lightx2v_4step.safetensors"
HIGH, LOW, T5, VAE = EXPERT.format("high"), EXPERT.format("low"), "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CONFIG, TOKENIZER = "high_noise_model/config.json", "google/umt5-xxl/tokenizer.json"
NEEDED = {BASE: [CONFIG, T5, TOKENIZER, VAE], DISTILLED: [HIGH, LOW]}
"""The files of the two repositories that the preset i2v_distill_merged needs."""


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def small_hub(**sizes: int) -> HubServer:
    """A server, not yet started, with a base model and a distilled one; `high=…` sets that file's size in bytes."""
    shard = "{}_noise_model/diffusion_pytorch_model-{:05}-of-00002.safetensors"
    shards = [shard.format(which, i) for which in ("high", "low") for i in (1, 2)]
    experts = {name: content(700_000, 7 + seed) for seed, name in enumerate(shards)}
    base = {
        "README.md": b"A card.",
        CONFIG: b'{"dim": 64, "num_layers": 2}',
        "low_noise_model/config.json": b'{"dim": 64, "num_layers": 3}',
        T5: content(sizes.get("t5", 90_000), 1),
        TOKENIZER: content(5_000, 2),
        VAE: content(40_000, 3),
    }
    distilled = {
        HIGH: content(sizes.get("high", 200_000), 4),
        LOW: content(sizes.get("low", 200_001), 5),
        "wan2.2_i2v_A14b_high_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors": content(100_000, 6),
    }
    return HubServer({BASE: base | experts, DISTILLED: distilled})


def merged() -> EngineConfig:
    return resolve("i2v_distill_merged").engine


def quick(server: HubServer, *, tries: int = 3, stall: float = 20.0, parallel_files: int = 4) -> Hub:
    """The server's Hub, without waiting between tries."""
    return Hub(endpoint=server.url, pause=0.001, tries=tries, stall=stall, parallel_files=parallel_files)


def point_here(patch: pytest.MonkeyPatch, home: Path) -> Path:
    """huggingface_hub online, with its cache below `home`. The cache folder."""
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    return home / "hub"


def environment(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that takes `server` for the Hub."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return others | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "LIGHTX2V_MODELS_DIR": ""} | more


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lightx2v.download", *arguments]


def download(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=dict(env), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def snapshot(home: Path, server: HubServer, repo: str) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / server.commit


def assert_whole(home: Path, server: HubServer) -> None:
    """Every needed file is there with its content, nothing else is, and no partial file is left."""
    for repo, paths in NEEDED.items():
        folder = snapshot(home, server, repo)
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(paths)
        for path in paths:
            assert (folder / path).read_bytes() == server.files[repo][path], path
        assert (folder.parents[1] / "refs" / "main").read_text() == server.commit
    assert not list(home.rglob("*.incomplete"))
