"""Editor: the updates of the left column for given values: fields, choices, preset list, cost."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from lightx2v.catalog.folders import told_folders
from lightx2v.catalog.found_file import FoundFile
from lightx2v.config.presets import AIMS
from lightx2v.config.prompt_cleaning import is_blank
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.config.request import IMAGES, MAX_SIDE, Request
from lightx2v.errors import LightX2VError
from lightx2v.media.framing import framing_of
from lightx2v.media.images import DECODE_LOCK, load_image

from ..backend.offer import FILE_FIELDS
from ..backend.studio import Studio
from ..backend.zerogpu import reserved_seconds
from ..strings import Words
from ..views import own_files, panels
from ..views.html import button
from ..views.stage import departures
from .demo_words import unknown_words
from .examples import examples
from .fields import EXACT, LORA_ROWS, Form, setting_fields, size_of, submit_plan
from .inputs import (
    MATCH,
    SHAPES,
    Inputs,
    length_choices,
    offload_choices,
    shape_choices,
    shape_of,
    size_choices,
    speed_choices,
    task_choices,
    tier_of,
)

Updates = dict[Component, Any]

MAX_FOUND = 30
"""Found models in the list of presets; each costs time at every refresh. A search in My files finds the others."""


class Editor:
    """Turns values into component updates. It holds no state of any session."""

    def __init__(self, studio: Studio, inputs: Inputs) -> None:
        self._studio, self._inputs = studio, inputs

    # ---- presets ------------------------------------------------------------------------------------------------

    def whole(self, values: Mapping[str, Any], *, task: str) -> dict[str, Any]:
        """`values` (of `preset_values` or `fields_of`) with the choices of size, shape and length that match them."""
        own = self._studio.settings(values["preset"]).request
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

    def preset_values(self, name: str) -> dict[str, Any]:
        """The values of every field that a preset decides."""
        files = dict.fromkeys(FILE_FIELDS, "")
        return {"preset": name, "missing": "", **files, **setting_fields(self._studio.settings(name).request)}

    def fill(self, words: Words, values: Mapping[str, Any]) -> Updates:
        """Updates of the fields in `values` (of `whole`), and of the choices and rows that depend on the preset."""
        fields, inputs, task = self._inputs.fields, self._inputs, values["task"]
        request = self._studio.settings(values["preset"]).request
        updates: Updates = {fields[name]: value for name, value in values.items() if name in fields}
        updates |= {fields[name]: picture_of(values[name]) for name in PICTURES if name in values}
        choices = {"task": task_choices(words), "size": size_choices(request), "shape": shape_choices(words, task)}
        for name, options in {**choices, "length": length_choices(request)}.items():
            updates[fields[name]] = gr.update(choices=options, value=values[name])
        for name, options in self.file_choices(words, task).items():
            if name in values:
                known = values[name] in (choice for _, choice in options)
                updates[fields[name]] = gr.update(choices=options, value=values[name] if known else "")
        distilled = request["denoising_step_list"] is not None
        moves = gr.update(visible=task == "i2v", value=values["motion_amplitude"])
        updates[fields["motion_amplitude"]] = moves
        updates[inputs.i2v_only] = gr.Group(visible=task == "i2v")
        updates[inputs.base_only] = gr.Row(visible=not distilled)
        updates[inputs.distilled_only] = gr.Row(visible=distilled)
        for row, box in enumerate(inputs.lora_rows):
            if f"lora_{row}_high" in values:
                updates[box] = gr.Row(visible=bool(values[f"lora_{row}_high"] or values[f"lora_{row}_low"]))
        return updates

    # ---- parts that depend on the fields ------------------------------------------------------------------------

    def parts(self, words: Words, values: Mapping[str, Any], problem: str, notices: str) -> dict[str, str]:
        """HTML by the names of `Inputs`: preset list, examples, crop, model files, and the cost or the `problem` below
        the `notices`."""
        name = values["preset"] if values["preset"] in self._studio.tasks else self._studio.default_preset
        parts = {
            "preset": self.preset_list(words, name),
            "examples": examples(words, self._studio.settings(name).preset),
            "crop": self.crop(words, values),
        }
        if problem:
            parts["cost"] = notices + _refusal(words, values, problem)
        elif self._studio.tasks.get(values["preset"]) == values["task"]:  # not while a run's fields are filled in
            parts["cost"] = notices + self.cost(words, values)
        parts["shelf"] = self.shelf(words, values, name)
        if self._inputs.mine is not None:
            parts["mine"] = self.folders(words, values, name)
        if self._inputs.files is not None:
            parts["files"] = panels.file_list(words, self._studio.files.status(self._studio.settings(name).engine))
        return parts

    def preset_list(self, words: Words, name: str) -> str:
        studio, options, found = self._studio, [], 0
        for info in studio.for_task(self._studio.settings(name).preset.task):
            settings = studio.settings(info.name)
            engine, request = settings.engine, stand_in(settings.request)
            group = studio.offer.group(info.name)
            if group == "found" and (found := found + 1) > MAX_FOUND and info.name != name:
                continue
            title, about = words.preset(info.name), words("about_" + info.variant)
            if group == "found":
                title, about = own_files.model_words(words, info, request.steps)
            option = panels.PresetOption(
                name=info.name, title=title, about=about,
                prediction=studio.predict(engine, request), need=studio.memory_need(engine, request),
                files=studio.files.status(engine),
                group=group or info.aim,
            )  # fmt: skip
            options.append(option)
        options.sort(key=lambda option: ("found", "own", *AIMS).index(option.group))
        return panels.preset_list(words, options, name, studio.room, more=max(0, found - MAX_FOUND))

    def shelf(self, words: Words, values: Mapping[str, Any], name: str) -> str:
        """The LoRAs on offer that fit the preset's model."""
        offer = self._studio.offer
        width = self._studio.width_of(name)
        loras = [lora for lora in offer.catalog.loras.values() if lora.first.width in (0, width)]
        task = offer.settings(name).preset.task
        return own_files.shelf(words, loras, str(values.get("lora_search") or ""), task, lora_texts(values))

    def folders(self, words: Words, values: Mapping[str, Any], name: str) -> str:
        """The folders with models, and remarks about the files that are chosen."""
        offer = self._studio.offer
        files = {field: str(values.get(field) or "") for field in FILE_FIELDS}
        told = [str(folder.resolve()) for folder in told_folders()]
        try:
            model = offer.model(name, files)
        except LightX2VError:  # the cost line says why
            model = None
        found = {key: value for key, value in offer.found.items() if value.settings.preset.task == values["task"]}
        models = own_files.model_list(words, found, str(values.get("model_search") or ""), name)
        return own_files.used_files(words, model) + models + own_files.folder_list(words, offer.catalog, told)

    def file_choices(self, words: Words, task: str) -> dict[str, list[tuple[str, str]]]:
        """The choices of the fields that name single files; {} where the page has none."""
        if self._inputs.mine is None:
            return {}
        choices = {}
        for field in FILE_FIELDS:
            other = {"file_high": "low", "file_low": "high"}.get(field)
            files = self._studio.offer.choices(field, task)
            choices[field] = [(words("automatic"), ""), *((_label(words, file, other), file.name) for file in files)]
        return choices

    def size(self, preset: str, values: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) from the two rows of choices."""
        own = tier_of(self._studio.settings(preset).request)
        tier = values["size"] if values["size"] is not None and 0 < values["size"] <= MAX_SIDE else own
        shape = values["shape"] if values["shape"] in SHAPES else None
        return size_of(tier, shape or ("16:9" if tier in (632, 960) else "1:1"))

    def cost(self, words: Words, values: Mapping[str, Any]) -> str:
        """The line below the button. A field that is still empty is no error here."""
        studio = self._studio
        try:
            form = unfilled(form_of(values))
            plan = submit_plan(form, studio.offer, studio.exposure)
        except LightX2VError as error:
            return _refusal(words, values, str(error))
        config, request = plan.config, plan.requests[0]
        prediction = studio.predict(config, request)
        cost = panels.cost_line(
            words, prediction, studio.memory_need(config, request), studio.files.status(config), studio.room,
            len(plan.requests), unknown=studio.not_predicted(config, request, prediction) if prediction else (),
            reserve=reserved_seconds(prediction) if studio.exposure.zerogpu else None,
            departs=departures(words, request),
        )  # fmt: skip
        demo = self._studio.settings(form.preset).preset.demo
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
        choices |= {"speed_up": speed_choices(words), **self.file_choices(words, task)}
        for name, options in choices.items():
            texts[self._inputs.fields[name]]["choices"] = options
        return {component: gr.update(**parts) for component, parts in texts.items()}


def _refusal(words: Words, values: Mapping[str, Any], problem: str) -> str:
    """An error in place of the cost, with a button where something missing is in the way."""
    go_on = button(words("go_on"), "go_on", kind="small") if values.get("missing") else ""
    return panels.problem(problem) + go_on


def _label(words: Words, file: FoundFile, other: str | None) -> str:
    """A file's name in a field for an expert whose other half is `other`."""
    if file.problem:
        return words("unusable", name=file.name)
    return words("other_half", name=file.name) if other and file.expert == other else file.name


def lora_texts(values: Mapping[str, Any]) -> list[str]:
    """What the rows of LoRAs name."""
    rows = (values.get(f"lora_{row}_{part}") for row in range(LORA_ROWS) for part in ("high", "low"))
    return [str(text) for text in rows if text]


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


def form_of(values: Mapping[str, Any]) -> Form:
    """The Form of the components' values."""
    return Form.of({**values, "match_image": values.get("shape", MATCH) == MATCH})


def unfilled(form: Form) -> Form:
    """The form with a placeholder for an empty prompt and a missing picture."""
    prompt, image = "…" if is_blank(form.prompt) else form.prompt, form.image_path or "picture.png"
    return replace(form, prompt=prompt, image_path=image if form.task == "i2v" else None)


def stand_in(request: Mapping[str, Any]) -> Request:
    """A Request of a preset's settings with a placeholder prompt and image, to estimate its cost."""
    return Request(prompt="…", **{**request, **dict.fromkeys(IMAGES[request["task"]], "picture.png")})


def picture_of(path: str | None) -> Image.Image | None:
    """A stored picture, for the component to show; None if it is gone."""
    try:
        return load_image(path) if path else None
    except LightX2VError:
        return None
