"""python -m lightx2v.download: download the model files of a preset before they are needed.

    python -m lightx2v.download t2v_distill_lora --dry_run      names, bytes and free disk space
    python -m lightx2v.download t2v_distill_lora                the download; start it again after an interruption

Exit codes: 0 all files are here, 1 failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated.
"""

import argparse
import sys
from collections.abc import Sequence

from .cli.parser import ArgumentParser
from .cli.runner import CommandContext, run_command
from .config.model_paths import RIFE
from .config.presets import list_presets, resolve
from .errors import DownloadError, byte_size, one_line
from .hub import DownloadPlan, Hub, fetch, make_plan
from .progress import Meter


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    stopped = "Stopped. The downloaded bytes are kept: run this again to continue from there."
    return run_command(_parser(), _run, argv, stopped=stopped)


def _run(options: argparse.Namespace, context: CommandContext) -> int:
    if options.preset is None:
        for info in list_presets():
            print(f"{info.name:<32} {info.title}")
        return 0
    overrides = {"models_dir": options.models_dir} if options.models_dir else {}
    resolved = resolve(options.preset, overrides, environment=context.environment)
    video, hub = resolved.request, Hub()
    rife = options.rife or video["interpolated_fps"] and video["interpolation"] != "ffmpeg"
    plan = make_plan(resolved.engine, also=(RIFE,) if rife else (), hub=hub)
    print(_table(plan))
    if plan.unavailable:
        raise DownloadError(
            f"{len(plan.unavailable)} of these files are neither on this machine nor on the Hub: "
            f"{', '.join(plan.unavailable)}. Check model_path and --models_dir."
        )
    if options.dry_run:
        plan.check_space()
        return 0
    if plan.files:
        with context.interrupts.cancelling() as token:
            fetch(plan, meter=Meter(on_progress=context.progress), cancel=token, hub=hub)
        context.progress.clear()
    print("All files are here.")
    return 0


def _table(plan: DownloadPlan) -> str:
    """One row for each needed file: bytes, state and name. Then the sums."""
    rows = [(f"{size:,}", "here", name) for name, size in plan.present]
    rows += [("", "missing", name) for name in plan.unavailable]
    for file in plan.files:
        state = "cached" if file.done else f"{100 * file.here // file.file.size} %" if file.here else "to fetch"
        rows.append((f"{file.file.size:,}", state, file.name))
    lines = [f"{size:>16}  {state:<8}  {one_line(name)}" for size, state, name in rows]
    lines.append(
        f"{plan.left:>16,}  bytes to fetch ({byte_size(plan.left)}); {byte_size(plan.free)} are free in {plan.cache}"
    )
    return "\n".join(lines)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lightx2v.download",
        description="Downloads the missing model files of a preset into the cache that all Hugging Face programs "
        "share. Follows HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.",
        epilog="Exit codes: 0 all files are here, 1 failed, 2 bad usage, 130 interrupted, 143 terminated.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "preset", nargs="?", metavar="PRESET", help="a name or a JSON file; without it, list the presets"
    )
    parser.add_argument("--models_dir", metavar="FOLDER", help="look for files there first; nothing is written there")
    parser.add_argument("--rife", action="store_true", help="also the file for --interpolated_fps (22 MB)")
    parser.add_argument("--dry_run", action="store_true", help="print the files and sizes, and download nothing")
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


if __name__ == "__main__":
    sys.exit(main())
