"""What happens when somebody does something: each event of the page is one short method here.

None of them runs a model or waits for one. They read or change the job manager and say what is to be shown; so
a closed tab, a reload or a lost network never touches a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from lightx2v.config import resolve
from lightx2v.engine_config import EngineConfig
from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs import Job
from lightx2v.media import read_frame
from lightx2v.mp4 import read_settings
from lightx2v.request import Request

from . import panels
from .editing import Editor, Updates, form_of, preset_values
from .form import LORA_ROWS, Plan, fields_of, new_seed, pair_of, plan
from .inputs import Inputs
from .remedies import remedied
from .strings import LANGUAGES, Words
from .studio import Studio, settings_of
from .views import Outputs, render
from .visitor import Visitor, look

BUSY_SECONDS, IDLE_SECONDS = 1.0, 4.0


class Handlers:
    """One for the page, for all visitors; whatever is a visitor's own comes in and goes out as values."""

    def __init__(self, studio: Studio, inputs: Inputs, outputs: Outputs, session: Any, seen: Any, timer: Any) -> None:
        self.studio, self.inputs, self.outputs = studio, inputs, outputs
        self.session, self.seen, self.timer = session, seen, timer
        self.editor = Editor(studio, inputs)

    # ---- looking ------------------------------------------------------------------------------------------------

    def opened(self, data: dict[Component, Any], request: gr.Request) -> Updates:
        """The page was loaded: the visitor is known again, and sees the run that the address names."""
        visitor = Visitor.of(data[self.session], request.headers.get("accept-language", ""))
        asked = request.query_params.get("job", "")
        if asked and self.studio.own(visitor.owner, asked) is not None:
            visitor = replace(visitor, job=asked, pinned=visitor.pinned and visitor.job == asked)
        visitor = replace(visitor, editing="", shown="")
        words = Words(visitor.language)
        updates = self._relabel(words) if visitor.language != "en" else {}
        stored = data[self.session].get("form") if isinstance(data[self.session], dict) else None
        values = self._stored_values(stored) or preset_values(self.studio.default_preset)
        updates |= self.editor.fill(words, values, task=settings_of(values["preset"]).preset.task)
        return updates | self._show(visitor, {}, form=stored)

    def tick(self, data: dict[Component, Any]) -> Updates:
        """Every second or few: what changed. Also the list of files, while something is downloaded."""
        visitor = Visitor.of(data[self.session])
        updates = self._show(visitor, data[self.seen], stored=data[self.session])
        if self.inputs.files is not None:
            status = self.studio.files.status(settings_of(self._preset(data)).engine)
            if status.download is not None:
                updates |= self.editor.files(Words(visitor.language), self._preset(data))
        return updates or gr.skip()

    def finished(self, data: dict[Component, Any]) -> Updates:
        """A run ended and was measured: what the next one costs is known better."""
        words, values = Words(Visitor.of(data[self.session]).language), self._values(data)
        cost = self.editor.cost(words, values)
        return self.editor.show_preset(words, self._preset(data)) | {self.inputs.cost: cost}

    # ---- making -------------------------------------------------------------------------------------------------

    def generate(self, data: dict[Component, Any]) -> Updates:
        """One click: one job or several, or new settings for the job that is edited."""
        visitor = Visitor.of(data[self.session])
        words, values = Words(visitor.language), self._values(data)
        try:
            planned = plan(form_of(values), self.studio.tasks, self.studio.exposure)
            if visitor.editing:
                visitor = self._save_edit(visitor, planned)
            else:
                jobs = self._submit_all(visitor, planned)
                visitor = replace(visitor, job=jobs[0].id, pinned=False, shown="")
        except LightX2VError as error:
            return {self.inputs.cost: panels.problem(str(error))}
        updates = self._show(visitor, data[self.seen], form=self._storable(values))
        return updates | self._button(words, visitor, values) | {self.inputs.cost: self.editor.cost(words, values)}

    def _submit_all(self, visitor: Visitor, planned: Plan) -> list[Job]:
        """Queues every request; where one is refused, those that are queued stay and the reason is told."""
        jobs: list[Job] = []
        for request in planned.requests:
            try:
                job = self.studio.submit(planned.config, request, owner=visitor.owner, preset=planned.preset)
            except LightX2VError as error:
                if not jobs:
                    raise
                gr.Warning(f"{len(jobs)} / {len(planned.requests)}: {error}")
                break
            jobs.append(job)
        return jobs

    def _save_edit(self, visitor: Visitor, planned: Plan) -> Visitor:
        """The edited job gets the new settings; with another engine it is a new job in the same place."""
        job = self.studio.own(visitor.owner, visitor.editing)
        request = planned.requests[0]
        if job is None or job.state != "queued":
            raise BadRequest("The run that you edited has begun or is gone. Press Generate again for a new one.")
        if job.config == planned.config and job.preset == planned.preset:
            self.studio.jobs.edit(job.id, request)
        else:
            new = self.studio.submit(planned.config, request, owner=visitor.owner, preset=planned.preset)
            self.studio.jobs.move(new.id, job.position or 1)
            self.studio.jobs.cancel(job.id)
            self.studio.jobs.delete(job.id)
        return replace(visitor, editing="")

    # ---- clicks in rendered HTML --------------------------------------------------------------------------------

    def act(self, data: dict[Component, Any], event: gr.EventData) -> Updates:
        """A button in the stage, the report, the history, the queue or the header."""
        visitor = Visitor.of(data[self.session])
        sent = event._data if isinstance(event._data, dict) else {}
        name = str(sent.get("act", ""))
        updates: Updates = {}
        try:
            if name in ("language", "example", "download", "cancel_download", "swap", "clear"):
                visitor, updates = self._act_on_page(visitor, name, sent, data)
            else:
                job = self.studio.own(visitor.owner, str(sent.get("id", "")))
                if job is None:
                    raise BadRequest(Words(visitor.language)("not_yours"))
                visitor, updates = self._act_on_job(visitor, name, job)
        except LightX2VError as error:
            updates = {self.inputs.cost: panels.problem(str(error))}
        return updates | self._show(visitor, data[self.seen], stored=data[self.session]) or gr.skip()

    def _act_on_page(
        self, visitor: Visitor, name: str, sent: Mapping[str, Any], data: dict[Component, Any]
    ) -> tuple[Visitor, Updates]:
        if name == "language" and sent.get("name") in LANGUAGES:
            visitor = replace(visitor, language=sent["name"])
            words, values = Words(visitor.language), self._values(data)
            updates = self._relabel(words) | self.editor.show_preset(words, self._preset(data))
            cost = self.editor.cost(words, values)
            return visitor, updates | self._button(words, visitor, values) | {self.inputs.cost: cost}
        if name == "example":
            return visitor, {self.inputs.fields["prompt"]: str(sent.get("text", ""))[:2000]}
        if name in ("download", "cancel_download") and self.inputs.files is not None:
            config = settings_of(self._preset(data)).engine
            self.studio.files.download(config) if name == "download" else self.studio.files.cancel()
            return visitor, self.editor.files(Words(visitor.language), self._preset(data))
        if name == "swap":
            return replace(visitor, compared=visitor.compared[::-1]), {}
        return (replace(visitor, compared=()), {}) if name == "clear" else (visitor, {})

    def _act_on_job(self, visitor: Visitor, name: str, job: Job) -> tuple[Visitor, Updates]:
        jobs = self.studio.jobs
        if name in ("stop", "cancel"):
            jobs.cancel(job.id)
        elif name == "delete":
            self.studio.delete(job)
            visitor = replace(visitor, compared=tuple(id for id in visitor.compared if id != job.id))
        elif name in ("up", "down"):
            waiting = sorted((j for j in self.studio.runs(visitor.owner) if j.position), key=lambda j: j.position or 0)
            place = [j.id for j in waiting].index(job.id) + (-1 if name == "up" else 1) if job.position else -1
            if 0 <= place < len(waiting):
                self.studio.swap(job, waiting[place])
        elif name == "compare":
            visitor = visitor.with_compared(job.id)
            words, count = Words(visitor.language), len(visitor.compared)
            gr.Info(words("compare_two" if count == 2 else "compare_one"), title=words("compare"), duration=4)
        elif name == "restore":
            return replace(visitor, job=job.id, pinned=True, shown=""), self._fill(
                visitor, job.preset, job.config, job.request
            )
        elif name == "edit":
            visitor = replace(visitor, editing="" if visitor.editing == job.id else job.id)
            updates = self._fill(visitor, job.preset, job.config, job.request) if visitor.editing else {}
            return visitor, updates | self._button(Words(visitor.language), visitor)
        elif name == "same_seed":
            return visitor, self._fill(visitor, job.preset, job.config, replace(job.request, seed=_seed_of(job)))
        elif name == "again":
            request = replace(job.request, seed=new_seed())
            new = self.studio.submit(job.config, request, owner=visitor.owner, preset=job.preset)
            visitor = replace(visitor, job=new.id, pinned=False, shown="")
        elif name == "last_frame":
            return visitor, self._continue(visitor, job)
        elif (changed := remedied(name, job)) is not None and job.over:
            new = self.studio.submit(*changed, owner=visitor.owner, preset=job.preset)
            return replace(visitor, job=new.id, pinned=False), self._fill(visitor, job.preset, *changed)
        return visitor, {}

    def _continue(self, visitor: Visitor, job: Job) -> Updates:
        """The last frame becomes the first of an image-to-video run of the same kind and size."""
        path = self.studio.video_of(job.id)
        if path is None:
            raise BadRequest(Words(visitor.language)("not_yours"))
        words, name = Words(visitor.language), self.studio.default_for("i2v", job.preset)
        values = preset_values(name)
        values |= {key: getattr(job.request, key) for key in ("prompt", "height", "width", "frames", "fps")}
        updates = self.editor.fill(words, {**values, "match_image": True}, task="i2v")
        picture = read_frame(path, -1)
        return updates | {self.inputs.fields["image_path"]: picture}

    # ---- editing the form ---------------------------------------------------------------------------------------

    def picked(self, data: dict[Component, Any], event: gr.EventData) -> Updates:
        """Another preset from the list."""
        visitor, values = Visitor.of(data[self.session]), self._values(data)
        sent = event._data if isinstance(event._data, dict) else {}
        name = str(sent.get("name", ""))
        if self.studio.tasks.get(name) != values["task"]:
            return gr.skip()
        return self.editor.use_preset(Words(visitor.language), name, values)

    def task_changed(self, data: dict[Component, Any]) -> Updates:
        """Text or image: the preset of the same kind for it."""
        visitor, values = Visitor.of(data[self.session]), self._values(data)
        name = self.studio.default_for(values["task"], values["preset"])
        return self.editor.use_preset(Words(visitor.language), name, values)

    def size_chosen(self, data: dict[Component, Any]) -> Updates:
        values = self._values(data)
        updates = self.editor.resize(values)
        fields = self.inputs.fields
        values |= {"height": updates[fields["height"]], "width": updates[fields["width"]]}
        return updates | self._recount(data, values)

    def length_chosen(self, data: dict[Component, Any]) -> Updates:
        values = self._values(data)
        values["frames"] = values["length"]
        return {self.inputs.fields["frames"]: values["length"]} | self._recount(data, values)

    def edited(self, data: dict[Component, Any]) -> Updates:
        """A field that changes the cost."""
        return self._recount(data, self._values(data))

    def size_typed(self, data: dict[Component, Any]) -> Updates:
        """A size of one's own is none of the choices."""
        fields = self.inputs.fields
        values = {**self._values(data), "size": None}
        updates: Updates = {fields["size"]: gr.Radio(value=None)}
        if values["task"] == "t2v":
            updates[fields["shape"]] = gr.Radio(value=None)
        return updates | self._recount(data, values)

    def _recount(self, data: dict[Component, Any], values: Mapping[str, Any]) -> Updates:
        visitor = Visitor.of(data[self.session])
        words = Words(visitor.language)
        updates: Updates = {self.inputs.cost: self.editor.cost(words, values)} | self._button(words, visitor, values)
        if values["task"] == "i2v":
            updates[self.inputs.crop] = self.editor.crop(words, values)
        return updates

    def paired(self, data: dict[Component, Any]) -> Updates:
        """A high-noise LoRA by name brings its low-noise one."""
        fields, updates = self.inputs.fields, {}
        for row in range(LORA_ROWS):
            high, low = fields[f"lora_{row}_high"], fields[f"lora_{row}_low"]
            if data[high] and not data[low] and (pair := pair_of(str(data[high]))):
                updates[low] = pair
        return updates or gr.skip()

    def lora_added(self, data: dict[Component, Any]) -> Updates:
        """One more row: the first that holds nothing."""
        fields = self.inputs.fields
        for row, box in enumerate(self.inputs.lora_rows):
            if not data[fields[f"lora_{row}_high"]] and not data[fields[f"lora_{row}_low"]]:
                return {box: gr.Row(visible=True)}
        return gr.skip()

    def restored(self, data: dict[Component, Any]) -> Updates:
        """One of our videos was dropped or chosen: it is shown, and its settings are filled in."""
        visitor, file = Visitor.of(data[self.session]), data[self.outputs.restore]
        if not file:
            return gr.skip()
        try:
            settings = read_settings(file)
            preset, config, request = self._from_settings(settings)
            updates = self._fill(visitor, preset, config, request)
        except LightX2VError as error:
            return {self.inputs.cost: panels.problem(str(error))}
        gr.Info(Words(visitor.language)("restored"), duration=3)
        visitor = replace(visitor, job="", pinned=True, shown=self.studio.show_file(Path(file)))
        return updates | self._show(visitor, data[self.seen], stored=data[self.session])

    def _from_settings(self, settings: Mapping[str, Any]) -> tuple[str, EngineConfig, Request]:
        """Preset, engine and request of a video's settings. A picture it names is anybody's path, and not read."""
        data = settings.get("request")
        if not isinstance(data, Mapping):
            raise BadRequest("The video carries no settings of this app. Use one that was made here.")
        task = "t2v" if data.get("task") == "t2v" else "i2v"
        preset = str(settings.get("preset", ""))
        if self.studio.tasks.get(preset) != task:
            preset = self.studio.default_for(task)
        config = resolve(preset).engine
        request = Request.from_json(dict(data))
        return preset, config, replace(request, loras=None)

    def _fill(self, visitor: Visitor, preset: str, config: EngineConfig, request: Request) -> Updates:
        """The form of a run. The stored pictures of our own jobs are shown again, other paths are not touched."""
        if preset not in self.studio.tasks:
            preset = self.studio.default_for("t2v" if request.task == "t2v" else "i2v")
        values = fields_of(preset, config, request)
        for name in ("image_path", "last_frame_path"):
            path = values[name]
            inside = path and Path(path).resolve().is_relative_to(self.studio.folder.resolve())
            values[name] = path if inside else None
        return self.editor.fill(Words(visitor.language), values, task=values["task"])

    def _relabel(self, words: Words) -> Updates:
        return self.editor.relabel(words) | self.outputs.relabel(words)

    # ---- values -------------------------------------------------------------------------------------------------

    def _show(self, visitor: Visitor, seen: dict[str, str], *, stored: Any = None, form: Any = None) -> Updates:
        """What changed on the right, what the browser keeps, and how soon to look again."""
        scene = look(self.studio, visitor)
        seen = dict(seen or {})
        before = dict(seen)
        words = Words(scene.visitor.language)
        updates: Updates = dict(render(self.studio, self.outputs, words, scene, seen))
        pace = BUSY_SECONDS if scene.busy else IDLE_SECONDS
        if seen.get("pace") != str(pace):
            seen["pace"] = str(pace)
            updates[self.timer] = gr.Timer(pace, active=True)
        keep = scene.visitor.to_json()
        kept_form = form if form is not None else stored.get("form") if isinstance(stored, dict) else None
        if kept_form:
            keep["form"] = kept_form
        if keep != stored:
            updates[self.session] = keep
        if seen != before:
            updates[self.seen] = seen
        return updates

    def _values(self, data: dict[Component, Any]) -> dict[str, Any]:
        return {name: data[component] for name, component in self.inputs.fields.items()}

    def _preset(self, data: dict[Component, Any]) -> str:
        name = data[self.inputs.fields["preset"]]
        return name if name in self.studio.tasks else self.studio.default_preset

    def _storable(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the browser keeps of the form, for the next visit: no pictures, and no paths on a page for others."""
        return {k: v for k, v in values.items() if k not in ("image_path", "last_frame_path")}

    def _stored_values(self, stored: Any) -> dict[str, Any] | None:
        """A form that the browser kept, if it still makes sense here."""
        if not isinstance(stored, dict) or self.studio.tasks.get(str(stored.get("preset"))) != stored.get("task"):
            return None
        values = {**preset_values(stored["preset"]), **stored}
        try:
            form_of({**values, "prompt": "…"})
        except (LightX2VError, TypeError, ValueError):
            return None
        return {**values, "match_image": values.get("shape") == "match"}

    def _button(self, words: Words, visitor: Visitor, values: Mapping[str, Any] | None = None) -> Updates:
        if visitor.editing:
            return {self.inputs.generate: words("save_edit")}
        count = 1
        if values is not None:
            lines = (
                [line for line in str(values["prompt"]).splitlines() if line.strip()] if values["per_line"] else [""]
            )
            videos = values["videos"] if isinstance(values["videos"], (int, float)) else 1
            count = max(1, len(lines)) * max(1, int(videos))
        return {self.inputs.generate: words("generate") if count == 1 else words("generate_n", n=count)}


def _seed_of(job: Job) -> int:
    return job.result["seed"] if job.result else job.request.seed
