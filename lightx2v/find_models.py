"""python -m lightx2v.find_models: list the model files on this machine, and the models that they make.

    python -m lightx2v.find_models                              what was found, by name
    python -m lightx2v.find_models --remember ~/ComfyUI/models  also look there from now on

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby

from .catalog.catalog import Catalog, summary
from .catalog.choose import add_folder_flag
from .catalog.folders import forget_folder, model_folders, tell_folder
from .catalog.found_file import FoundFile
from .catalog.scan import memory_file, scan
from .cli.parser import ArgumentParser
from .cli.runner import CommandContext, run_command
from .errors import byte_size, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(_parser(), _run, argv)


def _run(options: argparse.Namespace, context: CommandContext) -> int:
    for folder in options.remember:
        tell_folder(folder)
    for folder in options.forget:
        forget_folder(folder)
    folders = model_folders(options.model_dirs, context.environment)
    catalog = Catalog(scan(folders, memory_file(context.environment)))
    if options.json:
        print(json.dumps(summary(catalog), indent=2, ensure_ascii=False))
        return 0
    print("\n".join(_lines(catalog, [str(folder) for folder in folders])))
    return 0


def _lines(catalog: Catalog, folders: Sequence[str]) -> Iterable[str]:
    if not folders:
        yield "No folder of models is known. Name one: python -m lightx2v.find_models --remember FOLDER"
        return
    yield "Looked in " + ", ".join(map(one_line, folders))
    if catalog.models:
        yield "\nmodels (python -m lightx2v.infer --preset NAME)"
        for model in catalog.models.values():
            yield f"  {model.name:<56}  {model.task}, {model.summary}"
    for kind, files in groupby(sorted(catalog.files, key=lambda file: file.kind), key=lambda file: file.kind):
        yield f"\n{kind}"
        for file in files:
            yield f"  {one_line(file.name):<56}  {', '.join(_facts(file))}"
            if file.problem:
                yield f"    cannot be used: {one_line(file.problem)}"


def _facts(file: FoundFile) -> Iterable[str]:
    yield byte_size(file.size)
    yield from filter(None, (file.quantisation, file.task, f"{file.expert} noise" if file.expert else ""))
    if file.distilled:
        yield "distilled"
    if file.rank:
        yield f"rank {file.rank}"
    if file.trained_for:
        yield f"for {one_line(file.trained_for)}"
    if file.triggers:
        yield "triggers: " + one_line(" | ".join(file.triggers))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lightx2v.find_models",
        description="Lists the model files in your folders by what their headers say, and the models that they make.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 terminated.",
        allow_abbrev=False,
    )
    add_folder_flag(parser.add_argument)
    parser.add_argument("--remember", metavar="FOLDER", action="append", default=[], help="look there from now on")
    parser.add_argument("--forget", metavar="FOLDER", action="append", default=[], help="no longer look there")
    parser.add_argument("--json", action="store_true", help="print names and facts as JSON, without any path")
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


if __name__ == "__main__":
    sys.exit(main())
