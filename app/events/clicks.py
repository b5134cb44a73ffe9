"""Clicks on buttons inside rendered HTML: in the stage, the report, the history, the queue and the header."""

from dataclasses import replace

from lightx2v.errors import BadRequest
from lightx2v.jobs.store import Job
from lightx2v.media.video_writer import read_frame

from ..backend.studio import settings_of
from ..form.editor import picture_of, preset_values
from ..form.examples import picture
from ..form.fields import new_seed
from ..form.inputs import text_of
from ..strings import LANGUAGES
from ..views.report import seed_of
from ..views.retries import retry_options
from .page_controller import PageEvent

ON_PAGE = ("language", "example", "download", "cancel_download", "swap", "clear")
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
        event.values["prompt"] = event.updates[inputs.fields["prompt"]] = text_of(sent.get("text", ""))
        if (path := picture(str(sent.get("picture", "")))) is not None:
            event.updates[inputs.fields["image_path"]] = picture_of(str(path))
    elif name in ("download", "cancel_download") and inputs.files is not None:
        config = settings_of(event.preset).engine
        studio.files.download(config) if name == "download" else studio.files.cancel()
    elif name == "swap":
        event.change(compared=event.session.compared[::-1])
    elif name == "clear":
        event.change(compared=())


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
    elif name == "restore":
        event.change(job=job.id, pinned=True, uploaded="")
        event.fill_run(job.preset, job.config, job.request)
    elif name == "edit":
        event.change(editing="" if session.editing == job.id else job.id)
        if event.session.editing:
            event.fill_run(job.preset, job.config, job.request)
    elif name == "same_seed":
        event.fill_run(job.preset, job.config, replace(job.request, seed=seed_of(job)))
    elif name == "again":
        new = event.submit(job.preset, job.config, replace(job.request, seed=new_seed()))
        event.change(job=new.id, pinned=False, uploaded="")
    elif name == "last_frame":
        _continue(event, job)
    elif (changed := retry_options(job, offload=True).get(name)) is not None:
        new = event.submit(job.preset, *changed)
        event.change(job=new.id, pinned=False)
        event.fill_run(job.preset, *changed)


def _continue(event: PageEvent, job: Job) -> None:
    """Make the last frame the first frame of an image-to-video run with the same variant and size."""
    path = event.studio.video_of(job.id)
    if path is None:
        raise BadRequest(event.words("not_yours"))
    values = preset_values(event.studio.default_for("i2v", job.preset))
    values |= {key: getattr(job.request, key) for key in ("prompt", "height", "width", "frames", "fps")}
    event.fill({**values, "match_image": True, "last_frame_path": None}, task="i2v")
    event.updates[event.inputs.fields["image_path"]] = read_frame(path, -1)
