"""python -m lightx2v.server: the flags, the model loaded first, then the routes until Ctrl+C.

    python -m lightx2v.server --model_cls wan2.2_moe --task t2v --model_path P --config_json J --port 8000
    python -m lightx2v.server --preset demo_t2v_distill_lora

One model is loaded before the port opens, so that a wrong path ends the program at once. Others reach it only with
--host and a key (--api_key, or LIGHTX2V_API_KEY, which `ps` does not show).
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..cli.parser import ArgumentParser
from ..cli.signals import ECHO, Interrupts
from ..cli.terminal import ProgressLine, ended, logging_to
from ..config.engine_config import EngineConfig
from ..config.environment import Environment
from ..config.presets import Resolved, resolve
from ..errors import ConfigError
from ..jobs.engine_slot import Engine, OpenEngine
from ..jobs.store import JobStore
from ..progress import CancelToken, OnProgress

log = logging.getLogger("lightx2v.server")

MIN_KEY = 12
MAX_CONNECTIONS = 500
"""Further ones are answered 503 at once. Systems often let a program have 1024 files, connections among them."""


def main(argv: Sequence[str] | None = None, *, open_engine: OpenEngine | None = None) -> int:
    """Serves until it is told to stop. Returns the exit code. `open_engine` replaces what loads the model."""
    try:
        options = _parser().parse(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or shown the help
        return int(stop.code or 0)
    try:
        environment = Environment.read()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    line = ProgressLine(sys.stderr)
    echo = ECHO if environment.distributed else 0.0
    with logging_to(sys.stderr, line, logging.INFO, prefix=environment.log_prefix), Interrupts(echo=echo) as interrupts:
        run = partial(_run, options, environment, line, interrupts, open_engine)
        return ended(run, line, interrupts, stopped="")


def _run(
    options: argparse.Namespace,
    environment: Environment,
    line: ProgressLine,
    interrupts: Interrupts,
    open_engine: OpenEngine | None,
) -> int:
    keys = _keys(options, environment)
    resolved = resolve(_preset(options), _overrides(options), environment=environment)
    if environment.distributed and open_engine is None and _follow():
        return 0
    check_port(options.host, options.port)
    folder = Path(options.output_dir or environment.output_dir or "outputs")
    JobStore(folder / "jobs.sqlite").close()  # in use or not writable: neither should come out after minutes of loading
    with interrupts.cancelling() as token:
        loaded = Loaded.now(open_engine or load, resolved, line, token, warm=options.warmup)
    line.clear()
    try:
        return _serve(options, folder, resolved, loaded, keys)
    finally:
        loaded.close()


def load(config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
    """Loads the model. Only here is torch imported."""
    from ..pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config, preset=preset, on_progress=on_progress, cancel=cancel)


class Loaded:
    """What opens engines for the job manager: the first time the one that was loaded before the server started."""

    def __init__(self, open_engine: OpenEngine, config: EngineConfig, engine: Engine) -> None:
        self._open, self._config = open_engine, config
        self._engine: Engine | None = engine

    @classmethod
    def now(
        cls, open_engine: OpenEngine, resolved: Resolved, on_progress: OnProgress, cancel: CancelToken, *, warm: bool
    ) -> Loaded:
        engine = open_engine(resolved.engine, preset=resolved.preset.name, on_progress=on_progress, cancel=cancel)
        if warm:
            from .warmup import warm_up

            warm_up(engine, resolved, on_progress, cancel)
        return cls(open_engine, resolved.engine, engine)

    def __call__(self, config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
        engine, self._engine = self._engine, None
        if engine is not None and config == self._config:
            return engine
        if engine is not None:  # a job from before the restart, of another model
            engine.close()
        return self._open(config, preset=preset, on_progress=on_progress, cancel=cancel)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def _serve(options: argparse.Namespace, folder: Path, resolved: Resolved, loaded: Loaded, keys: list[str]) -> int:
    import uvicorn

    from ..jobs.queue import JobManager
    from .application import create_app
    from .input_images import InputImages
    from .metrics import Metrics
    from .service import Service

    metrics = Metrics()
    jobs = JobManager(
        metrics.watching(loaded),
        folder,
        max_queue=options.max_queue_size,
        ttl=options.result_ttl_hours * 3600 or None,
        size_cap=int(options.result_cap_gb * 1e9) or None,
    )
    with jobs:
        name = resolved.preset.name or resolved.engine.task
        images = InputImages(folder=options.input_dir)
        service = Service(jobs, {name: resolved}, images=images, lora_dir=options.lora_dir)
        app = create_app(service, metrics, keys=keys, hosts=_hosts(options))
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=3,
            http="h11",  # httptools, where somebody has it, takes headers without end
            limit_concurrency=MAX_CONNECTIONS,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        log.info("Serving %s on http://%s:%d, documents on /docs", name, options.host, options.port)
        server = uvicorn.Server(config)
        try:
            server.run()  # ends with the signal that stopped it, which is a KeyboardInterrupt then
        except SystemExit:  # the port is taken; uvicorn has logged it
            return 1
    return 0


def check_port(host: str, port: int) -> None:
    """ConfigError where the port cannot be had, which should not come out after minutes of loading. Port 0 is any."""
    try:
        if not 0 <= port <= 65535:  # getaddrinfo takes some of them, for another port
            raise OverflowError
        kind, *_, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(at)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no such port"
        address = f"{host}:{port}" if port else host
        other = "--port" if port else "--host"
        raise ConfigError(f"{address} cannot be listened on: {reason}. Choose another {other}.") from None


def _follow() -> bool:
    """Of torchrun's processes one serves; in the others this takes part in its runs and returns True at the end."""
    from ..pipeline import LightX2VPipeline

    return LightX2VPipeline.follow()


def _preset(options: argparse.Namespace) -> str | dict[str, Any]:
    if options.preset and options.config_json:
        raise ConfigError("--preset and --config_json both say what to run. Keep one of them.")
    if options.preset or options.config_json:
        return options.preset or options.config_json
    if options.model_path:
        return {}
    raise ConfigError("Say what to serve: --preset NAME, or --model_path P --config_json FILE.")


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    names = ("model_cls", "task", "model_path", "models_dir")
    return {name: getattr(options, name) for name in names if getattr(options, name)}


def _keys(options: argparse.Namespace, environment: Environment) -> list[str]:
    """The keys to let in. ConfigError where others could reach the server without one."""
    keys = options.api_key or [key for key in (environment.api_key or "").split(",") if key.strip()]
    if not keys and not is_loopback(options.host):
        raise ConfigError(
            f"--host {options.host} lets others reach this server, so it needs a key: set LIGHTX2V_API_KEY, or give "
            "--api_key KEY. Clients send it as the header Authorization: Bearer KEY."
        )
    if any(len(key.strip()) < MIN_KEY for key in keys):
        raise ConfigError(f"An API key needs at least {MIN_KEY} characters. Make one with: openssl rand -hex 16")
    return [key.strip() for key in keys]


def _hosts(options: argparse.Namespace) -> frozenset[str] | None:
    """The Host headers that are answered: on loopback only its own, against DNS rebinding."""
    if not is_loopback(options.host):
        return frozenset(name.lower() for name in options.allow_host) or None
    return frozenset({"127.0.0.1", "localhost", "[::1]", options.host.lower(), *map(str.lower, options.allow_host)})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lightx2v.server",
        description="Serves one model over HTTP. Exit codes: 1 failed, 2 bad usage, 130 or 143 stopped by a signal.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to serve").add_argument
    add("--preset", metavar="NAME", help="a preset by its name, e.g. t2v_distill_lora")
    add("--config_json", metavar="FILE", help="a preset from a JSON file in LightX2V's format")
    add("--model_cls", metavar="CLASS", help="wan2.2_moe or wan2.2_moe_distill")
    add("--task", choices=("t2v", "i2v", "flf2v"))
    add("--model_path", metavar="PATH", help="a folder, or a Hub name such as Wan-AI/Wan2.2-T2V-A14B")
    add("--models_dir", metavar="FOLDER", help="where relative paths are looked for first")
    add("--lora_dir", type=Path, metavar="FOLDER", help="LoRA files that requests may add")
    add("--input_dir", type=Path, metavar="FOLDER", help="pictures that requests may name")
    add("--warmup", action="store_true", help="make one very short video before the port opens")

    add = parser.add_argument_group("who reaches it").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000)
    add("--api_key", action="append", metavar="KEY", help="let in whoever has it; may be repeated, one for each client")
    add("--allow_host", action="append", default=[], metavar="NAME", help="also answer to this host name")

    add = parser.add_argument_group("jobs and results").add_argument
    add("--output_dir", metavar="FOLDER", help="jobs and videos (default: LIGHTX2V_OUTPUT_DIR, or outputs)")
    add("--max_queue_size", type=_count, default=10, metavar="N", help="jobs that may wait; more are refused (429)")
    add("--result_ttl_hours", type=_amount, default=168.0, metavar="H", help="results are deleted then; 0 never")
    add("--result_cap_gb", type=_amount, default=50.0, metavar="GB", help="the oldest results go beyond it; 0 never")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError("expected a number from 1 to 10000")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError("expected a number from 0 on")
    return value
