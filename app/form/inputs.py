"""The left column of the page. The fields are gradio's, so that keyboard, labels and validation are too."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.components import Component

from lightx2v.config.attention_names import SUPPORTED as ATTENTION_NAMES
from lightx2v.config.presets import Resolved
from lightx2v.config.request import MAX_PROMPT
from lightx2v.config.request_settings import SETTINGS, PhaseList, StepList

from ..exposure import Exposure
from ..gradio_compat import tolerant
from ..strings import Words
from .fields import CONTROLS, LORA_ROWS, OFFLOAD, SPEEDS, frames_for, setting_fields

JS_ACT = "const events = ['act']; studio.actions(element, trigger);"
JS_WATCH = JS_ACT + " studio.watched(element); watch('value', () => studio.watched(element));"
JS_PICK = "const events = ['pick']; studio.picker(element, props, trigger);"

SHAPES = ("16:9", "9:16", "1:1")
MATCH = "match"

HUGE = 1e300
"""No setting is larger, and a larger number may not be a float."""

USAGE = {
    **{name: row.usage for name, row in SETTINGS.items()},
    "guidance_high": "--guidance HIGH",
    "guidance_low": "--guidance … LOW",
    "attention": "--set self_attn_1_type",
    "loras": "--set loras",
}
"""How the command line writes each field of Advanced."""


def text_of(sent: Any) -> str:
    """The typed text without half characters, which JSON cannot hold; cut beyond the longest limit."""
    text = "" if sent is None else str(sent)[: MAX_PROMPT + 1]
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


def _number(component: Any, sent: Any) -> float | int | None:
    """The typed number, or None. A number of 20 digits is no integer in JSON."""
    if not isinstance(sent, (int, float)) or sent != sent:
        return None
    small = gr.Number.round_to_precision(max(-HUGE, min(sent, HUGE)), component.precision)
    return small if abs(small) < 2**63 else float(small)


def _choice(component: Any, sent: Any) -> str | int | None:
    """The chosen value, of the right type. It may be gone from the choices by now, which gradio reports as an error."""
    if type(sent) is not type(component.choices[0][1]):
        return None
    return text_of(sent) if isinstance(sent, str) else max(0, min(sent, 2**31))


MOST_VRAM_GB = 48
"""The largest value of the slider. A larger card needs no limit."""

Textbox = tolerant(gr.Textbox, lambda _, sent: text_of(sent))
Dropdown = tolerant(gr.Dropdown, lambda _, sent: text_of(sent))
Checkbox = tolerant(gr.Checkbox, lambda _, sent: sent if isinstance(sent, bool) else None)
Number = tolerant(gr.Number, _number)
Slider = tolerant(gr.Slider, _number)
Choice = tolerant(gr.Radio, _choice)
Picture = tolerant(gr.Image, lambda _, sent: sent.path if sent else None)
"""The path of an uploaded image, for `load_image` to check. gradio itself would decode any size, make transparency
black and 16-bit grey white, and fail without a message on a file that is no picture."""


@dataclass
class Inputs:
    """The components of the left column. `fields` are the fields of a Form, by its names."""

    words: Words
    """The texts that the column is built with."""
    fields: dict[str, Any] = field(default_factory=dict)
    texts: dict[Component, dict[str, str]] = field(default_factory=dict)
    """Component -> {property that holds a text: key in assets/strings.json}; for a change of language."""

    preset: Any = None
    crop: Any = None
    examples: Any = None
    generate: Any = None
    cost: Any = None
    i2v_only: Any = None
    base_only: Any = None
    distilled_only: Any = None
    lora_rows: list[Any] = field(default_factory=list)
    remove_lora: list[Any] = field(default_factory=list)
    add_lora: Any = None
    advanced: Any = None
    lora_box: Any = None
    shelf: Any = None
    mine_box: Any = None
    mine: Any = None
    add_folder: Any = None
    save_preset: Any = None
    files_box: Any = None
    files: Any = None

    @property
    def boxes(self) -> list[Any]:
        """The accordions, from top to bottom."""
        return [box for box in (self.advanced, self.lora_box, self.mine_box, self.files_box) if box is not None]

    def add(self, kind: Any, name: str, key: str = "", *, texts: Mapping[str, str] | None = None, **more: Any) -> None:
        """Add a field. `key` is that of its label, unless it is the name; `texts` has the keys of its other texts."""
        keys = {"label": key or name, **(texts or {})}
        component = kind(**{part: self.words(key) for part, key in keys.items()}, **{"elem_id": name, **more})
        self.fields[name], self.texts[component] = component, keys


def build_inputs(words: Words, resolved: Resolved, exposure: Exposure, *, tasks: int = 2) -> Inputs:
    """The column's components, in the order of decisions: what, how good, how large, go. `tasks` counts them."""
    inputs = Inputs(words)
    task, paths = resolved.preset.task, exposure.shows_paths
    inputs.add(
        Choice, "task", "mode", choices=task_choices(words), value=task, show_label=False, elem_id="mode",
        visible=tasks > 1,
    )  # fmt: skip
    _pictures(inputs, visible=task == "i2v")
    inputs.add(
        Textbox, "prompt", texts={"placeholder": "prompt_hint"}, lines=3, max_lines=12,
        max_length=exposure.limits.prompt,
    )  # fmt: skip
    inputs.examples = gr.HTML(apply_default_css=False, elem_id="examples", js_on_load=JS_ACT)
    with gr.Row(elem_classes="plain", elem_id="how"):
        inputs.preset = gr.HTML(apply_default_css=False, elem_id="preset", js_on_load=JS_PICK, scale=4, min_width=220)
        # A hidden field, so that every event carries the settings together with the preset that they belong to.
        inputs.fields["preset"] = Textbox(resolved.preset.name, visible=False, elem_id="preset_name")
        inputs.fields["missing"] = Textbox("", visible=False, elem_id="missing")
        inputs.add(
            Dropdown, "offload", choices=offload_choices(words), value="auto", filterable=False, scale=1,
            min_width=100, visible=paths,
        )  # fmt: skip
    _size(inputs, resolved)
    with gr.Column(elem_id="go"):  # stays in view
        inputs.generate = gr.Button(words("generate"), variant="primary", elem_id="generate", size="lg")
        inputs.cost = gr.HTML(apply_default_css=False, elem_id="cost", js_on_load=JS_WATCH)
    with gr.Accordion(words("advanced"), open=True, elem_id="advanced") as inputs.advanced:
        _advanced(inputs, resolved.request, task, exposure)
    inputs.texts[inputs.advanced] = {"label": "advanced"}
    with gr.Accordion(words("loras"), open=True, visible=paths, elem_id="loras") as inputs.lora_box:
        inputs.add(Textbox, "lora_search", texts={"placeholder": "lora_search_hint"}, max_lines=1)
        inputs.shelf = gr.HTML(apply_default_css=False, elem_id="shelf", js_on_load=JS_ACT)
        _lora_fields(inputs, visible=paths)
    inputs.texts[inputs.lora_box] = {"label": "loras"}
    if paths:
        _my_files(inputs)
        with gr.Accordion(words("files"), open=True, elem_id="files") as inputs.files_box:
            inputs.files = gr.HTML(apply_default_css=False, js_on_load=JS_ACT)
    return inputs


def _pictures(inputs: Inputs, *, visible: bool) -> None:
    with gr.Group(visible=visible, elem_id="pictures") as inputs.i2v_only:
        with gr.Row(elem_classes="plain"):
            for name, key in (("image_path", "image"), ("last_frame_path", "last_frame")):
                inputs.add(
                    Picture, name, key, texts={"placeholder": "image_hint"}, type="filepath", format="png", height=168,
                    sources=["upload"], min_width=140, buttons=["fullscreen"],
                )  # fmt: skip
        inputs.crop = gr.HTML(apply_default_css=False, elem_id="crop")


def _size(inputs: Inputs, resolved: Resolved) -> None:
    request, task = resolved.request, resolved.preset.task
    rows: tuple[tuple[str, str, list[Any], Any, int], ...] = (
        ("size", "size", size_choices(request), tier_of(request), 110),
        ("shape", "shape", shape_choices(inputs.words, task), shape_of(request, task), 150),
        ("length", "seconds", length_choices(request), request["frames"], 110),
    )
    with gr.Row(elem_classes="plain", elem_id="how-large"):
        for name, key, choices, value, width in rows:
            inputs.add(Choice, name, key, choices=choices, value=value, elem_classes="segment", min_width=width)


def _advanced(inputs: Inputs, request: Mapping[str, Any], task: str, exposure: Exposure) -> None:
    """Everything else in a Request. The hint below a label is what the command line writes."""
    distilled = request["denoising_step_list"] is not None
    values = setting_fields(request)
    hidden: dict[str, dict[str, Any]] = {"motion_amplitude": {"visible": task == "i2v"}}
    paired = ("width", "height", "frames", "fps", "enable_cfg")

    # The fields have no bounds: a number that is half typed may be out of them. `submit_plan` checks the bounds.
    def setting(name: str) -> None:
        row = CONTROLS[name]
        more: dict[str, Any]
        kind, more = Number, {"precision": 0 if row.type is int else None, "step": row.step or 1, "min_width": 120}
        if row.type is bool:
            kind, more = Checkbox, {}
        elif row.choices:
            choices = [("auto", ""), *((_named(inputs.words, name, choice), choice) for choice in row.choices)]
            kind, more = Dropdown, {"choices": choices, "min_width": 120}
        elif row.type in (StepList, PhaseList):
            kind, more = Textbox, {"min_width": 180}
        inputs.add(kind, name, value=values[name], info=USAGE[name], **more, **hidden.get(name, {}))

    with gr.Row(elem_classes="plain"):
        for name, value, info in (("seed", -1, "seed_info"), ("videos", 1, "videos_info")):
            inputs.add(Number, name, texts={"info": info}, value=value, precision=0, min_width=120)
    inputs.add(Checkbox, "per_line", value=False)
    inputs.add(
        Textbox, "negative_prompt", texts={"info": "negative_info"}, lines=2, max_lines=6,
        max_length=exposure.limits.prompt,
    )  # fmt: skip
    for pair in (paired[:2], paired[2:4]):
        with gr.Row(elem_classes="plain"):
            for name in pair:
                setting(name)
    setting("enable_cfg")
    step = SETTINGS["guidance"].step
    with gr.Row(elem_classes="plain"):
        for name in ("guidance_high", "guidance_low"):
            inputs.add(Number, name, value=values[name], info=USAGE[name], step=step, min_width=120)
    boxes = {}
    for schedule, visible in (("shift", not distilled), ("list", distilled), ("", True)):
        with gr.Row(elem_classes="plain", visible=visible) as boxes[schedule]:
            for name, row in CONTROLS.items():
                if row.schedule == schedule and name not in paired:
                    setting(name)
    with boxes["shift"]:
        inputs.add(
            Dropdown, "speed_up", choices=speed_choices(inputs.words), value=values["speed_up"], filterable=False,
            info=USAGE["speed_up"], min_width=120,
        )  # fmt: skip
    inputs.base_only, inputs.distilled_only = boxes["shift"], boxes["list"]
    with boxes[""]:
        inputs.add(
            Slider, "vram_gb", texts={"info": "vram_gb_info"}, value=0, minimum=0, maximum=MOST_VRAM_GB, step=1,
            min_width=180, visible=exposure.shows_paths,
        )  # fmt: skip
        inputs.add(
            Dropdown, "attention", choices=[*ATTENTION_NAMES], value="auto", info=USAGE["attention"], min_width=120,
            visible=exposure.shows_paths,
        )  # fmt: skip


def _named(words: Words, name: str, choice: str) -> str:
    """What a choice is called: methods of interpolation by what they are, the others by their names."""
    return words(f"interpolation_{choice}") if name == "interpolation" else choice


def _lora_fields(inputs: Inputs, *, visible: bool) -> None:
    words = inputs.words
    for row in range(LORA_ROWS):
        with gr.Row(elem_classes="plain lora", visible=False) as box:
            for part in ("high", "low"):
                inputs.add(
                    Textbox, f"lora_{row}_{part}", f"lora_{part}", info=USAGE["loras"], max_lines=1, scale=3,
                    min_width=160,
                )  # fmt: skip
                inputs.add(
                    Number, f"lora_{row}_strength_{part}", f"strength_{part}", value=1.0, step=0.1, scale=1,
                    min_width=90, elem_id=None,
                )  # fmt: skip
            remove = gr.Button(words("remove_lora"), size="sm", min_width=90, elem_id=f"remove_lora_{row}")
        inputs.remove_lora.append(remove)
        inputs.lora_rows.append(box)
    inputs.add_lora = gr.Button(words("add_lora"), size="sm", visible=visible, elem_id="add_lora")
    for button, key in ((inputs.add_lora, "add_lora"), *((remove, "remove_lora") for remove in inputs.remove_lora)):
        inputs.texts[button] = {"value": key}


def _my_files(inputs: Inputs) -> None:
    """Single files in place of the preset's, the folders with models, and saving a preset."""
    words = inputs.words
    with gr.Accordion(words("my_files"), open=True, elem_id="my_files") as inputs.mine_box:
        keys = {"file_high": "part_high", "file_low": "part_low", "file_t5": "part_text", "file_vae": "part_vae"}
        for pair in (("file_high", "file_low"), ("file_t5", "file_vae")):
            with gr.Row(elem_classes="plain"):
                for name in pair:
                    choices = [(words("automatic"), "")]
                    inputs.add(Dropdown, name, keys[name], choices=choices, value="", min_width=180)
        inputs.add(Textbox, "model_search", texts={"placeholder": "lora_search_hint"}, max_lines=1)
        inputs.mine = gr.HTML(apply_default_css=False, elem_id="mine", js_on_load=JS_ACT)
        for name, info, key in (
            ("folder", "folder_info", "add_folder"), ("new_name", "new_name_info", "save_preset"),
        ):  # fmt: skip
            with gr.Row(elem_classes="plain beside"):
                inputs.add(Textbox, name, texts={"info": info}, max_lines=1, scale=3, min_width=160)
                button = gr.Button(words(key), size="sm", scale=1, min_width=120, elem_id=key)
            inputs.texts[button] = {"value": key}
            setattr(inputs, key, button)
    inputs.texts[inputs.mine_box] = {"label": "my_files"}


def task_choices(words: Words) -> list[tuple[str, str]]:
    return [(words("mode_t2v"), "t2v"), (words("mode_i2v"), "i2v")]


def offload_choices(words: Words) -> list[tuple[str, str]]:
    return [(words("offload_" + name), name) for name in OFFLOAD]


def speed_choices(words: Words) -> list[tuple[str, str]]:
    return [(words("speed_" + name) if name[0].isalpha() else name, name) for name in SPEEDS]


def tier_of(request: dict[str, Any]) -> int:
    """The side of the square with about the area of the video: 632 for 480p, 960 for 720p."""
    area = max(0, request["height"] * request["width"])  # a typed height may be -1
    return next((tier for tier in (632, 960) if abs(area / tier**2 - 1) < 0.05), math.isqrt(area))


def size_choices(request: dict[str, Any]) -> list[tuple[str, int]]:
    """The official tiers, or three sizes around that of a small model. `request` is a preset's."""
    tier = tier_of(request)
    if tier in (632, 960):
        return [("480p", 632), ("720p", 960)]
    near = [max(32, round(tier * part / 16) * 16) for part in (2 / 3, 1, 4 / 3)]
    return [(f"{side} px", side) for side in dict.fromkeys(near)]


def shape_choices(words: Words, task: str) -> list[tuple[str, str]]:
    shapes = [(shape, shape) for shape in SHAPES]
    return [(words("shape_match"), MATCH), *shapes] if task == "i2v" else shapes


def shape_of(request: dict[str, Any], task: str) -> str | None:
    """The choice that fits height and width; None for any other size."""
    if task != "t2v" and request["resize_mode"] is None:
        return MATCH
    ratio = request["width"] / request["height"] if request["height"] else 0.0
    known = {"16:9": 16 / 9, "9:16": 9 / 16, "1:1": 1.0}
    return next((name for name, value in known.items() if abs(ratio / value - 1) < 0.04), None)


def length_choices(request: dict[str, Any]) -> list[tuple[str, int]]:
    """Lengths as (label in seconds, frames): 2, 3 and 5 s, or half, once and twice that of a short preset."""
    fps, whole = request["fps"], request["frames"] / request["fps"]
    wanted = (2.0, 3.0, 5.0) if whole > 4 else (whole / 2, whole, whole * 2)
    counts = dict.fromkeys(frames_for(seconds, fps) for seconds in wanted)
    return [(_seconds(count / fps), count) for count in counts]


def _seconds(value: float) -> str:
    """A rounded length: 81 frames at 16 a second are 5 s."""
    return f"{value:.0f} s" if abs(value - round(value)) < 0.15 and value >= 1 else f"{value:.1f} s"
