"""A run that another process goes on with makes the same video, bit for bit, and encodes nothing again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyModels
from PIL import Image
from safetensors import safe_open
from stopped_runs import Shelf, go_on, stop_after
from tiny_runs import latents

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.engine import saved_step as module
from lightx2v.engine.saved_step import SavedStep
from lightx2v.engine.step_saver import StepSaver
from lightx2v.errors import Cancelled, CheckpointError, OutputError
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress
from lightx2v.step_file import StepFile

SIZE = {"height": 32, "width": 48, "frames": 5}
STEPS = 4
BASE = {"steps": STEPS}
DISTILLED = {"denoising_step_list": [1000, 750, 500, 250], "boundary_step_index": 2}
LORA = "assets/demo/loras/wan2.2_t2v_demo_high_noise_lora_rank16_4step.safetensors"


@pytest.fixture(scope="module")
def loaded(tiny: TinyModels) -> Iterator[Callable[[str], LightX2VPipeline]]:
    """Opens the tiny models, and the demo's by the name of its preset, each once."""
    pipes: dict[str, LightX2VPipeline] = {}

    def load(name: str) -> LightX2VPipeline:
        if name not in pipes:
            folder = {"t2v": tiny.t2v, "i2v": tiny.i2v}
            own: Any = {"model_path": str(folder[name]), "task": name} if name in folder else name
            pipes[name] = LightX2VPipeline.from_config(resolve(own, {"device": "cpu"}).engine)
        return pipes[name]

    yield load
    for pipe in pipes.values():
        pipe.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)).save(path)
    return str(path)


def ask(settings: dict[str, Any], task: str = "t2v", picture: str = "") -> Request:
    shown = {"image_path": picture} if task == "i2v" else {}
    return Request(task=task, prompt="a red ball", seed=3, **SIZE, **settings, **shown)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("sampler", ["unipc", "euler", "lcm"])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("schedule", [BASE, DISTILLED | {"enable_cfg": False}], ids=["guided", "distilled"])
def test_every_sampler_goes_on_with_the_same_bits(
    loaded: Callable[[str], LightX2VPipeline], picture: str, schedule: dict[str, Any], task: str, sampler: str, at: int
) -> None:
    pipe, request = loaded(task), ask(schedule | {"sampler": sampler}, task, picture)
    whole = latents(pipe, request)
    shelf = Shelf()
    stop_after(pipe, request, at, shelf)
    result = go_on(pipe, request, shelf)
    assert result.latents is not None and torch.equal(result.latents, whole)
    assert result.report()["resumed_after"] == at and len(result.timings.steps) == STEPS - at
    assert result.warnings == ()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_goes_on_in_the_middle_of_its_phases(loaded: Callable[[str], LightX2VPipeline], at: int) -> None:
    """Step 1 continues the history of UniPC, step 2 begins another sampler, step 3 another expert without guidance."""
    phases = [
        {"expert": "high", "sampler": "unipc"},
        {"expert": "high", "from_step": 2, "sampler": "euler"},
        {"expert": "low", "from_step": 3, "guidance": 1, "sampler": "euler"},
    ]
    pipe, request, shelf = loaded("t2v"), ask({"steps": STEPS, "phases": phases}), Shelf()
    whole = latents(pipe, request)
    stop_after(pipe, request, at, shelf)
    result = go_on(pipe, request, shelf)
    assert result.latents is not None and torch.equal(result.latents, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["demo_t2v_distill_lora", "demo_i2v_distill_lora", "demo_t2v_fp8", "demo_t2v_three_phase"]
)
def test_loras_and_8_bit_weights_go_on_with_the_same_bits(
    loaded: Callable[[str], LightX2VPipeline], picture: str, preset: str
) -> None:
    resolved = resolve(preset, SIZE)
    shown = {"image_path": picture} if resolved.engine.task == "i2v" else {}
    request = Request(prompt="a red ball", **resolved.request, **shown)
    pipe, shelf = loaded(preset), Shelf()
    whole = latents(pipe, request)
    stop_after(pipe, request, 2, shelf)
    result = go_on(pipe, request, shelf)
    assert result.latents is not None and torch.equal(result.latents, whole) and result.resumed_after == 2


@pytest.mark.slow
def test_nothing_is_encoded_again(
    loaded: Callable[[str], LightX2VPipeline], picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, request, shelf = loaded("i2v"), ask(BASE, "i2v", picture), Shelf()
    stop_after(pipe, request, 2, shelf)
    monkeypatch.setattr("lightx2v.engine.run.encode_condition", None)
    monkeypatch.setattr("lightx2v.models.umt5.TextEncoder.encode", None)
    events: list[Progress] = []
    result = go_on(pipe, request, shelf, on_progress=events.append)
    assert result.text_tokens["prompt"] > 0 and result.text_tokens["negative_prompt"] > 0
    assert list(dict.fromkeys(event.stage for event in events)) == ["denoise", "decode"]
    steps = [event for event in events if event.stage == "denoise"]
    assert [(event.step, event.resumed_after) for event in steps] == [(2, 2), (3, 2), (4, 2)]
    assert steps[0].eta is None and steps[1].eta is not None and steps[1].eta >= result.timings.steps[0].seconds / 2


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_decodes_decodes_again_only(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, request, shelf = loaded("t2v"), ask(BASE), Shelf()
    whole = pipe.run(request, return_frames=True)
    stop_after(pipe, request, 1, shelf, stage="decode")
    result = go_on(pipe, request, shelf, return_frames=True)
    assert result.resumed_after == STEPS and not result.timings.steps
    assert whole.frames is not None and np.array_equal(result.frames, whole.frames)


def test_a_run_may_be_stopped_again_and_again(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, request, shelf = loaded("t2v"), ask(BASE), Shelf()
    for step in (1, 2, 3):
        stop_after(pipe, request, step, shelf)
    assert torch.equal(go_on(pipe, request, shelf).latents, latents(pipe, request))


def test_the_warnings_of_the_first_part_stay(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, shelf = loaded("t2v"), Shelf()
    request = replace(ask(BASE), prompt="a red ball " * 300)
    stop_after(pipe, request, 2, shelf)
    assert "the model reads the first 512" in go_on(pipe, request, shelf).warnings[0]


def test_a_seed_that_was_drawn_stays(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, shelf = loaded("t2v"), Shelf()
    request = replace(ask(BASE), seed=-1)
    stop_after(pipe, request, 2, shelf)
    assert shelf.data is not None
    result = go_on(pipe, request, shelf)
    assert result.seed == SavedStep.from_bytes(shelf.data).seed and result.resumed_after == 2
    assert torch.equal(result.latents, latents(pipe, replace(request, seed=result.seed)))


# ---- what may not go on


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"steps": 5}, "steps"),
        ({"prompt": "a blue ball"}, "prompt"),
        ({"guidance": (4.0, 1.0)}, "guidance"),
        ({"sampler": "euler"}, "sampler"),
    ],
)
def test_another_request_starts_over_and_says_so(
    loaded: Callable[[str], LightX2VPipeline], change: dict[str, Any], named: str
) -> None:
    pipe, request, shelf = loaded("t2v"), ask(BASE), Shelf()
    stop_after(pipe, request, 2, shelf)
    other = replace(request, **change)
    result = go_on(pipe, other, shelf)
    assert result.resumed_after == 0 and torch.equal(result.latents, latents(pipe, other))
    (warning,) = result.warnings
    assert warning == f"The video was started over: the saved step is of another run: {named}."


@pytest.mark.slow
def test_another_engine_or_version_starts_over_and_says_so(
    loaded: Callable[[str], LightX2VPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, request, shelf = loaded("t2v"), ask(BASE), Shelf()
    stop_after(pipe, request, 2, shelf)
    engine, kept = pipe._loaded(), shelf.data

    def warning_with(**changes: Any) -> str:
        shelf.data = kept
        monkeypatch.setattr(pipe, "_engine", replace(engine, **changes))
        result = go_on(pipe, request, shelf)
        monkeypatch.setattr(pipe, "_engine", engine)
        return "went on" if result.resumed_after else " ".join(result.warnings)

    assert warning_with() == "went on"
    assert warning_with(config=replace(engine.config, vae_dtype="fp16")).endswith("another run: vae_dtype.")
    assert warning_with(weights="others").endswith("another run: other weights.")
    assert "attention" in warning_with(self_attention=replace(engine.self_attention, name="flash_attn2"))
    monkeypatch.setattr(module, "NUMERICS", 0)
    assert warning_with().endswith("numerics 1, now 0.")
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert f"torch '{torch.__version__}'" not in warning_with() and ", now '1.0'." in warning_with()
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    assert warning_with().endswith(", now 'cpu ABACUS'.")


def test_a_picture_or_a_lora_with_other_content_under_its_name_starts_over(
    loaded: Callable[[str], LightX2VPipeline], tmp_path: Path
) -> None:
    pipe, shelf, picture = loaded("i2v"), Shelf(), tmp_path / "a.png"
    Image.new("RGB", (80, 96), "red").save(picture)
    request = ask(BASE, "i2v", str(picture))
    stop_after(pipe, request, 2, shelf)
    moved = replace(request, image_path=str(picture.rename(tmp_path / "b.png")))
    assert go_on(pipe, moved, shelf).resumed_after == 2, "another name is the same picture"
    Image.new("RGB", (80, 96), "blue").save(tmp_path / "b.png")
    result = go_on(pipe, moved, shelf)
    assert result.resumed_after == 0 and result.warnings[0].endswith("another run: image_path.")


@pytest.mark.slow
def test_another_lora_under_the_same_name_starts_over(
    loaded: Callable[[str], LightX2VPipeline], tmp_path: Path
) -> None:
    lora = tmp_path / "style_high_noise.safetensors"
    original = Path(LORA).read_bytes()
    lora.write_bytes(original)
    pipe = loaded("demo_t2v_distill_lora")
    resolved = resolve("demo_t2v_distill_lora", SIZE)
    request = Request(
        prompt="a ball", **resolved.request | {"loras": [{"name": "high_noise_model", "path": str(lora)}]}
    )
    shelf = Shelf()
    stop_after(pipe, request, 2, shelf)
    assert go_on(pipe, request, shelf).resumed_after == 2
    weaker = replace(request, loras=(replace(request.loras[0], strength=0.5),)) if request.loras else request
    assert "loras" in go_on(pipe, weaker, shelf).warnings[0]
    half = len(original) // 2
    lora.write_bytes(original[:half] + bytes(byte ^ 1 for byte in original[half:]))
    assert "other loras" in go_on(pipe, request, shelf).warnings[0]


def saved(loaded: Callable[[str], LightX2VPipeline]) -> tuple[LightX2VPipeline, Request, bytes]:
    pipe, request, shelf = loaded("t2v"), ask(BASE), Shelf()
    stop_after(pipe, request, 2, shelf)
    assert shelf.data is not None
    return pipe, request, shelf.data


def test_damaged_bytes_start_over_and_say_so(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, request, data = saved(loaded)
    header = 8 + int.from_bytes(data[:8], "little")
    flipped = lambda at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]  # noqa: E731
    damaged = [b"", b"x", data[:-1], data[: header + 10], bytes(len(data)), data + b"x", b"[" * 99_999]
    damaged += [flipped(at) for at in (*range(0, header, 7), header, len(data) - 1)]
    for content in damaged:
        try:
            SavedStep.from_bytes(content)
        except CheckpointError:
            continue
        at = next(index for index in range(len(data)) if content[index] != data[index])
        pytest.fail(f"not noticed at {at}: {data[max(0, at - 40) : at + 40]!r}")
    result = go_on(pipe, request, Shelf(data[:-1]))
    assert result.resumed_after == 0 and "the saved step is damaged" in result.warnings[0]


def test_another_format_starts_over_and_says_so(loaded: Callable[[str], LightX2VPipeline], monkeypatch: Any) -> None:
    pipe, request, data = saved(loaded)
    monkeypatch.setattr(module, "FORMAT", 2)
    assert "has format 1, expected 2" in go_on(pipe, request, Shelf(data)).warnings[0]


def test_a_saved_step_is_one_safetensors_file(loaded: Callable[[str], LightX2VPipeline], tmp_path: Path) -> None:
    _, request, data = saved(loaded)
    path = tmp_path / "step.safetensors"
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        head = json.loads(file.metadata()["lightx2v_saved_step"])
        assert set(file.keys()) >= {"latents", "context.0", "context.1", "solver.sample", "solver.x0"}
        assert tuple(file.get_tensor("latents").shape) == request.latent_shape
    assert (head["step"], head["steps"], head["made_by"]["request"]["prompt"]) == (2, STEPS, request.prompt)


# ---- when a step is saved


def some_step(step: int = 1) -> SavedStep:
    return SavedStep(
        step=step, steps=STEPS, latents=torch.zeros(2), solver_state={}, contexts=[], condition=None, made_by={},
        tokens={}, warnings=[],
    )  # fmt: skip


def test_a_short_run_writes_nothing_even_when_it_is_stopped(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, request, shelf = loaded("t2v"), ask(BASE), Shelf(every=60)
    stop_after(pipe, request, 3, shelf)
    pipe.run(request, steps=shelf)
    assert shelf.writes == 0


def test_zero_turns_saving_off(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, request, shelf = loaded("t2v"), ask(BASE), Shelf(every=0)
    stop_after(pipe, request, 3, shelf)
    assert shelf.writes == 0


def test_a_failed_save_costs_no_run(
    loaded: Callable[[str], LightX2VPipeline], caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Shelf):
        def write(self, data: bytes) -> None:
            raise OutputError("No space left on device.")

    pipe, request = loaded("t2v"), ask(BASE)
    assert torch.equal(go_on(pipe, request, Full()).latents, latents(pipe, request))
    assert "is not saved, the run goes on: No space left" in caplog.text


def test_a_cancelled_run_does_not_save_the_step_that_it_reached(loaded: Callable[[str], LightX2VPipeline]) -> None:
    pipe, request, shelf, token = loaded("t2v"), ask(BASE), Shelf(), CancelToken()

    def stop(event: Progress) -> None:
        if (event.stage, event.step) == ("denoise", 2):
            token.cancel()

    with pytest.raises(Cancelled):
        pipe.run(request, cancel=token, on_progress=stop, steps=shelf)
    assert shelf.data is None or SavedStep.from_bytes(shelf.data).step == 1


@pytest.mark.slow
def test_no_writer_outlives_its_run(loaded: Callable[[str], LightX2VPipeline]) -> None:
    class Slow(Shelf):
        def write(self, data: bytes) -> None:
            time.sleep(0.3)
            super().write(data)

    pipe, request, shelf = loaded("t2v"), ask(BASE), Slow()
    pipe.run(request, steps=shelf)
    assert shelf.writes >= 1
    assert not [thread for thread in threading.enumerate() if thread.name == "lightx2v-save"]


def test_saves_keep_their_distance_and_each_step_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    reached, copying = [0], [0.0]

    def take() -> SavedStep | None:
        now[0] += copying[0]
        return some_step(reached[0]) if reached[0] else None

    shelf = Shelf(every=20)
    saver = StepSaver(shelf, take)

    def writes_at(time: float, step: int) -> int:
        now[0], reached[0] = time, step
        saver.save_if_due()
        saver.close()
        return shelf.writes

    assert writes_at(119.9, 3) == 0
    assert writes_at(120.0, 0) == 0, "there is no step yet"
    assert writes_at(121.0, 4) == 1
    assert writes_at(140.9, 5) == 1
    assert writes_at(141.0, 5) == 2
    assert writes_at(170.0, 5) == 2, "that step is saved already"
    copying[0] = 1.0
    assert writes_at(171.0, 6) == 3
    assert writes_at(250.0, 7) == 3, "a save that takes a second comes once in a hundred"
    assert writes_at(272.1, 8) == 4
    now[0] = 273.0
    reached[0] = 9
    saver.save_at_stop()
    assert shelf.writes == 5


# ---- the file


def test_the_file_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StepFile(tmp_path / "cat.mp4")
    assert file.path.name == "cat.mp4.step.safetensors" and file.read() is None
    file.write(b"first")

    def no_rename(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_rename)
        with pytest.raises(OutputError, match="cat.mp4.step.safetensors could not be written: No space left"):
            file.write(b"second")
    assert file.read() == b"first" and [path.name for path in tmp_path.iterdir()] == [file.path.name]
    assert StepFile(tmp_path / "cat.mp4", resume=False).read() is None
    (tmp_path / "cat.mp4.step.safetensors.part").write_bytes(b"half")  # from a killed process
    file.remove()
    assert not list(tmp_path.iterdir())
    file.remove()


@pytest.mark.parametrize("name", ["x" * 220 + ".mp4", "x" * 251 + ".mp4", "é" * 125 + ".mp4"])
def test_a_video_with_a_long_name_has_a_step_of_its_own(tmp_path: Path, name: str) -> None:
    file, other = StepFile(tmp_path / name), StepFile(tmp_path / f"y{name[1:]}")
    assert not file.exists() and file.read() is None
    file.write(b"step")
    assert file.exists() and file.read() == b"step" and not other.exists()
    assert not StepFile(tmp_path / f"{name[:-5]}y.mp4").exists()
    file.remove()
    assert not list(tmp_path.iterdir())
