from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModels
from patience import PATIENCE
from PIL import Image

from lightx2v.catalog.used_files import content_hash
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.model_paths import PROJECT
from lightx2v.config.recorded_settings import recorded_settings
from lightx2v.config.request import Request
from lightx2v.cost.machine import Machine
from lightx2v.engine.result import Result
from lightx2v.errors import Cancelled, CheckpointError, OutOfMemory
from lightx2v.infer import main
from lightx2v.progress import CancelToken, OnProgress, Peak, Progress, StepTime, Timings, WeightsRead
from lightx2v.step_file import StepStore

TUTORIAL = PROJECT / "tests" / "data" / "tutorial"
NOTES = ["Alpha from the header."]
TIMINGS = Timings(
    seconds={"text": 0.5, "denoise": 2.0},
    steps=(StepTime(expert="high", seconds=2.0),),
    total=2.75,
    peak_vram={"denoise": Peak(allocated=3 << 30, reserved=4 << 30)},
    peak_rss=1 << 30,
)


@dataclass
class Stage:
    """A fake engine, and what was asked of it."""

    error: BaseException | None = None
    config: EngineConfig | None = None
    preset: str = ""
    request: Request | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    closed: int = 0

    def open(self, config: EngineConfig, *, preset: str, on_progress: OnProgress, **_: object) -> Stage:
        self.config, self.preset = config, preset
        on_progress(Progress(stage="load"))
        return self

    def run(
        self,
        request: Request,
        *,
        save_result_path: str | Path | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        metadata: bool = True,
        force: bool = False,
        steps: StepStore | None = None,
    ) -> Result:
        assert self.config is not None and on_progress is not None and cancel is not None
        self.request = request
        self.arguments = {"path": save_result_path, "metadata": metadata, "force": force}
        on_progress(Progress(stage="denoise", step=1, total=4, expert="high"))
        if self.error is not None:
            raise self.error
        Path(str(save_result_path)).write_bytes(b"video")
        return Result(
            path=str(save_result_path),
            frames=None,
            latents=None,
            request=request,
            config=self.config,
            height=request.height,
            width=request.width,
            device="CPU",
            attention={"self": "torch_sdpa", "cross": "torch_sdpa", "reason": "a test"},
            timings=TIMINGS,
            text_tokens={"prompt": 3},
            loras=(
                {
                    "expert": "high",
                    "path": "a.safetensors",
                    "strength": 0.5,
                    "applied": 49,
                    "total": 50,
                    "notes": NOTES,
                },
            ),
            warnings=("the prompt is\nlong",),
            load=WeightsRead(nbytes=68_400_000_000, seconds=4.0, known=68_400_000_000, cached=68_400_000_000),
        )

    def close(self) -> None:
        self.closed += 1


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Infer = Callable[..., Ended]


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def infer(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Infer:
    monkeypatch.chdir(tmp_path)
    for name in ("LIGHTX2V_MODELS_DIR", "LIGHTX2V_OUTPUT_DIR", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags: str) -> Ended:
        code = main(flags, open_engine=stage.open)
        out, err = capsys.readouterr()
        assert "Traceback" not in err or "--verbose" in flags
        return Ended(code, out, err)

    return run


def test_a_preset_and_a_prompt_make_a_video(infer: Infer, stage: Stage, tmp_path: Path) -> None:
    ended = infer("--preset", "demo_t2v_distill_lora", "--prompt", "a red ball", "--save_result_path", "ball.mp4")
    assert ended.code == 0, ended.err
    assert stage.preset == "demo_t2v_distill_lora"
    assert stage.request is not None and stage.request.prompt == "a red ball"
    assert stage.request.denoising_step_list == (1000, 750, 500, 250)
    assert stage.arguments == {"path": tmp_path / "ball.mp4", "metadata": True, "force": False}
    assert stage.closed == 1


def test_it_prints_the_path_first_and_then_what_it_took(infer: Infer, tmp_path: Path) -> None:
    ended = infer("--preset", "demo_t2v_base", "--prompt", "a red ball", "--save_result_path", "ball.mp4")
    assert ended.out.splitlines() == [
        str(tmp_path / "ball.mp4"),
        "96x96, 17 frames, 16 fps, seed 42, CPU",
        "2.75 s: text 0.50, denoise 2.00",
        "weights: 68.4 GB in 4.0 s from the page cache, 17.1 GB/s",
        "peak 3.00 GiB of GPU memory (4.00 GiB reserved), 1.00 GiB of RAM",
        "LoRA a.safetensors: 49 of 50 layers on the high-noise expert, strength 0.5. Alpha from the header.",
        "warning: the prompt is\\nlong",
    ]
    assert re.search(r"INFO +Total Cost cost \d+\.\d{6} seconds", ended.err)
    assert "denoise high" in ended.err


def test_the_tutorials_command_runs(infer: Infer, stage: Stage, tmp_path: Path) -> None:
    ended = infer(
        *("--model_cls", "wan2.2_moe", "--task", "t2v", "--model_path", "models/Wan2.2-T2V-A14B"),
        *("--config_json", str(tmp_path / "LightX2V/configs/wan22/wan_moe_t2v.json")),
        *("--prompt", "Two cats box.", "--negative_prompt", "色调艳丽，过曝"),
        *("--save_result_path", str(tmp_path / "save_results" / "output.mp4")),
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "save_results" / "output.mp4").exists()
    assert stage.config is not None and stage.config.model_path == "models/Wan2.2-T2V-A14B"
    assert stage.request is not None
    assert (stage.request.steps, stage.request.shift, stage.request.guidance) == (40, 12.0, (4.0, 3.0))
    assert stage.request.negative_prompt == "色调艳丽，过曝"
    assert "is not there; the preset t2v_base has the settings" in ended.err


def test_every_flag_of_a_video_reaches_the_request(infer: Infer, stage: Stage) -> None:
    ended = infer(
        *("--config_json", str(TUTORIAL / "wan_moe_t2v.json"), "--prompt", "x", "--seed", "7"),
        *("--target_shape", "96", "128", "--num_frames", "9", "--fps", "24", "--steps", "3", "--shift", "2"),
        *("--guidance", "2", "1.5", "--boundary", "0.8", "--no-enable_cfg", "--set", 'dtype="fp32"'),
        *("--set", "vae_dtype=bf16", "--strict_attention", "--models_dir", "m", "--no_metadata", "--force"),
        "--return_result_tensor",
    )
    assert ended.code == 0, ended.err
    request, config = stage.request, stage.config
    assert request is not None and config is not None
    assert (request.height, request.width, request.frames, request.fps, request.seed) == (96, 128, 9, 24.0, 7)
    assert (request.steps, request.shift, request.guidance, request.boundary) == (3, 2.0, (2.0, 1.5), 0.8)
    assert request.enable_cfg is False
    assert (config.dtype, config.vae_dtype, config.attention_strict, config.models_dir) == ("fp32", "bf16", True, "m")
    assert stage.arguments["metadata"] is False and stage.arguments["force"] is True


def test_image_to_video_takes_its_pictures(infer: Infer, stage: Stage) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(name)
    flags = ("--preset", "demo_i2v_base", "--prompt", "x", "--image_path", "a.png")
    assert infer(*flags).code == 0
    assert stage.request is not None and (stage.request.task, stage.request.image_path) == ("i2v", "a.png")
    assert infer(*flags, "--task", "flf2v", "--last_frame_path", "b.png", "--seed", "1").code == 0
    assert (stage.request.task, stage.request.last_frame_path) == ("flf2v", "b.png")


def test_an_unnamed_video_gets_a_name_that_tells_its_preset_and_seed(
    infer: Infer, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer("--preset", "demo_t2v_base", "--prompt", "x")
    monkeypatch.setenv("LIGHTX2V_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    infer("--preset", "demo_t2v_base", "--prompt", "x", "--seed", "7")
    (first,) = (tmp_path / "outputs").iterdir()
    (second,) = (tmp_path / "elsewhere").iterdir()
    assert re.fullmatch(r"demo_t2v_base_42_\d{8}-\d{6}\.mp4", first.name)
    assert re.fullmatch(r"demo_t2v_base_7_\d{8}-\d{6}\.mp4", second.name)


def test_a_drawn_seed_is_in_the_name_and_the_request(infer: Infer, stage: Stage, tmp_path: Path) -> None:
    infer("--preset", "demo_t2v_base", "--prompt", "x", "--seed", "-1")
    (path,) = (tmp_path / "outputs").iterdir()
    assert stage.request is not None and stage.request.seed >= 0
    assert f"_{stage.request.seed}_" in path.name


def test_an_existing_file_is_kept_unless_forced(infer: Infer, stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "cat.mp4").write_bytes(b"mine")
    flags = ("--preset", "demo_t2v_base", "--prompt", "x", "--save_result_path", "cat.mp4")
    ended = infer(*flags)
    assert (ended.code, stage.config) == (2, None)
    assert "--force" in ended.err
    assert (tmp_path / "cat.mp4").read_bytes() == b"mine"
    assert infer(*flags, "--force").code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--preset NAME or --config_json FILE"),
        (("--preset", "demo_t2v_base"), "There is no prompt"),
        (("--preset", "demo_t2v_base", "--prompt", ""), "it is empty"),
        (("--preset", "demo_t2v_base", "--prompt", "&nbsp;\u200b"), "nothing visible is left of it"),
        (("--preset", "demo_t2v_bose", "--prompt", "x"), "Did you mean 'demo_t2v_base'"),
        (
            ("--preset", "demo_t2v_base", "--config_json", "a.json"),
            "argument --config_json: not allowed with argument --preset",
        ),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--height", "100"), "Nearest valid value: 96."),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--num_frames", "16"), "frames is 16"),
        (
            ("--preset", "demo_t2v_base", "--prompt", "x", "--seed", "1.5"),
            "argument --seed: invalid int value: '1.5'. --help lists every flag.",
        ),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--guidance", "1", "2", "3"), "guidance is"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--shift", "nan"), "shift is nan"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--set", "cpu_ofload=true"), "Did you mean 'cpu_offload'"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--set", "cpu_offload"), "is not KEY=VALUE"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--seed", "1", "--set", "seed=2"), "given twice"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--steps", "1", "--set", "infer_steps=2"), "both set steps"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--set", "prompt=y"), "Use --prompt"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--set", "shift=NaN"), "shift is 'NaN'"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--image_path", "a.png"), "takes no image"),
        (("--preset", "demo_i2v_base", "--prompt", "x"), "needs image_path"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--save_result_path", "."), "exists"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--save_result_path", "a" * 300 + ".mp4"), "304 bytes long"),
        (("--preset", "t2v_base_cfg_ulysses", "--prompt", "x"), "torchrun --nproc_per_node=8"),
        (
            ("--preset", "demo_t2v_base", "--prompt", "x", "--promt", "y"),
            "unknown flag --promt. Did you mean --prompt?",
        ),
        (("--preset", "demo_i2v_base", "--prompt", "x", "--image"), "unknown flag --image. Did you mean --image_path?"),
        (("--prompt", "x", "--image_path"), "argument --image_path: expected one argument. --help lists every flag."),
        (
            ("--preset", "demo_t2v_base", "--prompt", "a", "cat"),
            "'cat' belongs to no flag. Put quotes around text with spaces",
        ),
        (("--preset", "demo_t2v_base", "--task", "v2v"), "argument --task: invalid choice: 'v2v' (choose from "),
        (
            ("--preset", "demo_t2v_base", "--target_shape", "3"),
            "argument --target_shape: expected 2 arguments. --help lists every flag.",
        ),
        (("--preset", "demo_t2v_base", "--verbose=2"), "argument --verbose: ignored explicit argument '2'."),
        (
            ("--preset", "demo_t2v_base", "--return_result_tensor=1"),
            "argument --return_result_tensor: ignored explicit argument '1'.",
        ),
        (("--preset", "demo_t2v_lora", "--prompt", "x"), "Did you mean 'demo_t2v_distill_lora'"),
        (("--preset", "demo_t2v_base", "--prompt", "x", "--card", "12"), "Add --dry_run"),
        (("--preset", "demo_t2v_base", "--dry_run", "--card", "nan"), "'nan' is no size from 1 to 10000"),
        (("--from", "none.mp4"), "There is no file"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, tuple) else "",
)
def test_bad_usage_ends_with_2_before_anything_is_loaded(
    infer: Infer, stage: Stage, flags: tuple[str, ...], message: str
) -> None:
    ended = infer(*flags)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.startswith("error: ") and "usage:" not in ended.err
    assert stage.config is None
    assert ended.out == ""


@pytest.mark.parametrize("wrong", ["--image_path", "--last_frame_path"])
@pytest.mark.parametrize("name", ["none.png", "text.png"])
def test_a_file_that_is_no_picture_is_refused_before_anything_is_loaded(
    infer: Infer, stage: Stage, wrong: str, name: str, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32)).save("a.png")
    Path("text.png").write_text("words")
    pictures = {"--image_path": "a.png", "--last_frame_path": "a.png"} | {wrong: name}
    flags = [part for pair in pictures.items() for part in pair]
    ended = infer("--preset", "demo_i2v_base", "--task", "flf2v", "--prompt", "x", *flags)
    assert ended.code == 2 and stage.config is None and not (tmp_path / "outputs").exists()
    assert (
        "There is no image file none.png" if name == "none.png" else "The file is a text. Only JPEG, PNG"
    ) in ended.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(OutOfMemory("Out of memory."), 1), (CheckpointError("No file."), 1), (Cancelled("Stopped."), 130)],
)
def test_a_run_that_fails_says_why_in_one_line_and_closes_the_engine(
    infer: Infer, stage: Stage, error: Exception, code: int
) -> None:
    stage.error = error
    ended = infer("--preset", "demo_t2v_base", "--prompt", "x")
    assert ended.code == code
    assert ended.out == ""
    assert stage.closed == 1
    assert ended.err.splitlines()[-1] == ("Stopped; no video was written." if code == 130 else f"error: {error}")


def test_verbose_shows_where(infer: Infer, stage: Stage) -> None:
    stage.error = CheckpointError("No file.")
    assert "Traceback (most recent call last)" in infer("--preset", "demo_t2v_base", "--prompt", "x", "--verbose").err


def test_the_world_must_fit_the_preset(infer: Infer, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert infer("--preset", "t2v_base_cfg_ulysses", "--prompt", "x").code == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "but 4 were started" in infer("--preset", "t2v_base_cfg_ulysses", "--prompt", "x", "--seed", "1").err


# ---- without running


def test_a_dry_run_prints_the_plan_and_loads_nothing(infer: Infer, stage: Stage, tmp_path: Path) -> None:
    ended = infer(
        "--preset", "i2v_distill_fp8_offload", "--prompt", "x", "--image_path", "a.png", "--seed", "-1", "--dry_run"
    )
    data = json.loads(ended.out)
    assert (ended.code, stage.config, list(tmp_path.iterdir())) == (0, None, [])
    assert data["preset"]["variant"] == "distill_fp8"
    assert data["engine"]["cpu_offload"] is True
    assert data["request"]["seed"] == -1 and data["request"]["prompt"] == "x"
    assert data["plan"]["tokens"] == 75_600
    assert data["plan"]["forwards"] == {"computed": 4, "skipped": 0}
    phase = {"steps": 2, "guidance": 1.0, "forwards_per_step": 1, "sampler": "euler"}
    assert data["plan"]["phases"] == [{"expert": expert, **phase} for expert in ("high", "low")]
    files = {file["name"]: file for file in data["plan"]["files"]}
    assert files["lightx2v/Encoders/models_t5_umt5-xxl-enc-fp8.pth"] == {
        "name": "lightx2v/Encoders/models_t5_umt5-xxl-enc-fp8.pth",
        "here": False,
        "hub": {"repo": "lightx2v/Encoders", "file": "models_t5_umt5-xxl-enc-fp8.pth"},
    }


@pytest.mark.parametrize(
    ("preset", "card", "fits", "stays"),
    [("i2v_distill_fp8", 6, False, False), ("i2v_base", 12, True, False), ("t2v_base", 80, True, True)],
)
def test_a_dry_run_says_whether_a_card_is_enough(infer: Infer, preset: str, card: int, fits: bool, stays: bool) -> None:
    memory = json.loads(infer("--preset", preset, "--dry_run", "--card", str(card)).out)["plan"]["memory"]
    assert memory["device"] == f"a card of {card} GB" and memory["free_gib"] == card - 1
    assert memory["device_peak_gib"] == max(memory["device_gib"].values())
    assert memory["fits"] == fits == (memory["device_peak_gib"] < card - 1)
    assert ("both experts stay on the device" in memory["plan"]) == stays
    waiting = 0 if stays else 33 if "fp8" in preset else 63
    assert memory["host_gib"] == pytest.approx(waiting, abs=1)


def test_without_a_card_a_dry_run_looks_at_this_machine(infer: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(machine: Machine, *flags: str) -> dict[str, Any]:
        monkeypatch.setattr("lightx2v.cost.machine.MachineReader.__call__", lambda self: machine)
        return json.loads(infer("--preset", "t2v_base", "--dry_run", *flags).out)["plan"]["memory"]

    plain = Machine(name="a laptop", cores=4, ram_free=16 << 30, ram_total=16 << 30)
    on_host = memory(plain)
    assert (on_host["device"], on_host["device_peak_gib"], on_host["fits"]) == ("a laptop", None, False)
    assert on_host["host_gib"] > 2 * 14.3e9 * 4 / 2**30, "both experts in float32"
    lazy = memory(plain, "--set", "lazy_load=true")
    assert lazy["host_gib"] < on_host["host_gib"] / 3 and "read as they are needed" in lazy["plan"]
    with_gpu = replace(plain, name="a card", ram_free=128 << 30, vram_free=23 << 30, vram_total=24 << 30)
    on_device = memory(with_gpu)
    assert (on_device["device"], on_device["free_gib"], on_device["fits"]) == ("a card", 23, True)
    assert 15 < on_device["device_peak_gib"] < 23 and on_device["host_gib"] == pytest.approx(63, abs=1)
    assert "on disk" in memory(replace(with_gpu, ram_free=16 << 30))["plan"]
    assert memory(with_gpu, "--set", "device=cpu") == on_host | {
        "device": "a card", "free_gib": 128, "fits": on_host["host_gib"] < 128,
    }  # fmt: skip


def test_a_dry_run_needs_no_prompt_and_no_gpus_and_finds_what_is_here(infer: Infer, tmp_path: Path) -> None:
    (tmp_path / "m" / "high_noise_model").mkdir(parents=True)
    ended = infer("--preset", "t2v_base_cfg_ulysses", "--model_path", str(tmp_path / "m"), "--dry_run")
    data = json.loads(ended.out)
    assert data["plan"]["processes"] == 8
    assert data["plan"]["forwards"] == {"computed": 80, "skipped": 0}
    assert [(phase["expert"], phase["steps"], phase["guidance"]) for phase in data["plan"]["phases"]] == [
        ("high", 26, 4.0), ("low", 14, 3.0),
    ]  # fmt: skip
    assert [file["here"] for file in data["plan"]["files"]] == [True, False, False, False, False]
    assert "prompt" not in data["request"]


def test_what_a_dry_run_prints_resolves_to_the_same(infer: Infer) -> None:
    data = json.loads(infer("--preset", "demo_t2v_fp8", "--dry_run", "--height", "128").out)
    engine = {key: value for key, value in data["engine"].items() if value is not None}
    Path("again.json").write_text(json.dumps(engine | data["request"]))
    again = json.loads(infer("--config_json", "again.json", "--dry_run").out)
    assert (again["engine"], again["request"]) == (data["engine"], data["request"])


def test_a_terminal_that_has_no_such_letters_is_no_reason_to_fail() -> None:
    command = [
        sys.executable,
        "-m",
        "lightx2v.infer",
        "--preset",
        "demo_t2v_distill_lora",
        "--prompt",
        "球",
        "--dry_run",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT, check=False)
    assert done.returncode == 0 and "\\u7403" in done.stdout and "Traceback" not in done.stderr, done.stderr


def test_the_presets_are_listed(infer: Infer) -> None:
    lines = infer("--list_presets").out.splitlines()
    assert lines[0].split()[0] == "demo_t2v_base"
    assert any(line.startswith("i2v_distill_fp8 ") for line in lines)


def test_the_help_is_readable(infer: Infer) -> None:
    ended = infer("--help")
    assert ended.code == 0
    assert "what it shows" in ended.out and "130 interrupted" in ended.out
    assert "return_result_tensor" not in ended.out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--preset", "demo_t2v_base", "--dry_run"), ("--list_presets",), ("--help",), ()])
def test_torch_is_not_imported_to_answer(flags: tuple[str, ...]) -> None:
    code = "import sys; from lightx2v.infer import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *flags], cwd=PROJECT, check=True, capture_output=True, timeout=60)


# ---- repeating a video


def recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, settings: dict[str, Any] | None = None
) -> None:
    assert stage.config is not None and stage.request is not None
    recorded = recorded_settings(str(stage.preset), stage.config, stage.request, None)
    monkeypatch.setattr("lightx2v.media.mp4.read_settings", lambda path: recorded if settings is None else settings)


def test_a_video_is_repeated_from_its_own_settings(
    infer: Infer, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--negative_prompt", " ", "--seed", "-1", "--sampler", "lcm")
    infer("--preset", "demo_t2v_distill_lora", "--prompt", "a ball", *flags)
    first = (stage.config, stage.request, stage.preset)
    assert stage.request is not None and stage.request.sampler == "lcm"
    recording(tmp_path, monkeypatch, stage)
    assert infer("--from", "first.mp4", "--save_result_path", "again.mp4").code == 0
    assert (stage.config, stage.request, stage.preset) == first


def test_a_repeated_video_may_differ_in_what_is_given(
    infer: Infer, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32)).save("a.png")
    infer("--preset", "demo_i2v_base", "--prompt", "a ball", "--image_path", "a.png")
    before = stage.request
    recording(tmp_path, monkeypatch, stage)
    assert infer("--from", "first.mp4", "--prompt", "a cube", "--seed", "9", "--steps", "5").code == 0
    assert before is not None and stage.request is not None
    changed = {key for key, value in stage.request.to_json().items() if value != before.to_json()[key]}
    assert changed == {"prompt", "seed", "steps"}


def test_a_repeated_videos_picture_is_found_or_asked_for(
    infer: Infer, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "other.png"):
        Image.new("RGB", (32, 32)).save(name)
    infer("--preset", "demo_i2v_base", "--prompt", "a ball", "--image_path", "a.png")
    recording(tmp_path, monkeypatch, stage)
    Path("kept").mkdir()
    Path("a.png").rename("kept/a.png")
    assert infer("--from", "kept/first.mp4", "--seed", "9").code == 0, "beside the video"
    assert stage.request is not None and stage.request.image_path == "kept/a.png"
    ended = infer("--from", "first.mp4", "--seed", "10")
    assert (ended.code, "picture a.png" in ended.err, "Give it with --image_path." in ended.err) == (2, True, True)
    assert infer("--from", "first.mp4", "--seed", "10", "--image_path", "other.png").code == 0
    assert stage.request.image_path == "other.png"
    Image.new("RGB", (32, 32), "red").save("a.png")
    assert "or its content has changed" in infer("--from", "first.mp4", "--seed", "10").err
    forged = {"engine": {}, "request": {"image_path": "\x1b[2J\n" * 1000}}
    recording(tmp_path, monkeypatch, stage, forged)
    ended = infer("--from", "first.mp4")
    assert (ended.code, "\x1b" in ended.err, len(ended.err.splitlines())) == (2, False, 1) and len(ended.err) < 300


@pytest.mark.parametrize("settings", [{}, {"engine": 1, "request": {}}, {"engine": {}, "request": {"x": 1}}])
def test_a_video_with_other_settings_is_refused(
    infer: Infer, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    infer("--preset", "demo_t2v_base", "--prompt", "a ball")
    recording(tmp_path, monkeypatch, stage, settings)
    assert infer("--from", "first.mp4", "--prompt", "x", "--save_result_path", "again.mp4").code == 2


# ---- ends

SLOW = """
import sys, time
from pathlib import Path
from lightx2v.infer import main

class Engine:
    def run(self, request, *, save_result_path, on_progress, cancel, metadata, force, steps):
        temporary = Path(str(save_result_path) + ".part")
        temporary.touch()
        try:
            print("running", flush=True)
            for _ in range(30_000):
                cancel.check()
                time.sleep(0.02)
        finally:
            temporary.unlink()
    def close(self):
        print("closed", flush=True)

def open_engine(config, **_):
    if sys.argv[1] == "load":
        print("loading", flush=True)
        time.sleep(600)
    if sys.argv[1] == "fault":
        raise TypeError("nobody foresaw\\x1b this")
    return Engine()

import lightx2v.infer
sys.excepthook = lightx2v.infer._unexpected
sys.exit(main(["--preset", "demo_t2v_base", "--prompt", "x", "--save_result_path", "v.mp4"], open_engine=open_engine))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["load", "run"])
def test_a_signal_ends_it_cleanly_and_soon(where: str, number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), where],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() in ("loading\n", "running\n")
        process.send_signal(number)
        started = time.monotonic()
        out, err = process.communicate(timeout=PATIENCE)  # left alone it would go on for ten minutes
    assert time.monotonic() - started < 5
    assert process.returncode == code
    assert out == ("closed\n" if where == "run" else "")
    assert err.splitlines()[-1] == "Stopped; no video was written."
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_nobody_foresaw_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SLOW), "fault"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "error: unexpected TypeError: nobody foresaw\\x1b this" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---- the whole way


@pytest.mark.slow
def test_a_real_video_is_made_and_repeated_from_its_file(tiny: TinyModels, tmp_path: Path) -> None:
    flags = ["--model_path", str(tiny.t2v), "--prompt", "a red ball", "--save_result_path", str(tmp_path / "a.mp4")]
    small = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--guidance", "1"]
    for file in filter(Path.is_file, tiny.t2v.rglob("*")):
        content_hash(file)  # a thread computes them else, and a video that is written before lacks them
    assert main([*flags, *small]) == 0
    assert main(["--from", str(tmp_path / "a.mp4"), "--save_result_path", str(tmp_path / "b.mp4")]) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
