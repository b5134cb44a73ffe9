"""Farm: a thread that keeps the replicas of the job queue: it starts workers where there is room, replaces those that
end or hang, follows the machines of the cluster, and starts or joins the cluster again where its head has ended."""

import contextlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from .. import __version__
from ..config.engine_config import EngineConfig
from ..cost.machine import gpu_count
from ..errors import LightX2VError
from ..jobs.engine_slot import OpenEngine
from ..jobs.queue import JobManager
from ..progress import CancelToken, OnProgress, Progress
from .messages import Hello
from .options import FarmOptions
from .places import Node, Place, free_places
from .ray_replica import SILENCE, Answer, RayReplica, RemoteWorker
from .ray_settings import prepare
from .scaling import Scaling

log = logging.getLogger("lightx2v.farm")

TICK = 0.5
START_SECONDS = 300.0
"""Seconds in which a worker must say hello, with the time in which it reads its libraries from a slow disk."""
RETRY_SECONDS, LONGEST_RETRY = 1.0, 60.0
"""After a worker that has ended in its first minute its place waits, twice as long each time."""
SETTLED_SECONDS = 60.0
CLOSE_SECONDS = 20.0
"""Seconds for the end of the workers and of the cluster. Joining a cluster that does not answer may take longer."""
LEAVE_SECONDS = 5.0
"""Seconds that a job has to stop where its replica is given up; it goes on elsewhere."""


class StartedWorker(RemoteWorker, Protocol):
    def hello(self) -> Answer: ...

    def leave(self) -> None: ...


class Cluster(Protocol):
    """Where workers run; `ray_cluster.RayCluster` is one. Any call may raise a LightX2VError: the head is lost then."""

    def open(self) -> None: ...

    def close(self) -> None: ...

    def check(self) -> None: ...

    def nodes(self) -> list[Node]: ...

    def start_worker(self, place: Place, open_engine: OpenEngine) -> StartedWorker: ...

    def ask_for(self, replicas: int, gpus: int) -> None: ...


@dataclass(slots=True)
class Member:
    """A worker of the farm, before and after it has become a replica."""

    place: Place
    worker: StartedWorker
    hello: Answer
    started: float = field(default_factory=time.monotonic)
    replica: RayReplica | None = None


@dataclass(frozen=True, slots=True)
class Preload:
    """A model that every worker loads before its first job."""

    config: EngineConfig
    preset: str
    on_progress: OnProgress


class Farm:
    """`start` returns at once; `wait_for_first` until jobs can run; `close` after the manager is closed."""

    def __init__(
        self,
        manager: JobManager,
        options: FarmOptions,
        open_engine: OpenEngine,
        *,
        cluster: Cluster | None = None,
        preload: Preload | None = None,
        silence: float = SILENCE,
    ) -> None:
        self._manager, self._options, self._open_engine = manager, options, open_engine
        self._cluster = cluster or _ray_cluster(options)
        self._preload, self._silence = preload, silence
        self._scaling = Scaling(options.low if options.low is not None else options.high, options.high)
        self._members: list[Member] = []
        self._failures: dict[tuple[str, int], tuple[int, float]] = {}
        self._closing, self._changed = threading.Event(), threading.Condition()
        self._ready, self._opened = 0, False
        self._loading, self._shown = 0, ""
        self._nodes: list[Node] | None = None
        self._error: LightX2VError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="lightx2v-farm")
        manager.more_may_come = True

    def start(self) -> None:
        self._thread.start()

    def wait_for_first(self, cancel: CancelToken) -> None:
        """Wait until a replica can take jobs, or until it is known that this cluster has no machine yet. Raises the
        error with which the first model does not load, ClusterLost where there is no cluster, and Cancelled."""
        with self._changed:
            while not self._ready and not (self._nodes is not None and not self._has_room()):
                if self._error is not None and not self._may_still_load():
                    raise self._error
                cancel.check()
                self._changed.wait(0.1)

    def close(self) -> None:
        """End all workers, and the cluster if it is our own."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closing.is_set():
                try:
                    self._cluster.open()
                    self._opened = True
                    while not self._closing.wait(TICK):
                        self._tick()
                except LightX2VError as error:
                    self._lose_all(error)
                    self._closing.wait(RETRY_SECONDS)
        finally:
            for member in self._members:
                member.worker.kill()
            with contextlib.suppress(LightX2VError):  # Ray keeps the request of a program that has ended
                self._cluster.ask_for(0, self._options.gpus)
            self._cluster.close()

    def _tick(self) -> None:
        self._cluster.check()
        nodes = self._cluster.nodes()
        self._note(nodes)
        for member in list(self._members):
            self._look_at(member, {node.id for node in nodes})
        wanted = self._wanted()
        for place in free_places(nodes, self._taken(), self._options.gpus):
            if len(self._members) >= wanted:
                break
            if time.monotonic() >= self._failures.get(place.key, (0, 0.0))[1]:
                worker = self._cluster.start_worker(place, self._open_engine)
                self._members.append(Member(place, worker, worker.hello()))
        if self._options.low is not None:  # with "auto" the cluster's size is not this program's business
            self._cluster.ask_for(wanted, self._options.gpus)

    def _taken(self) -> list[tuple[str, int]]:
        return [member.place.key for member in self._members]

    def _note(self, nodes: list[Node]) -> None:
        """Log which machines have come and gone."""
        known = {node.id for node in self._nodes or []}
        with self._changed:
            before, self._nodes = self._nodes or [], nodes
            self._changed.notify_all()
        for node in nodes:
            if node.id not in known:
                what = f"{node.gpus} GPUs" if node.gpus else f"room for {node.slots} workers without GPU"
                log.info("The machine %s has come, with %s.", node.name, what)
        for node in before:
            if node.id not in {other.id for other in nodes}:
                log.warning("The machine %s has gone.", node.name)

    def _has_room(self) -> bool:
        return bool(self._members) or bool(free_places(self._nodes or [], self._taken(), self._options.gpus))

    def _may_still_load(self) -> bool:
        return bool(self._loading) or any(member.replica is None for member in self._members)

    def _look_at(self, member: Member, alive: set[str]) -> None:
        replica = member.replica
        if member.place.node.id not in alive:
            self._drop(member)
        elif replica is None:
            self._welcome(member)
        else:
            replica.listen()
            if not replica.alive:
                self._drop(member)

    def _welcome(self, member: Member) -> None:
        """Make a worker that has said hello a replica."""
        hello: Hello | None = None
        problem = ""
        try:
            hello = member.hello.get()
            if hello is None and time.monotonic() - member.started > START_SECONDS:
                problem = f"it has not started within {START_SECONDS:.0f} seconds"
            elif hello is not None and hello.version != __version__:
                problem = f"it has version {hello.version}, and this program {__version__}: install the same on both"
        except LightX2VError as error:
            problem = str(error)
        if problem:
            log.error("A worker on %s is of no use: %s.", member.place.node.name, problem)
            self._drop(member)
        elif hello is not None:
            node = member.place.node
            member.replica = RayReplica(
                member.worker,
                hello,
                self._name(member.place, hello),
                node.name,
                may_refuse=bool(self._options.address),
                silence=self._silence,
            )
            if self._preload is None:
                self._add(member.replica)
            else:
                self._loading += 1
                threading.Thread(target=self._load, args=(member.replica,), daemon=True, name="lightx2v-load").start()

    def _name(self, place: Place, hello: Hello) -> str:
        """ "gpu-0" on this machine alone, else with the machine's name, and its id where several have one name."""
        what = f"gpu-{hello.gpus.replace(',', '+')}" if place.has_gpus and hello.gpus else f"cpu-{place.index}"
        if not self._options.address:
            return what
        twins = sum(node.name == place.node.name for node in self._nodes or []) > 1
        return f"{place.node.name}{f'~{place.node.id[:4]}' if twins else ''}/{what}"

    def _load(self, replica: RayReplica) -> None:
        """A thread: load the model to serve, then take jobs. A replica that cannot load it may have others."""
        assert self._preload is not None
        preload, self._shown = self._preload, self._shown or replica.name

        def show(event: Progress) -> None:
            if replica.name == self._shown and not self._ready:
                preload.on_progress(event)

        outcome = replica.load(preload.config, preload.preset, show, CancelToken())
        if replica.alive and not outcome.died:
            self._add(replica)
        with self._changed:
            if outcome.error is not None:
                log.error("%s cannot load %s: %s", replica.name, preload.preset, outcome.error["message"])
                self._error = LoadFailed(outcome.error["message"])
            self._loading -= 1
            self._changed.notify_all()

    def _add(self, replica: RayReplica) -> None:
        if self._closing.is_set():
            return
        self._manager.add_replica(replica)
        if not any(member.replica is replica for member in self._members):  # the cluster was lost meanwhile
            self._manager.remove_replica(replica.name, LEAVE_SECONDS)
            return
        log.info("The worker %s (%s) takes jobs.", replica.name, replica.device)
        with self._changed:
            self._ready += replica.loaded is not None or self._preload is None
            self._changed.notify_all()

    def _drop(self, member: Member) -> None:
        """Forget a worker that can run nothing more. Its place waits if it has hardly lived."""
        self._members.remove(member)
        self._give_up(member)
        now, key = time.monotonic(), member.place.key
        count = self._failures.get(key, (0, 0.0))[0] + 1 if now - member.started < SETTLED_SECONDS else 0
        self._failures[key] = (count, now + (min(LONGEST_RETRY, RETRY_SECONDS * 2 ** (count - 1)) if count else 0.0))

    def _give_up(self, member: Member) -> None:
        """Take its job back to the queue, which counts as nobody's death, and end the worker."""
        if member.replica is not None:
            self._manager.remove_replica(member.replica.name, LEAVE_SECONDS)
        member.worker.kill()

    def _lose_all(self, error: LightX2VError) -> None:
        """The cluster's head has ended: all jobs go back to the queue, and none of them has failed by itself."""
        log.error("%s Trying again.", error)
        members, self._members = self._members, []
        if members:
            with ThreadPoolExecutor(len(members)) as pool:  # each may take some seconds to save its step
                list(pool.map(self._give_up, members))
            for member in members:
                member.worker.leave()
        self._failures.clear()
        self._cluster.close()
        with self._changed:
            self._nodes = None
            if not self._opened:  # at the start a wrong address is a mistake; later the cluster may come back
                self._error = error
            self._changed.notify_all()

    def _wanted(self) -> int:
        """How many replicas there should be now. Gives back one that is idle where there are more."""
        if not self._options.scales:
            return self._scaling.wanted
        now = time.monotonic()
        idle = [it for it in self._members if it.replica is not None and it.replica.alive and not it.replica.busy]
        longest = max(idle, key=lambda it: now - it.replica.idle_since if it.replica else 0.0, default=None)
        since = now - longest.replica.idle_since if longest is not None and longest.replica is not None else 0.0
        working = sum(it.replica is not None and it.replica.alive for it in self._members)
        wanted = self._scaling.update(self._manager.backlog(), working, since)
        if longest is not None and longest.replica is not None and len(self._members) > wanted:
            self._members.remove(longest)
            self._give_up(longest)
            log.info("The worker %s is given back.", longest.replica.name)
        return wanted


class LoadFailed(LightX2VError):
    """A worker cannot load the model that is to be served."""


def _ray_cluster(options: FarmOptions) -> Cluster:
    prepare(own=not options.address)
    from .ray_cluster import RayCluster  # imports Ray

    return RayCluster(options.address, gpus=gpu_count(), slots=options.high * options.gpus)
