"""Clicks on buttons inside rendered HTML: in the stage, the report, the history, the queue and the header."""

from dataclasses import replace

import gradio as gr

from lightx2v.catalog.folders import forget_folder, told_folders
from lightx2v.errors import BadRequest, short_path
from lightx2v.jobs.store import Job
from lightx2v.media.video_writer import read_frame

from ..form.editor import lora_texts, picture_of
from ..form.examples import picture
from ..form.fields import LORA_ROWS, new_seed
from ..form.inputs import text_of
from ..strings import LANGUAGES
from ..views.report import seed_of
from ..views.retries import retry_options
from .page_controller import PageEvent

ON_PAGE = (
    *("language", "example", "download", "cancel_download", "swap", "clear"),
    *("undo_fill", "undo_delete", "random_seed", "stop_editing"),
    *("go_on", "look_again", "forget_folder", "use_model", "lora_add", "trigger"),
)
"""Buttons that are about the page; all others are about one run, whose id they send."""


def act(event: PageEvent) -> None:
    """Handle every button. The browser sends the button's name and the run's id, so this function checks both."""
    name = str(event.sent.get("act", ""))
    event.state.problem = None
    if name in ON_PAGE:
        act_on_page(event, name)
        return
    job = event.studio.job_of(event.session.owner, str(event.sent.get("id", "")))
    if job is None:
        raise BadRequest(event.words("not_yours"))
    act_on_job(event, name, job)


def act_on_page(event: PageEvent, name: str) -> None:
    """Change the language, fill in an example, control the download, or change the comparison."""
    sent, inputs, studio = event.sent, event.inputs, event.studio
    if name == "language" and (language := str(sent.get("name"))) in LANGUAGES:
        event.change(language=language)
        event.relabel()
    elif name == "example":
        event.keep_fields()
        event.values["prompt"] = event.updates[inputs.fields["prompt"]] = text_of(sent.get("text", ""))
        if (path := picture(str(sent.get("picture", "")))) is not None:
            event.updates[inputs.fields["image_path"]] = picture_of(str(path))
    elif name in ("download", "cancel_download") and inputs.files is not None:
        config = studio.settings(event.preset).engine
        studio.files.download(config) if name == "download" else studio.files.cancel()
    elif name in OF_OWN_FILES:
        OF_OWN_FILES[name](event)
    elif name == "undo_fill":
        event.put_fields_back()
    elif name == "undo_delete":
        studio.undo_delete(event.session.owner)
    elif name == "random_seed":
        event.set_fields(seed=-1)
    elif name == "stop_editing":
        event.change(editing="")
    elif name == "go_on":
        event.set_fields(missing="")
    elif name == "swap":
        event.change(compared=event.session.compared[::-1])
    elif name == "clear":
        event.change(compared=())


def look_again(event: PageEvent) -> None:
    """Look through the folders with models again."""
    if event.inputs.mine is not None:
        event.studio.offer.reread()


def forget(event: PageEvent) -> None:
    """Forget a folder that was told, by the name under which the page shows it."""
    if event.inputs.mine is not None:
        for folder in told_folders():
            if short_path(folder.resolve()) == event.sent.get("folder"):
                forget_folder(folder)
        event.studio.offer.reread()


def use_model(event: PageEvent) -> None:
    """Choose a found model, as picking it from the list of presets does."""
    if (name := str(event.sent.get("model", ""))) in event.studio.tasks:
        event.fill(event.page.editor.preset_values(name), task=event.studio.tasks[name])


def add_lora(event: PageEvent) -> None:
    """Put a LoRA of the shelf into the first empty row, with a strength of 1 for each expert."""
    lora = event.studio.offer.catalog.loras.get(str(event.sent.get("lora", "")))
    if lora is None or all(file.name in lora_texts(event.values) for file in lora.files):
        return
    empty = [row for row in range(LORA_ROWS) if not any(event.values[f"lora_{row}_{p}"] for p in ("high", "low"))]
    if not empty:
        raise BadRequest(event.words("lora_full", n=LORA_ROWS))
    for part, file in (("high", lora.high), ("low", lora.low)):
        values = {f"lora_{empty[0]}_{part}": file.name if file else "", f"lora_{empty[0]}_strength_{part}": 1.0}
        event.set_fields(**values)
    event.updates[event.inputs.lora_rows[empty[0]]] = gr.Row(visible=True)


def add_trigger(event: PageEvent) -> None:
    """Put a LoRA's trigger word behind the prompt, unless the prompt has it."""
    word, prompt = str(event.sent.get("text", "")), str(event.values["prompt"] or "")
    known = any(word in lora.triggers for lora in event.studio.offer.catalog.loras.values())
    if known and word.lower() not in prompt.lower():
        event.set_fields(prompt=f"{prompt.rstrip().rstrip(',')}, {word}" if prompt.strip() else word)


OF_OWN_FILES = {
    "look_again": look_again,
    "forget_folder": forget,
    "use_model": use_model,
    "lora_add": add_lora,
    "trigger": add_trigger,
}


def act_on_job(event: PageEvent, name: str, job: Job) -> None:
    """Stop, delete, move, compare, show, edit or repeat one run."""
    session, studio = event.session, event.studio
    if name in ("stop", "cancel"):
        studio.jobs.cancel(job.id)
    elif name == "delete":
        studio.delete(job)
        event.change(compared=tuple(id for id in session.compared if id != job.id))
    elif name in ("up", "down"):
        waiting = sorted((j for j in studio.runs(session.owner) if j.position), key=lambda j: j.position or 0)
        ids = [j.id for j in waiting]  # without the job if it has started by now
        place = ids.index(job.id) + (-1 if name == "up" else 1) if job.id in ids else -1
        if 0 <= place < len(waiting):
            studio.swap(job, waiting[place])
    elif name == "compare":
        event.session = session.toggle_compared(job.id)
    elif name == "show":
        event.change(job=job.id, pinned=True, uploaded="")
    elif name == "restore":
        event.keep_fields()
        event.fill_run(job.preset, job.config, job.request)
    elif name == "edit":
        event.change(editing="" if session.editing == job.id else job.id)
        if event.session.editing:
            event.keep_fields()
            event.fill_run(job.preset, job.config, job.request)
    elif name == "same_seed":
        event.keep_fields()
        event.fill_run(job.preset, job.config, replace(job.request, seed=seed_of(job)))
    elif name == "again":
        new = event.submit(job.preset, job.config, replace(job.request, seed=new_seed()))
        event.change(job=new.id, pinned=False, uploaded="")
    elif name == "last_frame":
        _continue(event, job)
    elif (changed := retry_options(job, offload=True).get(name)) is not None:
        new = event.submit(job.preset, *changed)
        event.change(job=new.id, pinned=False)
        event.keep_fields()
        event.fill_run(job.preset, *changed)


def _continue(event: PageEvent, job: Job) -> None:
    """Make the last frame the first frame of an image-to-video run with the same variant and size."""
    path = event.studio.video_of(job.id)
    if path is None:
        raise BadRequest(event.words("not_yours"))
    event.keep_fields()
    values = event.page.editor.preset_values(event.studio.default_for("i2v", job.preset))
    values |= {key: getattr(job.request, key) for key in ("prompt", "height", "width", "frames", "fps")}
    event.fill({**values, "match_image": True, "last_frame_path": None}, task="i2v")
    event.updates[event.inputs.fields["image_path"]] = read_frame(path, -1)
