"""Work in the background stops when the program ends, and the program's exit code is its own."""

from __future__ import annotations

import subprocess
import sys
import threading

from lightx2v.background import Background

PROGRAM = """
import sys, time
from lightx2v.background import Background

def work(stop):
    while not stop.wait(0.01):
        pass
    print("stopped", flush=True)

Background(work, "work")
print("done", flush=True)
sys.exit(3)
"""


def test_a_program_that_ends_stops_its_background_work_first() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout.split()) == (3, ["done", "stopped"]), done.stderr


def test_work_that_has_ended_is_forgotten() -> None:
    seen: list[str] = []
    work = Background(lambda stop: seen.append(threading.current_thread().name), "some work")
    work.wait()
    assert seen == ["some work"] and not work._thread.is_alive()
