"""Background: a thread whose work is of use, but not worth waiting for. It ends before the interpreter does.

    Background(call, name)        runs call(stop) in a thread; `stop` is set when the program ends

The interpreter ends threads that run on by unwinding them, in whatever library they are: in C++ or Rust that aborts the
process after its work was done.
"""

import atexit
import threading
from collections.abc import Callable


class Background:
    def __init__(self, call: Callable[[threading.Event], object], name: str) -> None:
        self._call, self._stop = call, threading.Event()
        # As no daemon, the interpreter would wait for it before it asks it to stop.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        atexit.register(self._end)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._call(self._stop)
        finally:
            atexit.unregister(self._end)

    def _end(self) -> None:
        self._stop.set()
        self._thread.join()
