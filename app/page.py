"""The page: layout and wiring. What the parts look like is in assets/studio.css, what they do in `handlers.py`."""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from lightx2v.config.recorded_settings import PICTURES
from lightx2v.errors import OutputError, short_path

from .backend.studio import Studio, settings_of
from .events.clicks import Clicks
from .events.handlers import Handlers
from .events.page_state import Tab
from .events.turn import BUSY_SECONDS, Screen
from .form.fields import LORA_ROWS
from .form.inputs import JS_ACT, build_inputs
from .strings import Words
from .views.render import Outputs
from .web.gradio_api import add_endpoints

JS_WATCH = JS_ACT + " studio.watched(element); watch('value', () => studio.watched(element));"
JS_COMPARE = JS_ACT + " studio.inStep(element);"
STORAGE = "lightx2v-studio"
JS_TELL = "(...values) => studio.tell(values)"
PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "js": JS_TELL}
"""Of every event: it says what the page shows, is answered at once and beside the queue, and is no part of the public
interface."""


def build_page(studio: Studio) -> gr.Blocks:
    """The whole page for one studio. Launching it is `app.py`'s."""
    words = Words("en")
    resolved = settings_of(studio.default_preset)
    with gr.Blocks(title=words("title"), analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        told = gr.JSON(
            {}, visible=False, elem_id="told"
        )  # the first component, so that it is the first value of every event
        session = gr.BrowserState({}, storage_key=STORAGE, secret=_storage_secret(studio.folder))
        tab = gr.State(Tab())
        timer = gr.Timer(BUSY_SECONDS / 2, active=False)  # no pace of `Screen`: the first answer sets one and starts it
        top = gr.HTML(apply_default_css=False, elem_id="top", js_on_load=JS_ACT)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(words("tab_create"), id="create") as creating, gr.Row(elem_id="create"):
                with gr.Column(scale=5, min_width=340, elem_id="left"):
                    inputs = build_inputs(words, resolved, studio.exposure, tasks=len(set(studio.tasks.values())))
                with gr.Column(scale=7, min_width=340, elem_id="right"):
                    with gr.Column(elem_id="theatre"):
                        stage = gr.HTML(apply_default_css=False, elem_id="stage", js_on_load=JS_WATCH)
                        status = gr.HTML(apply_default_css=False, elem_id="status", js_on_load=JS_WATCH)
                    queue = gr.HTML(apply_default_css=False, elem_id="queue", js_on_load=JS_ACT)
                    report = gr.HTML(apply_default_css=False, elem_id="report", js_on_load=JS_ACT)
                    with gr.Column(elem_id="past"):
                        history = gr.HTML(apply_default_css=False, elem_id="history", js_on_load=JS_ACT)
                        restore = gr.UploadButton(
                            words("restore_file"), file_types=[".mp4"], type="filepath", size="sm", elem_id="restore"
                        )
            with gr.Tab(words("tab_compare"), id="compare", render_children=True) as comparing:
                compared = gr.HTML(apply_default_css=False, elem_id="compared", js_on_load=JS_COMPARE)
                benchmark = gr.HTML(apply_default_css=False, elem_id="benchmark", js_on_load=JS_ACT)
        outputs = Outputs(
            top=top, stage=stage, status=status, report=report, queue=queue, history=history, compare=compared,
            benchmark=benchmark, tabs=(creating, comparing), restore=restore,
        )  # fmt: skip
        add_endpoints(studio)
        screen = Screen(studio, inputs, outputs, told=told, session=session, tab=tab, timer=timer)
        _wire(page, screen)
    return page


def _wire(page: gr.Blocks, screen: Screen) -> None:
    inputs, outputs = screen.inputs, screen.outputs
    handlers, clicks = Handlers(screen), Clicks(screen)
    fields = set(inputs.fields.values())
    pictures = {inputs.fields[name] for name in PICTURES}
    column = {
        *fields, inputs.preset, inputs.examples, inputs.generate, inputs.cost, inputs.crop, inputs.i2v_only,
        inputs.base_only, inputs.distilled_only, inputs.advanced, inputs.add_lora, *inputs.lora_rows,
        *inputs.remove_lora,
    }  # fmt: skip
    column |= {inputs.files, inputs.files_box} - {None}
    everything = [*column, *outputs.rendered, screen.session, screen.timer, outputs.restore, *outputs.tabs]
    state = {screen.told, screen.session, screen.tab, screen.timer, inputs.generate}
    read = state | fields - pictures
    # "once" would lose a second click while the first is answered; "always_last" keeps it, for what does not ask which
    # of several buttons was pressed.
    every: dict[str, Any] = {"inputs": read, "outputs": everything, "trigger_mode": "multiple", **PRIVATE}
    last: dict[str, Any] = {"inputs": read, "outputs": everything, "trigger_mode": "always_last", **PRIVATE}

    page.load(handlers.opened, inputs=read, outputs=everything, **PRIVATE)
    screen.timer.tick(handlers.tick, inputs=read, outputs=everything, trigger_mode="once", **PRIVATE)
    if screen.studio.exposure.zerogpu:
        # The queue is ZeroGPU's own: visitors' requests for the GPU run beside each other here.
        shown: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_limit": None,
            "js": JS_TELL,
        }
        inputs.generate.click(handlers.generate_on_gpu, inputs=read | pictures, outputs=everything, **shown)
    else:
        inputs.generate.click(handlers.generate, inputs=read | pictures, outputs=everything, **PRIVATE)
    for component in (inputs.examples, inputs.files, *outputs.rendered):
        if component is not None:
            component.act(clicks.act, **every)
    outputs.restore.upload(handlers.restored, **{**every, "inputs": read | {outputs.restore}})

    inputs.preset.pick(handlers.picked, **every)
    named = inputs.fields
    named["task"].input(handlers.task_changed, **last)
    gr.on([named["size"].input, named["shape"].input], handlers.size_chosen, **last)
    named["length"].input(handlers.length_chosen, **last)
    gr.on([named["height"].input, named["width"].input], handlers.size_typed, **last)
    costly = ("frames", "fps", "videos", "steps", "enable_cfg", "guidance_high", "guidance_low", "boundary", "shift")
    costly += ("denoising_step_list", "boundary_step_index", "per_line", "offload", "attention", "negative_prompt")
    changes = [*(named[name].input for name in costly), named["prompt"].blur]  # one video for each of its lines
    changes += [named[f"lora_{row}_low"].blur for row in range(LORA_ROWS)]
    gr.on(changes, handlers.edited, **last)
    gr.on([picture.change for picture in pictures], handlers.pictured, **{**last, "inputs": read | pictures})
    gr.on([named[f"lora_{row}_high"].blur for row in range(LORA_ROWS)], handlers.paired, **last)
    inputs.add_lora.click(handlers.lora_added, **last)
    for row, remove in enumerate(inputs.remove_lora):
        remove.click(partial(handlers.lora_removed, row), **last)


def _storage_secret(folder: Path) -> str:
    """One key for the browser's storage that lives as long as the output folder, so that a restart forgets nobody."""
    file = folder / "browser.key"
    try:
        file.touch(mode=0o600)
        if not (key := file.read_text(encoding="ascii").strip()):
            key = secrets.token_hex(16)
            file.write_text(key, encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(
            f"{short_path(file)} cannot be read or written: {getattr(error, 'strerror', 'it is no text')}. Move it "
            "away, and a new one is made, or give another folder with --output_dir."
        ) from None
    return key
