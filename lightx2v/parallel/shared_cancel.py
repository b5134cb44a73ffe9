"""SharedCancel: the cancel flag and the postponed error of one run, on all its processes."""

from collections.abc import Callable
from typing import ParamSpec

from ..errors import LightX2VError
from ..progress import CancelToken
from .process_group import Group

P = ParamSpec("P")


class SharedCancel(CancelToken):
    """Stops all processes at the same `check` when one of them is cancelled, or has failed in `postpone`.

    `check` is an exchange, so every process must call it at the same places: between steps and between VAE chunks.
    """

    def __init__(self, group: Group, token: CancelToken) -> None:
        super().__init__()
        self._group, self._token = group, token
        self._failure: LightX2VError | None = None

    @property
    def cancelled(self) -> bool:
        return super().cancelled or self._token.cancelled

    def check(self) -> None:
        """Raise the postponed error where it happened and Cancelled on the other processes."""
        self._stop_if(self.cancelled or self._failure is not None)

    def check_failure(self) -> None:
        """Like `check`, but a cancel that comes too late to stop anything is ignored."""
        self._stop_if(self._failure is not None)

    def postpone(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call, and keep an error of ours for the next check: the other processes wait for this one until then.

        After an error nothing is called any more.
        """
        if self._failure is None:
            try:
                call(*args, **kwargs)
            except LightX2VError as error:
                self._failure = error

    def _stop_if(self, flag: bool) -> None:
        if self._group.any_true(flag):
            self.cancel()
            if self._failure is not None:
                raise self._failure from None
            super().check()
