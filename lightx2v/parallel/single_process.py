"""SingleProcess: the process group of a program that works alone. Each method is the identity."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from ..progress import CancelToken

T = TypeVar("T")


class SingleProcess:
    """Has the methods of `ProcessGroup` that loading and running use; their meaning is documented there."""

    rank, size, is_rank0 = 0, 1, True

    def collectives_for(self, cfg_p_size: int, seq_p_size: int) -> tuple[None, None, None]:
        return None, None, None

    def check_device(self, device: str) -> None:
        pass

    def broadcast_stream(
        self, tensors: Iterable[tuple[str, Tensor]], cancel: CancelToken | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        for pair in tensors:
            if cancel is not None:
                cancel.check()
            yield pair

    def broadcast_json(self, message: Any) -> Any:
        return message

    def all_gather_json(self, message: Any) -> list[Any]:
        return [message]

    def any_true(self, flag: bool) -> bool:
        return flag

    def local_cancel(self, cancel: CancelToken | None) -> CancelToken | None:
        return cancel

    def run_on_rank0(
        self, command: str, call: Callable[[], T], to_json: Callable[[T], Any], from_json: Callable[[Any], T]
    ) -> T:
        return call()

    def send_command(self, command: str, content: Any = None) -> None:
        pass

    def collective(self) -> AbstractContextManager[None]:
        return nullcontext()


ALONE = SingleProcess()
