"""Whole runs on 2 and 4 processes: the videos of one process, whoever fails, cancels or serves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parallel_cases import requests_of
from parallel_ranks import ROOT, environment, ranks, run
from parallel_ranks import __file__ as RUNNER
from PIL import Image
from tiny import DiTSizes, build_tiny

from lightx2v.engine_config import EngineConfig
from lightx2v.media import probe
from lightx2v.pipeline import LightX2VPipeline

SIZES = DiTSizes(dim=48, num_heads=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models, a picture, and what one process makes of every request."""
    folder = tmp_path_factory.mktemp("parallel")
    build_tiny(folder / "t2v", "t2v", dit=SIZES)
    build_tiny(folder / "i2v", "i2v", dit=SIZES, seed=10)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    for name, (config, request) in requests_of(folder).items():
        with LightX2VPipeline.from_config(EngineConfig(**config)) as pipe:
            result = pipe.run(request, return_frames=True, return_latents=True)
        assert result.latents is not None and result.frames is not None
        np.savez(folder / f"{name}.npz", latents=result.latents.numpy(), frames=result.frames)
    yield folder


ALL = ["base", "one_guided", "distilled", "i2v", "i2v_distilled", "flf2v", "flat", "tiles"]


@pytest.mark.parametrize(
    ("layouts", "names", "count"),
    [([[2, 1], [1, 2]], ALL, 14), ([[2, 2], [1, 4]], ["base", "i2v", "i2v_distilled"], 5)],
    ids=["two", "four"],
)
def test_every_layout_makes_the_video_of_one_process(
    root: Path, layouts: list[list[int]], names: list[str], count: int
) -> None:
    size = layouts[0][0] * layouts[0][1]
    results = ranks(size, "parallel_cases:engine", str(root), layouts, names)
    assert len(results[0]) == count
    for ends in zip(*results, strict=True):
        first = ends[0]
        assert len({end["digest"] for end in ends}) == 1, "the processes' latents have drifted apart"
        assert [end["has_frames"] for end in ends] == [True] + [False] * (size - 1)
        assert [end["path"] is not None for end in ends] == [True] + [False] * (size - 1)
        alone = np.load(root / f"{first['name'].rpartition('-')[0]}.npz")
        shared = np.load(root / f"{first['name']}.npz")
        assert np.abs(alone["latents"] - shared["latents"]).max() <= 1e-5 * max(1.0, np.abs(alone["latents"]).max())
        assert alone["frames"].shape == shared["frames"].shape
        assert np.abs(alone["frames"].astype(int) - shared["frames"]).max() <= 1
        assert probe(root / f"{first['name']}.mp4").frames == len(alone["frames"])
        assert [process["rank"] for process in first["processes"]] == list(range(size))
        assert all("denoise" in process["timings"]["seconds"] for process in first["processes"])


def test_errors_and_cancelling_end_all_processes_alike_and_leave_nothing(root: Path) -> None:
    both = ranks(2, "parallel_cases:troubles", str(root))
    leader, follower = both
    assert leader == follower
    loading, good, large, folder, late, early, decoding, lora, again, drawn, world = leader
    assert loading == "Cancelled"
    assert large[0] == "BadRequest" and folder[0] != "GroupFailed"
    assert late == ["Cancelled", "The run was cancelled.", 2]
    assert early == ["Cancelled", "The run was cancelled.", 1]
    assert decoding == ["Cancelled", "The run was cancelled.", 4]
    assert lora[0] == "LoraError"
    assert again == good and drawn != good
    assert world[0] == "ConfigError" and "2 were started" in world[1]


@pytest.mark.parametrize(("how", "told"), [("raise", "no room for the tokens"), ("kill", "Process 1 ")])
def test_a_failure_of_one_process_ends_all(root: Path, how: str, told: str) -> None:
    ends = run(2, [RUNNER, "parallel_cases:failing", json.dumps([str(root), how])])
    assert ends[0].code == 1
    assert ends[1].code == (1 if how == "raise" else -9)
    assert told in ends[0].errors


def test_torchrun_starts_the_group_again_and_the_queue_goes_on(root: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    ended = subprocess.run(
        [*command, RUNNER, "parallel_cases:queue", json.dumps([str(root)])],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[[")]
    (states,) = [dict(line) for line in lines]
    assert states[0] == states[2] == "succeeded"
    assert states[1] in ("failed", "interrupted")


def test_the_others_follow_a_server(root: Path) -> None:
    (served, followed) = ranks(2, "parallel_cases:serving", str(root))
    assert followed == []
    for first, other, again, refused in (served[:4], served[4:]):
        assert first == again != other
        assert refused == "ConfigError"
