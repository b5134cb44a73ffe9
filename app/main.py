"""The page's command line:  python app.py [--share] [--host ADDRESS] [--port N]

Without flags it listens on 127.0.0.1 only and needs no password. With --share, or on an address that other machines
reach, it generates a password for this start and prints it; only --public opens such a page without one.
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightx2v.catalog.choose import add_folder_flag
from lightx2v.catalog.live_catalog import LiveCatalog
from lightx2v.cli.parser import ArgumentParser, add_save_every
from lightx2v.cli.runner import CommandContext, leave_at_exit, run_command
from lightx2v.config.folders import output_folder, use_temporary
from lightx2v.config.proxies import use_proxies
from lightx2v.errors import ConfigError, OutputError, short_path
from lightx2v.farm.farm import Farm
from lightx2v.farm.options import FarmOptions, add_farm_flags
from lightx2v.jobs.queue import JobManager
from lightx2v.loading import preload
from lightx2v.server.command import check_port
from lightx2v.server.guess_limit import GuessLimit
from lightx2v.step_file import SAVE_EVERY

from .backend.studio import Studio
from .exposure import Exposure, add_flags, decide

OPEN_PAGES = 500
"""Beyond this gradio forgets the page that was silent for longest, which starts anew with its next event. Anyone can
open pages, each takes half a megabyte, and gradio's default of 10 000 would take five gigabytes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page until Ctrl+C; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="LightX2V Studio: videos from text and images.")
    add_flags(parser)
    preset, output = (os.environ.get(f"LIGHTX2V_{name}", "") for name in ("PRESET", "OUTPUT_DIR"))
    parser.add_argument("--preset", default=preset, help="preset to start with; the only one on ZeroGPU")
    parser.add_argument("--output_dir", default=output, help="folder for videos and the job list (default: outputs)")
    add_folder_flag(parser.add_argument)
    offer = (
        "let others use the found models and LoRAs, and saved presets, of this name; may be repeated, * stands for any"
    )
    parser.add_argument("--offer", action="append", default=[], metavar="NAME", help=offer)
    add_farm_flags(parser.add_argument)
    add_save_every(parser.add_argument)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--mcp", action="store_true", help="also serve the tools over MCP (needs gradio[mcp])")
    return parser


def _run(args: argparse.Namespace, context: CommandContext) -> int:
    exposure = decide(args, os.environ)
    if args.mcp and importlib.util.find_spec("mcp") is None:
        raise ConfigError('--mcp needs one more package. Install it with: pip install "gradio[mcp]"')
    if context.environment.distributed:  # rank 0 serves the page, the other ranks take part in its runs
        from lightx2v.pipeline import LightX2VPipeline

        if LightX2VPipeline.follow():
            return _exit_code(context)
    farm_options = FarmOptions.of(args, context.environment)
    if farm_options is not None and exposure.zerogpu:
        raise ConfigError("ZeroGPU lends one GPU at a time. Leave --replicas, --gpus_per_replica and --ray out.")
    if not exposure.hosted:  # gradio would retry for ever or print a traceback
        check_port(args.host, args.port or 0)
    folder = output_folder(args.output_dir)
    prepare_environment(folder)
    catalog = LiveCatalog(args.model_dirs, args.offer if exposure.open_to_others else None)
    studio = open_studio(folder, exposure, args.preset, catalog, args.save_every, farm=farm_options is not None)
    farm = None
    try:
        if farm_options is not None:
            assert isinstance(studio.jobs, JobManager)  # that of ZeroGPU has no farm
            farm = Farm(studio.jobs, farm_options, open_engine)
            farm.start()
            farm.wait_for_first(context.interrupts.token)
        demo = launch(studio, open_browser=args.open, mcp=args.mcp)
        announce(demo, exposure)
        if farm is None:
            preload.start()  # while the visitor writes the first prompt
        serve_until_signal(demo, studio)
    finally:
        stopped = studio.close()
        if farm is not None:
            farm.close()
        if not stopped:
            leave_at_exit(context.interrupts.exit_code)
    return _exit_code(context)


def serve_until_signal(demo: Any, studio: Studio) -> None:
    """Waits for a signal, which raises here. Then the job stops while gradio closes the connections."""
    try:
        while demo.is_running:
            time.sleep(0.1)
    finally:
        studio.jobs.interrupt()
        demo.close(verbose=False)


def _exit_code(context: CommandContext) -> int:
    """Without a signal this process followed rank 0 to its end."""
    return context.interrupts.exit_code if context.interrupts.token.cancelled else 0


def open_studio(
    output: Path,
    exposure: Exposure,
    preset: str,
    catalog: LiveCatalog | None = None,
    save_every: float = SAVE_EVERY,
    *,
    farm: bool = False,
) -> Studio:
    """Opens the page's Studio. On ZeroGPU this loads its one model, before any visitor gets a GPU. With a `farm`, no
    job runs in this process."""
    if not exposure.zerogpu:
        engine = None if farm else open_engine
        return Studio(engine, output, exposure, default_preset=preset, catalog=catalog, save_every=save_every)
    import spaces  # has to come before torch  # pyright: ignore[reportMissingImports]

    only = [preset] if preset else None
    return Studio(open_engine, output, exposure, default_preset=preset, only=only, lend_gpu=spaces.GPU)


def open_engine(config: Any, **more: Any) -> Any:
    """Loads the model for the first job. Only this imports torch."""
    from lightx2v.pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config, **more)


def prepare_environment(output: Path) -> None:
    """Sets what gradio and torch read on import: no telemetry, and uploads go to the output folder."""
    uploads = output.absolute() / "uploads"
    try:
        uploads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Could not create the folder {short_path(uploads)}: {error.strerror}. Choose a writable folder with "
            "--output_dir."
        ) from None
    use_temporary(uploads)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # uvicorn would believe the X-Forwarded-For of all on loopback
    # Threads that spin while they wait compete with the browser for the cores: with two cores and one other busy
    # program a run of the demo would take two to three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    use_proxies()  # gradio makes clients on import
    # gradio checks at start that it reaches itself over loopback; a proxy would swallow that request.
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*known, "localhost", "127.0.0.1"]))


def launch(studio: Studio, *, open_browser: bool = False, mcp: bool = False) -> Any:
    """Serves the page in the background; returns gradio's Blocks with `local_url` and `share_url`."""
    from starlette.middleware import Middleware

    from lightx2v.server.http_server import bound_connections, room_for_connections

    from .gradio_compat import clean_up_failed_uploads, keep_no_sent_values, refuse_forged_events
    from .page import build_page
    from .theme import head, theme
    from .web.api_routes import api_routes
    from .web.forged_events import ForgedEvents
    from .web.limits import page_limits, sign_in_limit, upload_limit
    from .web.media_routes import media_routes
    from .web.uploads import remove_leftovers

    exposure = studio.exposure
    origins: set[str] = set()
    guesses = GuessLimit()
    for change in (refuse_forged_events, keep_no_sent_values, clean_up_failed_uploads):
        change()
    remove_leftovers(studio.folder / "uploads")
    demo = build_page(studio)
    app_kwargs = {
        "openapi_url": None,  # gradio has its own, behind the password
        "routes": [*api_routes(studio, guesses=guesses), *media_routes(studio)],
        "middleware": [
            page_limits(exposure, origins),
            sign_in_limit(guesses),
            upload_limit(exposure),
            Middleware(ForgedEvents),
        ],
    }
    demo.launch(
        server_name=exposure.host, server_port=exposure.port, share=exposure.share, inbrowser=open_browser,
        auth=exposure.auth, auth_message="LightX2V Studio", prevent_thread_lock=True, quiet=True, show_error=False,
        max_file_size=exposure.limits.upload, state_session_capacity=OPEN_PAGES, footer_links=["api"],
        run_history=False, enable_monitoring=False, ssr_mode=False, mcp_server=mcp, theme=theme(), head=head(),
        app_kwargs=app_kwargs,
    )  # fmt: skip
    if demo.server is not None:
        bound_connections(demo.server.config, room_for_connections())
        demo.server.config.timeout_graceful_shutdown = 1  # of the open pages' event streams
    studio.address = (demo.share_url or demo.local_url or studio.address).rstrip("/")
    if demo.share_url:
        origins.add(demo.share_url.partition("://")[2].strip("/").lower())
    return demo


def announce(demo: Any, exposure: Exposure) -> None:
    """Prints the page's address, how to sign in, and whether the share link could be made."""
    print(f"LightX2V Studio is on {demo.local_url}")
    if exposure.share:
        if demo.share_url:
            print(f"Shared on {demo.share_url}")
        else:
            print(
                "There is no share link: gradio could not open its tunnel. Check that this machine can reach "
                "api.gradio.app and that nothing blocks the program frpc. The page itself runs on this machine."
            )
    if exposure.auth:
        print(f"User {exposure.user}, password {exposure.password}")
    elif exposure.open_to_others and not exposure.hosted:
        print("Anyone who knows the address can use it.")
