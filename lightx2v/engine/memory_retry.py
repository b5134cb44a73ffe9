"""Out-of-memory errors: with advice, and with another try that keeps less on the device."""

from collections.abc import Callable
from typing import TypeVar

from ..errors import OutOfMemory, is_out_of_memory
from ..progress import free_memory

T = TypeVar("T")


def retry_with_offload(
    call: Callable[[], T], when: str, reduce_memory: Callable[[], str | None], on_retry: Callable[[str], None]
) -> T:
    """Run `call`. After each out-of-memory error keep less on the device and run it again, until nothing can leave.

    `reduce_memory` takes the next smaller plan and returns its summary, or None if there is none.
    """
    while True:
        try:
            return within_memory(call, when)
        except OutOfMemory as error:
            failure = error
        # Outside of the handler, where the failed call's tensors are free.
        summary = reduce_memory()
        if summary is None:
            raise failure
        on_retry(summary)


def within_memory(call: Callable[[], T], when: str) -> T:
    """Run `call`; turn an allocator's error into OutOfMemory with advice.

    The new error is raised outside of the `except` block, where the old one is no longer its context: the traceback of
    that one would keep every tensor of the failed step alive. A context manager could not do this.
    """
    try:
        return call()
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error)
    free_memory()
    first_line = failure.strip().splitlines()[0][:200] if failure.strip() else "no details"
    raise OutOfMemory(
        f"Out of memory {when} ({first_line}). "
        "Make the video smaller or shorter, turn offload on, or take an FP8 preset."
    )
