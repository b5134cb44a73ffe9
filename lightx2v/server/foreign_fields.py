"""Fields that the clients of OpenAI, SGLang, vLLM-Omni and FastVideo send and that this server has no setting for.

Those of IGNORED change no pixel here: they are taken, and the answer says so. Those of UNCHANGED would change the
video, so they are taken only while they ask for the video that is made anyway. Other unknown fields are refused.
"""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, create_model

Body = TypeVar("Body", bound=BaseModel)

IGNORED = (
    # who asks, and what for; the task follows from the images
    *("user", "user_id", "metadata", "safety_identifier", "request_id", "task", "task_type", "extra_params"),
    # how and where another server stores or returns its file
    *("quality", "output_quality", "output_compression", "output_format", "output_path", "response_format"),
    *("save_output", "return_frames", "return_file_paths_only"),
    # the device of the noise, which is drawn on the CPU here
    "generator_device",
    # details of what UNCHANGED keeps off
    *("frame_interpolation_exp", "frame_interpolation_scale", "frame_interpolation_model_path"),
    *("upscaling_model_path", "upscaling_scale", "sound_duration"),
    # measurements
    *("perf_dump_path", "profile", "num_profiled_timesteps", "profile_all_stages"),
)
IGNORED_TASK = ("video_duration", "sr_ratio", "reuse")
"""The same of LightX2V's other models, in its own body."""
UNCHANGED: dict[str, Any] = {
    "n": 1,
    "num_outputs_per_prompt": 1,
    "max_sequence_length": 512,
    "stream": False,
    "generate_sound": False,
    "enable_teacache": False,
    "enable_frame_interpolation": False,
    "enable_upscaling": False,
}
"""{field: the only value that is taken}."""
INSTEAD = {"enable_frame_interpolation": " For more frames per second send interpolated_fps."}
"""What this server offers in place of another value."""


def with_foreign_fields(body: type[Body]) -> type[Body]:
    """A class decorator that adds the fields above which `body` has no field of its own for."""
    fields: Any = {name: (Any, Field(None, description="Of other servers; without effect.")) for name in IGNORED}
    for name, value in UNCHANGED.items():
        only: Any = Annotated[
            type(value), AfterValidator(_only(value, INSTEAD.get(name, ""))), Field(json_schema_extra={"const": value})
        ]
        fields[name] = (only | None, Field(None, description="Of other servers; only as it is here."))
    own = {name: field for name, field in fields.items() if name not in body.model_fields}
    return create_model(body.__name__, __base__=body, __doc__=body.__doc__, __module__=body.__module__, **own)


def ignored(body: BaseModel) -> list[str]:
    """A warning that names the fields of `body` that have no effect; [] without any."""
    names = [name for name in (*IGNORED, *IGNORED_TASK) if getattr(body, name, None) is not None]
    return [f"Fields that this server has no use for and ignores: {', '.join(names)}."] if names else []


def _only(allowed: Any, instead: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value != allowed:
            word = str(allowed).lower() if isinstance(allowed, bool) else allowed
            raise ValueError(
                f"this server can only do {word}. Send {word}, or leave the field out.{instead}".rstrip(".")
            )
        return value

    return check
