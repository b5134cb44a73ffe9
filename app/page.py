"""The page: its layout, and which event calls which handler. Its look is in assets/studio.css."""

import secrets
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from lightx2v.config.recorded_settings import PICTURES
from lightx2v.errors import OutputError, short_path

from .backend.offer import FILE_FIELDS
from .backend.studio import Studio
from .backend.zerogpu import ZeroGpuJobs
from .events import clicks, handlers
from .events.page_controller import BUSY_SECONDS, PageController, refreshed
from .events.page_state import PageState
from .form.fields import CONTROLS, LORA_ROWS
from .form.inputs import JS_ACT, JS_WATCH, build_inputs
from .strings import Words
from .web.gradio_api import add_endpoints

JS_COMPARE = JS_ACT + " studio.inStep(element);"
STORAGE = "lightx2v-studio"
JS_VERSIONS = "(...values) => studio.sendVersions(values)"
PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "js": JS_VERSIONS}
"""For every event: it sends the versions that the page shows, bypasses gradio's queue, and is not in the public API."""


def build_page(studio: Studio) -> gr.Blocks:
    """Builds the whole page; `main.launch` serves it."""
    words = Words("en")
    resolved = studio.settings(studio.default_preset)
    parts: dict[str, gr.HTML] = {}

    def part(name: str, js: str = JS_ACT, elem_id: str = "") -> None:
        parts[name] = gr.HTML(apply_default_css=False, elem_id=elem_id or name, js_on_load=js)

    with gr.Blocks(title=words("title"), analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        versions = gr.JSON({}, visible=False, elem_id="versions")  # first, to be the first value of every event
        stored = gr.BrowserState({}, storage_key=STORAGE, secret=_storage_secret(studio.folder))
        state = gr.State(PageState())
        timer = gr.Timer(BUSY_SECONDS / 2, active=False)  # the first answer starts it
        part("top")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(words("tab_create"), id="create") as creating, gr.Row(elem_id="create"):
                with gr.Column(scale=5, min_width=340, elem_id="left"):
                    inputs = build_inputs(words, resolved, studio.exposure, tasks=len(set(studio.tasks.values())))
                with gr.Column(scale=7, min_width=340, elem_id="right"):
                    with gr.Column(elem_id="theatre"):
                        part("stage", JS_WATCH)
                        part("status", JS_WATCH)
                    part("queue")
                    part("report")
                    with gr.Column(elem_id="past"):
                        part("history")
                        restore = gr.UploadButton(
                            words("restore_file"), file_types=[".mp4"], type="filepath", size="sm", elem_id="restore"
                        )
            with gr.Tab(words("tab_compare"), id="compare", render_children=True) as comparing:
                part("compare", JS_COMPARE, "compared")
                part("benchmark")
        add_endpoints(studio)
        controller = PageController(
            studio=studio, inputs=inputs, parts=parts, tabs=(creating, comparing), restore=restore, versions=versions,
            stored=stored, state=state, timer=timer,
        )  # fmt: skip
        _wire(page, controller)
    return page


def _wire(page: gr.Blocks, controller: PageController) -> None:
    inputs, rendered, restore = controller.inputs, controller.parts.values(), controller.restore
    fields = set(inputs.fields.values())
    pictures = {inputs.fields[name] for name in PICTURES}
    column = {
        *fields, inputs.preset, inputs.examples, inputs.generate, inputs.cost, inputs.crop, inputs.i2v_only,
        inputs.base_only, inputs.distilled_only, inputs.add_lora, *inputs.lora_rows,
        *inputs.remove_lora, inputs.shelf, *inputs.boxes,
    }  # fmt: skip
    column |= {inputs.files, inputs.mine, inputs.add_folder, inputs.save_preset} - {None}
    everything = [*column, *rendered, controller.stored, controller.timer, restore, *controller.tabs]
    read = {controller.versions, controller.stored, controller.state, controller.timer, inputs.generate}
    read |= fields - pictures
    default: dict[str, Any] = {"inputs": read, "outputs": everything, **PRIVATE}
    # "once" would lose a second click while the first is answered. "always_last" keeps the last one, which is enough
    # where it does not matter which of several buttons was pressed.
    every, last = {**default, "trigger_mode": "multiple"}, {**default, "trigger_mode": "always_last"}
    on = on_submit = controller.listener
    submitting: dict[str, Any] = {}
    if isinstance(controller.studio.jobs, ZeroGpuJobs):
        # A run belongs to its event, and visitors' events run beside each other: ZeroGPU has a queue of its own.
        on_submit, submitting = controller.running_listener, {"queue": True, "concurrency_limit": None}

    page.load(on(handlers.opened), **default)
    controller.timer.tick(on(refreshed), **{**default, "trigger_mode": "once"})
    inputs.generate.click(on_submit(handlers.generate), **{**default, "inputs": read | pictures, **submitting})
    for component in (inputs.examples, inputs.cost, inputs.files, inputs.mine, inputs.shelf, *rendered):
        if component is not None:
            component.act(on_submit(clicks.act), **{**every, **submitting})
    restore.upload(on(handlers.restored), **{**every, "inputs": read | {restore}})

    inputs.preset.pick(on(handlers.picked), **every)
    named = inputs.fields
    named["task"].input(on(handlers.task_changed), **last)
    gr.on([named["size"].input, named["shape"].input], on(handlers.size_chosen), **last)
    named["length"].input(on(handlers.length_chosen), **last)
    gr.on([named["height"].input, named["width"].input], on(handlers.size_typed), **last)
    costly = [*(name for name in CONTROLS if name not in ("height", "width")), "speed_up"]
    costly += ["videos", "guidance_high", "guidance_low", "per_line", "offload", "vram_gb", "attention"]
    costly += ["negative_prompt"]
    costly += [*FILE_FIELDS, "lora_search", "model_search"] if inputs.mine is not None else ["lora_search"]
    changes = [*(named[name].input for name in costly), named["prompt"].blur]  # a prompt may make a video per line
    changes += [named[f"lora_{row}_low"].blur for row in range(LORA_ROWS)]
    gr.on(changes, on(refreshed), **last)
    gr.on([picture.change for picture in pictures], on(handlers.pictured), **{**last, "inputs": read | pictures})
    gr.on([named[f"lora_{row}_high"].blur for row in range(LORA_ROWS)], on(handlers.paired), **last)
    if inputs.mine is not None:
        inputs.add_folder.click(on(handlers.folder_added), **last)
        inputs.save_preset.click(on(handlers.preset_saved), **last)
    inputs.add_lora.click(on(handlers.lora_added), **last)
    for row, remove in enumerate(inputs.remove_lora):
        remove.click(on(partial(handlers.lora_removed, row=row)), **last)


def _storage_secret(folder: Path) -> str:
    """The key of the browsers' storage, kept in the output folder so that sessions survive a restart."""
    file = folder / "browser.key"
    try:
        file.touch(mode=0o600)
        if not (key := file.read_text(encoding="ascii").strip()):
            key = secrets.token_hex(16)
            file.write_text(key, encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(
            f"Could not read or write {short_path(file)}: {getattr(error, 'strerror', 'it is not text')}. Move it away "
            "so that a new one is created, or choose another folder with --output_dir."
        ) from None
    return key
