"""RayCluster: the only file that imports Ray. It starts or joins a cluster, and starts workers on its machines.

    prepare(own=True)                  before this module is imported: Ray reads its settings then
    cluster = RayCluster("", workers=2)
    cluster.open()                     ClusterLost where there is none (yet)
    worker = cluster.start_worker(place, …)

Every method but those of RayWorker is called from one thread that stays: the system ends Ray's own processes with the
thread that started them. Ray answers the loss of its head with exceptions of many kinds, SystemExit among them.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..errors import LightX2VError
from ..jobs.engine_slot import OpenEngine
from ..media.work_folder import WorkFolder, sweep
from .messages import Message, Task
from .places import SLOT, Node, Place
from .worker import Worker

log = logging.getLogger("lightx2v.farm")

T = TypeVar("T")

LOOPBACK = "127.0.0.2"
"""Only this machine reaches it. Ray would turn 127.0.0.1 into the address by which others reach the machine."""
STORE_BYTES = 2**30
"""Of Ray's object store on this machine: videos and saved steps on their way. What does not fit goes to the disk."""
IN_FLIGHT = 8
"""The most lists of messages of a run that wait in the object store for the front end."""
LOOK_SECONDS = 0.1
CONNECT_SECONDS, HANG_SECONDS = 2.0, 15.0
SIGACTION_BYTES = 512
"""More than a `struct sigaction` has on any system."""
LONGEST_SOCKET = 30
"""Characters of a temporary folder below which Ray's sockets still have names that the system accepts."""


class ClusterLost(LightX2VError):
    """The cluster's head, or this machine's part of the cluster, does not answer."""


class WorkerLost(LightX2VError):
    """The worker has ended, or its machine has, or the connection to it."""


class RayCluster:
    """The cluster at `address`, or with "" one of this machine alone, with room for `gpus` GPUs, or without GPUs for
    `slots` processes."""

    def __init__(self, address: str, *, gpus: int = 0, slots: int = 0) -> None:
        self.address = address
        self._gpus, self._slots = gpus, slots
        self._folder: WorkFolder | None = None
        self._gcs = ("", 0)
        self._socket = ""
        self._asked = 0

    def open(self) -> None:
        """Start the cluster or join it. ClusterLost where it does not answer."""
        if self.address and self._socket:
            self.check()  # Ray would look for a head that is gone for a long time
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "namespace": "lightx2v"}
        try:
            with _own_signals():
                if self.address:
                    ray.init(self.address, **quiet)
                else:
                    self._start(quiet)
            here = ray.get_runtime_context()
            own = next(node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
        except (Exception, SystemExit) as error:
            self.close()
            where = self.address or "of this machine"
            raise ClusterLost(f"The Ray cluster {where} does not answer: {_reason(error)}.") from None
        gcs = urlsplit(f"//{here.gcs_address}")
        self._gcs, self._socket = (gcs.hostname or "", gcs.port or 0), own["RayletSocketName"]
        self._asked = 0

    def _start(self, quiet: dict[str, Any]) -> None:
        self._folder = _socket_folder()
        ray.init(
            "local",
            num_cpus=0,
            num_gpus=self._gpus,
            resources={} if self._gpus else {SLOT: self._slots},
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(self._folder.path),
            **quiet,
        )

    def close(self) -> None:
        """Leave the cluster; one of this machine alone ends."""
        with contextlib.suppress(Exception, SystemExit), _own_signals():
            ray.shutdown()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def check(self) -> None:
        """Raise ClusterLost where the head or this machine's raylet has ended. Asks the sockets: Ray would wait."""
        try:
            _reach(socket.AF_INET6 if ":" in self._gcs[0] else socket.AF_INET, self._gcs)
            if ray.is_initialized():  # another cluster at this address has another socket
                _reach(socket.AF_UNIX, self._socket)
        except OSError as error:
            raise ClusterLost(f"The head of the Ray cluster has ended ({error.strerror or error}).") from None

    def nodes(self) -> list[Node]:
        """The machines that are there now."""
        alive = [node for node in self._guarded(ray.nodes) if node["Alive"]]
        return [
            Node(
                id=node["NodeID"],
                name=node["NodeManagerHostname"],
                gpus=int(node["Resources"].get("GPU", 0)),
                slots=int(node["Resources"].get(SLOT, 0)),
            )
            for node in alive
        ]

    def start_worker(self, place: Place, open_engine: OpenEngine) -> "RayWorker":
        """Start a worker there; it says hello once it is ready."""
        return self._guarded(lambda: _start(place, open_engine))

    def ask_for(self, replicas: int, gpus: int) -> None:
        """Ask Ray's autoscaler for room for so many replicas in all."""
        if replicas != self._asked and self.address:
            bundle: dict[str, float] = {"GPU": gpus}
            self._guarded(lambda: request_resources(bundles=[bundle] * replicas))
            self._asked = replicas

    @staticmethod
    def _guarded(call: Callable[[], T]) -> T:
        """Call in a thread of its own: where the head ends meanwhile, or hangs, Ray's calls never return."""
        answer: Future[T] = Future()

        def work() -> None:
            try:
                answer.set_result(call())
            except (Exception, SystemExit) as error:
                answer.set_exception(ClusterLost(f"Ray does not answer: {_reason(error)}."))

        threading.Thread(target=work, daemon=True, name="lightx2v-ray").start()
        try:
            return answer.result(HANG_SECONDS)
        except TimeoutError:
            raise ClusterLost(f"The head of the Ray cluster has not answered for {HANG_SECONDS:.0f} seconds.") from None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this program's answer to SIGTERM: Ray puts its own in its place, and none when it leaves. Python sets
    handlers in its main thread only; the system's own call works in any."""
    system, kept = ctypes.CDLL(None), ctypes.create_string_buffer(SIGACTION_BYTES)
    system.sigaction(signal.SIGTERM, None, kept)
    try:
        yield
    finally:
        system.sigaction(signal.SIGTERM, kept, None)


def _reach(family: socket.AddressFamily, address: Any) -> None:
    """Connect and leave again. OSError where nothing listens."""
    with socket.socket(family) as probe:
        probe.settimeout(CONNECT_SECONDS)
        probe.connect(address)


def _start(place: Place, open_engine: OpenEngine) -> "RayWorker":
    kind = "num_gpus" if place.has_gpus else "resources"
    options: dict[str, Any] = {kind: place.gpus if place.has_gpus else {SLOT: place.gpus}}
    group: PlacementGroup | None = None
    if place.gpus > 1:
        bundle: dict[str, float] = {"GPU" if place.has_gpus else SLOT: place.gpus}
        on_node = [{"ray.io/node-id": place.node.id}]
        group = placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=on_node)
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
    else:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(place.node.id, soft=False)
    remote: Any = ray.remote
    actor_class = remote(
        num_cpus=0,
        max_restarts=0,  # the farm replaces workers itself
        max_task_retries=0,
        concurrency_groups={"control": 1, "health": 1},
    )(Worker)
    return RayWorker(actor_class.options(**options).remote(open_engine, place.share, place.gpus), group)


@dataclass(slots=True)
class Answer:
    """The answer to a question, once it is there."""

    reference: Any

    def get(self) -> Any:
        """None while there is no answer. WorkerLost if none will come."""
        try:
            if not ray.wait([self.reference], timeout=0)[0]:
                return None
            return ray.get(self.reference)
        except (Exception, SystemExit) as error:
            raise _lost(error) from None


class RayWorker:
    """A Worker on the cluster, from the side of the front end. Any thread may use it."""

    def __init__(self, actor: Any, group: PlacementGroup | None = None) -> None:
        self._actor, self._group = actor, group

    def hello(self) -> "Answer":
        return self._ask("hello", "control")

    def pulse(self) -> "Answer":
        return self._ask("pulse", "health")

    def stop(self, run: str, *, suspend: bool) -> None:
        self._ask("stop", "control", run, suspend)

    def run(self, task: Task) -> Iterator[list[Message]]:
        """The messages of a run as they come, and an empty list every now and then. WorkerLost."""
        try:
            method = self._actor.run.options(num_returns="streaming", _generator_backpressure_num_objects=IN_FLIGHT)
            messages = method.remote(task)
            while True:
                if not ray.wait([messages], timeout=LOOK_SECONDS)[0]:
                    yield []
                    continue
                try:
                    reference = next(messages)
                except StopIteration:
                    return
                yield ray.get(reference)
        except (Exception, SystemExit) as error:
            raise _lost(error) from None

    def leave(self) -> None:
        """Tell it to end, where the head that would kill it is gone."""
        with contextlib.suppress(LightX2VError):
            self._ask("leave", "control")

    def kill(self) -> None:
        """End its process, also where it hangs."""
        with contextlib.suppress(Exception, SystemExit):
            ray.kill(self._actor)
        if self._group is not None:
            with contextlib.suppress(Exception, SystemExit):
                remove_placement_group(self._group)

    def _ask(self, method: str, group: str, *arguments: Any) -> "Answer":
        try:
            return Answer(getattr(self._actor, method).options(concurrency_group=group).remote(*arguments))
        except (Exception, SystemExit) as error:
            raise _lost(error) from None


def _lost(error: BaseException) -> WorkerLost:
    return WorkerLost(f"{type(error).__name__}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The first line of Ray's many."""
    return str(error).partition("\n")[0].rstrip(". ")


def _socket_folder() -> WorkFolder:
    """A folder for the cluster of this machine, which only this user can read. Sockets need short paths."""
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_SOCKET and os.path.isdir("/tmp"):  # noqa: S108
        parent = "/tmp"  # noqa: S108
    sweep(Path(parent))
    return WorkFolder(Path(parent))
