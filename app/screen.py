"""What a visitor's page shows after an event, and what its components say: shared by all handlers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from lightx2v.engine_config import EngineConfig
from lightx2v.errors import LightX2VError
from lightx2v.request import Request

from .editing import Editor, Updates, form_of, preset_values
from .form import fields_of
from .inputs import Inputs
from .strings import Words
from .studio import Studio
from .views import Outputs, render
from .visitor import Visitor, look

BUSY_SECONDS, IDLE_SECONDS = 1.0, 4.0

Data = dict[Component, Any]
"""What gradio gives a handler: the values of its input components."""


class Screen:
    """One for the page, for all visitors; whatever is a visitor's own comes in and goes out as values."""

    def __init__(self, studio: Studio, inputs: Inputs, outputs: Outputs, session: Any, seen: Any, timer: Any) -> None:
        self.studio, self.inputs, self.outputs = studio, inputs, outputs
        self.session, self.seen, self.timer = session, seen, timer
        self.editor = Editor(studio, inputs)

    def fill_run(self, visitor: Visitor, preset: str, config: EngineConfig, request: Request) -> Updates:
        """The form of a run. The stored pictures of our own jobs are shown again, other paths are not touched."""
        if preset not in self.studio.tasks:
            preset = self.studio.default_for("t2v" if request.task == "t2v" else "i2v")
        values = fields_of(preset, config, request)
        for name in ("image_path", "last_frame_path"):
            path = values[name]
            inside = path and Path(path).resolve().is_relative_to(self.studio.folder.resolve())
            values[name] = path if inside else None
        return self.editor.fill(Words(visitor.language), values, task=values["task"])

    def relabel(self, words: Words, task: str) -> Updates:
        return self.editor.relabel(words, task) | self.outputs.relabel(words)

    def show(self, visitor: Visitor, seen: dict[str, str], *, stored: Any = None, form: Any = None) -> Updates:
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

    def values(self, data: Data) -> dict[str, Any]:
        return {name: data[component] for name, component in self.inputs.fields.items()}

    def preset(self, data: Data) -> str:
        name = data[self.inputs.fields["preset"]]
        return name if name in self.studio.tasks else self.studio.default_preset

    def storable(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the browser keeps of the form, for the next visit: no pictures, and no paths on a page for others."""
        return {k: v for k, v in values.items() if k not in ("image_path", "last_frame_path")}

    def stored_values(self, stored: Any) -> dict[str, Any] | None:
        """A form that the browser kept, if it still makes sense here."""
        if not isinstance(stored, dict) or self.studio.tasks.get(str(stored.get("preset"))) != stored.get("task"):
            return None
        values = {**preset_values(stored["preset"]), **stored}
        try:
            form_of({**values, "prompt": "…"})
        except (LightX2VError, TypeError, ValueError):
            return None
        return {**values, "match_image": values.get("shape") == "match"}

    def button(self, words: Words, visitor: Visitor, values: Mapping[str, Any] | None = None) -> Updates:
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
