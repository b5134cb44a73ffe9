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

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs.store import Job
from lightx2v.media.mp4 import read_settings

from ..backend.visitor import Visitor
from ..form.editor import Updates, form_of, preset_values
from ..form.fields import LORA_ROWS, Plan, pair_of, plan
from .turn import Data, Screen, Turn


class Handlers:
    """Events of the page itself and of its fields."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._studio, self._inputs = screen, screen.studio, screen.inputs

    # ---- looking ------------------------------------------------------------------------------------------------

    def opened(self, data: Data, request: gr.Request) -> Updates:
        """The page was loaded: the visitor is known again, and sees the run that the address names."""
        stored = data[self._screen.session]
        with self._screen.turn(data) as turn:
            known = Visitor.of(stored, request.headers.get("accept-language", ""))
            # A new visitor may have pressed something before this is answered.
            turn.visitor = known if stored else replace(known, owner=turn.visitor.owner)
            asked = request.query_params.get("job", "")
            if asked and self._studio.own(turn.visitor.owner, asked) is not None:
                turn.change(job=asked, pinned=turn.visitor.pinned and turn.visitor.job == asked)
            turn.change(editing="", shown="")
            if (values := self._screen.stored_values(stored)) is not None:
                turn.fill(values, task=values["task"])
            # Built open and closed here: gradio mounts a closed accordion's fields when it is first opened, and then
            # puts the values of the last answer over what was typed meanwhile.
            for box in filter(None, (self._inputs.advanced, self._inputs.files_box)):
                turn.updates[box] = gr.update(open=False)
            if turn.visitor.language != "en":
                turn.relabel()
            return turn.answer()

    def tick(self, data: Data) -> Updates:
        """Every second or few: whatever changed."""
        with self._screen.turn(data) as turn:
            return turn.answer()

    # ---- making -------------------------------------------------------------------------------------------------

    def generate(self, data: Data) -> Updates:
        """One click: one job or several, or new settings for the job that is edited."""
        with self._screen.turn(data) as turn:
            turn.tab.problem = None
            try:
                planned = plan(form_of(turn.values), self._studio.tasks, self._studio.exposure)
                if turn.visitor.editing:
                    self._save_edit(turn.visitor, planned)
                    turn.change(editing="")
                else:
                    jobs = self._submit_all(turn, planned)
                    turn.change(job=jobs[0].id, pinned=False, shown="")
            except LightX2VError as error:
                turn.refuse(error)
            return turn.answer()

    def generate_on_gpu(self, data: Data) -> Iterator[Updates]:
        """On ZeroGPU: the event owns the run, and ends it when the visitor leaves. See `zerogpu.py`."""
        lender, planned, refused = self._studio.lender, None, gr.skip()
        with self._screen.turn(data) as turn:
            turn.tab.problem = None
            try:
                planned = plan(form_of(turn.values), self._studio.tasks, self._studio.exposure)
                if lender is None or planned.config != lender.config:
                    raise BadRequest("This page runs one model. Choose its preset from the list.")
            except LightX2VError as error:
                turn.refuse(error)
                refused = turn.answer()
                planned = None
        if lender is None or planned is None:
            yield refused
            return
        with closing(lender.run(planned.requests[0], owner=turn.visitor.owner, preset=planned.preset)) as jobs:
            for job in jobs:
                with self._screen.turn(data) as turn:
                    turn.change(job=job.id, pinned=False, shown="")
                    updates = turn.answer()
                yield updates

    def _submit_all(self, turn: Turn, planned: Plan) -> list[Job]:
        """Queues every request; where one is refused, those that are queued stay and the reason is told."""
        jobs: list[Job] = []
        for request in planned.requests:
            try:
                job = self._studio.submit(planned.config, request, owner=turn.visitor.owner, preset=planned.preset)
            except LightX2VError as error:
                if not jobs:
                    raise
                turn.refuse(BadRequest(f"{len(jobs)} / {len(planned.requests)}: {error}"))
                break
            jobs.append(job)
        return jobs

    def _save_edit(self, visitor: Visitor, planned: Plan) -> None:
        """The edited job gets the new settings."""
        job = self._studio.own(visitor.owner, visitor.editing)
        if job is None or job.state != "queued":
            raise BadRequest("The run that you edited has begun or is gone. Press Generate again for a new one.")
        request, *more = planned.requests
        if more:
            raise BadRequest(
                f"One run is edited, and these are {1 + len(more)}. Set videos to 1, and leave one prompt in the box."
            )
        self._studio.edit(job, planned.config, request, preset=planned.preset)

    # ---- editing the form ---------------------------------------------------------------------------------------

    def picked(self, data: Data, event: gr.EventData) -> Updates:
        """Another preset from the list: its own settings; the prompt, pictures, seed and LoRAs stay."""
        sent = event._data if isinstance(event._data, dict) else {}
        name = str(sent.get("name", ""))
        with self._screen.turn(data) as turn:
            task = turn.values["task"]
            if self._studio.tasks.get(name) == task:
                turn.fill(preset_values(name), task=task)
            return turn.answer()

    def task_changed(self, data: Data) -> Updates:
        """Text or image: the preset of the same kind for it."""
        with self._screen.turn(data) as turn:
            name = self._studio.default_for(turn.values["task"], turn.values["preset"])
            turn.fill(preset_values(name), task=self._studio.tasks[name])
            del turn.updates[self._inputs.fields["task"]]  # it may have been changed again by now
            return turn.answer()

    def size_chosen(self, data: Data) -> Updates:
        """Height and width from the two rows of choices."""
        with self._screen.turn(data) as turn:
            height, width = self._screen.editor.size(turn.preset, turn.values)
            return self._derived(turn, height=height, width=width)

    def length_chosen(self, data: Data) -> Updates:
        """Frames from the row of lengths."""
        with self._screen.turn(data) as turn:
            return self._derived(turn, frames=turn.values["length"])

    def size_typed(self, data: Data) -> Updates:
        """A size of one's own is none of the choices."""
        with self._screen.turn(data) as turn:
            return self._derived(turn, size=None, **({"shape": None} if turn.values["task"] == "t2v" else {}))

    def _derived(self, turn: Turn, **values: Any) -> Updates:
        for name, value in values.items():
            turn.updates[self._inputs.fields[name]] = gr.update(value=value)
        turn.values |= values
        return turn.answer()

    def edited(self, data: Data) -> Updates:
        """A field that changes the cost."""
        return self.tick(data)

    def pictured(self, data: Data) -> Updates:
        """A picture was chosen or taken away."""
        with self._screen.turn(data) as turn:
            turn.tab.pictures = {name: turn.values[name] for name in PICTURES}
            turn.tab.problem = None
            return turn.answer()

    def paired(self, data: Data) -> Updates:
        """A high-noise LoRA by name brings its low-noise one; of one that is not there the cost says so."""
        with self._screen.turn(data) as turn:
            pairs = {}
            for row in range(LORA_ROWS):
                high, low = (turn.values[f"lora_{row}_{part}"] for part in ("high", "low"))
                if high and not low and (pair := pair_of(str(high))):
                    pairs[f"lora_{row}_low"] = pair
            return self._derived(turn, **pairs)

    def lora_added(self, data: Data) -> Updates:
        """One more row: the first that holds nothing."""
        fields = self._inputs.fields
        for row, box in enumerate(self._inputs.lora_rows):
            if not data[fields[f"lora_{row}_high"]] and not data[fields[f"lora_{row}_low"]]:
                return {box: gr.Row(visible=True)}
        return gr.skip()

    def lora_removed(self, row: int, data: Data) -> Updates:
        """The row is emptied and goes; the others stay where they are."""
        with self._screen.turn(data) as turn:
            turn.updates[self._inputs.lora_rows[row]] = gr.Row(visible=False)
            empty = {"high": "", "low": "", "strength_high": 1.0, "strength_low": 1.0}
            return self._derived(turn, **{f"lora_{row}_{part}": value for part, value in empty.items()})

    def restored(self, data: Data) -> Updates:
        """One of our videos was dropped or chosen: it is shown, and its settings are filled in."""
        file = data[self._screen.outputs.restore]
        if not file:
            return gr.skip()
        with self._screen.turn(data) as turn:
            try:
                turn.fill_run(*self._from_settings(read_settings(file)))
                turn.change(job="", pinned=True, shown=self._studio.show_file(Path(file)))
                turn.tab.problem = None
            except LightX2VError as error:
                turn.refuse(error)
            return turn.answer()

    def _from_settings(self, settings: Mapping[str, Any]) -> tuple[str, EngineConfig, Request]:
        """Preset, engine and request of a video's settings. A picture it names is looked for among our own."""
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
