"""The whole engine on tiny models: exact, repeatable, nothing left behind by a run."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModels
from PIL import Image
from tiny_runs import latents

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.recorded_settings import find_picture
from lightx2v.config.request import Request
from lightx2v.engine.memory_retry import within_memory
from lightx2v.engine.result import Result
from lightx2v.errors import BadRequest, Busy, Cancelled, CheckpointError, ConfigError, NumericsError, OutOfMemory
from lightx2v.media.mp4 import probe, read_settings
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 4, "text_len": 512}


def load(folder: Path, **overrides: object) -> tuple[LightX2VPipeline, Request]:
    resolved = resolve({"model_path": str(folder), "device": "cpu"}, SMALL | overrides)
    pipe = LightX2VPipeline.from_config(resolved.engine, preset="tiny")
    fields = dict(resolved.request) | {"prompt": "a red ball", "seed": 3}
    if resolved.engine.task != "t2v":
        fields["image_path"] = str(folder / "first.png")
    return pipe, Request(**fields)


@pytest.fixture(scope="module")
def t2v(tiny: TinyModels) -> Iterator[tuple[LightX2VPipeline, Request]]:
    pipe, request = load(tiny.t2v)
    with pipe:
        yield pipe, request


@pytest.mark.slow
def test_a_prompt_becomes_a_playable_file(t2v: tuple[LightX2VPipeline, Request], tmp_path: Path) -> None:
    pipe, request = t2v
    events: list[Progress] = []
    target = tmp_path / "video.mp4"
    result = pipe.run(request, save_result_path=target, on_progress=events.append, return_frames=True)
    info = probe(target)
    assert (info.width, info.height, info.frames, info.fps) == (48, 32, 5, 16)
    assert result.frames is not None and result.frames.shape == (5, 32, 48, 3) and result.frames.dtype == np.uint8
    assert list(dict.fromkeys(e.stage for e in events)) == ["text", "denoise", "decode", "write"]
    assert all(e.step == e.total for e in {e.stage: e for e in events}.values())
    steps = [e for e in events if e.stage == "denoise" and e.step]
    assert [e.step for e in steps] == [1, 2, 3, 4]
    assert steps[-1].preview is not None and steps[-1].preview().dtype == np.uint8
    json.dumps(result.report())
    assert read_settings(target)["request"] == result.request.to_json()


@pytest.mark.slow
def test_the_recorded_settings_repeat_the_run(t2v: tuple[LightX2VPipeline, Request], tmp_path: Path) -> None:
    pipe, request = t2v
    result = pipe.run(replace(request, seed=-1), save_result_path=tmp_path / "a.mp4", return_latents=True)
    assert result.seed >= 0
    again = Request.from_json(read_settings(tmp_path / "a.mp4")["request"])
    assert torch.equal(latents(pipe, again), result.latents)


@pytest.mark.slow
def test_a_video_does_not_name_its_makers_home(
    t2v: tuple[LightX2VPipeline, Request], tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, request = t2v
    monkeypatch.setenv("HOME", str(tiny.t2v.parent))
    pipe.run(request, save_result_path=tmp_path / "a.mp4")
    recorded = read_settings(tmp_path / "a.mp4")
    assert recorded["engine"]["model_path"] == f"~/{tiny.t2v.name}"
    assert str(tiny.t2v.parent) not in json.dumps(recorded)
    with LightX2VPipeline.from_config(EngineConfig.from_json(recorded["engine"])) as again:  # and it is found again
        assert torch.equal(latents(again, request), latents(pipe, request))


@pytest.mark.slow
def test_a_run_after_another_equals_that_run_alone(t2v: tuple[LightX2VPipeline, Request], tiny: TinyModels) -> None:
    pipe, request = t2v
    other = replace(request, prompt="another thing entirely", seed=9, frames=9, guidance=(2.0, 5.0), shift=3.0)
    latents(pipe, other)
    after = latents(pipe, request)
    fresh, _ = load(tiny.t2v)
    with fresh:
        assert torch.equal(latents(fresh, request), after)
    assert not torch.equal(latents(pipe, replace(request, seed=4)), after)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(t2v: tuple[LightX2VPipeline, Request], tiny: TinyModels) -> None:
    pipe, request = t2v
    ours = hashlib.sha256(latents(pipe, request).numpy().tobytes()).hexdigest()
    code = (
        "import sys, json, hashlib\n"
        "from lightx2v.config import resolve\n"
        "from lightx2v.pipeline import LightX2VPipeline\n"
        "from lightx2v.config.request import Request\n"
        "engine, request = json.loads(sys.argv[1])\n"
        "from lightx2v.config.engine_config import EngineConfig\n"
        "pipe = LightX2VPipeline.from_config(EngineConfig.from_json(engine))\n"
        "result = pipe.run(Request.from_json(request), return_latents=True)\n"
        "print(hashlib.sha256(result.latents.numpy().tobytes()).hexdigest())\n"
    )
    engine = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, SMALL).engine
    argument = json.dumps([engine.to_json(), request.to_json()])
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split()[-1] == ours


@pytest.mark.slow
def test_guidance_one_is_no_guidance(t2v: tuple[LightX2VPipeline, Request]) -> None:
    pipe, request = t2v
    without = latents(pipe, replace(request, enable_cfg=False))
    assert torch.equal(latents(pipe, replace(request, guidance=(1.0, 1.0))), without)
    assert not torch.equal(latents(pipe, request), without)
    blank = latents(pipe, replace(request, negative_prompt=" "))
    assert not torch.equal(blank, latents(pipe, request)), "a blank negative prompt is not the default one"


@pytest.mark.slow
def test_both_experts_run_in_their_range(tiny: TinyModels) -> None:
    pipe, request = load(tiny.t2v, boundary=0.5)
    with pipe:
        seen: list[str | None] = []
        pipe.run(replace(request, steps=8, shift=5.0), on_progress=lambda e: seen.append(e.expert) if e.step else None)
        order = [expert for expert in seen if expert]
        assert set(order) == {"high", "low"} and order == sorted(order)


@pytest.mark.slow
def test_the_distilled_list_runs_without_guidance(tiny: TinyModels) -> None:
    pipe, request = load(
        tiny.t2v, denoising_step_list=[1000, 750, 500, 250], boundary_step_index=2, enable_cfg=False, shift=5.0
    )
    with pipe:
        result = pipe.run(request)
        assert [step.expert for step in result.timings.steps] == ["high", "high", "low", "low"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["i2v", "flf2v"])
def test_an_image_becomes_a_video_of_its_shape(tiny: TinyModels, tmp_path: Path, task: str) -> None:
    Image.effect_mandelbrot((120, 60), (-2, -1, 1, 1), 20).convert("RGB").save(tmp_path / "first.png")
    resolved = resolve({"model_path": str(tiny.i2v), "device": "cpu", "task": task}, SMALL)
    image = str(tmp_path / "first.png")
    request = Request(
        prompt="it moves", image_path=image, last_frame_path=image if task == "flf2v" else None, **resolved.request
    )
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        result = pipe.run(request, save_result_path=tmp_path / "out.mp4")
        again = pipe.run(replace(request, prompt="it moves on"), return_latents=True)
    assert result.width > result.height, "the image gives the shape"
    assert probe(tmp_path / "out.mp4").frames == 5
    assert again.latents is not None and again.latents.isfinite().all()
    settings = read_settings(tmp_path / "out.mp4")
    assert settings["request"]["image_path"] == "first.png", "its folder is nobody's business"
    assert str(tmp_path) not in json.dumps(settings["request"])
    assert find_picture(settings, "image_path", tmp_path / "out.mp4") == tmp_path / "first.png"


def test_a_model_of_the_other_task_is_named(tiny: TinyModels) -> None:
    config = resolve({"model_path": str(tiny.i2v), "device": "cpu", "task": "t2v"}, SMALL).engine
    with pytest.raises(CheckpointError, match="36 input channels.*image-to-video"):
        LightX2VPipeline.from_config(config)


@pytest.mark.slow
def test_swapped_experts_are_warned_of_in_the_report_and_equal_ones_refused(tiny: TinyModels, tmp_path: Path) -> None:
    high, low = (str(tiny.t2v / f"{which}_noise_model") for which in ("high", "low"))
    pipe, request = load(tiny.t2v, high_noise_original_ckpt=low, low_noise_original_ckpt=high)
    with pipe:
        warnings = pipe.run(request).report()["warnings"]
    assert sum("If the two are swapped" in warning for warning in warnings) == 2
    shutil.copytree(high, tmp_path / "other")
    with pytest.raises(CheckpointError, match="are the same"):
        load(tiny.t2v, low_noise_original_ckpt=str(tmp_path / "other"))


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_cancel_leaves_no_file(t2v: tuple[LightX2VPipeline, Request], tmp_path: Path, stage: str) -> None:
    pipe, request = t2v
    token = CancelToken()

    def stop(event: Progress) -> None:
        if event.stage == stage:
            token.cancel()

    with pytest.raises(Cancelled):
        pipe.run(request, save_result_path=tmp_path / "video.mp4", on_progress=stop, cancel=token)
    assert not list(tmp_path.iterdir())
    assert pipe.run(request).seed == 3, "the next run is not affected"


@pytest.mark.slow
def test_nan_ends_the_run_with_the_step(tiny: TinyModels, tmp_path: Path) -> None:
    pipe, request = load(tiny.t2v)
    with pipe:
        with pipe._engine.placement.expert("low") as dit, torch.no_grad():  # type: ignore[union-attr]
            dit.head.head.bias.fill_(float("nan"))
        with pytest.raises(NumericsError, match="step 4"):
            pipe.run(replace(request, boundary=0.9, shift=12.0, steps=4), save_result_path=tmp_path / "black.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "parameter", "source"),
    [
        ("text", "stack.final_layer_norm.weight", "The text encoder made NaN or infinity of the prompt"),
        ("vae", "encoder.conv1.bias", "The VAE made NaN or infinity of the picture"),
        ("vae", "decoder.head.2.bias", "The VAE made NaN or infinity of the latents"),
    ],
)
def test_nan_of_another_network_is_named_and_the_next_run_works(
    tiny: TinyModels, tmp_path: Path, network: str, parameter: str, source: str
) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "first.png")
    pipe, request = load(tiny.i2v, task="i2v", steps=1)
    request = replace(request, image_path=str(tmp_path / "first.png"))
    with pipe:
        good = latents(pipe, request)
        engine = pipe._engine
        assert engine is not None
        with getattr(engine.placement, network)() as module, torch.no_grad():
            values = module.get_parameter(parameter)
            kept = values.clone()
            values[0] = float("nan")
            engine.prompts.clear()
            with pytest.raises(NumericsError, match=source):
                pipe.run(request, save_result_path=tmp_path / "black.mp4")
            values.copy_(kept)
        assert torch.equal(latents(pipe, request), good)
    assert [path.name for path in tmp_path.iterdir()] == ["first.png"]


@pytest.mark.slow
def test_a_video_that_stands_still_is_warned_of(tiny: TinyModels) -> None:
    pipe, request = load(tiny.t2v)
    with pipe:
        assert pipe.run(request).warnings == ()
        with pipe._engine.placement.vae() as vae, torch.no_grad():  # type: ignore[union-attr]
            vae.decoder.head["2"].weight.zero_()
        (warning,) = pipe.run(request).warnings
    assert "All frames are identical" in warning


@pytest.mark.slow
@pytest.mark.parametrize("where", ["text", "expert", "vae"])
def test_out_of_memory_says_what_to_do_and_the_next_run_works(tiny: TinyModels, where: str) -> None:
    pipe, request = load(tiny.t2v)
    with pipe:
        engine = pipe._engine
        assert engine is not None
        with engine.placement.text() as text, engine.placement.expert("high") as dit, engine.placement.vae() as vae:
            victim = {"text": text.stack, "expert": dit.blocks[1], "vae": vae.conv2}[where]
        hook = victim.register_forward_pre_hook(_exhausted)
        with pytest.raises(OutOfMemory, match="smaller") as caught:
            pipe.run(request)
        assert caught.value.__context__ is None, "the failed step's tensors would stay alive in its traceback"
        hook.remove()
        assert pipe.run(request).seed == 3


def _exhausted(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.slow
def test_allocators_errors_are_recognised_and_no_others() -> None:
    def on_apple() -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB).")

    for call in (lambda: torch.empty(2**46), on_apple):
        with pytest.raises(OutOfMemory):
            within_memory(call, "in a test")
    with pytest.raises(RuntimeError, match="size"):
        within_memory(lambda: torch.empty(2) @ torch.empty(3), "in a test")


def test_one_run_at_a_time(t2v: tuple[LightX2VPipeline, Request]) -> None:
    pipe, request = t2v
    refused: list[str] = []

    def second(event: Progress) -> None:
        if not refused:
            try:
                pipe.run(request)
            except Busy as error:
                refused.append(str(error))

    pipe.run(request, on_progress=second)
    assert refused and "is making a video" in refused[0]


def test_a_broken_callback_does_not_cost_the_run(t2v: tuple[LightX2VPipeline, Request]) -> None:
    pipe, request = t2v

    def broken(_: Progress) -> None:
        raise ValueError("listener")

    assert isinstance(pipe.run(request, on_progress=broken), Result)


def test_a_long_prompt_is_cut_and_says_so(t2v: tuple[LightX2VPipeline, Request]) -> None:
    pipe, request = t2v
    result = pipe.run(replace(request, prompt="ball " * 700))
    assert result.text_tokens["prompt"] > 512
    assert any("reads the first 512" in warning for warning in result.warnings)


@pytest.mark.slow
def test_an_existing_file_is_not_replaced_unasked(t2v: tuple[LightX2VPipeline, Request], tmp_path: Path) -> None:
    pipe, request = t2v
    target = tmp_path / "mine.mp4"
    target.write_bytes(b"precious")
    with pytest.raises(BadRequest, match="exists"):
        pipe.run(request, save_result_path=target)
    assert target.read_bytes() == b"precious"
    pipe.run(request, save_result_path=target, force=True, metadata=False)
    assert probe(target).frames == 5
    with pytest.raises(BadRequest):
        read_settings(target)


@pytest.mark.slow
def test_the_python_example_of_the_readme(tiny: TinyModels, tmp_path: Path) -> None:
    pipe = LightX2VPipeline(model_path=tiny.t2v, model_cls="wan2.2_moe", task="t2v")
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "infer_steps": 2,
                "target_video_length": 5,
                "text_len": 512,
                "target_height": 32,
                "target_width": 32,
                "self_attn_1_type": "torch_sdpa",
                "cross_attn_1_type": "torch_sdpa",
                "cross_attn_2_type": "torch_sdpa",
                "sample_guide_scale": [4.0, 3.0],
                "sample_shift": 12.0,
                "enable_cfg": True,
                "cpu_offload": False,
                "offload_granularity": "model",
                "t5_cpu_offload": False,
                "vae_cpu_offload": False,
                "boundary": 0.875,
            }
        )
    )
    pipe.create_generator(config_json=config)
    target = tmp_path / "out.mp4"
    for _ in range(2):  # LightX2V's own example runs twice into the same file
        pipe.generate(seed=42, prompt="a ball", negative_prompt="blur", save_result_path=target)
    assert probe(target).frames == 5
    with pytest.raises(ConfigError, match="before"):
        pipe.enable_offload()
    pipe.close()
    with pytest.raises(ConfigError, match="create_generator"):
        pipe.generate(prompt="a ball")
    pipe.create_generator(infer_steps=2, num_frames=5, height=32, width=32, guidance_scale=5.0, sample_shift=5.0)
    result = pipe.generate(prompt="a ball", seed=1, return_result_tensor=True, frames=9)
    assert result.frames is not None and len(result.frames) == 9
    pipe.close()
