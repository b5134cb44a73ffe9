"""The request bodies of both APIs (/v1/videos and LightX2V's tasks), and their readers for JSON and forms.

This file reads the bodies instead of FastAPI because a route accepts both content types, because JSON may be nested
deeper than Python can recurse, and because an error must not repeat the client's values.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_validator,
)
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest

from ..config.checks import did_you_mean
from ..config.lora_spec import MAX_STRENGTH
from ..config.phases import MAX_PHASES
from ..config.request import MAX_PROMPT, MAX_STEPS
from ..config.request_settings import SETTINGS, Guidance, PhaseList, StepList
from ..errors import BadRequest, quoted
from ..media.images import MAX_BYTES
from .foreign_fields import IGNORED, UNCHANGED, with_foreign_fields
from .service import VideoRequest

Body = TypeVar("Body", bound=BaseModel)
Text = Annotated[str, Field(max_length=MAX_PROMPT)]
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
TYPES: dict[Any, Any] = {
    int: int,
    float: float,
    bool: bool,
    str: Annotated[str, Field(max_length=40)],
    Guidance: float | Annotated[list[float], Field(min_length=2, max_length=2)],
    StepList: Annotated[list[int], Field(min_length=1, max_length=MAX_STEPS)],
    PhaseList: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_PHASES)],
}
"""The JSON type of a setting. Its range is checked later, by Request, whose error names the nearest valid value."""
NAMES = {api: {name: row for row in SETTINGS.values() if (name := getattr(row, api))} for api in ("video", "task")}
"""API -> name of the field in its body -> setting."""
LISTS = {name for rows in NAMES.values() for name, row in rows.items() if row.type in (Guidance, StepList, PhaseList)}
LISTS |= {"loras", "target_shape"}
BLOCKS = ("video_params", "extra_body")
"""Objects of other servers whose fields are those of the body."""
OBJECTS = (*BLOCKS, "input_reference", "image_reference", "last_frame_reference")
"""Fields that may be JSON objects. A form holds them as text, or as OpenAI's clients write it, in `name[key]`."""
_FORM_NAME = re.compile(r"([^\[\]]*)((?:\[[^\[\]]*\]){0,3})")
MAX_COMMAS = 3 * MAX_PROMPT
"""Commas in a JSON body: enough for two prompts. Parsing sixty megabytes of commas would block the server for
seconds."""
EXPECTED = {
    "model_type": 'expected a JSON object, such as {"prompt": "A cat surfs."}',
    "string_pattern_mismatch": "expected WIDTHxHEIGHT, such as 832x480",  # only a size has a pattern
}
"""Messages for errors that pydantic names in its own words."""
FILES = ("input_reference", "last_frame_reference", "image_file", "last_frame_file")


def _address(value: Any) -> Any:
    """The text in OpenAI's {"image_url": …}, whose value is an address or {"url": …}; other values as they are."""
    for key, beside in (("image_url", {"type"}), ("url", {"detail"})):
        if isinstance(value, Mapping):
            if key not in value or value.keys() - {key, *beside}:
                wrong = next((name for name in value if name not in (key, *beside)), "nothing")
                raise ValueError(f'the object holds {quoted(wrong)}; expected {{"image_url": "https://… or data:…"}}')
            value = value[key]
    return value


Picture = Annotated[
    str,
    BeforeValidator(_address),
    Field(max_length=2 * MAX_BYTES),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": 2 * MAX_BYTES},
                {
                    "type": "object",
                    "properties": {"image_url": {"type": "string"}},
                    "required": ["image_url"],
                    "additionalProperties": False,
                },
            ]
        }  # fmt: skip
    ),
]


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
    strength: Strength | Annotated[list[Strength], Field(min_length=1, max_length=MAX_PHASES)] = Field(
        1.0, description="One number, or one for each phase of the video."
    )


@with_foreign_fields
@with_settings("video")
class VideoBody(BaseModel):
    """One video. What is not given is the preset's. In a form every value is text, lists as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    negative_prompt: Text | None = Field(None, description='Empty for the model\'s own, " " for none.')
    model: Annotated[str, Field(max_length=200)] | None = Field(None, description="A preset, see GET /v1/models.")
    input_reference: Picture | None = Field(
        None, description="The first frame: an https URL, a data URL or base64. In a form: a file."
    )
    image_reference: Picture | None = Field(None, description="vLLM-Omni's word for input_reference.")
    reference_url: Picture | None = Field(None, description="SGLang's word for input_reference.")
    last_frame_reference: Picture | None = Field(None, description="The last frame, in the same ways.")
    size: Annotated[str, Field(pattern=r"^([0-9]{2,4}x[0-9]{2,4})?$")] | None = Field(None, description="WIDTHxHEIGHT.")
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
        if self.size:
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
            negative_prompt=self.negative_prompt or "",
            preset=self.model or "",
            image=self._first_frame(files),
            last_frame=files.get("last_frame_reference", self.last_frame_reference),
            seconds=self.seconds,
            settings=settings,
            loras=[lora.model_dump(exclude_none=True) for lora in self.loras or ()],
            client_id=self.client_id or None,
            name=self.file_name or "",
        )

    def _first_frame(self, files: Mapping[str, bytes]) -> bytes | str | None:
        names = ("input_reference", "image_reference", "reference_url")
        given = {name: value for name in names if (value := files.get(name) or getattr(self, name))}
        if len(given) > 1:
            raise BadRequest(f"{' and '.join(given)} are the same thing, the first frame. Keep one of them.")
        return next(iter(given.values()), None)

    @model_validator(mode="before")
    @classmethod
    def _merged(cls, data: Any) -> Any:
        """The fields of vLLM-Omni's `video_params` and of SGLang's `extra_body` as the body's own. The latter win."""
        if not isinstance(data, dict):
            return data
        blocks = {name: data[name] for name in BLOCKS if isinstance(data.get(name), dict)}
        own = {name: value for name, value in data.items() if name not in blocks}
        return {**blocks.get("video_params", {}), **own, **blocks.get("extra_body", {})}


@with_foreign_fields
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
    reuse: bool | None = Field(None, description="Of other models; without effect.")

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


class RemixBody(BaseModel):
    """Another video with the settings of an earlier one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]


async def read_body(request: HttpRequest, kind: type[Body]) -> tuple[Body, dict[str, bytes]]:
    """The body of a request, from JSON or a form, and the files that came with the form."""
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content == "application/json":
        return _validated(kind, _parsed(await request.body())), {}
    if content != "multipart/form-data":
        raise UnsupportedType("The body must be JSON (Content-Type: application/json) or multipart/form-data.")
    values: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=2, max_fields=80, max_part_size=2 * MAX_BYTES) as form:
        for name, value in form.multi_items():
            if name.partition("[")[0] in files or isinstance(value, UploadFile) and name in values:
                raise _twice(name)
            if isinstance(value, UploadFile) and name in FILES:
                if data := await value.read(MAX_BYTES + 1):  # a browser sends an empty file where none was chosen
                    files[name] = data
            elif isinstance(value, str):
                _put(values, name, value)
            else:
                raise BadRequest(f"The form has a file {quoted(name)}; files are {', '.join(FILES)}.")
    return _validated(kind, {name: value for name, value in values.items() if value is not None}, form=True), files


def _put(values: dict[str, Any], name: str, text: str) -> None:
    """Add one text of a form. `name[]` adds to a list and `name[key]` to an object, as OpenAI's clients write them."""
    match = _FORM_NAME.fullmatch(name)
    top, keys = (match[1], re.findall(r"\[(.*?)\]", match[2])) if match is not None else (name, [])
    if keys == [""]:
        found = values.setdefault(top, [])
        if not isinstance(found, list):
            raise _twice(top)
        found.append(text)
        return
    place = values
    for key, after in zip([top, *keys], keys, strict=False):
        place = place.setdefault(key, {})
        if not isinstance(place, dict) or not after:
            raise BadRequest(f"The form's field {quoted(name)} fits no other one. Send {quoted(top)} once, as JSON.")
    last = keys[-1] if keys else top
    if last in place:
        raise _twice(name)
    place[last] = text if keys else _from_text(top, text)


def _twice(name: str) -> BadRequest:
    return BadRequest(f"The form has {quoted(name)} twice. Send it once.")


def _from_text(name: str, text: str) -> Any:
    """A value of a form. Numbers stay text, lists and objects are JSON. An empty value means none, except a prompt."""
    if not text and name not in ("prompt", "negative_prompt"):
        return None
    if text[:1] == "[" and name in LISTS or text[:1] == "{" and name in OBJECTS:
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
        if first["type"] == "extra_forbidden":
            known = [name for name in kind.model_fields if name not in (*IGNORED, *UNCHANGED)]
            hint = f" {did_you_mean(where, known)}" if len(first["loc"]) == 1 else ""
            raise BadRequest(f"{where}: this server has no such field.{hint} Leave it out, or see /docs.") from None
        message = EXPECTED.get(first["type"]) or first["msg"].removeprefix("Value error, ")[:200]
        raise BadRequest(f"{where}: {message}.") from None
