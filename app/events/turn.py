"""What a visitor's page shows after an event: shared by all handlers. `tab.py` says why nothing is lost on the way."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context, LocalContext

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.config.request import Request
from lightx2v.errors import LightX2VError

from ..backend.studio import Studio, settings_of
from ..backend.visitor import Visitor, look
from ..form.editor import Editor, Updates, form_of, preset_values
from ..form.fields import Unfilled, fields_of
from ..form.inputs import MATCH, Inputs
from ..strings import Words
from ..views import panels
from ..views.html import tag
from ..views.render import Outputs, render
from .page_state import Tab

BUSY_SECONDS, IDLE_SECONDS = 1.0, 4.0

HELD = "held"
"""What the page's script says instead of the version of a part that is in use, such as an open list."""

Data = dict[Component, Any]
"""What gradio gives a handler: the values of its input components."""


class Screen:
    """One for the page, for all visitors. `told` carries the versions that a page shows, `session` is what its browser
    keeps, `tab` holds a Tab."""

    def __init__(
        self, studio: Studio, inputs: Inputs, outputs: Outputs, *, told: Any, session: Any, tab: Any, timer: Any
    ) -> None:
        self.studio, self.inputs, self.outputs = studio, inputs, outputs
        self.told, self.session, self.tab, self.timer = told, session, tab, timer
        self.editor = Editor(studio, inputs)
        self._newest = Context.id
        """Of the page's own components none has a greater number."""
        self.typed = inputs.fields.keys() - {*PICTURES}
        """The names of the fields that a browser keeps. A picture is a path, and one that it names is not read."""

    @contextmanager
    def turn(self, data: Data) -> Iterator[Turn]:
        """The event that brought `data` is answered; other events of the same page wait."""
        tab = data[self.tab]
        with tab.lock:
            self._forget_copies()
            yield Turn(self, tab, data)

    def _forget_copies(self) -> None:
        """gradio makes a component anew for every output of an answer, and keeps each in the page's session under a
        number of its own that nothing asks for: a quarter of a megabyte a tick, for as long as the page is open."""
        session = LocalContext.blocks_config.get(None)
        if session is not None:
            newest = self._newest
            for number in [number for number in session.blocks if number > newest]:
                session.blocks.pop(number, None)

    def stored_values(self, stored: Any) -> dict[str, Any] | None:
        """The fields that the browser kept, if they still make sense here. What was left empty is the preset's."""
        kept = stored.get("form") if isinstance(stored, dict) else None
        if not isinstance(kept, dict) or self.studio.tasks.get(str(kept.get("preset")), "") != kept.get("task"):
            return None
        kept = {name: value for name, value in kept.items() if name in self.typed and value is not None}
        kept = {name: self.inputs.fields[name].preprocess(value) for name, value in kept.items()}
        kept = {name: value for name, value in kept.items() if value is not None}  # of a wrong type
        values = {**preset_values(kept["preset"]), **kept}
        try:
            form_of({**values, "prompt": "…"})
            self.editor.whole({**values, "match_image": False}, task=kept["task"])
        except (LightX2VError, TypeError, ValueError, ArithmeticError):
            return None
        return {**values, "match_image": values.get("shape") == MATCH}


class Turn:
    """One event of a page. Handlers change `visitor` and fill fields; `answer` adds all that follows."""

    def __init__(self, screen: Screen, tab: Tab, data: Data) -> None:
        self.tab, self.data = tab, data
        self.updates: Updates = {}
        self._screen, self._studio, self._inputs = screen, screen.studio, screen.inputs
        if tab.visitor is None:
            tab.visitor = Visitor.of(data[screen.session])
        self.visitor: Visitor = tab.visitor
        fields = {name: data[component] for name, component in self._inputs.fields.items() if component in data}
        self.values: dict[str, Any] = {**dict.fromkeys(PICTURES), **tab.pictures, **fields}
        """The fields as they will stand in the browser after the answer."""

    @property
    def words(self) -> Words:
        return Words(self.visitor.language)

    @property
    def preset(self) -> str:
        name = self.values["preset"]
        return name if name in self._studio.tasks else self._studio.default_preset

    def change(self, **what: Any) -> None:
        """Changes what the visitor looks at."""
        self.visitor = replace(self.visitor, **what)

    def refuse(self, error: LightX2VError) -> None:
        """Says in place of the cost what is wrong, until the fields are changed."""
        self.tab.problem = self.words(error.key) if isinstance(error, Unfilled) else str(error), self._typed

    # ---- fields -------------------------------------------------------------------------------------------------

    def fill(self, values: Mapping[str, Any], *, task: str) -> None:
        """Puts `values` into their fields, and no others."""
        whole = self._screen.editor.whole(values, task=task)
        self.updates |= self._screen.editor.fill(self.words, whole)
        self.values |= whole
        self.tab.pictures |= {name: values[name] for name in PICTURES if name in values}

    def fill_run(self, preset: str, config: EngineConfig, request: Request) -> None:
        """The form of a run. The stored pictures of our own jobs are shown again, other paths are not touched."""
        if preset not in self._studio.tasks:
            preset = self._studio.default_for("t2v" if request.task == "t2v" else "i2v")
        values = fields_of(preset, config, request)
        for name in PICTURES:
            path = self._studio.folder / (values[name] or "")  # a video names its picture by its place beside it
            inside = path.resolve().is_relative_to(self._studio.folder.resolve()) and os.path.isfile(path)
            values[name] = str(path) if inside else None
        self.fill(values, task=values["task"])

    def relabel(self) -> None:
        """Every label in the visitor's language; values stay."""
        words, labels = self.words, self._screen.editor.relabel(self.words, self.values["task"])
        for component, label in (labels | self._screen.outputs.relabel(words)).items():
            self.updates[component] = together(label, self.updates[component]) if component in self.updates else label

    # ---- the answer ---------------------------------------------------------------------------------------------

    def answer(self) -> Updates:
        """What the handler filled in, what of the rest the page shows otherwise, what the browser keeps, how soon to
        look again."""
        data, screen = self.data, self._screen
        scene = look(self._studio, self.visitor)
        self.visitor = self.tab.visitor = scene.visitor
        words, inputs = self.words, self._inputs
        right = render(self._studio, words, scene)
        parts = {getattr(screen.outputs, name): (name, html) for name, html in right.items()}
        left = screen.editor.parts(words, self.values, self._problem())
        parts |= {getattr(inputs, name): (name, html) for name, html in left.items()}
        told = data[screen.told] if isinstance(data[screen.told], dict) else {}
        updates = dict(self.updates)
        for component, (name, html) in parts.items():
            version = hashlib.sha256(html.encode()).hexdigest()[:16] if html else ""
            if told.get(name, "") not in (version, HELD):
                told[name] = version
                # The clock of the browser may be off by hours; the script corrects it by this.
                attributes = {"data_part": name, "data_version": version, "data_now": f"{time.time():.2f}"}
                updates[component] = tag("div", html, class_="part", **attributes) if html else ""
        data[screen.told] = told
        if inputs.files in updates:
            status = self._studio.files.status(settings_of(self.preset).engine)
            title = gr.update(label=panels.files_title(words, status))
            updates[inputs.files_box] = together(title, updates.get(inputs.files_box, gr.update()))
        label = self._button(words)
        if data[inputs.generate] != label:
            updates[inputs.generate] = gr.update(value=label)
        pace = BUSY_SECONDS if scene.busy else IDLE_SECONDS
        if data[screen.timer] != pace:
            updates[screen.timer] = gr.Timer(pace, active=True)
        keep = self._kept()
        if keep != data[screen.session]:
            updates[screen.session] = keep
        return updates or gr.skip()

    @property
    def _typed(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if name in self._screen.typed}

    def _problem(self) -> str:
        if self.tab.problem is not None and self.tab.problem[1] != self._typed:
            self.tab.problem = None
        return self.tab.problem[0] if self.tab.problem is not None else ""

    def _kept(self) -> dict[str, Any]:
        """For the browser: the visitor, and the fields once somebody changed them; pictures stay here."""
        form = self._typed
        if self.tab.untouched is None:
            self.tab.untouched = form
        before = self.data[self._screen.session]
        known = isinstance(before, dict) and "form" in before
        return self.visitor.to_json() | ({"form": form} if known or form != self.tab.untouched else {})

    def _button(self, words: Words) -> str:
        if self.visitor.editing:
            return words("save_edit")
        values, lines = self.values, 1
        if values["per_line"]:
            lines = sum(1 for line in str(values["prompt"]).splitlines() if line.strip())
        videos = values["videos"] if isinstance(values["videos"], (int, float)) else 1
        count = max(1, lines) * max(1, int(videos))
        return words("generate") if count == 1 else words("generate_n", n=count)


def together(label: Any, value: Any) -> Any:
    """Both changes of one component: what it says, and what it holds."""
    if not (isinstance(value, dict) and value.get("__type__") == "update"):
        value = {"value": value}
    return {**label, **value}
