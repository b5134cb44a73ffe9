"""One table of a video's settings, from which every front end is made.

The keys of `Shown` and `RequestSettings` are fields of Request; each annotation holds the field's type and its row.
The flags of the command line, both HTTP bodies, the Python and gradio APIs, the controls of the page and the names in
preset files come from them. A new setting is written in three files: `request.py` (the field and its check), here, and
`assets/strings.json` (its label).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

from ..media.framing import RESIZE_MODES
from .magcache_tables import MIN_CACHED_STEPS
from .request import FEATURE_CACHING, INTERPOLATIONS, SAMPLERS

Guidance = float | Sequence[float]
"""One number for both experts, or (high-noise expert, low-noise expert)."""
StepList = Sequence[int]
PhaseList = Sequence[Mapping[str, Any]]
"""As JSON writes the phases; phases.py has their keys."""
Tables = Sequence[Sequence[float]]
"""One list of numbers for both branches of guidance, or one for each."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How people write one field of Request. The field's annotation gives `name` and `type`."""

    metavar: str
    help: str
    """One line, for --help and for the documentation of the HTTP API."""
    video: str = ""
    """Its name in POST /v1/videos (that of OpenAI, vLLM-Omni and diffusers); "" if that body has no such field."""
    task: str = ""
    """Its name in LightX2V's JSON and task bodies; "" if those have no such field."""
    also: tuple[str, ...] = ()
    """More names in preset files."""
    flag: bool = True
    """Whether the command line has a flag of the field's name. Without one, it takes --set."""
    choices: tuple[str, ...] = ()
    """The values of a text; None is one too."""
    schedule: Literal["", "shift", "list"] = ""
    """The schedule that uses it: the shifted one of a base model, or the step list of a distilled one."""
    step: float | None = None
    """How far one arrow press moves the page's number field."""
    name: str = ""
    type: Any = None

    @property
    def aliases(self) -> list[str]:
        """Every name except the field's own."""
        return [word for word in dict.fromkeys((self.video, self.task, *self.also)) if word not in ("", self.name)]

    @property
    def usage(self) -> str:
        """How the command line writes it."""
        return f"--{self.name}" if self.flag else f"--set {self.name}"


# fmt: off
class Shown(TypedDict, total=False):
    """What one video shows. No preset has any of these."""

    prompt: Annotated[str, Setting("TEXT", "what happens in the video")]
    negative_prompt: Annotated[str, Setting("TEXT", 'what to avoid; "" is the model\'s default, " " is nothing')]
    image_path: Annotated[str, Setting("IMAGE", "first frame, for i2v and flf2v", video="input_reference")]
    last_frame_path: Annotated[str, Setting("IMAGE", "last frame, for flf2v", video="last_frame_reference")]


class RequestSettings(TypedDict, total=False):
    """How one video is made: every setting that a preset may hold and a request may change."""

    seed: Annotated[int, Setting("N", "-1 draws one", video="seed", task="seed")]
    height: Annotated[int, Setting(
        "PIXELS", "a multiple of 16; with an image, height x width is an area",
        video="height", also=("target_height",), step=16)]
    width: Annotated[int, Setting("PIXELS", "a multiple of 16", video="width", also=("target_width",), step=16)]
    frames: Annotated[int, Setting("N", "4n + 1", video="num_frames", task="target_video_length", step=4)]
    fps: Annotated[float, Setting("N", "frames per second of the file", video="fps", task="target_fps")]
    steps: Annotated[int, Setting(
        "N", "denoising steps of a base model; a distilled model has its step list",
        video="num_inference_steps", task="infer_steps", schedule="shift")]
    shift: Annotated[float, Setting(
        "X", "shift of the noise levels; a larger one spends more steps on high noise",
        video="flow_shift", task="sample_shift", step=0.5)]
    guidance: Annotated[Guidance, Setting(
        "X", "one number for both experts, or two: high-noise, low-noise",
        video="guidance_scale", task="sample_guide_scale", step=0.5)]
    enable_cfg: Annotated[bool, Setting(
        "", "guidance, at twice the time", video="enable_cfg", task="enable_cfg")]
    boundary: Annotated[float, Setting(
        "X", "noise level, from 0 to 1, below which the low-noise expert works",
        video="boundary_ratio", schedule="shift", step=0.025)]
    denoising_step_list: Annotated[StepList, Setting(
        "N", "timesteps of a distilled model, falling from 1000",
        video="denoising_step_list", schedule="list", flag=False)]
    boundary_step_index: Annotated[int, Setting(
        "N", "step of the list, counted from 0, at which the low-noise expert takes over",
        video="boundary_step_index", schedule="list", flag=False)]
    phases: Annotated[PhaseList, Setting(
        "JSON", 'who denoises when, in place of the boundary: a list such as [{"expert": "high", "guidance": 3.5}, '
        '{"expert": "low", "below_timestep": 875, "guidance": 1}]; also from_step and sampler',
        video="phases", flag=False)]
    resize_mode: Annotated[str, Setting(
        "MODE", f"how an image is fitted: {', '.join(RESIZE_MODES)}",
        video="resize_mode", task="resize_mode", choices=RESIZE_MODES)]
    sampler: Annotated[str, Setting(
        "NAME", f"solver: {', '.join(SAMPLERS)}; by default unipc, and euler with a step list",
        video="sampler", task="sampler", choices=SAMPLERS)]
    nag_scale: Annotated[float, Setting(
        "X", "NAG: how far to leave the negative prompt where guidance is off; 1 is off, 11 is usual",
        video="nag_scale", task="nag_scale")]
    nag_tau: Annotated[float, Setting(
        "X", "NAG: how much larger than without it the attention may become", video="nag_tau", task="nag_tau",
        step=0.5)]
    nag_alpha: Annotated[float, Setting(
        "X", "NAG: its share in the attention, from 0 to 1", video="nag_alpha", task="nag_alpha", step=0.05)]
    motion_amplitude: Annotated[float, Setting(
        "X", "for i2v, from 1 to 2: more motion, e.g. 1.15 for 4 steps; 1 is off",
        video="motion_amplitude", task="motion_amplitude", step=0.05)]
    speed_up: Annotated[float, Setting(
        "X", f"how many times fewer forwards, e.g. 1.5; 1 is exact; base models with {MIN_CACHED_STEPS} steps or more",
        video="speed_up", task="speed_up", schedule="shift", step=0.5)]
    feature_caching: Annotated[str, Setting(
        "NAME", "NoCaching, or Mag to skip forwards by MagCache's rule",
        video="feature_caching", task="feature_caching", choices=FEATURE_CACHING, schedule="shift")]
    magcache_thresh: Annotated[float, Setting(
        "X", "error at which Mag computes again; by default the authors' 0.06",
        video="magcache_thresh", task="magcache_thresh", schedule="shift")]
    magcache_K: Annotated[int, Setting(
        "N", "most forwards in a row that Mag skips; by default the authors' 2",
        video="magcache_K", task="magcache_K", schedule="shift")]
    magcache_retention_ratio: Annotated[float, Setting(
        "X", "first part of each expert's steps in which Mag skips none; by default 0.4 for T2V, 0.1 for I2V",
        video="magcache_retention_ratio", task="magcache_retention_ratio", schedule="shift")]
    magcache_ratios: Annotated[Tables, Setting(
        "TABLE", "table of another model, from python -m lightx2v.calibrate", schedule="shift", flag=False)]
    interpolated_fps: Annotated[float, Setting(
        "N", "frames per second of the file after interpolation, such as 24, 30, 32, 48 or 60; the duration stays",
        video="interpolated_fps", task="interpolated_fps")]
    interpolation: Annotated[str, Setting(
        "NAME", "what makes the frames between: rife, a network (22 MB), or ffmpeg's own motion interpolation",
        video="interpolation", task="interpolation", choices=INTERPOLATIONS)]
    keep_original: Annotated[bool, Setting(
        "", "keep the video without interpolation too, as NAME.original.mp4",
        video="keep_original", task="keep_original")]
# fmt: on


def _rows(table: type) -> dict[str, Setting]:
    hints = {name: get_args(hint) for name, hint in get_type_hints(table, include_extras=True).items()}
    return {name: replace(row, name=name, type=kind) for name, (kind, row) in hints.items()}


SHOWN = _rows(Shown)
SETTINGS = _rows(RequestSettings)
"""{field of Request: its row}."""
