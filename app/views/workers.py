"""The workers in the header, where there are several: what each has loaded and does."""

from collections.abc import Sequence

from lightx2v.jobs.pool import WorkerState

from ..strings import Words
from . import numbers
from .html import esc, tag
from .stage import overall


def worker_chips(words: Words, workers: Sequence[WorkerState], *, each: bool) -> list[str]:
    """A chip with how many are busy, and with `each` one for every worker."""
    busy = sum(worker.job is not None for worker in workers)
    dot = tag("i", "", class_="dot ok" if workers else "dot bad")
    chips = [tag("span", dot + esc(words("workers_busy", busy=busy, n=len(workers))), class_="chip")]
    return chips + [tag("span", esc(_line(words, worker)), class_="chip") for worker in workers if each]


def _line(words: Words, worker: WorkerState) -> str:
    job, used, total = worker.job, worker.status.memory_used, worker.status.memory_total
    parts = [f"{worker.name}: {words.preset(worker.loaded.preset) if worker.loaded else words('nothing_loaded')}"]
    if job is not None:
        parts.append(f"{100 * overall(job.request, job.progress):.0f}{numbers.NARROW}%")
    elif worker.paused:
        parts.append(words("worker_drained"))
    if used is not None and total is not None:
        parts.append(words("memory_free", free=numbers.memory(total - used), total=numbers.memory(total)))
    return " · ".join(parts)
