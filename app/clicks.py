"""What the buttons inside rendered HTML do: in the stage, the report, the history, the queue, the header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs import Job
from lightx2v.media import read_frame

from . import panels
from .editing import Updates, picture_of, preset_values
from .examples import picture
from .form import new_seed
from .remedies import remedied
from .screen import Data, Screen
from .strings import LANGUAGES, Words
from .studio import settings_of
from .visitor import Visitor


class Clicks:
    """`act` is the event; which button it was, and for which run, comes from outside and is checked."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._studio, self._inputs = screen, screen.studio, screen.inputs

    def act(self, data: Data, event: gr.EventData) -> Updates:
        """A button in the stage, the report, the history, the queue or the header."""
        visitor = Visitor.of(data[self._screen.session])
        sent = event._data if isinstance(event._data, dict) else {}
        name = str(sent.get("act", ""))
        updates: Updates = {}
        try:
            if name in ("language", "example", "download", "cancel_download", "swap", "clear"):
                visitor, updates = self._act_on_page(visitor, name, sent, data)
            else:
                job = self._studio.own(visitor.owner, str(sent.get("id", "")))
                if job is None:
                    raise BadRequest(Words(visitor.language)("not_yours"))
                visitor, updates = self._act_on_job(visitor, name, job)
        except LightX2VError as error:
            updates = {self._inputs.cost: panels.problem(str(error))}
        return (
            updates | self._screen.show(visitor, data[self._screen.seen], stored=data[self._screen.session])
            or gr.skip()
        )

    def _act_on_page(self, visitor: Visitor, name: str, sent: Mapping[str, Any], data: Data) -> tuple[Visitor, Updates]:
        if name == "language" and sent.get("name") in LANGUAGES:
            visitor = replace(visitor, language=sent["name"])
            words, values = Words(visitor.language), self._screen.values(data)
            updates = self._screen.relabel(words, values["task"]) | self._screen.editor.show_preset(
                words, self._screen.preset(data)
            )
            cost = self._screen.editor.cost(words, values)
            return visitor, updates | self._screen.button(words, visitor, values) | {self._inputs.cost: cost}
        if name == "example":
            fields = self._inputs.fields
            updates: Updates = {fields["prompt"]: str(sent.get("text", ""))[:2000]}
            if (path := picture(str(sent.get("picture", "")))) is not None:
                updates[fields["image_path"]] = picture_of(str(path))
            return visitor, updates
        if name in ("download", "cancel_download") and self._inputs.files is not None:
            config = settings_of(self._screen.preset(data)).engine
            self._studio.files.download(config) if name == "download" else self._studio.files.cancel()
            return visitor, self._screen.editor.files(Words(visitor.language), self._screen.preset(data))
        if name == "swap":
            return replace(visitor, compared=visitor.compared[::-1]), {}
        return (replace(visitor, compared=()), {}) if name == "clear" else (visitor, {})

    def _act_on_job(self, visitor: Visitor, name: str, job: Job) -> tuple[Visitor, Updates]:
        if name in ("stop", "cancel"):
            self._studio.stop(job)
        elif name == "delete":
            self._studio.delete(job)
            visitor = replace(visitor, compared=tuple(id for id in visitor.compared if id != job.id))
        elif name in ("up", "down"):
            waiting = sorted((j for j in self._studio.runs(visitor.owner) if j.position), key=lambda j: j.position or 0)
            place = [j.id for j in waiting].index(job.id) + (-1 if name == "up" else 1) if job.position else -1
            if 0 <= place < len(waiting):
                self._studio.swap(job, waiting[place])
        elif name == "compare":
            visitor = visitor.with_compared(job.id)
            words, count = Words(visitor.language), len(visitor.compared)
            gr.Info(words("compare_two" if count == 2 else "compare_one"), title=words("compare"), duration=4)
        elif name == "restore":
            return replace(visitor, job=job.id, pinned=True, shown=""), self._screen.fill_run(
                visitor, job.preset, job.config, job.request
            )
        elif name == "edit":
            visitor = replace(visitor, editing="" if visitor.editing == job.id else job.id)
            updates = self._screen.fill_run(visitor, job.preset, job.config, job.request) if visitor.editing else {}
            return visitor, updates | self._screen.button(Words(visitor.language), visitor)
        elif name == "same_seed":
            return visitor, self._screen.fill_run(
                visitor, job.preset, job.config, replace(job.request, seed=_seed_of(job))
            )
        elif name == "again":
            request = replace(job.request, seed=new_seed())
            new = self._studio.submit(job.config, request, owner=visitor.owner, preset=job.preset)
            visitor = replace(visitor, job=new.id, pinned=False, shown="")
        elif name == "last_frame":
            return visitor, self._continue(visitor, job)
        elif (changed := remedied(name, job)) is not None and job.over:
            new = self._studio.submit(*changed, owner=visitor.owner, preset=job.preset)
            return replace(visitor, job=new.id, pinned=False), self._screen.fill_run(visitor, job.preset, *changed)
        return visitor, {}

    def _continue(self, visitor: Visitor, job: Job) -> Updates:
        """The last frame becomes the first of an image-to-video run of the same kind and size."""
        path = self._studio.video_of(job.id)
        if path is None:
            raise BadRequest(Words(visitor.language)("not_yours"))
        words, name = Words(visitor.language), self._studio.default_for("i2v", job.preset)
        values = preset_values(name)
        values |= {key: getattr(job.request, key) for key in ("prompt", "height", "width", "frames", "fps")}
        updates = self._screen.editor.fill(words, {**values, "match_image": True}, task="i2v")
        picture = read_frame(path, -1)
        return updates | {self._inputs.fields["image_path"]: picture}


def _seed_of(job: Job) -> int:
    return job.result["seed"] if job.result else job.request.seed
