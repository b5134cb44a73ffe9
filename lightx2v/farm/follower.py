"""A follower process: takes part in the runs of its worker, which is rank 0, and ends with it."""

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
"""Linux: the signal that this process gets when its parent ends. It reaches a process that hangs, too."""


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, daemon=True, name="lightx2v-parent").start()
    from ..pipeline import LightX2VPipeline

    LightX2VPipeline.follow()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
