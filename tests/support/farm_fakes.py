"""A cluster without Ray: its workers are real Workers in this process, and its machines come and go on request."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

from lightx2v.errors import LightX2VError
from lightx2v.farm.messages import Ended, Hello, Message, Pulse, Task
from lightx2v.farm.places import Node, Place
from lightx2v.farm.worker import Worker
from lightx2v.jobs.engine_slot import OpenEngine
from lightx2v.jobs.replica import ReplicaStatus


class Gone(LightX2VError):
    pass


class Said:
    """An answer that is there at once; None never comes."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


class FakeWorker:
    """Its `greeting` may be replaced. `hangs` and `dead` are what a SIGSTOP and a SIGKILL make of it."""

    def __init__(self, engine: Worker | None = None, **hello: Any) -> None:
        self.engine, self.killed, self.stops = engine, False, list[tuple[str, bool]]()
        self.hangs = self.dead = False
        self.greeting: Hello | Exception | None = Hello(**({"pid": 1, "gpus": "", "device": "CPU"} | hello))
        self.messages: list[Message | None] = []
        self.tasks: list[Task] = []

    def hello(self) -> Said:
        return Said(self.greeting)

    def pulse(self) -> Said:
        if self.dead:
            return Said(Gone("killed"))
        return Said(None if self.hangs else Pulse(status=ReplicaStatus(machine="", memory_used=1, memory_total=2)))

    def stop(self, run: str, *, suspend: bool) -> None:
        self.stops.append((run, suspend))
        if self.engine is not None:
            self.engine.stop(run, suspend)

    def run(self, task: Task) -> Iterator[list[Message]]:
        self.tasks.append(task)
        if self.engine is None:
            for message in self.messages:
                yield [message] if message is not None else []
            while not self.dead:
                yield []
            raise Gone("killed")
        heard: queue.SimpleQueue[list[Message]] = queue.SimpleQueue()
        engine = self.engine
        threading.Thread(target=lambda: [heard.put(messages) for messages in engine.run(task)], daemon=True).start()
        while True:
            if self.dead:
                raise Gone("killed")
            try:
                messages = heard.get(timeout=0.01)
            except queue.Empty:
                yield []
                continue
            if not self.hangs:
                yield messages
            if isinstance(messages[-1], Ended):
                return

    def leave(self) -> None:
        self.dead = True

    def kill(self) -> None:
        self.killed = self.dead = True


class FakeCluster:
    """`machines` may change at any time; with `down` every call fails. `asked` are the requests of the autoscaler."""

    def __init__(self, *machines: Node) -> None:
        self.machines = list(machines)
        self.down = False
        self.opened = 0
        self.workers: list[tuple[Place, FakeWorker]] = []
        self.asked: list[int] = []
        self.hellos: Iterator[dict[str, Any]] = itertools.repeat({})

    def open(self) -> None:
        self.check()
        self.opened += 1

    def close(self) -> None:
        pass

    def check(self) -> None:
        if self.down:
            raise Gone("The head has ended.")

    def nodes(self) -> list[Node]:
        return list(self.machines)

    def start_worker(self, place: Place, open_engine: OpenEngine) -> FakeWorker:
        worker = FakeWorker(Worker(open_engine, place.share, 1), **next(self.hellos))
        self.workers.append((place, worker))
        return worker

    def ask_for(self, replicas: int, gpus: int) -> None:
        if [replicas] != self.asked[-1:]:
            self.asked.append(replicas)

    def living(self) -> list[FakeWorker]:
        return [worker for _, worker in self.workers if not worker.dead]
