"""Several processes that work on one video: what rank 0 tells the others, how a failure of one ends all.

    world = join(environment)               meet.py
    mesh = Mesh(world, cfg_p_size, seq_p_size)
    with world.together(): …                what may fail on one process only

Rank 0 reads, writes and talks to people; the others do what it tells them (`same`). Commands are JSON in rank 0's
store on loopback; failures go through torchrun's, which outlives every rank. Waiting there needs no device and has no
time limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..config.engine_config import EngineConfig
from ..errors import ConfigError, GroupFailed, LightX2VError
from ..progress import CancelToken
from .broadcast import TensorStream, describe, feed, recall
from .collectives import Wire
from .heartbeat import Watch

SETTLE = 8.0
"""Seconds in which all processes must have come out of a piece of work after it failed on one of them."""
POLL = 0.02
LEAVE, CLOSE = "leave", "close"


class World:
    """One per program; `join` makes it. `store` takes commands, `watch` failures."""

    def __init__(self, rank: int, size: int, device: torch.device, store: dist.Store, watch: Watch) -> None:
        everybody = dist.group.WORLD
        assert everybody is not None
        self.rank, self.size, self.device = rank, size, device
        self.wire = Wire(everybody)
        self._all_wires = [self.wire]
        self._wires: dict[tuple[int, int], tuple[Wire | None, Wire | None, Wire]] = {}
        self._store, self._watch = store, watch
        self._told = self._works = self._forgotten = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wires(self, cfg_p_size: int, seq_p_size: int) -> tuple[Wire | None, Wire | None, Wire]:
        """This process's groups among `cfg_p_size` x `seq_p_size`: the branches, the sequence, everybody.

        All processes ask for it. A layout's groups are made once: NCCL keeps memory for each.
        """
        known = self._wires.get((cfg_p_size, seq_p_size))
        if known is not None:
            return known
        whole = self.wire.group
        if cfg_p_size > 1 and seq_p_size > 1:
            mesh = init_device_mesh(self.device.type, (cfg_p_size, seq_p_size), mesh_dim_names=("cfg_p", "seq_p"))
            cfg, seq = Wire(mesh.get_group("cfg_p")), Wire(mesh.get_group("seq_p"))
        else:
            cfg, seq = Wire(whole) if cfg_p_size > 1 else None, Wire(whole) if seq_p_size > 1 else None
        made = self._wires[cfg_p_size, seq_p_size] = (cfg, seq, Wire(whole))
        self._all_wires += [wire for wire in made if wire is not None]
        return made

    # ---- what rank 0 tells the others -------------------------------------------------------------------------------

    def tell(self, what: str, content: Any = None) -> None:
        """Rank 0's next command, in JSON types."""
        self._store.set(f"command/{self._told}", json.dumps({"what": what, "content": content}))
        self._told += 1

    def peek(self) -> tuple[str, Any]:
        """The next command, whenever it comes; it stays the next one."""
        key = f"command/{self._told}"
        try:
            while not self._store.check([key]):
                time.sleep(POLL)
            command = json.loads(self._store.get(key))
        except RuntimeError:
            raise GroupFailed(self._watch.reason() or "Process 0 ended without a word.") from None
        return command["what"], command["content"]

    def same(self, what: str, content: Callable[[], Any]) -> Any:
        """One call that all processes make: rank 0's content, on all. What rank 0 refuses is refused everywhere."""
        if self.leads:
            try:
                said = content()
            except LightX2VError as error:
                self.tell("refused", describe(error))
                raise
            self.tell(what, said)
            return said
        while (heard := self.peek())[0] == CLOSE:  # each closes its own
            self.skip()
        if heard[0] == LEAVE:
            raise GroupFailed("Process 0 has ended.")
        self.skip()
        if heard[0] == "refused":
            raise recall(heard[1])
        if heard[0] != what:
            raise GroupFailed(f"Rank 0 does {heard[0]} while this process does {what}: the scripts must do the same.")
        return heard[1]

    def skip(self) -> None:
        """Done with the command that `peek` shows."""
        self._told += 1

    def leave(self) -> None:
        """The program ends. The others, if they wait for a command, end too.

        After a failure it ends here: NCCL would wait for exchanges that never come.
        """
        if self._watch.reason():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if self.leads:
            with contextlib.suppress(RuntimeError):
                self.tell(LEAVE)
        self._watch.close()
        if self.leads:
            self._watch.wait_for_others(SETTLE)  # they read the last command from this process's store
        if dist.is_initialized():
            dist.destroy_process_group()

    def agree_on_model(
        self, config: EngineConfig, preset: str, *, prepare: Callable[[], None]
    ) -> tuple[EngineConfig, str]:
        """What rank 0 wants to load, once it has called `prepare`."""

        def prepared() -> dict[str, Any]:
            prepare()
            return {"config": config.to_json(), "preset": preset}

        said = self.same("load", prepared)
        return EngineConfig.from_json(said["config"]), said["preset"]

    def check_device(self, device: str) -> None:
        """Raises ConfigError if this is not where the processes were put."""
        if device not in ("auto", self.device.type):
            raise ConfigError(
                f'device is "{device}", but the {self.size} processes are on {self.device.type.upper()}, one device '
                'each. Set device to "auto"; CUDA_VISIBLE_DEVICES says which GPUs are used, if any.'
            )

    def stream(self, tensors: TensorStream, cancel: CancelToken | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) as rank 0 reads them, on every process; the others' `tensors` are never begun."""
        return feed(self.wire, self.device, tensors, cancel)

    # ---- failures ---------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all processes do. Where it fails on all, at the same exchange, the group can go on.

        Otherwise some wait for an exchange that will not come; then the first failure is told and all processes end.
        """
        work, self._works = self._works, self._works + 1
        try:
            with self._watch.busy():
                try:
                    self.wire.agree(True, all_of_them=True)  # all are here, so the work before this one is over
                    self._forget(work - 1)
                    yield
                finally:
                    with contextlib.suppress(RuntimeError):  # the store may be gone, with rank 0
                        self._store.set(f"ended/{work}/{self.rank}", str(sum(wire.calls for wire in self._all_wires)))
        except KeyboardInterrupt:
            self._watch.fail("stopped by a signal", kind="KeyboardInterrupt")
            raise
        except BaseException as error:
            if not (missing := self._missing(work)):
                raise
            if isinstance(error, RuntimeError) and (not self._store_lives() or self._watch.silent(missing)):
                who = ", ".join(map(str, missing))
                self._watch.fail(f"Process {who} ended without a word.", kind="GroupFailed")
            else:
                self._watch.fail(str(error), kind=type(error).__name__)
            raise GroupFailed(self._watch.reason()) from error

    def give_up(self, error: BaseException) -> None:
        """Tells all processes that this one ends, so that they end too."""
        self._watch.fail(str(error) or "stopped", kind=type(error).__name__)

    def _missing(self, work: int) -> list[int]:
        """The processes that do not come out of this work, or not at the same exchange."""
        deadline = time.monotonic() + SETTLE
        missing = list(range(self.size))
        try:
            while missing and time.monotonic() < deadline and not self._watch.reason():
                missing = [rank for rank in missing if not self._store.check([f"ended/{work}/{rank}"])]
                time.sleep(POLL)
            if missing:
                return missing
            calls = [self._store.get(f"ended/{work}/{rank}").decode() for rank in range(self.size)]
        except RuntimeError:  # the store was rank 0's
            return [0]
        return [rank for rank, count in enumerate(calls) if count != calls[self.rank]]

    def _store_lives(self) -> bool:
        """False once rank 0, whose store it is, has ended."""
        try:
            return self._store.check([]) or True
        except RuntimeError:
            return False

    def _forget(self, work: int) -> None:
        """Drops from the store what nobody will read any more: how this work ended, and the commands so far."""
        with contextlib.suppress(RuntimeError):
            self._store.delete_key(f"ended/{work}/{self.rank}")
            while self.leads and self._forgotten < self._told:
                self._store.delete_key(f"command/{self._forgotten}")
                self._forgotten += 1
