"""PageController: answers every event of the page. page_state.py explains why no update is lost."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from gradio.components import Component

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.prompt_cleaning import is_blank
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.config.request import Request
from lightx2v.errors import LightX2VError
from lightx2v.jobs.store import Job

from ..backend.session import Session
from ..backend.studio import Studio, existing
from ..backend.zerogpu import ZeroGpuJobs
from ..form.editor import Editor, Updates, form_of
from ..form.fields import LORA_ROWS, Unfilled, fields_of, file_name, missing_names, mixed_pair
from ..form.inputs import MATCH, Inputs
from ..gradio_compat import forget_copies, merge_updates, newest_component, payload
from ..strings import Words
from ..views import panels
from ..views.html import esc, tag
from ..views.render import render
from ..views.view_state import build_view
from .page_state import PageState

BUSY_SECONDS, IDLE_SECONDS = 1.0, 4.0

UNDO_STEPS = 3

IN_USE = "in use"
"""The page's script sends this instead of a part's version while that part is in use, such as an open list."""

Data = dict[Component, Any]
"""The values of the input components, as gradio passes them to an event listener."""


@dataclass(kw_only=True)
class PageController:
    """One for the page, shared by all sessions."""

    studio: Studio
    inputs: Inputs
    """The left column."""
    parts: dict[str, Any]
    """The HTML of the header and the right side, by the names of `render`."""
    tabs: tuple[Any, Any]
    """Create and Compare."""
    restore: Any
    """The upload button for a video made here."""
    versions: Any
    """Carries the version of each rendered part."""
    stored: Any
    """The browser's storage."""
    state: Any
    """Holds the PageState."""
    timer: Any

    def __post_init__(self) -> None:
        self.editor = Editor(self.studio, self.inputs)
        self._newest = newest_component()
        """None of the page's own components has a greater number."""
        self.typed = self.inputs.fields.keys() - {*PICTURES}
        """Names of the fields that the browser stores. A picture is a path; paths from a browser are not trusted."""

    def listener(self, handler: Handler) -> Callable[[Data, gr.EventData, gr.Request], Updates]:
        """The function that gradio calls for an event that `handler` handles."""

        def listen(data: Data, click: gr.EventData, request: gr.Request) -> Updates:
            return self._answer(handler, data, sent=payload(click), request=request)

        return listen

    def running_listener(self, handler: Handler) -> Callable[[Data, gr.EventData], Iterator[Updates]]:
        """The same on ZeroGPU, where the event that submits runs has to run them: on the GPU lent to its visitor."""

        def listen(data: Data, click: gr.EventData) -> Iterator[Updates]:
            jobs = self.studio.jobs
            assert isinstance(jobs, ZeroGpuJobs)
            submitted: list[str] = []
            updates = self._answer(handler, data, sent=payload(click), submitted=submitted)
            with jobs.running(submitted) as changes:
                yield updates
                for _ in changes:
                    yield self._answer(refreshed, data)

        return listen

    def _answer(self, handler: Handler, data: Data, **details: Any) -> Updates:
        """Handle the event that brought `data`. Other events of the same page wait."""
        state = data[self.state]
        with state.lock:
            forget_copies(self._newest)
            event = PageEvent(self, state, data, **details)
            try:
                handler(event)
            except LightX2VError as error:
                event.refuse(error)
            return event.answer()

    def stored_values(self, stored: Any) -> dict[str, Any] | None:
        """The fields that the browser stored, if they are still valid here. Empty ones get the preset's value."""
        kept = stored.get("form") if isinstance(stored, dict) else None
        if not isinstance(kept, dict) or self.studio.tasks.get(str(kept.get("preset")), "") != kept.get("task"):
            return None
        kept = {name: value for name, value in kept.items() if name in self.typed and value is not None}
        kept = {name: self.inputs.fields[name].preprocess(value) for name, value in kept.items()}
        kept = {name: value for name, value in kept.items() if value is not None}  # drops values of a wrong type
        return self.valid({**self.editor.preset_values(kept["preset"]), **kept})

    def valid(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """`values` of all fields, to fill them with; None if some are only half typed."""
        try:
            form_of({**values, "prompt": "…"})
            self.editor.whole({**values, "match_image": False}, task=values["task"])
        except (LightX2VError, TypeError, ValueError, ArithmeticError):
            return None
        return {**values, "match_image": values.get("shape") == MATCH}


class PageEvent:
    """One event of a page. Handlers change `session` and fill in fields; `answer` adds everything that follows.

    `sent` is the object that came with a click. `submitted` receives the ids of the runs that the handler queues.
    """

    def __init__(
        self,
        page: PageController,
        state: PageState,
        data: Data,
        *,
        sent: Mapping[str, Any] | None = None,
        request: gr.Request | None = None,
        submitted: list[str] | None = None,
    ) -> None:
        self.page, self.state, self.data = page, state, data
        self.sent, self.request = sent or {}, request
        self._submitted = [] if submitted is None else submitted
        self.studio, self.inputs = page.studio, page.inputs
        self.updates: Updates = {}
        self._kept: dict[str, Any] | None = None
        if state.session is None:
            state.session = Session.of(data[page.stored])
        self.session: Session = state.session
        fields = {name: data[component] for name, component in self.inputs.fields.items() if component in data}
        self.values: dict[str, Any] = {**dict.fromkeys(PICTURES), **state.pictures, **fields}
        """The fields as the browser will hold them after the answer."""

    @property
    def words(self) -> Words:
        return Words(self.session.language)

    @property
    def preset(self) -> str:
        name = self.values["preset"]
        return name if name in self.studio.tasks else self.studio.default_preset

    def change(self, **changes: Any) -> None:
        """Change the session."""
        self.session = replace(self.session, **changes)

    def refuse(self, error: LightX2VError) -> None:
        """Show the error in place of the cost until the fields change."""
        message = self.words(error.key) if isinstance(error, Unfilled) else str(error)
        self.state.problem = message, _digest(self._typed)

    def submit(self, preset: str, config: EngineConfig, request: Request) -> Job:
        """Queue a run of this session."""
        job = self.studio.submit(config, request, owner=self.session.owner, preset=preset)
        self._submitted.append(job.id)
        return job

    # ---- fields -------------------------------------------------------------------------------------------------

    def fill(self, values: Mapping[str, Any], *, task: str) -> None:
        """Put `values` into their fields, and touch no others."""
        whole = self.page.editor.whole(values, task=task)
        self.updates |= self.page.editor.fill(self.words, whole)
        self.values |= whole
        self.state.pictures |= {name: values[name] for name in PICTURES if name in values}

    def fill_run(
        self,
        preset: str,
        config: EngineConfig,
        request: Request,
        *,
        files: Mapping[str, str] | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        """Fill in the settings of a run. Show the stored pictures of our own jobs again; ignore other paths. `files`
        and what is `missing` come on top of what `config` tells."""
        absent = list(missing)
        if preset not in self.studio.tasks:
            absent.append(preset)
            preset = self.studio.default_for("t2v" if request.task == "t2v" else "i2v")
        values = fields_of(preset, config, request, self.studio.offer) | dict(files or {})
        for name in PICTURES:
            path = self.studio.folder / (values[name] or "")  # a video names its picture relative to itself
            here = existing(path, self.studio.folder)
            if values[name] and not here and name != "image_path":  # without a first frame nothing can run anyway
                absent.append(path.name)
            values[name] = str(path) if here else None
        values["missing"] = missing_names([*absent, values["missing"]])
        self.fill(values, task=values["task"])

    def keep_fields(self) -> None:
        """Remember what the visitor has typed before something else takes its place, for `put_fields_back`."""
        if not is_blank(str(self.values["prompt"] or "")) or any(self.state.pictures.values()):
            self._kept = dict(self.values)
            self.state.replaced = [*self.state.replaced, self._kept][-UNDO_STEPS:]

    def put_fields_back(self) -> None:
        """Undo the last change that replaced what the visitor had typed."""
        if not self.state.replaced:
            return
        before = self.state.replaced.pop()
        if (values := self.page.valid(before)) is not None:
            self.fill(values, task=values["task"])
        else:  # numbers were half typed: at least the texts come back
            self.set_fields(prompt=before["prompt"], negative_prompt=before["negative_prompt"])

    def set_fields(self, **values: Any) -> None:
        """Set single fields that follow from others."""
        for name, value in values.items():
            self.updates[self.inputs.fields[name]] = gr.update(value=value)
        self.values |= values

    def relabel(self) -> None:
        """Show every label in the session's language; values stay."""
        words, page = self.words, self.page
        labels = page.editor.relabel(words, self.values["task"])
        for tab, key in zip(page.tabs, ("tab_create", "tab_compare"), strict=True):
            labels[tab] = gr.Tab(label=words(key))
        labels[page.restore] = gr.UploadButton(label=words("restore_file"))
        for component, label in labels.items():
            known = component in self.updates
            self.updates[component] = merge_updates(label, self.updates[component]) if known else label

    # ---- the answer ---------------------------------------------------------------------------------------------

    def answer(self) -> Updates:
        """The fields that the handler filled in, the parts that are out of date on the page, what the browser stores,
        and the interval of the timer."""
        data, page = self.data, self.page
        self.studio.keep_alive(*self.state.pictures.values(), self.studio.uploaded_video(self.session.uploaded))
        view = build_view(self.studio, self.session)
        self.session = self.state.session = view.session
        if self._kept is not None and _but_seed(self._kept) == _but_seed(self.values):  # nothing was lost
            self.state.replaced.pop()
        words, inputs = self.words, self.inputs
        parts = {page.parts[name]: (name, html) for name, html in render(self.studio, words, view).items()}
        left = page.editor.parts(words, self.values, self._problem(), self._notices(words))
        parts |= {getattr(inputs, name): (name, html) for name, html in left.items()}
        versions = data[page.versions] if isinstance(data[page.versions], dict) else {}
        self._offer_found_files()
        updates = dict(self.updates)
        for component, (name, html) in parts.items():
            version = hashlib.sha256(html.encode()).hexdigest()[:16] if html else ""
            if versions.get(name, "") not in (version, IN_USE):
                versions[name] = version
                # The browser's clock may be off by hours; the script corrects it with data_now.
                attributes = {"data_part": name, "data_version": version, "data_now": f"{time.time():.2f}"}
                updates[component] = tag("div", html, class_="part", **attributes) if html else ""
        data[page.versions] = versions  # for the next answer to the same event
        if inputs.files in updates:
            status = self.studio.files.status(self.studio.settings(self.preset).engine)
            title = gr.update(label=panels.files_title(words, status))
            updates[inputs.files_box] = merge_updates(title, updates.get(inputs.files_box, gr.update()))
        label = self._button(words)
        if data[inputs.generate] != label:
            updates[inputs.generate] = gr.update(value=label)
        interval = BUSY_SECONDS if view.busy else IDLE_SECONDS
        if data[page.timer] != interval:
            updates[page.timer] = gr.Timer(interval, active=True)
        stored = self._stored()
        if stored != data[page.stored]:
            updates[page.stored] = stored
        return updates or gr.skip()

    def _offer_found_files(self) -> None:
        """After files were found or went away: the choices of the fields that name them."""
        catalog, inputs = self.studio.offer.catalog, self.inputs
        if self.state.catalog == catalog.version:
            return
        self.state.catalog = catalog.version
        for name, options in self.page.editor.file_choices(self.words, self.values["task"]).items():
            component = inputs.fields[name]
            known = component in self.updates
            choices = gr.update(choices=options)
            self.updates[component] = merge_updates(choices, self.updates[component]) if known else choices
        if inputs.mine is None:  # a page for others has LoRAs only where the operator allows some
            box = gr.update(visible=bool(catalog.loras))
            self.updates[inputs.lora_box] = {**self.updates.get(inputs.lora_box, {}), **box}

    @property
    def _typed(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if name in self.page.typed}

    def _problem(self) -> str:
        if self.state.problem is not None and self.state.problem[1] != _digest(self._typed):
            self.state.problem = None
        return self.state.problem[0] if self.state.problem is not None else ""

    def _notices(self, words: Words) -> str:
        """What a press on Generate will do besides the obvious, each with a way out."""
        lines = []
        if self.session.editing:
            lines.append(panels.notice(words, "editing", "stop_editing", "leave_unchanged"))
        if (seed := self.values["seed"]) not in (None, -1):
            lines.append(panels.notice(words, "seed_locked", "random_seed", "seed_random", seed=seed))
        if self.state.replaced:
            lines.append(panels.notice(words, "fields_replaced", "undo_fill", "undo"))
        for row in range(LORA_ROWS):
            high, low = (str(self.values[f"lora_{row}_{part}"] or "") for part in ("high", "low"))
            if mixed_pair(high, low):
                names = {"high": file_name(high), "low": file_name(low)}
                lines.append(tag("p", esc(words("loras_mixed", **names)), class_="notice-line warn", role="status"))
        return "".join(lines)

    def _stored(self) -> dict[str, Any]:
        """For the browser: the session, and the fields once the visitor has changed them; pictures stay here."""
        form = self._typed
        digest = _digest(form)
        if self.state.untouched is None:
            self.state.untouched = digest
        before = self.data[self.page.stored]
        known = isinstance(before, dict) and "form" in before
        return self.session.to_json() | ({"form": form} if known or digest != self.state.untouched else {})

    def _button(self, words: Words) -> str:
        if self.session.editing:
            return words("save_edit")
        values, lines = self.values, 1
        if values["per_line"]:
            lines = sum(1 for line in str(values["prompt"]).splitlines() if not is_blank(line))
        videos = values["videos"] if isinstance(values["videos"], (int, float)) else 1
        count = max(1, lines) * max(1, int(videos))
        return words("generate") if count == 1 else words("generate_n", n=count)


def _but_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "seed"}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode("utf-8", "surrogatepass")).hexdigest()


def refreshed(event: PageEvent) -> None:
    """The timer ticked, or a field changed that affects the cost: the answer holds everything that changed."""


Handler = Callable[[PageEvent], None]
"""Handles one event: changes the session, fills in fields or submits runs. A LightX2VError becomes a message."""
