"""Keyboard: sends a launched page's own events by plain HTTP, with values that its script would never send too."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

import httpx
from patience import eventually
from studio_app import LEAKS, Page


@dataclass(frozen=True)
class Keyboard:
    """Sends events of a page as its script does. `config` is the configuration that every browser gets."""

    page: Page
    config: dict[str, Any]

    def components(self) -> dict[int, dict[str, Any]]:
        return {component["id"]: component for component in self.config["components"]}

    def name(self, id: int) -> str:
        props = self.components()[id]["props"]
        return str(props.get("elem_id") or props.get("storage_key") or id)

    def event(self, target: str, kind: str) -> dict[str, Any]:
        """The event of a component, by its elem_id; the timer has none and is "timer", the whole page is "page"."""
        found = self.components().items()
        ids = {id for id, c in found if self.name(id) == target or c["type"] == target}
        if target == "page":
            ids = {t[0] for d in self.config["dependencies"] for t in d["targets"]} - self.components().keys()
        return next(d for d in self.config["dependencies"] if any(t[0] in ids and t[1] == kind for t in d["targets"]))

    def press(
        self, target: str, kind: str = "click", *, sent: Any = None, session: str = "", **changes: Any
    ) -> dict[str, Any]:
        """Sends an event; returns its answer by the elem_ids of its outputs, {} if refused. `changes`: other values.
        Events of one open page have the same `session`."""
        answer = self.answer(target, kind, sent=sent, session=session, **changes)
        assert not LEAKS.search(answer.text), answer.text[:300]
        return self.values(target, kind, answer)

    def answer(self, target: str, kind: str, *, sent: Any = None, session: str = "", **changes: Any) -> httpx.Response:
        """Sends an event; returns the HTTP response, which may name a visitor's own file that holds an image."""
        event = self.event(target, kind)
        data = [changes.get(self.name(id), self.components()[id]["props"].get("value")) for id in event["inputs"]]
        session = session or secrets.token_hex(6)
        body = {"data": data, "fn_index": event["id"], "session_hash": session, "event_data": sent}
        url, text = "/gradio_api/run/predict", json.dumps(body)  # in ASCII, as a browser writes half a character
        headers = {"Content-Type": "application/json"}
        return eventually(
            lambda: (r := self.page.http.post(url, content=text, headers=headers)).status_code != 429 and r
        )

    def values(self, target: str, kind: str, answer: httpx.Response) -> dict[str, Any]:
        """The values in an answer to the event, by the elem_ids of its outputs."""
        if answer.status_code != 200:
            return {}
        outputs = self.event(target, kind)["outputs"]
        return {self.name(id): value for id, value in zip(outputs, answer.json()["data"], strict=False)}
