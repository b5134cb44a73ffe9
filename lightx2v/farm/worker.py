"""Worker: the engine of one replica, on its own machine, in a process of its own: a Ray actor around an EngineSlot.

    hello()             once it has started
    run(task)           yields lists of Heard and StepSaved while it works, at last Ended; one run at a time
    stop(run, suspend)  ends that run within a step
    pulse()             answers at once, while it lives

Each of `run`, `stop` and `pulse` has threads of its own, so that none waits for the others. Files come and go as bytes;
models are those of this machine. The process ends with the process of Ray that started it.
"""

import importlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ..config.engine_config import EngineConfig
from ..config.environment import Environment, set_variables
from ..config.request import Request
from ..cost.machine import MachineReader
from ..errors import LightX2VError
from ..jobs.engine_slot import EngineSlot, OpenEngine, public_error
from ..jobs.replica import Outcome, ReplicaStatus
from ..jobs.store import Job
from ..jobs.worker import PREVIEW_SECONDS, PREVIEW_SIDE
from ..media.images import jpeg
from ..media.video_writer import original_path
from ..media.work_folder import WorkFolder, sweep
from ..progress import CancelToken, Progress
from .followers import start_followers
from .messages import Ended, Heard, Hello, Message, Pulse, StepSaved, Task
from .outbox import Outbox

log = logging.getLogger("lightx2v.farm")

Made = tuple[Outcome, bytes | None, bytes | None]
"""How a run ended, its video, and the one without interpolation where that is kept."""

WATCH_SECONDS = 1.0
STATUS_SECONDS = 3.0


class Worker:
    """`open_engine` loads models. `share` workers use this machine's cores; `gpus` processes make each video."""

    def __init__(self, open_engine: OpenEngine, share: int, gpus: int) -> None:
        self._machine = MachineReader()
        threads = max(1, self._machine().cores // share)
        set_variables({"OMP_NUM_THREADS": str(threads)})  # Ray has set one for its own count of CPUs
        self._slot = EngineSlot(open_engine, platform.node())
        self._status = self._slot.status()
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="lightx2v-engine")
        self._lock = threading.Lock()
        self._tokens: dict[str, CancelToken] = {}
        sweep(Path(tempfile.gettempdir()))
        # Libraries that are read from a cold disk hold Python's lock for long; from now on a silent worker hangs.
        importlib.import_module("lightx2v.pipeline")
        ready = threading.Event()
        threading.Thread(target=self._watch, args=(gpus, ready), daemon=True, name="lightx2v-watch").start()
        ready.wait()

    def hello(self) -> Hello:
        gpus = Environment.read().visible_gpus or ""
        return Hello(pid=os.getpid(), gpus=gpus, device=self._slot.device)

    def pulse(self) -> Pulse:
        return Pulse(status=self._status)

    def stop(self, run: str, suspend: bool) -> None:
        """Cancel this run, or suspend it: it then saves its step. It may not have begun yet."""
        token = self._token(run)
        token.suspend() if suspend else token.cancel()

    def leave(self) -> NoReturn:
        """End this process, also where the cluster's head is gone, which else does that."""
        os._exit(0)

    def run(self, task: Task) -> Iterator[list[Message]]:
        outbox = Outbox()
        work = self._engine_thread.submit(self._work, task, outbox)
        work.add_done_callback(lambda done: outbox.put(self._end(task, done)))
        yield from outbox

    def _token(self, run: str) -> CancelToken:
        with self._lock:
            return self._tokens.setdefault(run, CancelToken())

    def _work(self, task: Task, outbox: Outbox) -> Made:
        """In the engine's thread: load the model, or make the video, and put everything that happens into `outbox`."""
        config, loaded = EngineConfig.from_json(task.config), self._slot.loaded
        if task.may_refuse and (loaded is None or loaded.config != config):
            from .refusal import refusal_of  # imports torch

            if reason := refusal_of(config, self._machine()):
                return Outcome(cancelled=True, refused=reason), None, None
        if task.request is not None:
            return self._video(task, config, outbox)
        announcer, cancel = _Announcer(outbox), self._token(task.run)
        self._slot.load(config, preset=task.preset, on_progress=announcer, cancel=cancel)
        return Outcome(), None, None

    def _end(self, task: Task, work: "Future[Made]") -> Ended:
        with self._lock:
            self._tokens.pop(task.run, None)
        loaded = self._slot.loaded
        known = (loaded.config.to_json(), loaded.preset) if loaded is not None else None
        error = work.exception()
        if error is not None:  # what EngineSlot does not see: a model that does not load, a full disk
            log.error("run %s failed", task.run, exc_info=None if isinstance(error, LightX2VError) else error)
            return Ended(outcome=Outcome(error=public_error(error, task.job)), loaded=known)
        outcome, video, original = work.result()
        return Ended(outcome=outcome, video=video, original=original, loaded=known)

    def _video(self, task: Task, config: EngineConfig, outbox: Outbox) -> Made:
        assert task.request is not None
        with closing(WorkFolder(Path(tempfile.gettempdir()))) as work:
            request = dict(task.request)
            for name, (file, data) in task.pictures.items():
                (work.path / file).write_bytes(data)
                request[name] = str(work.path / file)
            now = time.time()
            job = Job(
                id=task.job,
                state="running",
                owner="",
                preset=task.preset,
                client_id=None,
                config=config,
                request=Request.from_json(request),
                created=now,
                started=now,
            )
            path = work.path / f"{task.job}.mp4"
            outcome = self._slot.run(
                job, path, on_progress=_Announcer(outbox), cancel=self._token(task.run), steps=_Steps(task, outbox)
            )
            if outcome.report is None:
                return outcome, None, None
            kept = original_path(path)
            return outcome, path.read_bytes(), kept.read_bytes() if kept.is_file() else None

    def _watch(self, gpus: int, ready: threading.Event) -> None:
        """A thread as long as the process: the system ends the followers with the thread that started them."""
        parent, next_status = os.getppid(), 0.0
        try:
            start_followers(gpus)
        finally:
            ready.set()
        while os.getppid() == parent:  # an orphan would keep its GPU's memory from the next worker
            if time.monotonic() >= next_status:
                self._status: ReplicaStatus = self._slot.status()
                next_status = time.monotonic() + STATUS_SECONDS
            time.sleep(WATCH_SECONDS)
        os._exit(1)


class _Announcer:
    """Puts progress events into the outbox, with a preview at most twice a second."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox, self._next_preview = outbox, 0.0

    def __call__(self, event: Progress) -> None:
        preview = None
        if event.preview is not None and time.monotonic() >= self._next_preview:
            try:
                preview = jpeg(event.preview(), max_side=PREVIEW_SIDE)
                self._next_preview = time.monotonic() + PREVIEW_SECONDS
            except (LightX2VError, RuntimeError, ValueError, OSError):  # no reason to lose the video
                log.warning("the run continues without previews", exc_info=True)
                self._next_preview = float("inf")
        self._outbox.put(Heard(progress=replace(event, preview=None), preview=preview))


class _Steps:
    """The StepStore of a run whose steps are kept by the front end."""

    def __init__(self, task: Task, outbox: Outbox) -> None:
        self.every = task.save_every
        self._step, self._outbox = task.step, outbox

    def read(self) -> bytes | None:
        return self._step

    def write(self, data: bytes) -> None:
        self._outbox.put(StepSaved(data=data))
