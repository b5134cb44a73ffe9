"""Handlers of the page's own events: opening the page, pressing Generate, editing a field. One short function each.

None of them runs a model or waits for one. They read or change the job manager and say what the page shows next, so a
closed tab, a reload or a lost connection never affects a run. (On ZeroGPU one does: see backend/zerogpu.py.)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from lightx2v.catalog.folders import tell_folder
from lightx2v.config.presets import preset_content
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs.store import Job
from lightx2v.media.mp4 import read_settings

from ..backend.session import Session
from ..form.editor import form_of, stand_in, unfilled
from ..form.fields import LORA_ROWS, SubmitPlan, low_noise_partner, submit_plan
from ..form.inputs import MATCH
from ..form.recorded_run import recorded_run
from .page_controller import PageEvent


def opened(event: PageEvent) -> None:
    """On loading the page: restore the session from the browser's storage and show the run that the URL names."""
    assert event.request is not None
    stored = event.data[event.page.stored]
    known = Session.of(stored, event.request.headers.get("accept-language", ""))
    # A new visitor may have pressed a button before this event is answered.
    event.session = known if stored else replace(event.session, language=known.language)
    job_id = event.request.query_params.get("job", "")
    if job_id and event.studio.job_of(event.session.owner, job_id) is not None:
        event.change(job=job_id, pinned=event.session.pinned and event.session.job == job_id)
    event.change(editing="", uploaded="")
    if (values := event.page.stored_values(stored)) is not None:
        event.fill(values, task=values["task"])
    # Built open and closed here: gradio mounts a closed accordion's fields when it is first opened, and then
    # overwrites what was typed meanwhile with the values of the last answer.
    for box in event.inputs.boxes:
        event.updates[box] = gr.update(open=False)
    if event.session.language != "en":
        event.relabel()


# ---- generating ---------------------------------------------------------------------------------------------------


def generate(event: PageEvent) -> None:
    """On Generate: queue one job or several, or save new settings for the job that the visitor edits."""
    event.state.problem = None
    event.state.replaced.clear()
    planned = submit_plan(form_of(event.values), event.studio.offer, event.studio.exposure)
    if event.session.editing:
        _save_edit(event, planned)
        event.change(editing="")
    else:
        jobs = _submit_all(event, planned)
        event.change(job=jobs[0].id, pinned=False, uploaded="")


def _submit_all(event: PageEvent, planned: SubmitPlan) -> list[Job]:
    """Queue every request. If the queue refuses one, those before it stay and the page shows the reason."""
    jobs: list[Job] = []
    for request in planned.requests:
        try:
            jobs.append(event.submit(planned.preset, planned.config, request))
        except LightX2VError as error:
            if not jobs:
                raise
            event.refuse(BadRequest(f"{len(jobs)} / {len(planned.requests)}: {error}"))
            break
    return jobs


def _save_edit(event: PageEvent, planned: SubmitPlan) -> None:
    job = event.studio.job_of(event.session.owner, event.session.editing)
    if job is None or job.state != "queued":
        raise BadRequest("The run you edited has started or was deleted. Press Generate again to queue a new one.")
    request, *more = planned.requests
    if more:
        raise BadRequest(
            f"You are editing one run, but these settings make {1 + len(more)}. Set videos to 1 and use one prompt."
        )
    event.studio.edit(job, planned.config, request, preset=planned.preset)


# ---- editing the form ---------------------------------------------------------------------------------------------


def picked(event: PageEvent) -> None:
    """On picking a preset: fill in its settings; prompt, pictures, seed, LoRAs and a chosen size and length stay."""
    name, task = str(event.sent.get("name", "")), event.values["task"]
    if event.studio.tasks.get(name) == task:
        event.fill({**event.page.editor.preset_values(name), **_chosen_size(event, name)}, task=task)


def _chosen_size(event: PageEvent, name: str) -> dict[str, Any]:
    """Size, shape and length if the visitor has changed them, and the preset `name` can make them too."""
    before, after = event.studio.settings(event.preset), event.studio.settings(name)
    chosen = {field: event.values[field] for field in ("height", "width", "frames", "fps")}
    chosen = {field: value for field, value in chosen.items() if value != before.request[field]}
    if before.preset.demo != after.preset.demo:
        return {}
    try:
        request = stand_in({**after.request, **chosen})
        after.engine.check_request(request)
        event.studio.exposure.limits.check(request)
    except (LightX2VError, TypeError):  # TypeError: a number is only half typed
        return {}
    return {**chosen, "match_image": event.values["shape"] == MATCH} if event.values["task"] == "i2v" else chosen


def task_changed(event: PageEvent) -> None:
    """On choosing text or image to video: select the corresponding preset."""
    name = event.studio.default_for(event.values["task"], event.values["preset"])
    event.fill(event.page.editor.preset_values(name), task=event.studio.tasks[name])
    del event.updates[event.inputs.fields["task"]]  # it may have changed again by now


def size_chosen(event: PageEvent) -> None:
    """On choosing a size or shape: set height and width."""
    height, width = event.page.editor.size(event.preset, event.values)
    event.set_fields(height=height, width=width)


def length_chosen(event: PageEvent) -> None:
    """On choosing a length: set the number of frames."""
    event.set_fields(frames=event.values["length"])


def size_typed(event: PageEvent) -> None:
    """On typing a height or width: deselect the size and shape."""
    event.set_fields(size=None, **({"shape": None} if event.values["task"] == "t2v" else {}))


def pictured(event: PageEvent) -> None:
    """On choosing or removing a picture: store the paths of all pictures."""
    event.state.pictures = {name: event.values[name] for name in PICTURES}
    event.state.problem = None


def paired(event: PageEvent) -> None:
    """On naming a high-noise LoRA: fill in its low-noise file, also in place of one that the page filled in before. The
    cost line reports a missing file."""
    pairs = {}
    for row in range(LORA_ROWS):
        high, low = (str(event.values[f"lora_{row}_{part}"] or "") for part in ("high", "low"))
        name = f"lora_{row}_low"
        if low in ("", event.state.paired.get(name)) and (pair := low_noise_partner(high)) != low:
            pairs[name] = pair
    event.state.paired |= pairs
    event.set_fields(**pairs)


def lora_added(event: PageEvent) -> None:
    """On "Add a LoRA": show the first empty row."""
    for row, box in enumerate(event.inputs.lora_rows):
        if not event.values[f"lora_{row}_high"] and not event.values[f"lora_{row}_low"]:
            event.updates[box] = gr.Row(visible=True)
            return


def lora_removed(event: PageEvent, row: int) -> None:
    """On removing a LoRA's row: empty and hide it; the other rows stay where they are."""
    event.updates[event.inputs.lora_rows[row]] = gr.Row(visible=False)
    empty = {"high": "", "low": "", "strength_high": 1.0, "strength_low": 1.0}
    event.set_fields(**{f"lora_{row}_{part}": value for part, value in empty.items()})


def folder_added(event: PageEvent) -> None:
    """On naming another folder with models: remember it and look there."""
    if event.inputs.mine is not None and (folder := str(event.values["folder"] or "").strip()):
        tell_folder(folder)
        event.studio.offer.reread()
        event.set_fields(folder="")


def preset_saved(event: PageEvent) -> None:
    """On "Save as my preset": write a file with the model and the settings, and choose it."""
    if event.inputs.mine is None:
        return
    name = str(event.values["new_name"] or "").strip()
    plan = submit_plan(unfilled(form_of(event.values)), event.studio.offer, event.studio.exposure)
    event.studio.offer.save(name, preset_content(name, plan.config, plan.requests[0]))
    event.fill(event.page.editor.preset_values(name), task=event.values["task"])
    empty = {"high": "", "low": "", "strength_high": 1.0, "strength_low": 1.0}  # they are the preset's own now
    event.set_fields(
        new_name="", **{f"lora_{row}_{part}": value for row in range(LORA_ROWS) for part, value in empty.items()}
    )
    event.updates |= dict.fromkeys(event.inputs.lora_rows, gr.Row(visible=False))


def restored(event: PageEvent) -> None:
    """On dropping or choosing a video made here: show it and fill in its settings."""
    file = event.data[event.page.restore]
    if file:
        event.keep_fields()
        default = {task: event.studio.default_for(task) for task in ("t2v", "i2v")}
        run = recorded_run(read_settings(file), event.studio.offer, default)
        event.fill_run(run.preset, run.config, run.request, files=run.files, missing=run.missing)
        event.change(job="", pinned=True, uploaded=event.studio.keep_upload(Path(file)))
        event.state.problem = None
