"""What the left column shows for given values: fields, choices, preset list, cost. Returns updates by component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from lightx2v.errors import LightX2VError
from lightx2v.framing import frame_picture
from lightx2v.image import load_image
from lightx2v.request import Request

from . import panels
from .demo_words import unknown_words
from .examples import examples
from .form import EXACT, Form, plan, size_of
from .inputs import (
    MATCH,
    Inputs,
    length_choices,
    offload_choices,
    shape_choices,
    shape_of,
    size_choices,
    task_choices,
    tier_of,
)
from .strings import Words
from .studio import Studio, settings_of

Updates = dict[Component, Any]

PICTURES = ("image_path", "last_frame_path")


class Editor:
    """Knows how values become what is shown. It holds no state of any visitor."""

    def __init__(self, studio: Studio, inputs: Inputs) -> None:
        self._studio, self._inputs = studio, inputs

    # ---- presets ------------------------------------------------------------------------------------------------

    def use_preset(self, words: Words, name: str, values: Mapping[str, Any]) -> Updates:
        """Another preset: its own settings, with the prompt, pictures and seed that are there."""
        resolved = settings_of(name)
        kept = {"prompt", "negative_prompt", "seed", "videos", "per_line", "offload", "attention", *PICTURES}
        kept |= {field for field in values if field.startswith("lora_")}
        defaults = preset_values(name)
        return self.fill(
            words, {**defaults, **{k: v for k, v in values.items() if k in kept}}, task=resolved.preset.task
        )

    def fill(self, words: Words, values: Mapping[str, Any], *, task: str) -> Updates:
        """Everything in the column from a full set of values (`preset_values` or `form.fields_of`)."""
        fields, inputs = self._inputs.fields, self._inputs
        resolved = settings_of(values["preset"])
        asked = {**resolved.request, **{k: values[k] for k in ("height", "width", "frames", "fps")}}
        asked["resize_mode"] = None if values.get("match_image", True) else EXACT
        values = {**values, "task": task, "shape": shape_of(asked, task)}
        values["size"] = (
            tier_of(asked) if tier_of(asked) in {tier for _, tier in size_choices(resolved.request)} else None
        )
        updates: Updates = {}
        for name, component in fields.items():
            if name in values and name not in ("size", "shape", "length", *PICTURES):
                updates[component] = values[name]
        updates[fields["task"]] = gr.update(choices=task_choices(words), value=task)
        lengths = length_choices(resolved.request)
        length = asked["frames"] if asked["frames"] in [count for _, count in lengths] else None
        updates[fields["size"]] = gr.update(choices=size_choices(resolved.request), value=values["size"])
        updates[fields["shape"]] = gr.update(choices=shape_choices(words, task), value=values["shape"])
        updates[fields["length"]] = gr.update(choices=lengths, value=length)
        for name in PICTURES:
            if name in values:
                updates[fields[name]] = picture_of(values[name])
        distilled = resolved.request["denoising_step_list"] is not None
        updates[inputs.i2v_only] = gr.Group(visible=task == "i2v")
        updates[inputs.base_only] = gr.Row(visible=not distilled)
        updates[inputs.distilled_only] = gr.Row(visible=distilled)
        for row, box in enumerate(inputs.lora_rows):
            used = values.get(f"lora_{row}_high") or values.get(f"lora_{row}_low")
            updates[box] = gr.Row(visible=bool(used))
        return updates | self.show_preset(words, values["preset"]) | {inputs.cost: self.cost(words, values)}

    def show_preset(self, words: Words, name: str) -> Updates:
        """The preset list, the examples that suit it, and its files."""
        info = settings_of(name).preset
        updates: Updates = {
            self._inputs.preset: self.preset_list(words, name),
            self._inputs.examples: examples(words, info),
        }
        return updates | self.files(words, name)

    def preset_list(self, words: Words, name: str) -> str:
        studio = self._studio
        offers = []
        for info in studio.for_task(settings_of(name).preset.task):
            resolved = settings_of(info.name)
            request = stand_in(resolved.request)
            about = words("about_" + info.variant) if info.variant in _VARIANTS else info.summary
            offers.append(
                panels.Offer(
                    name=info.name,
                    title=words.preset(info.name),
                    about=about,
                    prediction=studio.predict(resolved.engine, request),
                    need=studio.memory_need(resolved.engine, request),
                    files=studio.files.status(resolved.engine),
                )
            )
        return panels.preset_list(words, offers, name, studio.room)

    def files(self, words: Words, name: str) -> Updates:
        """The list of model files and its heading; nothing where the page hides them."""
        if self._inputs.files is None:
            return {}
        status = self._studio.files.status(settings_of(name).engine)
        title = panels.files_title(words, status)
        return {self._inputs.files: panels.file_list(words, status), self._inputs.files_box: gr.Accordion(label=title)}

    # ---- size and cost ------------------------------------------------------------------------------------------

    def resize(self, values: Mapping[str, Any]) -> Updates:
        """Height and width from the two rows of choices."""
        fields = self._inputs.fields
        preset = settings_of(values["preset"]).request
        tier, shape = values["size"] or tier_of(preset), values["shape"]
        height, width = size_of(tier, "16:9" if shape in (None, MATCH) and tier in (632, 960) else _square(shape))
        return {fields["height"]: height, fields["width"]: width}

    def cost(self, words: Words, values: Mapping[str, Any]) -> str:
        """What stands under the button; what is not filled in yet does not count as wrong."""
        studio = self._studio
        try:
            form = form_of(values)
            form = replace(form, prompt=form.prompt if form.prompt.strip() else "…")
            if form.task == "i2v":
                form = replace(form, image_path=form.image_path or "picture.png")
            planned = plan(form, studio.tasks, studio.exposure)
        except LightX2VError as error:
            return panels.problem(str(error))
        config, request = planned.config, planned.requests[0]
        note = ""
        if settings_of(form.preset).preset.demo:
            note = panels.demo_note(words, unknown_words(form.prompt))
        return (
            panels.cost_line(
                words,
                studio.predict(config, request),
                studio.memory_need(config, request),
                studio.files.status(config),
                studio.room,
                len(planned.requests),
                reserve=studio.lender.reservation(request) if studio.lender else None,
            )
            + note
        )

    def crop(self, words: Words, values: Mapping[str, Any]) -> str:
        """What the model will see of the first frame; what is wrong with it instead, if something is."""
        path = values.get("image_path")
        if not path or values["task"] != "i2v":
            return panels.crop_preview(words, None, None)
        try:
            picture = load_image(path)
            mode = None if values["shape"] == MATCH else EXACT
            framing = frame_picture(picture.size, int(values["height"]), int(values["width"]), mode)
        except LightX2VError as error:
            return panels.problem(str(error))
        return panels.crop_preview(words, picture, framing)

    # ---- language -----------------------------------------------------------------------------------------------

    def relabel(self, words: Words, task: str) -> Updates:
        """Every label, hint and choice of the column in another language."""
        updates: Updates = {}
        for component, (what, key) in self._inputs.labels.items():
            updates[component] = {what: words(key)}
        for component, (what, key) in self._inputs.hints.items():
            text = words(key)
            if key in ("seed_info", "videos_info"):
                text = f"--{component.elem_id} · {text}" if component.elem_id == "seed" else text
            updates.setdefault(component, {})[what] = text
        result: Updates = {component: gr.update(**parts) for component, parts in updates.items()}
        fields = self._inputs.fields
        result[fields["task"]] = gr.update(choices=task_choices(words), label=words("mode"))
        result[fields["shape"]] = gr.update(choices=shape_choices(words, task), label=words("shape"))
        result[fields["offload"]] = gr.update(choices=offload_choices(words), label=words("offload"))
        result[self._inputs.generate] = gr.update(value=words("generate"))
        result[self._inputs.advanced] = gr.update(label=words("advanced"))
        result[self._inputs.add_lora] = gr.update(value=words("add_lora"))
        return result


_VARIANTS = ("base", "distill_lora", "distill_merged", "distill_fp8")


def together(labels: Updates, values: Updates) -> Updates:
    """Both changes of one component where both sides have one: what it says, and what it holds."""
    merged = {**labels, **values}
    for component in labels.keys() & values.keys():
        value = values[component]
        merged[component] = {**labels[component], **(value if _is_update(value) else {"value": value})}
    return merged


def _is_update(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update"


def preset_values(name: str) -> dict[str, Any]:
    """Values for all fields that a preset decides."""
    resolved = settings_of(name)
    request = resolved.request
    values = {key: request[key] for key in ("height", "width", "frames", "fps", "steps", "shift", "enable_cfg")}
    return values | {
        "preset": name,
        "match_image": request["resize_mode"] is None,
        "guidance_high": request["guidance"][0],
        "guidance_low": request["guidance"][1],
        "boundary": request["boundary"],
        "denoising_step_list": ", ".join(map(str, request["denoising_step_list"] or ())),
        "boundary_step_index": request["boundary_step_index"],
    }


def form_of(values: Mapping[str, Any]) -> Form:
    """The form that the components' values make."""
    return Form.of({**values, "match_image": values.get("shape", MATCH) == MATCH})


def stand_in(request: Mapping[str, Any]) -> Request:
    """A request of a preset's settings, to count its work."""
    shown = {"i2v": ("image_path",), "flf2v": ("image_path", "last_frame_path")}.get(request["task"], ())
    return Request(prompt="…", **{**request, **dict.fromkeys(shown, "picture.png")})


def picture_of(path: str | None) -> Image.Image | None:
    """A kept picture, for the component to show; None when it is gone."""
    try:
        return load_image(path) if path else None
    except LightX2VError:
        return None


def _square(shape: str | None) -> str:
    return "1:1" if shape in (None, MATCH) else shape
