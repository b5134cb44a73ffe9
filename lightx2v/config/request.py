"""Request: one video, with every setting that can change from one video to the next.

A Request is frozen and checks itself when it is created. An invalid value raises BadRequest, which names the nearest
valid one. `to_json` and `from_json` are exact inverses over plain JSON types.
"""

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from ..errors import BadRequest
from ..media.frame_times import frame_count
from ..media.framing import RESIZE_MODES
from .checks import Checks
from .lora_spec import LoraSpec
from .magcache_tables import MIN_CACHED_STEPS, tables_from
from .phases import MAX_GUIDANCE, MAX_STEPS, SAMPLERS, TRAIN_STEPS, Phase, Sampler, phases_from
from .prompt_cleaning import is_blank

check = Checks(BadRequest)

Task = Literal["t2v", "i2v", "flf2v"]
FeatureCaching = Literal["NoCaching", "Mag"]
Interpolation = Literal["rife", "ffmpeg"]

TASKS: tuple[Task, ...] = get_args(Task)
IMAGES: dict[Task, tuple[str, ...]] = {"t2v": (), "i2v": ("image_path",), "flf2v": ("image_path", "last_frame_path")}
"""The fields with the input images that a task needs."""
FEATURE_CACHING: tuple[FeatureCaching, ...] = get_args(FeatureCaching)
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
MAX_FPS = 120.0
MAX_INTERPOLATION = 8
"""A video has at most this many times the frames that the model made."""
OFFICIAL_BOUNDARY: dict[Task, float] = {"t2v": 0.875, "i2v": 0.9, "flf2v": 0.9}
"""Of the base models. The high-noise expert runs at timesteps of 1000 x boundary and above."""

LATENT_CHANNELS = 16
MIN_SIDE, MAX_SIDE = 32, 4096
MAX_FRAMES = 1001
MAX_TOKENS = 262_144
"""About 3.5 times the official largest video (1280x720, 81 frames: 75 600 tokens). A preset may set a lower ceiling."""
MAX_PROMPT = 10_000
MAX_SPEED_UP = 3.0
MAX_MOTION = 2.0
MAX_LORAS = 32
MAX_SEED = 2**32 - 1
"""Torch's CPU generator, which draws the noise, uses 32 bits: a larger seed would repeat the video of a smaller one."""

DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The official `sample_neg_prompt` of Wan2.2. It replaces an empty negative prompt while guidance is on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One video.

    `guidance` is (high-noise expert, low-noise expert); one number means both. With a `denoising_step_list`, `steps`
    becomes the length of the list and `boundary` None. Without a list, a `boundary` of None means the task's official
    one. `phases` (phases.py) replace `boundary` and `boundary_step_index`. A `sampler` of None means `solver`'s choice.
    For i2v and flf2v, height x width is an area and the image gives the shape, unless `resize_mode` says otherwise
    (framing.py).

    With `interpolated_fps` the written video has that rate and the same duration: `interpolation`, RIFE where it is
    None, makes the frames between.

    The rest is off by default and changes the result. With a `nag_scale` above 1 the negative prompt works without
    guidance too. With a `motion_amplitude` above 1 i2v moves more. A `feature_caching` of "Mag" skips forwards
    (magcache.py): None in its numbers means those of the authors, and a `speed_up` chooses them; 1 is exact.
    """

    task: Task = "t2v"
    prompt: str
    negative_prompt: str = ""
    image_path: str | None = None
    last_frame_path: str | None = None
    seed: int = 42
    height: int = 480
    width: int = 832
    frames: int = 81
    fps: float = 16.0
    steps: int = 40
    shift: float = 5.0
    guidance: tuple[float, float] = (4.0, 3.0)
    enable_cfg: bool = True
    boundary: float | None = None
    denoising_step_list: tuple[int, ...] | None = None
    boundary_step_index: int | None = None
    phases: tuple[Phase, ...] | None = None
    resize_mode: str | None = None
    sampler: Sampler | None = None
    nag_scale: float = 1.0
    nag_tau: float = 2.5
    nag_alpha: float = 0.25
    motion_amplitude: float = 1.0
    speed_up: float | None = None
    feature_caching: FeatureCaching = "NoCaching"
    magcache_thresh: float | None = None
    magcache_K: int | None = None
    magcache_retention_ratio: float | None = None
    magcache_ratios: tuple[tuple[float, ...], ...] | None = None
    interpolated_fps: float | None = None
    interpolation: Interpolation | None = None
    keep_original: bool = False
    loras: tuple[LoraSpec, ...] | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        check.one_of("task", self.task, TASKS)
        put("prompt", _text("prompt", self.prompt))
        put("negative_prompt", _text("negative_prompt", self.negative_prompt))
        if is_blank(self.prompt):
            what = "nothing visible is left of it after cleaning" if self.prompt.strip() else "it is empty"
            check.bad("prompt", self.prompt, f"a description of the video; {what}")
        put("image_path", _path("image_path", self.image_path))
        put("last_frame_path", _path("last_frame_path", self.last_frame_path))
        self._check_images()
        put("seed", check.whole("seed", self.seed, -1, MAX_SEED))
        put("height", check.whole("height", self.height, MIN_SIDE, MAX_SIDE, step=16))
        put("width", check.whole("width", self.width, MIN_SIDE, MAX_SIDE, step=16))
        put("frames", check.whole("frames", self.frames, 1, MAX_FRAMES, step=4))
        put("fps", check.real("fps", self.fps, 1.0, MAX_FPS))
        put("shift", check.real("shift", self.shift, 0.01, 100.0))
        put("guidance", _pair("guidance", self.guidance))
        put("enable_cfg", check.flag("enable_cfg", self.enable_cfg))
        self._check_schedule(put)
        check.one_of("resize_mode", self.resize_mode, (None, *RESIZE_MODES))
        check.one_of("sampler", self.sampler, (None, *SAMPLERS))
        for name, low, high in (("nag_scale", 1.0, 100.0), ("nag_tau", 0.0, 100.0), ("nag_alpha", 0.0, 1.0)):
            put(name, check.real(name, getattr(self, name), low, high))
        put("motion_amplitude", check.real("motion_amplitude", self.motion_amplitude, 1.0, MAX_MOTION))
        if self.motion_amplitude != 1 and self.task != "i2v":
            raise BadRequest(
                f"motion_amplitude is {self.motion_amplitude:g}, which is for task i2v; the task is {self.task}. Leave "
                "it out, or give a first frame only."
            )
        self._check_caching(put)
        self._check_interpolation(put)
        put("loras", _loras(self.loras))
        self.check_strengths(self.loras or ())
        if self.tokens > MAX_TOKENS:
            self.check_tokens(MAX_TOKENS)

    def _check_images(self) -> None:
        if self.task == "t2v" and (self.image_path or self.last_frame_path):
            raise BadRequest("Task t2v takes no image. Use task i2v for a first image, or leave the image out.")
        for name, use in (("image_path", "starts from"), ("last_frame_path", "ends with")):
            if name in IMAGES[self.task] and not getattr(self, name):
                raise BadRequest(f"Task {self.task} needs {name}: the picture that the video {use}.")
        if self.task == "i2v" and self.last_frame_path:
            raise BadRequest("Task i2v takes no last_frame_path. Use task flf2v, or leave last_frame_path out.")

    def _check_schedule(self, put: Any) -> None:
        put("phases", phases_from(self.phases))
        if self.denoising_step_list is None:
            put("steps", check.whole("steps", self.steps, 1, MAX_STEPS))
            if self.boundary_step_index is not None:
                check.bad("boundary_step_index", self.boundary_step_index, "null without a denoising_step_list")
        else:
            steps = check_step_list(self.denoising_step_list)
            put("denoising_step_list", steps)
            put("steps", len(steps))
        if self.phases is not None:
            self._check_phases(self.phases)
        elif self.denoising_step_list is None:
            boundary = OFFICIAL_BOUNDARY[self.task] if self.boundary is None else self.boundary
            put("boundary", check.real("boundary", boundary, 0.0, 1.0))
        else:
            put("boundary", None)
            index, last = self.boundary_step_index, self.steps - 1
            if index is None:
                expected = f"the step, 0 to {last}, at which the low-noise expert takes over"
                check.bad("boundary_step_index", index, expected)
            put("boundary_step_index", check.whole("boundary_step_index", index, 0, last))

    def _check_phases(self, phases: Sequence[Phase]) -> None:
        for name in ("boundary", "boundary_step_index"):
            if getattr(self, name) is not None:
                check.bad(name, getattr(self, name), "null beside phases, which say where each expert begins")
        late = next((phase.from_step for phase in phases if (phase.from_step or 0) >= self.steps), None)
        if late is not None:
            raise BadRequest(
                f"phases: a phase begins at step {late}, counted from 0, but there are {self.steps} steps. Make more "
                "steps, or let it begin earlier."
            )

    def check_strengths(self, loras: Sequence[LoraSpec]) -> None:
        """Raise BadRequest if one of these LoRAs has strengths for another number of phases."""
        phases = len(self.timeline)
        for lora in loras:
            if isinstance(lora.strength, tuple) and len(lora.strength) != phases:
                check.bad("LoRA strength", list(lora.strength), f"one number, or one for each of the {phases} phases")

    def _check_caching(self, put: Any) -> None:
        check.one_of("feature_caching", self.feature_caching, FEATURE_CACHING)
        if self.magcache_thresh is not None:
            put("magcache_thresh", check.real("magcache_thresh", self.magcache_thresh, 0.0, 10.0))
        if self.magcache_K is not None:
            put("magcache_K", check.whole("magcache_K", self.magcache_K, 0, MAX_STEPS))
        if self.magcache_retention_ratio is not None:
            retention = check.real("magcache_retention_ratio", self.magcache_retention_ratio, 0.0, 1.0)
            put("magcache_retention_ratio", retention)
        put("magcache_ratios", tables_from(self.magcache_ratios))
        name, value = "feature_caching", '"Mag"'
        if self.speed_up is not None:
            speed_up = check.real("speed_up", self.speed_up, 1.0, MAX_SPEED_UP)
            name, value = "speed_up", f"{speed_up:g}"
            put("feature_caching", "NoCaching" if speed_up == 1 else "Mag")
            put("speed_up", None if speed_up == 1 else speed_up)
            for number in ("magcache_thresh", "magcache_K", "magcache_retention_ratio"):
                put(number, None)
        if self.feature_caching != "Mag":
            return
        if self.distilled or self.steps < MIN_CACHED_STEPS:
            raise BadRequest(
                f"{name} is {value}, but {'a distilled model makes' if self.distilled else 'the video has'} "
                f"{self.steps} steps, which differ too much from each other to skip any. Leave {name} out, or take a "
                f"base model with {MIN_CACHED_STEPS} steps or more."
            )

    def _check_interpolation(self, put: Any) -> None:
        check.one_of("interpolation", self.interpolation, (None, *INTERPOLATIONS))
        put("keep_original", check.flag("keep_original", self.keep_original))
        if self.interpolated_fps is None:
            return
        rate = check.real("interpolated_fps", self.interpolated_fps, 1.0, MAX_FPS)
        if not self.fps < rate <= MAX_INTERPOLATION * self.fps:
            check.bad(
                "interpolated_fps",
                rate,
                f"more than fps, which is {self.fps:g}, and at most {MAX_INTERPOLATION} times it; or null for no "
                "interpolation",
            )
        put("interpolated_fps", rate)

    def check_tokens(self, ceiling: int) -> None:
        """Raise BadRequest if the video has more than `ceiling` tokens. The error names frames or an area that fit."""
        if self.tokens <= ceiling:
            return
        per_frame = self.area // 256
        latent_frames = ceiling // per_frame
        fit = f"{4 * latent_frames - 3} frames at this size" if latent_frames else ""
        side = max(MIN_SIDE, int(math.sqrt(ceiling / self.latent_shape[1])) * 16)
        fit = " or ".join(filter(None, [fit, f"{side}x{side} at this length"]))
        raise BadRequest(
            f"{self.width}x{self.height} with {self.frames} frames is {self.tokens} tokens; the limit is {ceiling}. "
            f"Nearest: {fit}."
        )

    @property
    def distilled(self) -> bool:
        """Whether the steps come from the step list of a distilled model."""
        return self.denoising_step_list is not None

    @property
    def solver(self) -> Sampler:
        """The sampler that runs. LightX2V's files name none: UniPC for a base model, Euler with a step list."""
        return self.sampler or ("euler" if self.distilled else "unipc")

    @property
    def interpolator(self) -> Interpolation | None:
        """What makes the frames between those of the model; None where the video is written as it is."""
        return None if self.interpolated_fps is None else self.interpolation or "rife"

    @property
    def keeps_original(self) -> bool:
        """Whether the video without interpolation is written too."""
        return self.keep_original and self.interpolator is not None

    @property
    def video_fps(self) -> float:
        """The rate of the written video."""
        return self.fps if self.interpolated_fps is None else self.interpolated_fps

    @property
    def video_frames(self) -> int:
        """The frames of the written video."""
        return frame_count(self.frames, self.fps, self.video_fps)

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) at height x width. An input image may give another h, w of the same area."""
        return LATENT_CHANNELS, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """Patches of 1 x 2 x 2 latents: the length of the experts' sequence."""
        _, t, h, w = self.latent_shape
        return t * (h // 2) * (w // 2)

    @property
    def seconds(self) -> float:
        """The playing time of the video."""
        return self.frames / self.fps

    @property
    def timeline(self) -> tuple[Phase, ...]:
        """Who denoises when: `phases`, or the two that the boundary means. Guidance and sampler are filled in."""
        if self.boundary_step_index is not None:
            low = Phase(expert="low", from_step=self.boundary_step_index)
        else:
            low = Phase(expert="low", below_timestep=None if self.boundary is None else self.boundary * TRAIN_STEPS)
        scales = dict(zip(("high", "low"), self.guidance, strict=True))
        filled = []
        for phase in self.phases or (Phase(expert="high"), low):
            scale = scales[phase.expert] if phase.guidance is None else phase.guidance
            scale = scale if self.enable_cfg else 1.0
            filled.append(replace(phase, guidance=scale, sampler=phase.sampler or self.solver))
        return tuple(filled)

    @property
    def guided(self) -> tuple[bool, bool]:
        """Whether the (high, low) expert needs an unconditional forward too, in any of its phases."""
        guided = {phase.expert for phase in self.timeline if phase.guided}
        return "high" in guided, "low" in guided

    @property
    def nag(self) -> bool:
        """Whether the phases without guidance avoid the negative prompt inside of their attention."""
        on = self.nag_scale > 1 and self.nag_alpha > 0
        return on and not all(phase.guided for phase in self.timeline)

    @property
    def negative_text(self) -> str | None:
        """The negative prompt to encode: None without guidance and NAG, the default for "", an empty text for " "."""
        if not (any(self.guided) or self.nag):
            return None
        return self.negative_prompt.strip() if self.negative_prompt else DEFAULT_NEGATIVE_PROMPT

    @property
    def texts(self) -> dict[str, str]:
        """What the text encoder encodes, by the fields' names."""
        negative = self.negative_text
        return {"prompt": self.prompt} | ({} if negative is None else {"negative_prompt": negative})

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON types. `from_json` returns an equal Request."""
        data: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("loras", "phases") and value is not None:
                value = [item.to_json() for item in value]
            if field.name == "magcache_ratios" and value is not None:
                value = [list(table) for table in value]
            data[field.name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """A Request from an object with the names of its fields. An unknown key is an error."""
        check.known_keys(data, [field.name for field in fields(cls)], "request")
        if "prompt" not in data:
            raise BadRequest("The request has no prompt. Describe the video in the field prompt.")
        return cls(**data)


def check_step_list(value: Any) -> tuple[int, ...]:
    """The timesteps of a distilled model: whole numbers from 1000 down to 1, strictly falling."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not 1 <= len(value) <= MAX_STEPS:
        check.bad("denoising_step_list", value, f"a list of 1 to {MAX_STEPS} timesteps such as [1000, 750, 500, 250]")
    steps = tuple(check.whole("denoising_step_list", step, 1, 1000) for step in value)
    for before, after in zip(steps, steps[1:], strict=False):
        if after >= before:
            check.bad(
                "denoising_step_list", list(steps), "strictly decreasing", nearest=sorted(set(steps), reverse=True)
            )
    return steps


def clean_text(text: str) -> str:
    """`text` without NUL and lone surrogates. A surrogate pair of two characters becomes one character."""
    if text.isascii():
        return text.replace("\0", "")
    return text.replace("\0", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        check.bad(name, value, "text")
    if len(value) > MAX_PROMPT:
        raise BadRequest(
            f"{name} has {len(value)} characters; the limit is {MAX_PROMPT}. (The model reads about 512 tokens.)"
        )
    return clean_text(value)


def _path(name: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not value.strip() or not _names_a_file(value):
        check.bad(name, value, "the path of a picture, such as a JPEG, PNG or WebP file")
    return value


def _names_a_file(path: str) -> bool:
    """Whether a file can have this name: the system's calls raise on NUL and on half a character."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _pair(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, (int, float)):
        value = (value, value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        check.bad(name, value, "one number, or two: [high-noise expert, low-noise expert]")
    high, low = (check.real(name, scale, -MAX_GUIDANCE, MAX_GUIDANCE) for scale in value)
    return high, low


def _loras(value: Any) -> tuple[LoraSpec, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or len(value) > MAX_LORAS:
        check.bad("loras", value, f"null or a list of at most {MAX_LORAS} LoRAs")
    return tuple(lora if isinstance(lora, LoraSpec) else LoraSpec.from_json(lora) for lora in value)


def draw_seed() -> int:
    """A random seed for a request without one: 0 .. 2**32 - 1, short enough to read out and type."""
    return secrets.randbits(32)
