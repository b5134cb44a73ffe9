"""A run of a model that is only on the Hub downloads it first, as a stage of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TinyModels
from hub_models import ROOT, environment, point_here
from hub_server import Fault, HubServer, serving
from huggingface_hub import constants
from lora_files import base_weights, random_pairs, write
from patience import PATIENCE

from lightx2v import LightX2VPipeline
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.errors import Cancelled, DownloadError
from lightx2v.hub import find, missing
from lightx2v.progress import CancelToken, Progress

REPO = "someone/tiny-wan"
SMALL = {"steps": 2, "height": 32, "width": 32, "frames": 5}


@pytest.fixture
def server(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The tiny model on a Hub that this process takes for the real one."""
    files = {str(p.relative_to(tiny.t2v)): p.read_bytes() for p in tiny.t2v.rglob("*") if p.is_file()}
    with serving(HubServer({REPO: files})) as started:
        point_here(monkeypatch, tmp_path)
        monkeypatch.setattr(constants, "ENDPOINT", started.url)
        template = started.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield started


def config() -> EngineConfig:
    return resolve({"model_cls": "wan2.2_moe", "task": "t2v", "model_path": REPO, "device": "cpu"}).engine


@pytest.mark.slow
def test_loading_downloads_first_and_reports_it(server: HubServer) -> None:
    events: list[Progress] = []
    with LightX2VPipeline.from_config(config(), on_progress=events.append):
        stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["download", "load"]
    last = [event for event in events if event.stage == "download"][-1]
    assert last.step == last.total == sum(len(content) for content in server.files[REPO].values())
    before = len(server.asked)
    with LightX2VPipeline.from_config(config(), on_progress=events.append):
        assert len(server.asked) == before


@pytest.mark.slow
def test_a_cancel_during_the_download_ends_the_run(server: HubServer) -> None:
    server.faults["Wan2.1_VAE.pth"] = [Fault(stall_after=1000)]
    token = CancelToken()

    def stop(event: Progress) -> None:
        assert event.stage == "download"
        if server.bytes_of("Wan2.1_VAE.pth"):
            token.cancel()

    with pytest.raises(Cancelled):
        LightX2VPipeline.from_config(config(), on_progress=stop, cancel=token)
    assert missing(config())


def test_a_failed_download_ends_the_run_with_the_reason(server: HubServer) -> None:
    with pytest.raises(DownloadError, match="no folder someone/other on this machine"):
        LightX2VPipeline.from_config(replace(config(), model_path="someone/other"))


@pytest.mark.slow
def test_a_lora_on_the_hub_is_downloaded_when_a_run_needs_it(
    server: HubServer, tmp_path: Path, tiny: TinyModels
) -> None:
    name = "wan2.2_t2v_high_noise_lora.safetensors"
    shapes = base_weights(tiny.t2v).plain_shapes
    file = write(tmp_path / name, random_pairs(shapes))
    server.files["someone/loras"] = {name: file.read_bytes(), "other.safetensors": b"x" * 5000}
    with LightX2VPipeline.from_config(config()) as pipe:
        pipe.switch_lora([{"name": "high_noise_model", "path": f"someone/loras/{name}"}])
        assert find(f"someone/loras/{name}", config()) is not None and not server.bytes_of("other.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("given", ["high", "low"])
def test_a_lora_brings_its_partner_from_the_hub(
    server: HubServer, tmp_path: Path, tiny: TinyModels, given: str
) -> None:
    shapes = base_weights(tiny.t2v).plain_shapes
    names = {which: f"style_{which}_noise.safetensors" for which in ("high", "low")}
    files = {name: write(tmp_path / name, random_pairs(shapes, seed)) for seed, name in enumerate(names.values())}
    server.files["someone/loras"] = {name: file.read_bytes() for name, file in files.items()}
    with LightX2VPipeline.from_config(config()) as pipe:
        pipe.switch_lora([{"path": f"someone/loras/{names[given]}"}])
        report = pipe.run(Request(prompt="a cat", **SMALL)).report()
    assert [entry["path"].rpartition("/")[2] for entry in report["loras"]] == list(names.values())
    assert report["warnings"] == []


@pytest.mark.slow
def test_a_lora_without_a_partner_on_the_hub_is_downloaded_alone(
    server: HubServer, tmp_path: Path, tiny: TinyModels
) -> None:
    file = write(tmp_path / "a_high.safetensors", random_pairs(base_weights(tiny.t2v).plain_shapes))
    server.files["someone/loras"] = {file.name: file.read_bytes()}
    with LightX2VPipeline.from_config(config()) as pipe:
        pipe.switch_lora([{"path": f"someone/loras/{file.name}"}])
        report = pipe.run(Request(prompt="a cat", **SMALL)).report()
    assert [entry["expert"] for entry in report["loras"]] == ["high", "low"]
    (warning,) = report["warnings"]
    assert "is used for both experts: its name has a word for high or low, but no second file" in warning


@pytest.mark.slow
def test_infer_downloads_and_then_makes_the_video(server: HubServer, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"model_cls": "wan2.2_moe", "task": "t2v", "model_path": REPO}))
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    run = [sys.executable, "-m", "lightx2v.infer", "--config_json", str(settings), *options, "--prompt", "a cat"]
    env = environment(server, tmp_path / "home", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    ended = subprocess.run(
        [*run, "--save_result_path", str(tmp_path / "a.mp4")],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "a.mp4").stat().st_size > 0 and "Download models cost" in ended.stderr
    assert "\ndownload " in ended.stderr and ended.stderr.index("\ndownload ") < ended.stderr.index("\nload ")
