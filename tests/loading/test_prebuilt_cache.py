"""The prebuilt cache: read in place of the sources, never half, never built twice, pruned when sources change."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyModels
from lora_files import random_pairs, write

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.environment import Environment
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.convert import main
from lightx2v.errors import Cancelled, CheckpointError
from lightx2v.loading import conversion, prebuilt_cache
from lightx2v.loading.conversion import Conversion
from lightx2v.loading.prebuilt_cache import PrebuiltCache, prebuilt_folder
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress
from lightx2v.weights import checkpoint as checkpoint_module
from lightx2v.weights.checkpoint import open_checkpoint

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "boundary": 0.9}
FP8 = {"build": "fp8", "dit_quantized": True, "dit_quant_scheme": "fp8-sgl"}
FP8_T5 = FP8 | {"t5_quantized": True, "t5_quant_scheme": "fp8-sgl"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prebuilt of its own for every test."""
    monkeypatch.setenv("LIGHTX2V_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "built"


@pytest.fixture(scope="module")
def loras(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraSpec, ...]:
    root = tmp_path_factory.mktemp("loras")
    shapes = open_checkpoint(tiny.t2v / "high_noise_model").shapes
    files = [write(root / f"{which}.safetensors", random_pairs(shapes, n)) for n, which in enumerate(("a", "b"))]
    return tuple(LoraSpec(expert=e, path=str(f)) for e, f in zip(("high", "low"), files, strict=True))  # type: ignore[arg-type]


def configured(folder: Path, **overrides: Any) -> tuple[EngineConfig, Request]:
    resolved = resolve({"model_path": str(folder), "device": "cpu"}, SMALL | overrides)
    fields: dict[str, Any] = {**resolved.request, "prompt": "a red ball", "seed": 3}
    return resolved.engine, Request(**fields)


def latents(folder: Path, **overrides: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    config, request = configured(folder, **overrides)
    with LightX2VPipeline.from_config(config) as pipe:
        result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents, result.report()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of tensors read, by the name of the file's folder or, in the prebuilt, "built"."""
    seen: Counter[str] = Counter()

    def spy(places: Any, *more: Any, **settings: Any) -> Any:
        every = list(places)
        for place in every:
            folder, pickle = place.path.parent.name, place.path.suffix == ".pth"
            seen[folder if folder == "built" else place.path.stem if pickle else folder] += place.nbytes
        return read_tensors(every, *more, **settings)

    read_tensors = checkpoint_module.read_tensors
    monkeypatch.setattr(checkpoint_module, "read_tensors", spy)
    return seen


EXPERTS = ("high_noise_model", "low_noise_model")
T5 = "models_t5_umt5-xxl-enc-bf16"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"build": "merged"}, FP8_T5])
def test_the_second_load_reads_only_what_was_built(
    tiny: TinyModels, loras: tuple[LoraSpec, ...], reads: Counter[str], cache: Path, settings: dict[str, Any]
) -> None:
    first, report = latents(tiny.t2v, lora_configs=loras, **settings)
    assert all(reads[name] for name in EXPERTS)
    sizes = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    assert len(sizes) == (3 if "t5_quantized" in settings else 2) and not list(cache.glob("*.part"))
    reads.clear()
    second, again = latents(tiny.t2v, lora_configs=loras, **settings)
    assert torch.equal(first, second) and again["loras"] == report["loras"] and again["warnings"] == []
    assert not any(reads[name] for name in EXPERTS) and reads["built"]
    assert bool(reads[T5]) != ("t5_quantized" in settings)
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")} == sizes


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"build": "merged"}, FP8_T5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_kept_equals_what_is_made_in_memory(
    tiny: TinyModels, loras: tuple[LoraSpec, ...], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], dtype: str
) -> None:
    kept, report = latents(tiny.t2v, lora_configs=loras, dtype=dtype, **settings)
    assert report["warnings"] == []
    monkeypatch.setenv("LIGHTX2V_CACHE_DIR", "/proc/nowhere")
    made, report = latents(tiny.t2v, lora_configs=loras, dtype=dtype, **settings)
    assert torch.equal(made, kept)
    assert "built in memory" in report["warnings"][0] and "cannot be written to" in report["warnings"][0]


@pytest.mark.slow
def test_a_request_without_the_loras_gets_the_bare_model(tiny: TinyModels, loras: tuple[LoraSpec, ...]) -> None:
    plain, _ = latents(tiny.t2v)
    config, request = configured(tiny.t2v, build="merged", lora_configs=loras)
    with LightX2VPipeline.from_config(config) as pipe:
        run = lambda request: pipe.run(request, return_latents=True).latents  # noqa: E731
        merged, bare, again = run(request), run(replace(request, loras=())), run(request)
    assert torch.equal(bare, plain) and torch.equal(again, merged) and not torch.equal(merged, plain)


@pytest.mark.slow
def test_a_full_disk_is_no_reason_not_to_run(
    tiny: TinyModels, loras: tuple[LoraSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=1000))
    _, report = latents(tiny.t2v, lora_configs=loras, build="merged")
    assert "0.0 GB are free" in report["warnings"][0]


# ---- the cache -----------------------------------------------------------------------------------------------------


def job_of(folder: Path, form: str = "fp8") -> Conversion:
    return Conversion(source=folder / "high_noise_model", output=Path("high_noise.safetensors"), format=form)


@pytest.fixture
def model(tiny: TinyModels, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(tiny.t2v, tmp_path / "model")


KILLED = """
import os, signal, sys
from pathlib import Path
from lightx2v.loading.prebuilt_cache import PrebuiltCache
from lightx2v.loading.conversion import Conversion

def stop(event):
    if event.step > event.total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

job = Conversion(source=Path(sys.argv[2]), output=Path("high_noise.safetensors"), format="fp8")
PrebuiltCache(Path(sys.argv[1])).build(job, on_progress=stop)
"""


@pytest.mark.slow
def test_a_killed_build_is_never_used_and_is_continued(model: Path, cache: Path) -> None:
    job, prebuilt = job_of(model), PrebuiltCache(cache)
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache), str(job.source)], timeout=100)
    assert done.returncode == -signal.SIGKILL
    (item,) = prebuilt.files()
    assert not item.whole and item.state == "current" and item.size > 1000 and prebuilt.find(job) is None
    begun = item.path.read_bytes()
    path = prebuilt.build(job)  # the dead process's lock does not hold this one up
    assert path.read_bytes().startswith(begun[:-1]) and prebuilt.find(job) == path
    whole = PrebuiltCache(cache.parent / "other").build(job)
    assert whole.read_bytes() == path.read_bytes()
    assert [item.whole for item in prebuilt.files()] == [True]


@pytest.mark.slow
def test_two_at_once_make_it_once(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, begun = [], threading.Event()
    convert = prebuilt_cache.convert

    def slow(job: Conversion, **more: Any) -> bool:
        begun.set()
        waiting.wait(0.2)
        made.append(job.output)
        return convert(job, **more)

    waiting = threading.Event()
    monkeypatch.setattr(prebuilt_cache, "convert", slow)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(PrebuiltCache(cache).build(job_of(model)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(set(found)) == 1 and len(found) == 3 and begun.is_set()


@pytest.mark.slow
def test_waiting_for_another_process_can_be_cancelled(model: Path, cache: Path) -> None:
    prebuilt, token = PrebuiltCache(cache), CancelToken()
    with prebuilt._locked(None):
        token.cancel()
        with pytest.raises(Cancelled):
            PrebuiltCache(cache).build(job_of(model), cancel=token)


def test_a_cancelled_build_leaves_a_part_and_no_lock(model: Path, cache: Path) -> None:
    prebuilt, token = PrebuiltCache(cache), CancelToken()

    def stop(event: Progress) -> None:
        token.cancel()

    with pytest.raises(Cancelled):
        prebuilt.build(job_of(model), on_progress=stop, cancel=token)
    assert prebuilt.find(job_of(model)) is None and prebuilt.build(job_of(model)).is_file()


def test_a_damaged_file_is_made_anew(model: Path, cache: Path) -> None:
    prebuilt, job = PrebuiltCache(cache), job_of(model)
    path = prebuilt.build(job)
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    assert prebuilt.find(job) is None
    assert prebuilt.build(job).read_bytes() == good


def test_other_settings_are_other_files_and_the_old_ones_go_when_their_source_changes(model: Path, cache: Path) -> None:
    prebuilt, job = PrebuiltCache(cache), job_of(model)
    names = {prebuilt.build(each).name for each in (job, replace(job, format="int8"), replace(job, plain="fp32"))}
    assert len(names) == 3 and all(name.startswith("model-high_noise-") for name in names)
    assert [item.state for item in prebuilt.files()] == ["current"] * 3 and prebuilt.prune() == []
    low = prebuilt.build(replace(job, source=model / "low_noise_model"))
    shard = next((model / "high_noise_model").glob("*.safetensors"))
    shard.touch()
    assert prebuilt.find(job) is None
    new = prebuilt.build(job)
    assert {item.path for item in prebuilt.files()} == {low, new}, "what was made of the old file is gone"


def test_what_an_older_program_made_goes(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt, job = PrebuiltCache(cache), job_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "VERSION", 0)
        old = prebuilt.build(job)
    assert prebuilt.find(job) is None and [item.state for item in prebuilt.files()] == ["stale"]
    new = prebuilt.build(job)
    assert new != old and [item.path for item in prebuilt.files()] == [new]


def test_what_was_made_of_a_disk_that_is_not_there_is_kept(model: Path, cache: Path) -> None:
    prebuilt = PrebuiltCache(cache)
    prebuilt.build(job_of(model))
    model.rename(model.with_name("elsewhere"))
    assert [item.state for item in prebuilt.files()] == ["missing-source"] and prebuilt.prune() == []
    (cache / "rubbish.safetensors").write_bytes(b"no header")
    (cache / "other.safetensors.part").write_bytes(b"")
    assert {item.path.name for item in prebuilt.prune()} == {"rubbish.safetensors", "other.safetensors.part"}


def test_the_command_line_lists_sizes_and_tidies(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = PrebuiltCache(cache).build(job_of(model))
    assert main(["--list_built"]) == 0
    line = capsys.readouterr().out
    assert f"{path.stat().st_size / 1e9:.2f} GB" in line and "current" in line and str(path) in line
    next((model / "high_noise_model").glob("*.safetensors")).touch()
    assert main(["--tidy_built"]) == 0 and "removed" in capsys.readouterr().out and not path.exists()


def test_models_have_their_builds_beside_them() -> None:
    some = Environment(models_dir="/models", cache_dir="/cache")
    assert prebuilt_folder("/disk/models", some) == Path("/disk/models/.built")
    assert prebuilt_folder(None, some) == Path("/models/.built")
    assert prebuilt_folder(None, Environment(cache_dir="/cache")) == Path("/cache/built")
    assert prebuilt_folder(None, Environment()).parts[-2:] == ("lightx2v", "built")


def test_a_wrong_pair_is_refused_before_anything_is_made(model: Path, cache: Path) -> None:
    shutil.rmtree(model / "low_noise_model")
    shutil.copytree(model / "high_noise_model", model / "low_noise_model")
    with pytest.raises(CheckpointError, match="the same"):
        latents(model, **FP8)
    assert not cache.exists()


@pytest.mark.slow
def test_progress_of_a_build_is_part_of_loading(model: Path) -> None:
    config, _ = configured(model, **FP8)
    seen: list[Progress] = []
    LightX2VPipeline.from_config(config, on_progress=seen.append).close()
    said = [event for event in seen if event.message.startswith("Making")]
    assert {event.stage for event in said} == {"load"} and said[-1].step == said[-1].total == conversion.STEPS
    assert "Making the low-noise expert" in said[-1].message and "GB" in said[-1].message
