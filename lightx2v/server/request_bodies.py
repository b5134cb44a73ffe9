"""The request bodies of both APIs (/v1/videos and LightX2V's tasks), and their readers for JSON and forms.

This file reads the bodies instead of FastAPI because a route accepts both content types, because JSON may be nested
deeper than Python can recurse, and because an error must not repeat the client's values.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest

from ..config.request import MAX_PROMPT, MAX_STEPS, MAX_STRENGTH
from ..config.request_settings import SETTINGS, Guidance, StepList
from ..errors import BadRequest
from ..media.images import MAX_BYTES
from .service import VideoRequest

Body = TypeVar("Body", bound=BaseModel)
Text = Annotated[str, Field(max_length=MAX_PROMPT)]
Picture = Annotated[str, Field(max_length=2 * MAX_BYTES)]
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
TYPES: dict[Any, Any] = {
    int: int,
    float: float,
    bool: bool,
    str: Annotated[str, Field(max_length=40)],
    Guidance: float | Annotated[list[float], Field(min_length=2, max_length=2)],
    StepList: Annotated[list[int], Field(min_length=1, max_length=MAX_STEPS)],
}
"""The JSON type of a setting. Its range is checked later, by Request, whose error names the nearest valid value."""
NAMES = {api: {name: row for row in SETTINGS.values() if (name := getattr(row, api))} for api in ("video", "task")}
"""API -> name of the field in its body -> setting."""
LISTS = {name for rows in NAMES.values() for name, row in rows.items() if row.type in (Guidance, StepList)}
LISTS |= {"loras", "target_shape"}
MAX_COMMAS = 3 * MAX_PROMPT
"""Commas in a JSON body: enough for two prompts. Parsing sixty megabytes of commas would block the server for
seconds."""
FILES = ("input_reference", "last_frame_reference", "image_file", "last_frame_file")


def with_settings(api: Literal["video", "task"]) -> Callable[[type[Body]], type[Body]]:
    """A class decorator that adds a field for every setting that the API has."""
    fields: Any = {
        name: (TYPES[row.type] | None, Field(None, description=row.help)) for name, row in NAMES[api].items()
    }
    return lambda body: create_model(
        body.__name__, __base__=body, __doc__=body.__doc__, __module__=body.__module__, **fields
    )


def _settings(body: BaseModel, api: Literal["video", "task"]) -> dict[str, Any]:
    """The settings in `body` under the client's names. `config.resolve` knows them, so its errors use them too."""
    return {name: value for name in NAMES[api] if (value := getattr(body, name)) is not None}


class UnsupportedType(BadRequest):
    """A body that is neither JSON nor a form."""

    status = 415


class LoraBody(BaseModel):
    """A file in the server's LoRA folder, added to the LoRAs of the preset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: Annotated[str, Field(min_length=1, max_length=255, description="The file's name.")]
    name: Literal["high_noise_model", "low_noise_model"] | None = Field(
        None,
        description="The expert that it is for. Without one the file's name decides: high_noise, low_noise, or both.",
    )
    strength: Strength = 1.0


@with_settings("video")
class VideoBody(BaseModel):
    """One video. What is not given is the preset's. In a form every value is text, lists as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    negative_prompt: Text = Field("", description='Empty for the model\'s own, " " for none.')
    model: Annotated[str, Field(max_length=200)] | None = Field(None, description="A preset, see GET /v1/models.")
    input_reference: Picture | None = Field(
        None, description="The first frame: an https URL, a data URL or base64. In a form: a file."
    )
    last_frame_reference: Picture | None = Field(None, description="The last frame, in the same ways.")
    size: Annotated[str, Field(pattern=r"^\d{2,4}x\d{2,4}$")] | None = Field(None, description="WIDTHxHEIGHT.")
    seconds: Annotated[float, Field(gt=0, le=600, strict=False)] | None = Field(
        None, description="The length, as a number or (OpenAI's clients) as text; the nearest 4n + 1 frames are made."
    )
    guidance_scale_2: float | None = Field(None, description="For the low-noise expert.")
    loras: Annotated[list[LoraBody], Field(max_length=8)] | None = None
    client_id: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Your own id. The same body with the same id again gives the same job."
    )
    file_name: Annotated[str, Field(max_length=200)] | None = Field(None, description="What the video is called.")

    def video_request(self, files: dict[str, bytes]) -> VideoRequest:
        settings = _settings(self, "video")
        if self.size is not None:
            if "height" in settings or "width" in settings:
                raise BadRequest("The body sets the size twice: as size, and as height or width. Keep one of them.")
            width, _, height = self.size.partition("x")
            settings |= {"width": int(width), "height": int(height)}
        if self.guidance_scale_2 is not None:
            if not isinstance(settings.get("guidance_scale"), float):
                raise BadRequest(
                    "guidance_scale_2 is for the low-noise expert, so guidance_scale must be one number beside it."
                )
            settings["guidance_scale"] = [settings["guidance_scale"], self.guidance_scale_2]
        return VideoRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            preset=self.model or "",
            image=files.get("input_reference", self.input_reference),
            last_frame=files.get("last_frame_reference", self.last_frame_reference),
            seconds=self.seconds,
            settings=settings,
            loras=[lora.model_dump(exclude_none=True) for lora in self.loras or ()],
            client_id=self.client_id or None,
            name=self.file_name or "",
        )


@with_settings("task")
class TaskBody(BaseModel):
    """One video in LightX2V's words. Fields of its other models are taken only while they ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    negative_prompt: Text = ""
    task_id: Annotated[str, Field(max_length=200)] | None = Field(None, description="Your own id, else one is made.")
    image_path: Picture = Field("", description="The first frame: a URL, a data URL or base64; a name in --input_dir.")
    last_frame_path: Picture = ""
    save_result_path: Annotated[str, Field(max_length=200)] = Field(
        "", description="What the video is called: a file's name, never a path."
    )
    target_shape: Annotated[list[int], Field(max_length=2)] = Field(default=[], description="[height, width]")
    lora_name: Annotated[str, Field(max_length=255)] | None = None
    lora_strength: Strength = 1.0
    image_mask_path: Literal[""] | None = None
    audio_path: Literal[""] | None = None
    video_path: Literal[""] | None = None
    presigned_url: Literal[""] | None = None
    talk_objects: Annotated[list[Any], Field(max_length=0)] | None = None
    num_fragments: Literal[1] | None = None
    use_prompt_enhancer: Literal[False] | None = None
    video_duration: float | None = Field(None, description="Of audio models; without effect.")
    sr_ratio: float | None = Field(None, description="Of other models; without effect.")
    reuse: bool | None = Field(None, description="Without effect.")

    def video_request(self, files: dict[str, bytes]) -> VideoRequest:
        settings = _settings(self, "task")
        if self.target_shape:
            settings["target_shape"] = self.target_shape
        return VideoRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            image=files.get("image_file", self.image_path),
            last_frame=files.get("last_frame_file", self.last_frame_path),
            settings=settings,
            loras=[{"path": self.lora_name, "strength": self.lora_strength}] if self.lora_name else (),
            client_id=self.task_id or None,
            name=self.save_result_path,
        )


async def read_body(request: HttpRequest, kind: type[Body]) -> tuple[Body, dict[str, bytes]]:
    """The body of a request, from JSON or a form, and the files that came with the form."""
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content == "application/json":
        return _validated(kind, _parsed(await request.body())), {}
    if content != "multipart/form-data":
        raise UnsupportedType("The body must be JSON (Content-Type: application/json) or multipart/form-data.")
    values: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=2, max_fields=50, max_part_size=2 * MAX_BYTES) as form:
        for name, value in form.multi_items():
            if name in values or name in files:
                raise BadRequest(f"The form has {name[:40]!r} twice.")
            if isinstance(value, UploadFile) and name in FILES:
                if data := await value.read(MAX_BYTES + 1):  # a browser sends an empty file where none was chosen
                    files[name] = data
            elif isinstance(value, str):
                values[name] = _from_text(kind, name, value)
            else:
                raise BadRequest(f"The form has a file {name[:40]!r}; files are {', '.join(FILES)}.")
    return _validated(kind, {name: value for name, value in values.items() if value is not None}, form=True), files


def _from_text(kind: type[BaseModel], name: str, text: str) -> Any:
    """A value of a form. Numbers stay text, lists are JSON, and an empty value means none, except for prompts."""
    if not text and name not in ("prompt", "negative_prompt"):
        return None
    if text[:1] == "[" and name in LISTS:
        return _parsed(text.encode())
    return text


def _parsed(raw: bytes) -> Any:
    if raw.count(b",") > MAX_COMMAS:
        raise BadRequest("The body holds more values than any video has settings.")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON, or nested too deeply.") from None


def _validated(kind: type[Body], data: Any, *, form: bool = False) -> Body:
    """In a form all is text; JSON has types of its own, and there "7" is no number and true not 1."""
    try:
        return kind.model_validate(data, strict=False if form else None)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"]) or "the body"
        raise BadRequest(f"{where}: {first['msg'][:200]}.") from None
