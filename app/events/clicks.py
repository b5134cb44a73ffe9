"""What the buttons inside rendered HTML do: in the stage, the report, the history, the queue, the header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs.store import Job
from lightx2v.media.video_writer import read_frame

from ..backend.studio import settings_of
from ..form.editor import Updates, picture_of, preset_values
from ..form.examples import picture
from ..form.fields import new_seed
from ..form.inputs import text_of
from ..strings import LANGUAGES
from ..views.retries import remedied
from .turn import Data, Screen, Turn


class Clicks:
    """`act` is the event; which button it was, and for which run, comes from outside and is checked."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._studio, self._inputs = screen, screen.studio, screen.inputs

    def act(self, data: Data, event: gr.EventData) -> Updates:
        """A button in the stage, the report, the history, the queue or the header."""
        sent = event._data if isinstance(event._data, dict) else {}
        name = str(sent.get("act", ""))
        with self._screen.turn(data) as turn:
            turn.tab.problem = None
            try:
                if name in ("language", "example", "download", "cancel_download", "swap", "clear"):
                    self._act_on_page(turn, name, sent)
                else:
                    job = self._studio.own(turn.visitor.owner, str(sent.get("id", "")))
                    if job is None:
                        raise BadRequest(turn.words("not_yours"))
                    self._act_on_job(turn, name, job)
            except LightX2VError as error:
                turn.refuse(error)
            return turn.answer()

    def _act_on_page(self, turn: Turn, name: str, sent: Mapping[str, Any]) -> None:
        if name == "language" and (language := str(sent.get("name"))) in LANGUAGES:
            turn.change(language=language)
            turn.relabel()
        elif name == "example":
            fields = self._inputs.fields
            turn.values["prompt"] = turn.updates[fields["prompt"]] = text_of(sent.get("text", ""))
            if (path := picture(str(sent.get("picture", "")))) is not None:
                turn.updates[fields["image_path"]] = picture_of(str(path))
        elif name in ("download", "cancel_download") and self._inputs.files is not None:
            config = settings_of(turn.preset).engine
            self._studio.files.download(config) if name == "download" else self._studio.files.cancel()
        elif name == "swap":
            turn.change(compared=turn.visitor.compared[::-1])
        elif name == "clear":
            turn.change(compared=())

    def _act_on_job(self, turn: Turn, name: str, job: Job) -> None:
        visitor = turn.visitor
        if name in ("stop", "cancel"):
            self._studio.stop(job)
        elif name == "delete":
            self._studio.delete(job)
            turn.change(compared=tuple(id for id in visitor.compared if id != job.id))
        elif name in ("up", "down"):
            waiting = sorted((j for j in self._studio.runs(visitor.owner) if j.position), key=lambda j: j.position or 0)
            ids = [j.id for j in waiting]  # without the job, if it has begun meanwhile
            place = ids.index(job.id) + (-1 if name == "up" else 1) if job.id in ids else -1
            if 0 <= place < len(waiting):
                self._studio.swap(job, waiting[place])
        elif name == "compare":
            turn.visitor = visitor.with_compared(job.id)
        elif name == "restore":
            turn.change(job=job.id, pinned=True, shown="")
            turn.fill_run(job.preset, job.config, job.request)
        elif name == "edit":
            turn.change(editing="" if visitor.editing == job.id else job.id)
            if turn.visitor.editing:
                turn.fill_run(job.preset, job.config, job.request)
        elif name == "same_seed":
            turn.fill_run(job.preset, job.config, replace(job.request, seed=_seed_of(job)))
        elif name == "again":
            request = replace(job.request, seed=new_seed())
            new = self._studio.submit(job.config, request, owner=visitor.owner, preset=job.preset)
            turn.change(job=new.id, pinned=False, shown="")
        elif name == "last_frame":
            self._continue(turn, job)
        elif (changed := remedied(name, job)) is not None and job.over:
            new = self._studio.submit(*changed, owner=visitor.owner, preset=job.preset)
            turn.change(job=new.id, pinned=False)
            turn.fill_run(job.preset, *changed)

    def _continue(self, turn: Turn, job: Job) -> None:
        """The last frame becomes the first of an image-to-video run of the same kind and size."""
        path = self._studio.video_of(job.id)
        if path is None:
            raise BadRequest(turn.words("not_yours"))
        values = preset_values(self._studio.default_for("i2v", job.preset))
        values |= {key: getattr(job.request, key) for key in ("prompt", "height", "width", "frames", "fps")}
        turn.fill({**values, "match_image": True, "last_frame_path": None}, task="i2v")
        turn.updates[self._inputs.fields["image_path"]] = read_frame(path, -1)


def _seed_of(job: Job) -> int:
    return job.result["seed"] if job.result else job.request.seed
