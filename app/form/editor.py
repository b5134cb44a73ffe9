"""Editor: the updates of the left column for given values: fields, choices, preset list, cost."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from lightx2v.config.prompt_cleaning import is_blank
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.config.request import IMAGES, MAX_SIDE, Request
from lightx2v.errors import LightX2VError
from lightx2v.media.framing import framing_of
from lightx2v.media.images import DECODE_LOCK, load_image

from ..backend.studio import Studio, settings_of
from ..backend.zerogpu import reserved_seconds
from ..strings import Words
from ..views import panels
from .demo_words import unknown_words
from .examples import examples
from .fields import EXACT, Form, setting_fields, size_of, submit_plan
from .inputs import (
    MATCH,
    SHAPES,
    Inputs,
    length_choices,
    offload_choices,
    shape_choices,
    shape_of,
    size_choices,
    task_choices,
    tier_of,
)

Updates = dict[Component, Any]


class Editor:
    """Turns values into component updates. It holds no state of any session."""

    def __init__(self, studio: Studio, inputs: Inputs) -> None:
        self._studio, self._inputs = studio, inputs

    # ---- presets ------------------------------------------------------------------------------------------------

    def whole(self, values: Mapping[str, Any], *, task: str) -> dict[str, Any]:
        """`values` (of `preset_values` or `fields_of`) with the choices of size, shape and length that match them."""
        own = settings_of(values["preset"]).request
        asked = {**own, **{k: values[k] for k in ("height", "width", "frames", "fps")}}
        asked["resize_mode"] = None if values.get("match_image", True) else EXACT
        tier, tiers = tier_of(asked), {tier for _, tier in size_choices(own)}
        lengths = {count for _, count in length_choices(own)}
        return {
            **values,
            "task": task,
            "shape": shape_of(asked, task),
            "size": tier if tier in tiers else None,
            "length": asked["frames"] if asked["frames"] in lengths else None,
        }

    def fill(self, words: Words, values: Mapping[str, Any]) -> Updates:
        """Updates of the fields in `values` (of `whole`), and of the choices and rows that depend on the preset."""
        fields, inputs, task = self._inputs.fields, self._inputs, values["task"]
        request = settings_of(values["preset"]).request
        updates: Updates = {fields[name]: value for name, value in values.items() if name in fields}
        updates |= {fields[name]: picture_of(values[name]) for name in PICTURES if name in values}
        choices = {"task": task_choices(words), "size": size_choices(request), "shape": shape_choices(words, task)}
        for name, options in {**choices, "length": length_choices(request)}.items():
            updates[fields[name]] = gr.update(choices=options, value=values[name])
        distilled = request["denoising_step_list"] is not None
        updates[inputs.i2v_only] = gr.Group(visible=task == "i2v")
        updates[inputs.base_only] = gr.Row(visible=not distilled)
        updates[inputs.distilled_only] = gr.Row(visible=distilled)
        for row, box in enumerate(inputs.lora_rows):
            if f"lora_{row}_high" in values:
                updates[box] = gr.Row(visible=bool(values[f"lora_{row}_high"] or values[f"lora_{row}_low"]))
        return updates

    # ---- parts that depend on the fields ------------------------------------------------------------------------

    def parts(self, words: Words, values: Mapping[str, Any], problem: str) -> dict[str, str]:
        """HTML by the names of `Inputs`: preset list, examples, crop, model files, and the cost or the `problem`."""
        name = values["preset"] if values["preset"] in self._studio.tasks else self._studio.default_preset
        parts = {
            "preset": self.preset_list(words, name),
            "examples": examples(words, settings_of(name).preset),
            "crop": self.crop(words, values),
        }
        if problem:
            parts["cost"] = panels.problem(problem)
        elif self._studio.tasks.get(values["preset"]) == values["task"]:  # not while a run's fields are filled in
            parts["cost"] = self.cost(words, values)
        if self._inputs.files is not None:
            parts["files"] = panels.file_list(words, self._studio.files.status(settings_of(name).engine))
        return parts

    def preset_list(self, words: Words, name: str) -> str:
        studio = self._studio
        options = []
        for info in studio.for_task(settings_of(name).preset.task):
            engine, request = settings_of(info.name).engine, stand_in(settings_of(info.name).request)
            option = panels.PresetOption(
                name=info.name, title=words.preset(info.name), about=words("about_" + info.variant),
                prediction=studio.predict(engine, request), need=studio.memory_need(engine, request),
                files=studio.files.status(engine),
            )  # fmt: skip
            options.append(option)
        return panels.preset_list(words, options, name, studio.room)

    def size(self, preset: str, values: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) from the two rows of choices."""
        own = tier_of(settings_of(preset).request)
        tier = values["size"] if values["size"] is not None and 0 < values["size"] <= MAX_SIDE else own
        shape = values["shape"] if values["shape"] in SHAPES else None
        return size_of(tier, shape or ("16:9" if tier in (632, 960) else "1:1"))

    def cost(self, words: Words, values: Mapping[str, Any]) -> str:
        """The line below the button. A field that is still empty is no error here."""
        studio = self._studio
        try:
            form = form_of(values)
            prompt, image = "…" if is_blank(form.prompt) else form.prompt, form.image_path or "picture.png"
            form = replace(form, prompt=prompt, image_path=image if form.task == "i2v" else None)
            plan = submit_plan(form, studio.tasks, studio.exposure)
        except LightX2VError as error:
            return panels.problem(str(error))
        config, request = plan.config, plan.requests[0]
        prediction = studio.predict(config, request)
        cost = panels.cost_line(
            words, prediction, studio.memory_need(config, request), studio.files.status(config), studio.room,
            len(plan.requests), unknown=studio.not_predicted(config, request, prediction) if prediction else (),
            reserve=reserved_seconds(prediction) if studio.exposure.zerogpu else None,
        )  # fmt: skip
        demo = settings_of(form.preset).preset.demo
        return cost + (panels.demo_note(words, unknown_words(form.prompt)) if demo else "")

    def crop(self, words: Words, values: Mapping[str, Any]) -> str:
        """The part of the first frame that the model sees, or the error of that picture."""
        if values["task"] != "i2v":
            return ""
        shape = None if values["shape"] == MATCH else EXACT
        return _crop(words.language, values.get("image_path"), values["height"], values["width"], shape)

    # ---- language -----------------------------------------------------------------------------------------------

    def relabel(self, words: Words, task: str) -> Updates:
        """Every label, hint and choice of the column in another language."""
        texts: dict[Any, dict[str, Any]] = {
            c: {part: words(key) for part, key in keys.items()} for c, keys in self._inputs.texts.items()
        }
        choices = {"task": task_choices(words), "shape": shape_choices(words, task), "offload": offload_choices(words)}
        for name, options in choices.items():
            texts[self._inputs.fields[name]]["choices"] = options
        return {component: gr.update(**parts) for component, parts in texts.items()}


@lru_cache(maxsize=32)
def _crop(language: str, path: str | None, height: Any, width: Any, mode: str | None) -> str:
    """Cached: every refresh of the page calls this, and the picture may be large."""
    words = Words(language)
    if not path or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in (height, width)):
        return panels.crop_preview(words, None, None)
    with DECODE_LOCK:
        try:
            picture = load_image(path)
            framing = framing_of(picture.size, height, width, mode)
        except LightX2VError as error:
            return panels.problem(str(error))
        return panels.crop_preview(words, picture, framing)


def preset_values(name: str) -> dict[str, Any]:
    """The values of every field that a preset decides."""
    return {"preset": name, **setting_fields(settings_of(name).request)}


def form_of(values: Mapping[str, Any]) -> Form:
    """The Form of the components' values."""
    return Form.of({**values, "match_image": values.get("shape", MATCH) == MATCH})


def stand_in(request: Mapping[str, Any]) -> Request:
    """A Request of a preset's settings with a placeholder prompt and image, to estimate its cost."""
    return Request(prompt="…", **{**request, **dict.fromkeys(IMAGES[request["task"]], "picture.png")})


def picture_of(path: str | None) -> Image.Image | None:
    """A stored picture, for the component to show; None if it is gone."""
    try:
        return load_image(path) if path else None
    except LightX2VError:
        return None
