"""ViewState: the runs that one session sees now."""

from dataclasses import dataclass, replace

from lightx2v.jobs.store import Job

from ..backend.session import Session
from ..backend.studio import Studio


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewState:
    """The run on the stage, the last finished one, all of the session's runs, and those it compares."""

    session: Session
    job: Job | None
    finished: Job | None
    runs: tuple[Job, ...]
    compared: tuple[Job, ...]
    ahead: tuple[int, int]
    """The runs before the one on the stage while that waits, and how many of them are other visitors'."""

    @property
    def busy(self) -> bool:
        return any(job.state in ("queued", "running") for job in self.runs)


def build_view(studio: Studio, session: Session) -> ViewState:
    """Looks up the session's runs. Unless the visitor chose a run, the stage follows the one in progress; of several it
    keeps one until that ends. A run that has started can no longer be edited."""
    runs = studio.runs(session.owner)
    if not session.pinned and not session.uploaded:
        running = sorted((job for job in runs if job.state == "running"), key=lambda job: job.started or 0.0)
        followed = (job for job in running if job.id == session.job)
        current = next(followed, None) or next(iter(running), None) or _later(runs, session.job)
        if current is not None and current.id != session.job:
            session = replace(session, job=current.id)
    if session.editing and not any(job.id == session.editing and job.state == "queued" for job in runs):
        session = replace(session, editing="")
    job = next((job for job in runs if job.id == session.job), None) or studio.job_of(session.owner, session.job)
    if job is None and session.job:
        session = replace(session, job="", pinned=False)
    done = [run for run in runs if run.state == "succeeded"]
    finished = job if job is not None and job.state == "succeeded" else next(iter(done), None)
    compared = [run for id in session.compared for run in done if run.id == id]
    ahead = studio.ahead_of(job, session.owner) if job is not None and job.state == "queued" else (0, 0)
    return ViewState(
        session=session, job=job, finished=finished, runs=tuple(runs), compared=tuple(compared), ahead=ahead
    )


def _later(runs: list[Job], on_stage: str) -> Job | None:
    """The last run that started after the one on the stage ended: a short run may start and end between two ticks."""
    current = next((job for job in runs if job.id == on_stage and job.over), None)
    if current is None or current.finished is None:
        return None
    later = [job for job in runs if job.started is not None and job.started >= current.finished]
    return max(later, key=lambda job: job.started or 0.0, default=None)
