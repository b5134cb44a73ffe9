"""ProcessGroup: several processes that work on one video, the commands of rank 0, and how a failure of one ends all.

    group = join(environment)               rendezvous.py
    mesh = Mesh(group, cfg_p_size, seq_p_size)
    with group.collective(): …              work that may fail on one process only

Rank 0 reads, writes and talks to people; the others follow its commands (`run_on_rank0`). Commands are JSON in rank
0's store on loopback. Failures go through torchrun's store, which outlives every rank. Waiting for a command needs no
device and has no time limit.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..errors import ConfigError, GroupFailed, LightX2VError
from ..progress import CancelToken
from .broadcast import TensorStream, broadcast_stream, error_from_json, error_to_json
from .collectives import Collectives
from .heartbeat import Heartbeat
from .single_process import SingleProcess

SETTLE = 8.0
"""Seconds in which all processes must have left a collective after it failed on one of them."""
POLL = 0.02
EXIT, CLOSE, REFUSED = "exit", "close", "refused"
"""Commands: the program ends; the model is closed; the call on rank 0 failed."""

T = TypeVar("T")


class ProcessGroup(Collectives):
    """All processes of this program; `join` makes the one instance. `store` carries commands, `heartbeat` failures."""

    def __init__(self, device: torch.device, store: dist.Store, heartbeat: Heartbeat) -> None:
        assert dist.group.WORLD is not None
        super().__init__(dist.group.WORLD)
        self.device = device
        self._all_collectives: list[Collectives] = [self]
        self._layouts: dict[tuple[int, int], tuple[Collectives | None, Collectives | None, Collectives]] = {}
        self._store, self._heartbeat = store, heartbeat
        self._commands = self._works = self._deleted = 0

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def check_device(self, device: str) -> None:
        """Raise ConfigError if a configuration asks for another device than the processes are on."""
        if device not in ("auto", self.device.type):
            raise ConfigError(
                f'device is "{device}", but the {self.size} processes run on {self.device.type.upper()}, one device '
                'each. Set device to "auto"; CUDA_VISIBLE_DEVICES selects the GPUs, if any.'
            )

    def close(self) -> None:
        """End this process's part. The others end too, as soon as they wait for a command.

        After a failure the process ends here: NCCL would wait for exchanges that never come.
        """
        if self._heartbeat.failure():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        with contextlib.suppress(RuntimeError):
            self.send_command(EXIT)
        self._heartbeat.close()
        if self.is_rank0:
            self._heartbeat.wait_for_others(SETTLE)  # they read the last command from this process's store
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- exchanges --------------------------------------------------------------------------------------------------

    def collectives_for(
        self, cfg_p_size: int, seq_p_size: int
    ) -> tuple[Collectives | None, Collectives | None, Collectives]:
        """This process's groups in a layout: guidance branches, sequence, all processes. All ranks must call it.

        The groups of a layout are made once: NCCL keeps memory for each.
        """
        known = self._layouts.get((cfg_p_size, seq_p_size))
        if known is not None:
            return known
        if cfg_p_size > 1 and seq_p_size > 1:
            mesh = init_device_mesh(self.device.type, (cfg_p_size, seq_p_size), mesh_dim_names=("cfg_p", "seq_p"))
            cfg, seq = Collectives(mesh.get_group("cfg_p")), Collectives(mesh.get_group("seq_p"))
        else:
            cfg = Collectives(self.handle) if cfg_p_size > 1 else None
            seq = Collectives(self.handle) if seq_p_size > 1 else None
        layout = self._layouts[cfg_p_size, seq_p_size] = (cfg, seq, Collectives(self.handle))
        self._all_collectives += [collectives for collectives in layout if collectives is not None]
        return layout

    def broadcast_stream(
        self, tensors: TensorStream, cancel: CancelToken | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as rank 0 reads them, on every rank. Other ranks never start their `tensors`."""
        return broadcast_stream(self, self.device, tensors, cancel)

    def local_cancel(self, cancel: CancelToken | None) -> CancelToken | None:
        """The token for places where a single process may stop by itself: none, the others would wait for it."""
        return None

    # ---- commands of rank 0 -----------------------------------------------------------------------------------------

    def send_command(self, command: str, content: Any = None) -> None:
        """Send the next command from rank 0, in JSON types. The other ranks send none, so there it does nothing."""
        if self.is_rank0:
            self._store.set(f"command/{self._commands}", json.dumps([command, content]))
            self._commands += 1

    def next_command(self) -> tuple[str, Any]:
        """Wait for the next command and its content. It stays the next one until `finish_command`."""
        key = f"command/{self._commands}"
        try:
            while not self._store.check([key]):
                time.sleep(POLL)
            command, content = json.loads(self._store.get(key))
        except RuntimeError:
            raise GroupFailed(self._heartbeat.failure() or "Process 0 ended without a message.") from None
        return command, content

    def finish_command(self) -> None:
        self._commands += 1

    def run_on_rank0(
        self, command: str, call: Callable[[], T], to_json: Callable[[T], Any], from_json: Callable[[Any], T]
    ) -> T:
        """Run `call` on rank 0 alone and return its result on every rank. All ranks must make this call.

        A LightX2VError of rank 0 is raised on every rank.
        """
        if self.is_rank0:
            try:
                result = call()
            except LightX2VError as error:
                self.send_command(REFUSED, error_to_json(error))
                raise
            self.send_command(command, to_json(result))
            return result
        while (received := self.next_command())[0] == CLOSE:  # each process closes its own model
            self.finish_command()
        actual, content = received
        if actual == EXIT:
            raise GroupFailed("Process 0 has ended.")
        self.finish_command()
        if actual == REFUSED:
            raise error_from_json(content)
        if actual != command:
            raise GroupFailed(
                f'Process 0 calls "{actual}" while process {self.rank} calls "{command}". All processes must run the '
                "same script."
            )
        return from_json(content)

    # ---- failures ---------------------------------------------------------------------------------------------------

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Work that all processes do. If all of them fail at the same exchange, the group can continue.

        Otherwise some processes wait for an exchange that never comes: then all learn of the first failure and end.
        """
        work, self._works = self._works, self._works + 1
        try:
            with self._heartbeat.needs_all():
                try:
                    self.all_true(True)  # all processes are here, so all have ended the work before this one
                    self._delete_old_keys(work - 1)
                    yield
                finally:
                    calls = sum(collectives.calls for collectives in self._all_collectives)
                    with contextlib.suppress(RuntimeError):  # the store may be gone, with rank 0
                        self._store.set(f"ended/{work}/{self.rank}", str(calls))
        except KeyboardInterrupt:
            self._heartbeat.report_failure("stopped by a signal", kind="KeyboardInterrupt")
            raise
        except BaseException as error:
            if not (missing := self._missing(work)):
                raise
            if isinstance(error, RuntimeError) and (not self._store_lives() or self._heartbeat.silent(missing)):
                ranks = ", ".join(map(str, missing))
                self._heartbeat.report_failure(f"Process {ranks} ended without a message.", kind="GroupFailed")
            else:
                self.report_failure(error)
            raise GroupFailed(self._heartbeat.failure()) from error

    def report_failure(self, error: BaseException) -> None:
        """Tell all processes that this one ends with this error, so that they end too."""
        self._heartbeat.report_failure(str(error) or "stopped", kind=type(error).__name__)

    def _missing(self, work: int) -> list[int]:
        """The ranks that do not leave this work, or leave it at another exchange than this one."""
        deadline = time.monotonic() + SETTLE
        missing = list(range(self.size))
        try:
            while missing and time.monotonic() < deadline and not self._heartbeat.failure():
                missing = [rank for rank in missing if not self._store.check([f"ended/{work}/{rank}"])]
                time.sleep(POLL)
            if missing:
                return missing
            calls = [self._store.get(f"ended/{work}/{rank}").decode() for rank in range(self.size)]
        except RuntimeError:  # the store was rank 0's
            return [0]
        return [rank for rank, count in enumerate(calls) if count != calls[self.rank]]

    def _store_lives(self) -> bool:
        """False once rank 0 has ended, which holds the store."""
        try:
            return self._store.check([]) or True
        except RuntimeError:
            return False

    def _delete_old_keys(self, work: int) -> None:
        """Delete from the store what all have read: how this work ended, and the commands so far."""
        with contextlib.suppress(RuntimeError):
            self._store.delete_key(f"ended/{work}/{self.rank}")
            while self.is_rank0 and self._deleted < self._commands:
                self._store.delete_key(f"command/{self._deleted}")
                self._deleted += 1


Group = ProcessGroup | SingleProcess
"""The processes that work on one video: several, or this one alone."""
