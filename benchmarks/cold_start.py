"""Where the seconds of a program go from its start on, by thread and by function.

    python -m benchmarks.cold_start lightx2v.infer --preset demo_t2v --prompt "a red ball"

Runs the module in this process and looks at all threads every 20 ms. A line is a function of the project, with the
seconds in which a thread was inside it, or what it called last outside of the project. Threads of one pool count
together. Threads in which nothing of the project runs are left out, except the first one.
"""

from __future__ import annotations

import re
import runpy
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType

import psutil

ROOT = str(Path(__file__).parents[1]) + "/"
EVERY = 0.02
LEAST = 0.15
"""Seconds from which on a line is shown."""


class Sampler:
    """Looks at all threads. `seconds[stage][thread]` counts functions; the stages are those before, at and after
    loading."""

    def __init__(self) -> None:
        self.inside: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self.took: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        self._stage = "before loading"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.perf_counter()
        while not self._stop.wait(EVERY):
            now = time.perf_counter()
            took, before = now - before, now
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            stacks = {names.get(ident, "?"): _stack(frame) for ident, frame in sys._current_frames().items()}
            loading = any(frame.f_code.co_name == "load_here" for stack in stacks.values() for frame in stack)
            if loading or self._stage == "loading":
                self._stage = "loading" if loading else "after loading"
            self.took[self._stage] += took
            self.late[self._stage] += took - EVERY
            for name, stack in stacks.items():
                ours = [frame for frame in stack if _is_ours(frame)]
                if name != "sampler" and (ours or name == "MainThread"):
                    counter = self.inside[self._stage][re.sub(r"[-_]?\d+$", "", name)]
                    last = f"{_name(ours[0]) if ours else 'nothing'} > {_name(stack[0])}"
                    counter.update(dict.fromkeys({*map(_name, ours), last}, took))

    def tables(self) -> str:
        lines = []
        for stage, threads in self.inside.items():
            lines.append(f"{stage}: {self.took[stage]:.2f} s; looks came {self.late[stage]:.2f} s late in all")
            for thread, counter in threads.items():
                lines.append(f"  {thread}")
                lines += [f"  {seconds:8.2f}  {name}" for name, seconds in counter.most_common(60) if seconds > LEAST]
        return "\n".join(lines)


def _stack(frame: FrameType | None) -> list[FrameType]:
    """The innermost frame first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith((f"{ROOT}lightx2v/", f"{ROOT}app/"))


def _name(frame: FrameType) -> str:
    code = frame.f_code
    file = code.co_filename.removeprefix(ROOT) if _is_ours(frame) else "/".join(code.co_filename.split("/")[-2:])
    return f"{file.removesuffix('.py')}:{code.co_qualname}"


def main() -> None:
    module, *arguments = sys.argv[1:]
    sampler = Sampler()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        whole = time.time() - psutil.Process().create_time()
        sampler.stop()
        print(sampler.tables(), file=sys.stderr)
        print(f"{whole:.2f} s since the start of the process", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
