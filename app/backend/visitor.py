"""One visitor: the secret that their browser keeps, and what they look at. No gradio here."""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from lightx2v.jobs.store import Job

from ..strings import TABLES, preferred
from .studio import JOB_ID, Studio

OWNER = re.compile(r"[A-Za-z0-9_-]{32,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """What the browser stores. It comes back from outside, so nothing in it is believed but its form."""

    owner: str
    language: str = "en"
    job: str = ""
    """The run on the stage."""
    pinned: bool = False
    """Whether the visitor chose that run; else the stage follows the one that runs."""
    compared: tuple[str, ...] = ()
    editing: str = ""
    shown: str = ""
    """The token of a dropped video that is on the stage."""

    @classmethod
    def of(cls, stored: Any, accept_language: str = "") -> Self:
        """From the browser's storage; a new visitor where it holds nothing of use."""
        data = stored if isinstance(stored, dict) else {}
        owner = data.get("owner")
        if not (isinstance(owner, str) and OWNER.fullmatch(owner)):
            return cls(owner=secrets.token_urlsafe(32), language=preferred(accept_language))
        language = data.get("language")
        compared = data.get("compared")
        return cls(
            owner=owner,
            language=language if language in TABLES else preferred(accept_language),
            job=_id(data.get("job")),
            pinned=data.get("pinned") is True,
            compared=tuple(filter(None, map(_id, compared[:2]))) if isinstance(compared, list) else (),
            editing=_id(data.get("editing")),
            shown=_id(data.get("shown")),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"compared": list(self.compared)}

    def with_compared(self, job_id: str) -> Self:
        """One more run to compare, or one less; the third takes the second's place."""
        if job_id in self.compared:
            return replace(self, compared=tuple(other for other in self.compared if other != job_id))
        return replace(self, compared=(*self.compared[:1], job_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a visitor sees now: the run on the stage, the last finished one, all of theirs."""

    visitor: Visitor
    job: Job | None
    finished: Job | None
    runs: tuple[Job, ...]
    compared: tuple[Job, ...]

    @property
    def ahead(self) -> int:
        """The place in the queue of the run on the stage, others' runs counted; 0 where it does not wait."""
        return self.job.position or 0 if self.job is not None else 0

    @property
    def busy(self) -> bool:
        return any(job.state in ("queued", "running") for job in self.runs)


def look(studio: Studio, visitor: Visitor) -> Scene:
    """The scene of a visitor. Unless a run was chosen, the stage follows the one that runs; one that began is no longer
    edited."""
    runs = studio.runs(visitor.owner)
    if not visitor.pinned and not visitor.shown:
        now = next((job for job in runs if job.state == "running"), None) or _later(runs, visitor.job)
        if now is not None and now.id != visitor.job:
            visitor = replace(visitor, job=now.id)
    if visitor.editing and not any(job.id == visitor.editing and job.state == "queued" for job in runs):
        visitor = replace(visitor, editing="")
    job = next((job for job in runs if job.id == visitor.job), None) or studio.own(visitor.owner, visitor.job)
    if job is None and visitor.job:
        visitor = replace(visitor, job="", pinned=False)
    done = [run for run in runs if run.state == "succeeded"]
    finished = job if job is not None and job.state == "succeeded" else next(iter(done), None)
    compared = [run for id in visitor.compared for run in done if run.id == id]
    return Scene(visitor=visitor, job=job, finished=finished, runs=tuple(runs), compared=tuple(compared))


def _later(runs: list[Job], shown: str) -> Job | None:
    """The last run that began after the one that is shown ended: a short one may come and go between two looks."""
    current = next((job for job in runs if job.id == shown and job.over), None)
    if current is None or current.finished is None:
        return None
    later = [job for job in runs if job.started is not None and job.started >= current.finished]
    return max(later, key=lambda job: job.started or 0.0, default=None)


def _id(value: Any) -> str:
    return value if isinstance(value, str) and JOB_ID.fullmatch(value) else ""
