"""Outbox: the messages of one run on their way from the engine's thread to the front end, in order and bounded."""

import threading
from collections import deque
from collections.abc import Iterator

from .messages import Ended, Heard, Message, StepSaved

GATHER_SECONDS = 0.05


class Outbox:
    """`put` in one thread, iterate in another: over lists of messages, at most one in GATHER_SECONDS, since each is a
    message of Ray. Saved steps and the end do not wait. The iteration ends after `Ended`.

    Of a stage's events that nobody has taken yet only the newest stays, but for the denoising steps, which are few. A
    saved step is put when the one before it was taken, so at most one waits here.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: deque[Message] = deque()

    def put(self, message: Message) -> None:
        with self._changed:
            if isinstance(message, StepSaved):
                self._changed.wait_for(lambda: not any(isinstance(other, StepSaved) for other in self._messages))
            elif self._messages and _replaces(message, self._messages[-1]):
                self._messages.pop()
            self._messages.append(message)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[list[Message]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages)
                self._changed.wait_for(self._urgent, GATHER_SECONDS)
                messages = list(self._messages)
                self._messages.clear()
                self._changed.notify_all()
            yield messages
            if isinstance(messages[-1], Ended):
                return

    def _urgent(self) -> bool:
        return not isinstance(self._messages[-1], Heard)


def _replaces(new: Message, old: Message) -> bool:
    if not (isinstance(new, Heard) and isinstance(old, Heard)) or old.preview is not None:
        return False
    return new.progress.stage == old.progress.stage != "denoise"
