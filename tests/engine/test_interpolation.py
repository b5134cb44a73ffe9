"""A run whose video has a higher rate: by RIFE with random weights, and by ffmpeg."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyModels
from rife_reference import between, random_rife
from safetensors.torch import save_file

from lightx2v.config import model_paths
from lightx2v.config.request import Request
from lightx2v.engine.interpolation import RifeFrames
from lightx2v.errors import BadRequest, CheckpointError, DownloadError
from lightx2v.loading import rife_file
from lightx2v.media.frame_times import frame_times
from lightx2v.media.mp4 import probe, read_settings
from lightx2v.media.video_writer import read_frame
from lightx2v.models.rife import Rife
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"infer_steps": 2, "num_frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def pipe(tiny: TinyModels) -> Iterator[LightX2VPipeline]:
    with LightX2VPipeline(tiny.t2v, "wan2.2_moe", "t2v") as pipe:
        pipe.create_generator(**SMALL)
        yield pipe


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of random weights where the program looks for the real one, with its hash as the expected one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / model_paths.RIFE
    path.parent.mkdir(parents=True)
    save_file(random_rife(), path)
    monkeypatch.setattr(rife_file, "RIFE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def clip(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def streamed(frames: np.ndarray, new: float, chunk: int, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """By RifeFrames, with the reference's weights."""
    rife = Rife().to(dtype)
    rife.load_state_dict(random_rife(dtype=dtype))
    request = Request(prompt="a cat", frames=len(frames), fps=16, interpolated_fps=new)
    made = RifeFrames(rife.eval(), request, CancelToken())
    with torch.inference_mode():
        parts = [part for at in range(0, len(frames), chunk) for part in made.add(frames[at : at + chunk])]
        return np.concatenate([*parts, *made.finish()])


@pytest.mark.parametrize("new", [24, 32, 60])
def test_each_frame_is_that_of_the_transcription_at_its_time_and_originals_stay(new: float) -> None:
    """Also beside the edge, where the picture ends inside a block of 64 pixels."""
    frames = clip(5, 48, 80)
    made, times = streamed(frames, new, 4), list(frame_times(5, 16, new))
    assert len(made) == len(times)
    padded = np.pad(frames.transpose(0, 3, 1, 2) / 255, ((0, 0), (0, 0), (0, 16), (0, 48)), mode="edge")
    for frame, (index, part) in zip(made, times, strict=True):
        if not part:
            assert np.array_equal(frame, frames[index])
            continue
        exact = between(random_rife(dtype=torch.float64), padded[index], padded[index + 1], float(part))
        levels = (exact[:, :48, :80].transpose(1, 2, 0) * 255).clip(0, 255)
        assert np.abs(frame - levels).max() <= 0.5 + 1e-6


def test_the_size_of_the_chunks_changes_nothing() -> None:
    frames = clip(9, 32, 48)
    assert np.array_equal(streamed(frames, 24, 1), streamed(frames, 24, 9))


def test_two_frames_are_held_whatever_the_length() -> None:
    rife = Rife()
    rife.load_state_dict(random_rife())
    request = Request(prompt="a cat", frames=401, fps=16, interpolated_fps=17)
    made = RifeFrames(rife, request, CancelToken())
    seen: list[int] = []
    rife.features = lambda frame: seen.append(1) or rife.encode(frame)  # type: ignore[method-assign, func-returns-value]
    with torch.inference_mode():
        for frame in clip(5, 32, 32):
            assert sum(1 for _ in made.add(frame[None])) <= 2
    assert len(seen) <= 5  # once for each frame


@pytest.mark.parametrize(("fps", "frames"), [(24, 14), (30, 17), (32, 18), (48, 27), (60, 34)])
@pytest.mark.parametrize("how", ["rife", "ffmpeg"])
def test_a_run_writes_the_asked_rate_and_says_so(
    how: str, fps: float, frames: int, pipe: LightX2VPipeline, weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "video.mp4"
    made = pipe.generate(
        prompt="a cat",
        seed=1,
        save_result_path=path,
        interpolated_fps=fps,
        interpolation=how,
        return_result_tensor=True,
    )
    info, report = probe(path), made.report()
    assert (info.frames, info.fps) == (frames, fps) == (report["frames"], report["fps"])
    assert abs(info.frames / info.fps - 9 / 16) <= 0.5001 / fps
    assert made.frames is not None and made.frames.shape == (frames, 32, 48, 3)
    assert made.timings.seconds["interpolate"] > 0
    request = read_settings(path)["request"]
    assert (request["interpolated_fps"], request["interpolation"], request["fps"]) == (fps, how, 16)
    assert Request.from_json(request) == made.request


def test_the_models_frames_are_the_same_with_and_without_interpolation(
    pipe: LightX2VPipeline, weights: Path, tmp_path: Path
) -> None:
    def run(**more: Any) -> np.ndarray:
        frames = pipe.generate(prompt="a cat", seed=1, return_result_tensor=True, **more).frames
        assert frames is not None
        return frames

    plain = run()
    for how in ("rife", "ffmpeg"):
        assert np.array_equal(run(interpolated_fps=32, interpolation=how)[:17:2], plain)
    assert "interpolate" not in pipe.generate(prompt="a cat", seed=1).timings.seconds


def test_the_original_is_kept_beside_the_video_if_that_is_asked_for(
    pipe: LightX2VPipeline, weights: Path, tmp_path: Path
) -> None:
    path, original = tmp_path / "video.mp4", tmp_path / "video.original.mp4"
    made = pipe.generate(prompt="a cat", save_result_path=path, interpolated_fps=32, keep_original=True)
    assert made.original_path == str(original) == made.report()["original_path"]
    assert (probe(original).frames, probe(original).fps, probe(path).frames) == (9, 16, 18)
    assert read_settings(original) == read_settings(path)
    plain = pipe.generate(prompt="a cat", save_result_path=tmp_path / "plain.mp4", keep_original=True)
    assert plain.original_path is None and not (tmp_path / "plain.original.mp4").exists()
    for index in (0, 4, 8):
        kept, expected = (read_frame(video, index) for video in (original, tmp_path / "plain.mp4"))
        assert np.array_equal(np.asarray(kept), np.asarray(expected))


def test_an_original_that_exists_is_not_overwritten_unasked(
    pipe: LightX2VPipeline, weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "video.original.mp4").write_bytes(b"mine")
    request = Request(prompt="a cat", frames=9, height=32, width=48, steps=2, interpolated_fps=32, keep_original=True)
    with pytest.raises(BadRequest, match=r"video\.original\.mp4 exists already"):
        pipe.run(request, save_result_path=tmp_path / "video.mp4")
    assert (tmp_path / "video.original.mp4").read_bytes() == b"mine" and not (tmp_path / "video.mp4").exists()


def test_without_the_file_a_run_ends_before_it_begins_and_names_the_other_way(
    pipe: LightX2VPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages: list[str] = []
    with pytest.raises(DownloadError, match="choose interpolation ffmpeg, which needs no file"):
        pipe.generate(prompt="a cat", interpolated_fps=32, on_progress=lambda event: stages.append(event.stage))
    assert set(stages) <= {"download"}


def test_a_file_of_other_content_is_refused(pipe: LightX2VPipeline, weights: Path) -> None:
    save_file(random_rife(seed=5), weights)
    with pytest.raises(CheckpointError, match="is not the file of RIFE 4.25: its SHA-256 is"):
        pipe.generate(prompt="a cat", interpolated_fps=32, return_result_tensor=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"caltime.conv.weight": torch.zeros(3)}, "1 unexpected: caltime.conv.weight"),
        (
            lambda w: {k: v for k, v in w.items() if k != "blocks.3.convblock.7.beta"},
            "1 missing: blocks.3.convblock.7.beta",
        ),
        (lambda w: {k.replace("blocks.", "module.block"): v for k, v in w.items()}, "unexpected: module.block0"),
        (
            lambda w: w | {"encode.cnn3.weight": torch.zeros(16, 8, 4, 4)},
            r"has shape \[16, 8, 4, 4\], expected \[16, 4, 4, 4\]",
        ),
    ],
)
def test_tensors_of_another_network_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    save_file(change(random_rife()), tmp_path / "rife.safetensors")
    with pytest.raises(CheckpointError, match=message):
        rife_file.rife_of(tmp_path / "rife.safetensors", torch.device("cpu"))


def test_the_last_frame_stays_until_the_end() -> None:
    frames = clip(5, 32, 32)
    assert np.array_equal(streamed(frames, 32, 2)[-2:], frames[[4, 4]])
