"""What a worker and the front end send each other. Both run the same version, which `Hello` is checked for."""

from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..jobs.replica import Outcome, ReplicaStatus
from ..progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model to load, and a run on it unless `request` is None. Pictures and the saved step are the files' bytes."""

    run: str
    """Names this attempt, also where the same job runs twice on one worker."""
    config: dict[str, Any]
    preset: str
    job: str = ""
    request: dict[str, Any] | None = None
    pictures: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """{field of the request: (name of the file, its content)}."""
    step: bytes | None = None
    save_every: float = 0.0
    may_refuse: bool = False
    """Whether other machines may hold the model where this one cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a worker says when it has started."""

    pid: int
    gpus: str
    """The GPUs that Ray has given it, as in CUDA_VISIBLE_DEVICES."""
    device: str
    version: str = __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """The answer of a live worker: its machine's memory, as it was read last."""

    status: ReplicaStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A progress event, with a preview as JPEG now and then."""

    progress: Progress
    preview: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSaved:
    """The run's newest saved step."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last message of a run. `video` is the mp4 where there is one, `original` the one without interpolation where
    that is kept; `loaded` the model that is in memory now."""

    outcome: Outcome
    video: bytes | None = field(default=None, repr=False)
    original: bytes | None = field(default=None, repr=False)
    loaded: tuple[dict[str, Any], str] | None = None


Message = Heard | StepSaved | Ended
