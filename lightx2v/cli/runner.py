"""Run one command line: parse its flags, show log and progress, handle signals, return the exit code.

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(_parser(), _run, argv, stopped="Stopped; no video was written.")

The second argument is the command's body. It gets the parsed flags and a CommandContext, and returns the exit code.
"""

import argparse
import atexit
import contextlib
import gc
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config.environment import Environment
from ..config.folders import use_home, working_folder
from ..errors import Cancelled, ConfigError, LightX2VError
from .parser import ArgumentParser
from .signals import ECHO, Interrupts
from .terminal import ProgressLine, logging_to

log = logging.getLogger("lightx2v.cli")


@dataclass(frozen=True, slots=True)
class CommandContext:
    """The environment variables, the progress line and the signals of a command."""

    environment: Environment
    progress: ProgressLine
    interrupts: Interrupts


Body = Callable[[argparse.Namespace, CommandContext], int]


def run_command(parser: ArgumentParser, body: Body, argv: Sequence[str] | None = None, *, stopped: str = "") -> int:
    """Run `body` with the parsed flags. Return its exit code, or that of the error or signal that ended it.

    `stopped` is the message after a signal. A flag `--verbose` turns the debug log on. Of the processes that torchrun
    starts, only rank 0 prints the error that ends all of them, and a signal that torchrun repeats counts once.
    """
    # At the end of a program the interpreter searches all objects for garbage: with torch 2 to 4 seconds.
    atexit.register(gc.freeze)
    try:
        options = parser.parse(argv)
    except SystemExit as stop:  # argparse has printed the error or the help
        return int(stop.code or 0)
    progress = ProgressLine(sys.stderr)
    try:
        environment = Environment.read()
    except ConfigError as error:
        progress.finish(f"error: {error}")
        return error.exit_code
    level = logging.DEBUG if getattr(options, "verbose", False) else logging.INFO
    with (
        logging_to(sys.stderr, progress, level, prefix=environment.log_prefix),
        Interrupts(echo=ECHO if environment.distributed else 0.0) as interrupts,
    ):
        context = CommandContext(environment, progress, interrupts)
        return _exit_code(lambda: body(options, context), context, stopped)


def leave_at_exit(code: int) -> None:
    """Let the process end with `code` although a thread is inside torch. The interpreter's own end would abort."""
    atexit.register(_leave, code)


def _leave(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _exit_code(call: Callable[[], int], context: CommandContext, stopped: str) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without … or 球 must not fail after the last step
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        working_folder()  # in a deleted one every relative path would end in a traceback
        use_home()
        return call()
    except (Cancelled, KeyboardInterrupt):
        code, message = context.interrupts.exit_code, stopped
    except LightX2VError as error:
        log.debug("Traceback:", exc_info=True)
        code, message = error.exit_code, f"error: {error}"
    except BrokenPipeError:  # `--list_presets | head`: the reader has left, and Python would flush to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return context.interrupts.exit_code if context.interrupts.token.cancelled else 1
    context.progress.finish(message if context.environment.rank == 0 else "")
    return code
