"""The page on your own machine, or on a Space:  python app.py [--share] [--host ADDRESS] [--port N]

Without flags it listens on 127.0.0.1 only and asks nobody for a password. With --share, or on an address that others
reach, it prints a user and a password made up for this start; --public is the only way without one.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.exposure import Exposure, add_flags, decide
from lightx2v.cli.parser import ArgumentParser
from lightx2v.cli.signals import ECHO, Interrupts
from lightx2v.config.environment import Environment
from lightx2v.errors import ConfigError, LightX2VError, OutputError, short_path
from lightx2v.loading import preload
from lightx2v.server.command import check_port

if TYPE_CHECKING:
    from app.backend.studio import Studio

log = logging.getLogger("lightx2v.page")

OPEN_PAGES = 500
"""Beyond it the page that was silent for longest is forgotten, and begins anew when it speaks. Each takes half a
megabyte, whoever asks for it, and gradio's own 10 000 would take five gigabytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the page and serves it until Ctrl+C. Returns the exit code."""
    try:
        environment = Environment.read()
    except LightX2VError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    logging.basicConfig(level=logging.INFO, format=f"{environment.log_prefix}%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = ArgumentParser(prog="app.py", description="LightX2V Studio: videos from text and images.")
    add_flags(parser)
    preset = os.environ.get("LIGHTX2V_PRESET", "")
    parser.add_argument("--preset", default=preset, help="the preset that is chosen at first; the only one on ZeroGPU")
    parser.add_argument(
        "--output_dir", default=os.environ.get("LIGHTX2V_OUTPUT_DIR", "outputs"), help="where runs are kept"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--mcp", action="store_true", help="also serve the tools over MCP (needs gradio[mcp])")
    args = parser.parse(arguments)
    with Interrupts(echo=ECHO if environment.distributed else 0.0) as interrupts:
        try:
            serve(args)
        except LightX2VError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:  # `python app.py | head -1`: gradio says its last words to a reader who has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # A page is stopped by a signal; without one it followed another process to its end.
    return interrupts.exit_code if interrupts.token.cancelled else 0


def serve(args: argparse.Namespace) -> None:
    """From the flags to the end of the page."""
    exposure = decide(args, os.environ)
    if args.mcp and importlib.util.find_spec("mcp") is None:
        raise ConfigError('--mcp needs one more package. Install it with: pip install "gradio[mcp]"')
    if Environment.read().distributed and follow():
        return
    if not exposure.hosted:  # gradio would try for ever, or fail with a traceback
        check_port(args.host, args.port or 0)
    prepare_environment(Path(args.output_dir))
    studio = open_studio(Path(args.output_dir), exposure, args.preset)
    try:
        demo = launch(studio, open_browser=args.open, mcp=args.mcp)
        announce(demo, exposure)
        preload.start()  # while somebody writes the first prompt
        demo.block_thread()
    finally:
        studio.close()


def open_studio(output: Path, exposure: Exposure, preset: str) -> Studio:
    """What the page works with. On ZeroGPU its one model is loaded now, before any visitor's GPU is lent."""
    if not exposure.zerogpu:
        from app.backend.studio import Studio

        return Studio(open_engine, output, exposure, default_preset=preset)
    import spaces  # before torch  # pyright: ignore[reportMissingImports]

    from app.backend.studio import Studio, settings_of
    from app.backend.zerogpu import GpuLender
    from lightx2v.pipeline import LightX2VPipeline

    studio = Studio(open_engine, output, exposure, default_preset=preset, only=[preset] if preset else None)
    config = settings_of(studio.default_preset).engine
    studio.lender = GpuLender(spaces.GPU, LightX2VPipeline.from_config(config, preset=preset), config, studio)
    return studio


def follow() -> bool:
    """Of torchrun's processes one serves the page; in the others this takes part in its runs and returns True."""
    from lightx2v.pipeline import LightX2VPipeline

    return LightX2VPipeline.follow()


def open_engine(config: Any, *, preset: str, on_progress: Any, cancel: Any) -> Any:
    """Loads the model. Only here is torch imported, and only when the first job runs."""
    from lightx2v.pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config, preset=preset, on_progress=on_progress, cancel=cancel)


def prepare_environment(output: Path) -> None:
    """Settings that gradio and torch read when they are imported: nothing is sent home, uploads stay in our folder."""
    uploads = output.absolute() / "uploads"
    try:
        uploads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {short_path(uploads)} cannot be made: {error.strerror}. Give a folder that can be written to "
            "with --output_dir."
        ) from None
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Threads that spin while they wait for each other take the cores from the browser, and it takes them back: on two
    # cores beside one busy program a run of the demo takes two to three times as long then.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The self-check of the server's start goes to loopback; a proxy would swallow it.
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*known, "localhost", "127.0.0.1"]))


def launch(studio: Studio, *, open_browser: bool = False, mcp: bool = False, **more: Any) -> Any:
    """Serves the page in the background; returns gradio's Blocks with `local_url` and `share_url`."""
    from starlette.middleware import Middleware

    from app.page import build_page
    from app.theme import head, theme
    from app.web.api_routes import api_routes
    from app.web.guard import Guard
    from app.web.media_routes import media_routes

    exposure = studio.exposure
    origins: set[str] = set()
    demo = build_page(studio)
    demo.launch(
        server_name=exposure.host,
        server_port=exposure.port,
        share=exposure.share,
        auth=exposure.auth,
        auth_message="LightX2V Studio",
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        max_file_size=exposure.limits.upload,
        state_session_capacity=OPEN_PAGES,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=mcp,
        theme=theme(),
        head=head(),
        app_kwargs={
            "openapi_url": None,  # gradio has its own, behind the password
            "routes": [*api_routes(studio), *media_routes(studio)],
            "middleware": [Middleware(Guard, exposure=exposure, origins=origins)],
        },
        **more,
    )
    studio.address = (demo.share_url or demo.local_url or studio.address).rstrip("/")
    if demo.share_url:
        origins.add(demo.share_url.partition("://")[2].strip("/").lower())
    return demo


def announce(demo: Any, exposure: Exposure) -> None:
    """Where the page is and how to get in; a share link that could not be made is said to be one."""
    print(f"LightX2V Studio is on {demo.local_url}")
    if exposure.share:
        if demo.share_url:
            print(f"Shared on {demo.share_url}")
        else:
            print(
                "There is no share link: gradio's tunnel could not be opened. Check that this machine reaches "
                "api.gradio.app and that nothing stops the program frpc. The page itself runs on this machine."
            )
    if exposure.auth:
        print(f"User {exposure.user}, password {exposure.password}")
    elif exposure.open_to_others and not exposure.hosted:
        print("Anybody who knows the address can use it.")


if __name__ == "__main__":
    sys.exit(main())
