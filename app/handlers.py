"""What happens when somebody opens the page, presses Generate or edits a field: one short method for each event.

None of them runs a model or waits for one. They read or change the job manager and say what is to be shown; so
a closed tab, a reload or a lost network never touches a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from lightx2v.config import resolve
from lightx2v.engine_config import EngineConfig
from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs import Job
from lightx2v.mp4 import read_settings
from lightx2v.request import Request

from . import panels
from .editing import Updates, form_of, preset_values, together
from .form import LORA_ROWS, Plan, pair_of, plan
from .screen import Data, Screen
from .strings import Words
from .studio import settings_of
from .visitor import Visitor


class Handlers:
    """Events of the page itself and of its fields."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._studio, self._inputs = screen, screen.studio, screen.inputs

    # ---- looking ------------------------------------------------------------------------------------------------

    def opened(self, data: Data, request: gr.Request) -> Updates:
        """The page was loaded: the visitor is known again, and sees the run that the address names."""
        visitor = Visitor.of(data[self._screen.session], request.headers.get("accept-language", ""))
        asked = request.query_params.get("job", "")
        if asked and self._studio.own(visitor.owner, asked) is not None:
            visitor = replace(visitor, job=asked, pinned=visitor.pinned and visitor.job == asked)
        visitor = replace(visitor, editing="", shown="")
        words = Words(visitor.language)
        stored = data[self._screen.session].get("form") if isinstance(data[self._screen.session], dict) else None
        values = self._screen.stored_values(stored) or preset_values(self._studio.default_preset)
        task = settings_of(values["preset"]).preset.task
        updates = self._screen.editor.fill(words, values, task=task)
        if visitor.language != "en":
            updates = together(self._screen.relabel(words, task), updates)
        # Built open and closed here: gradio mounts a closed accordion's fields when it is first opened, and then puts
        # the values of the last answer over what was typed meanwhile.
        updates |= {self._inputs.advanced: gr.Accordion(open=False)}
        return updates | self._screen.show(visitor, {}, form=stored)

    def tick(self, data: Data) -> Updates:
        """Every second or few: what changed. Also the list of files, while it changes."""
        visitor = Visitor.of(data[self._screen.session])
        updates = self._screen.show(visitor, data[self._screen.seen], stored=data[self._screen.session])
        if self._inputs.files is not None:
            status = self._studio.files.status(settings_of(self._screen.preset(data)).engine)
            if status.changing:
                updates |= self._screen.editor.files(Words(visitor.language), self._screen.preset(data))
        return updates or gr.skip()

    def finished(self, data: Data) -> Updates:
        """A run ended and was measured: what the next one costs is known better."""
        words, values = Words(Visitor.of(data[self._screen.session]).language), self._screen.values(data)
        cost = self._screen.editor.cost(words, values)
        return self._screen.editor.show_preset(words, self._screen.preset(data)) | {self._inputs.cost: cost}

    # ---- making -------------------------------------------------------------------------------------------------

    def generate(self, data: Data) -> Updates:
        """One click: one job or several, or new settings for the job that is edited."""
        visitor = Visitor.of(data[self._screen.session])
        words, values = Words(visitor.language), self._screen.values(data)
        try:
            planned = plan(form_of(values), self._studio.tasks, self._studio.exposure)
            if visitor.editing:
                visitor = self._save_edit(visitor, planned)
            else:
                jobs = self._submit_all(visitor, planned)
                visitor = replace(visitor, job=jobs[0].id, pinned=False, shown="")
                if len(jobs) > 1:
                    gr.Info(words("queued_n", n=len(jobs)), title=words("queue"), duration=4)
        except LightX2VError as error:
            return {self._inputs.cost: panels.problem(str(error))}
        updates = self._screen.show(visitor, data[self._screen.seen], form=self._screen.storable(values))
        return (
            updates
            | self._screen.button(words, visitor, values)
            | {self._inputs.cost: self._screen.editor.cost(words, values)}
        )

    def generate_on_gpu(self, data: Data) -> Iterator[Updates]:
        """On ZeroGPU: the event owns the run, and ends it when the visitor leaves. See `zerogpu.py`."""
        visitor = Visitor.of(data[self._screen.session])
        values, seen = self._screen.values(data), dict(data[self._screen.seen] or {})
        lender = self._studio.lender
        try:
            planned = plan(form_of(values), self._studio.tasks, self._studio.exposure)
            if lender is None or planned.config != lender.config:
                raise BadRequest("This page runs one model. Choose its preset from the list.")
        except LightX2VError as error:
            yield {self._inputs.cost: panels.problem(str(error))}
            return
        with closing(lender.run(planned.requests[0], owner=visitor.owner, preset=planned.preset)) as jobs:
            for job in jobs:
                visitor = replace(visitor, job=job.id, pinned=False, shown="")
                updates = self._screen.show(visitor, seen, form=self._screen.storable(values))
                seen = updates.get(self._screen.seen, seen)
                yield updates

    def _submit_all(self, visitor: Visitor, planned: Plan) -> list[Job]:
        """Queues every request; where one is refused, those that are queued stay and the reason is told."""
        jobs: list[Job] = []
        for request in planned.requests:
            try:
                job = self._studio.submit(planned.config, request, owner=visitor.owner, preset=planned.preset)
            except LightX2VError as error:
                if not jobs:
                    raise
                gr.Warning(f"{len(jobs)} / {len(planned.requests)}: {error}")
                break
            jobs.append(job)
        return jobs

    def _save_edit(self, visitor: Visitor, planned: Plan) -> Visitor:
        """The edited job gets the new settings; with another engine it is a new job in the same place."""
        job = self._studio.own(visitor.owner, visitor.editing)
        request = planned.requests[0]
        if job is None or job.state != "queued":
            raise BadRequest("The run that you edited has begun or is gone. Press Generate again for a new one.")
        if job.config == planned.config and job.preset == planned.preset:
            self._studio.jobs.edit(job.id, request)
        else:
            new = self._studio.submit(planned.config, request, owner=visitor.owner, preset=planned.preset)
            self._studio.jobs.move(new.id, job.position or 1)
            self._studio.jobs.cancel(job.id)
            self._studio.jobs.delete(job.id)
        return replace(visitor, editing="")

    # ---- editing the form ---------------------------------------------------------------------------------------

    def picked(self, data: Data, event: gr.EventData) -> Updates:
        """Another preset from the list."""
        visitor, values = Visitor.of(data[self._screen.session]), self._screen.values(data)
        sent = event._data if isinstance(event._data, dict) else {}
        name = str(sent.get("name", ""))
        if self._studio.tasks.get(name) != values["task"]:
            return gr.skip()
        return self._screen.editor.use_preset(Words(visitor.language), name, values)

    def task_changed(self, data: Data) -> Updates:
        """Text or image: the preset of the same kind for it."""
        visitor, values = Visitor.of(data[self._screen.session]), self._screen.values(data)
        name = self._studio.default_for(values["task"], values["preset"])
        return self._screen.editor.use_preset(Words(visitor.language), name, values)

    def size_chosen(self, data: Data) -> Updates:
        values = self._screen.values(data)
        updates = self._screen.editor.resize(values)
        fields = self._inputs.fields
        values |= {"height": updates[fields["height"]], "width": updates[fields["width"]]}
        return updates | self._recount(data, values)

    def length_chosen(self, data: Data) -> Updates:
        values = self._screen.values(data)
        values["frames"] = values["length"]
        return {self._inputs.fields["frames"]: values["length"]} | self._recount(data, values)

    def edited(self, data: Data) -> Updates:
        """A field that changes the cost."""
        return self._recount(data, self._screen.values(data))

    def size_typed(self, data: Data) -> Updates:
        """A size of one's own is none of the choices."""
        fields = self._inputs.fields
        values = {**self._screen.values(data), "size": None}
        updates: Updates = {fields["size"]: gr.Radio(value=None)}
        if values["task"] == "t2v":
            updates[fields["shape"]] = gr.Radio(value=None)
        return updates | self._recount(data, values)

    def _recount(self, data: Data, values: Mapping[str, Any]) -> Updates:
        visitor = Visitor.of(data[self._screen.session])
        words = Words(visitor.language)
        updates: Updates = {self._inputs.cost: self._screen.editor.cost(words, values)} | self._screen.button(
            words, visitor, values
        )
        if values["task"] == "i2v":
            updates[self._inputs.crop] = self._screen.editor.crop(words, values)
        return updates

    def paired(self, data: Data) -> Updates:
        """A high-noise LoRA by name brings its low-noise one."""
        fields, updates = self._inputs.fields, {}
        for row in range(LORA_ROWS):
            high, low = fields[f"lora_{row}_high"], fields[f"lora_{row}_low"]
            if data[high] and not data[low] and (pair := pair_of(str(data[high]))):
                updates[low] = pair
        return updates or gr.skip()

    def lora_added(self, data: Data) -> Updates:
        """One more row: the first that holds nothing."""
        fields = self._inputs.fields
        for row, box in enumerate(self._inputs.lora_rows):
            if not data[fields[f"lora_{row}_high"]] and not data[fields[f"lora_{row}_low"]]:
                return {box: gr.Row(visible=True)}
        return gr.skip()

    def restored(self, data: Data) -> Updates:
        """One of our videos was dropped or chosen: it is shown, and its settings are filled in."""
        visitor, file = Visitor.of(data[self._screen.session]), data[self._screen.outputs.restore]
        if not file:
            return gr.skip()
        try:
            settings = read_settings(file)
            preset, config, request = self._from_settings(settings)
            updates = self._screen.fill_run(visitor, preset, config, request)
        except LightX2VError as error:
            return {self._inputs.cost: panels.problem(str(error))}
        gr.Info(Words(visitor.language)("restored"), duration=3)
        visitor = replace(visitor, job="", pinned=True, shown=self._studio.show_file(Path(file)))
        return updates | self._screen.show(visitor, data[self._screen.seen], stored=data[self._screen.session])

    def _from_settings(self, settings: Mapping[str, Any]) -> tuple[str, EngineConfig, Request]:
        """Preset, engine and request of a video's settings. A picture it names is anybody's path, and not read."""
        data = settings.get("request")
        if not isinstance(data, Mapping):
            raise BadRequest("The video carries no settings of this app. Use one that was made here.")
        task = "t2v" if data.get("task") == "t2v" else "i2v"
        preset = str(settings.get("preset", ""))
        if self._studio.tasks.get(preset) != task:
            preset = self._studio.default_for(task)
        config = resolve(preset).engine
        request = Request.from_json(dict(data))
        return preset, config, replace(request, loras=None)
