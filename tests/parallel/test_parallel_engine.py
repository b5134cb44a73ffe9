"""Whole runs on 2 and 4 processes make the videos of one process, with the tiny and with the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parallel_runs
import pytest
from parallel_ranks import ROOT, group, tiny_models

from lightx2v.media.mp4 import probe

pytestmark = pytest.mark.multi

TINY = ["base", "one_guided", "distilled", "i2v", "i2v_distilled", "flf2v", "mag", "nag", "flat", "tiles"]
DEMO = ["t2v_base", "t2v_distill_lora", "t2v_fp8", "t2v_dynamic_lora", "i2v_base", "i2v_distill_lora"]
LORA = str(ROOT / "assets/demo/loras/wan2.2_i2v_demo_high_noise_lora_rank16_4step.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models, and the results of one process for every request."""
    folder = tiny_models(tmp_path_factory.mktemp("parallel"))
    group(1).call(parallel_runs.make, str(folder), "tiny", TINY, [])
    group(1).call(parallel_runs.make, str(folder), "demo", DEMO, [])
    return folder


@pytest.mark.parametrize(
    ("kind", "layouts", "names", "count"),
    [
        ("tiny", [[2, 1], [1, 2]], TINY, 20),
        ("tiny", [[2, 2], [1, 4]], ["base", "one_guided", "distilled", "i2v", "i2v_distilled", "mag"], 12),
        ("demo", [[2, 1], [1, 2]], DEMO, 12),
        ("demo", [[2, 2], [1, 4]], ["t2v_base", "t2v_distill_lora", "i2v_base", "i2v_distill_lora"], 8),
    ],
)
def test_every_layout_makes_the_video_of_one_process(
    root: Path, kind: str, layouts: list[list[int]], names: list[str], count: int
) -> None:
    size = layouts[0][0] * layouts[0][1]
    results = group(size).call(parallel_runs.make, str(root), kind, names, layouts)
    assert len(results[0]) == count
    for ends in zip(*results, strict=True):
        first = ends[0]
        assert len({end["digest"] for end in ends}) == 1, "the processes' latents have drifted apart"
        assert [end["has_frames"] for end in ends] == [True] + [False] * (size - 1)
        alone = np.load(root / f"{kind}-{first['name'].rpartition('-')[0]}.npz")
        shared = np.load(root / f"{kind}-{first['name']}.npz")
        assert np.abs(alone["latents"] - shared["latents"]).max() <= 1e-5 * max(1.0, np.abs(alone["latents"]).max())
        assert alone["frames"].shape == shared["frames"].shape
        assert np.abs(alone["frames"].astype(int) - shared["frames"]).max() <= 1
        assert [end["path"] for end in ends][1:] == [None] * (size - 1)
        if first["path"] is not None:
            assert probe(first["path"]).frames == len(alone["frames"])
        check_report(first, size)
    assert any(end["path"] for end in results[0])


def check_report(report: dict[str, Any], size: int) -> None:
    """It has the seconds, steps, memory and sent bytes of every process."""
    processes = report["processes"]
    assert [process["rank"] for process in processes] == list(range(size))
    for process in processes:
        timings = process["timings"]
        assert {"text", "denoise", "decode"} <= set(timings["seconds"])
        assert len(timings["steps"]) == report["request"]["steps"]
        assert timings["peak_rss"] > 0 and "peak_vram" in timings
        assert any(process["sent"].values())
        if not report["request"]["enable_cfg"]:  # in a layout with two branches too no process repeats another's work
            assert any("swap" in kinds for kinds in process["sent"].values())
    assert not any("write" in process["timings"]["seconds"] for process in processes[1:])


def test_only_rank_0_reads_files(root: Path) -> None:
    """Weights, input images, and LoRAs that are exchanged: merged, or beside the weights."""
    first, second = group(2).call(parallel_runs.reads, str(root), [LORA])
    assert all(first.values()), first
    for what, amount in second.items():  # a LoRA's scales are read by all: a few bytes for each layer
        assert amount <= first[what] / 100, second


@pytest.mark.parametrize(("lazy", "mag"), [(False, False), (True, False), (False, True), (True, True)])
def test_blocks_are_streamed_from_host_memory_or_from_rank_0s_disk(root: Path, lazy: bool, mag: bool) -> None:
    first, second = group(2).call(parallel_runs.streamed, str(root), lazy, mag)
    assert first[:2] == second[:2] == [True, True]
    assert (first[2] > 0) == lazy and second[2] == 0


def test_requests_leave_nothing_behind(root: Path) -> None:
    once, *later = group(2).call(parallel_runs.again_and_again, str(root))[0]
    assert later == [once, once]


def test_the_others_follow_a_server(root: Path) -> None:
    """The layout follows the request: without guidance, all processes share its one branch."""
    served, *followed = group(4).call(parallel_runs.serving, str(root))
    assert followed == [[]] * 3
    for first, short, unguided, again, refused in (served[:5], served[5:]):
        assert first == again and first != short
        assert "cfg" in first[1] and "seq" in first[1]
        assert "cfg" not in unguided[1] and "all" in unguided[1]
        assert refused == "BadRequest"
