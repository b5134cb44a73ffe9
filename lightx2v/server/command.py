"""python -m lightx2v.server: load the model first, then serve the routes until Ctrl+C.

    python -m lightx2v.server --model_cls wan2.2_moe --task t2v --model_path P --config_json J --port 8000
    python -m lightx2v.server --preset demo_t2v_distill_lora

The model is loaded before the port opens, so that a wrong path ends the program at once. Other machines reach the
server only with --host and a key (--api_key, or LIGHTX2V_API_KEY, which `ps` does not show).
"""

import argparse
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..catalog.catalog import FoundLora
from ..catalog.choose import FileChoice, add_file_flags, named_preset
from ..catalog.live_catalog import LiveCatalog
from ..cli.parser import ArgumentParser, add_save_every, amount
from ..cli.runner import CommandContext, leave_at_exit, run_command
from ..config.engine_config import EngineConfig
from ..config.environment import Environment
from ..config.folders import output_folder, use_temporary
from ..config.phases import TRAIN_STEPS, Phase
from ..config.presets import Resolved, resolve
from ..config.request import Request
from ..errors import ConfigError
from ..farm.farm import Farm, Preload
from ..farm.options import FarmOptions, add_farm_flags
from ..jobs.engine_slot import Engine, OpenEngine
from ..jobs.queue import JobManager
from ..jobs.replica import Outcome
from ..jobs.run_times import RunTimes
from ..media.work_folder import WorkFolder
from ..progress import CancelToken, OnProgress
from .metrics import Metrics

log = logging.getLogger("lightx2v.server")

MIN_KEY = 12
MAX_CONNECTIONS = 500
"""Further ones get 503 at once. Many systems limit a process to 1024 open files, and connections count among them."""


def main(argv: Sequence[str] | None = None, *, open_engine: OpenEngine | None = None) -> int:
    """Serve until a signal. Returns the exit code. `open_engine` replaces the function that loads the model."""
    return run_command(_parser(), partial(_run, open_engine=open_engine), argv)


def _run(options: argparse.Namespace, context: CommandContext, *, open_engine: OpenEngine | None) -> int:
    environment = context.environment
    keys = _keys(options, environment)
    names = ("model_cls", "task", "model_path", "models_dir", "vram_gb")
    overrides = {name: value for name in names if (value := getattr(options, name))}
    resolved = _resolved(options, overrides, environment)
    if environment.distributed and open_engine is None:
        from ..pipeline import LightX2VPipeline

        if LightX2VPipeline.follow():  # a process of torchrun beside rank 0: it has taken part in the runs to their end
            return 0
    farm_options = _farm_options(options, environment)
    check_port(options.host, options.port)
    folder = output_folder(options.output_dir or environment.output_dir)
    use_temporary(folder)
    metrics, times = Metrics(), RunTimes(folder / "rates.json")

    def on_finished(config: EngineConfig, request: Request, outcome: Outcome) -> None:
        metrics.observe_run(config, request, outcome)
        times.learn(config, request, outcome)

    jobs = JobManager(
        None if farm_options else open_engine or load,
        folder,
        max_queue=options.max_queue_size,
        ttl=options.result_ttl_hours * 3600 or None,
        size_cap=int(options.result_cap_gb * 1e9) or None,
        predict=times.seconds,
        on_finished=on_finished,
        save_every=options.save_every,
        start=False,
    )
    name = resolved.preset.name
    preload = Preload(resolved.engine, name, context.progress)
    farm = Farm(jobs, farm_options, open_engine or load, preload=preload) if farm_options else None
    try:
        with context.interrupts.cancelling() as token:
            if farm is not None:
                farm.start()
                farm.wait_for_first(token)
            else:
                engine = jobs.load(resolved.engine, preset=name, on_progress=context.progress, cancel=token)
                if options.warmup:
                    _warm_up(engine, resolved, jobs.folder, context.progress, token)
        context.progress.clear()
        jobs.start()
        operator = _operator(options, environment)
        return _serve(options, jobs, metrics, resolved, keys, environment.trusted_proxies, operator)
    finally:
        stopped = jobs.close()
        if farm is not None:
            farm.close()
        if not stopped:
            leave_at_exit(context.interrupts.exit_code)


def _farm_options(options: argparse.Namespace, environment: Environment) -> FarmOptions | None:
    farm = FarmOptions.of(options, environment)
    if farm is not None and options.warmup:
        raise ConfigError(
            "--warmup is for the engine of this process. Leave it out where several workers run the jobs."
        )
    return farm


def load(config: EngineConfig, **more: Any) -> Engine:
    """Load the model. Nothing else in this package imports torch."""
    from ..pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config, **more)


def _serve(
    options: argparse.Namespace,
    jobs: JobManager,
    metrics: Metrics,
    resolved: Resolved,
    keys: list[str],
    trusted_proxies: str,
    operator: str = "",
) -> int:
    import uvicorn

    from .application import create_app
    from .http_server import HttpServer
    from .input_images import InputImages
    from .service import Service

    name = resolved.preset.name or resolved.engine.task
    images = InputImages(folder=options.input_dir)
    loras = _offered_loras(options)
    service = Service(jobs, {name: resolved}, images=images, lora_dir=options.lora_dir, loras=loras)
    config = uvicorn.Config(
        create_app(service, metrics, keys=keys, operator=operator, hosts=_hosts(options)),
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        http="h11",  # httptools, used by default if it is installed, accepts endless headers
        limit_concurrency=MAX_CONNECTIONS,
        forwarded_allow_ips=trusted_proxies,  # uvicorn would trust whoever is on loopback
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    log.info("Serving %s on http://%s:%d, documentation on /docs", name, options.host, options.port)
    try:
        HttpServer(config, on_signal=jobs.interrupt).run()  # raises KeyboardInterrupt after the signal that stopped it
    except SystemExit:  # the port is in use; uvicorn has logged it
        return 1
    return 0


def _offered_loras(options: argparse.Namespace) -> Callable[[], Mapping[str, FoundLora]]:
    """What gives the found LoRAs that --offer allows. Each call looks for new files, which the next one knows."""
    catalog = LiveCatalog(options.model_dirs, options.offer)
    catalog.refresh()

    def loras() -> Mapping[str, FoundLora]:
        catalog.refresh()
        return catalog.loras

    return loras


def _warm_up(engine: Engine, resolved: Resolved, output: Path, on_progress: OnProgress, cancel: CancelToken) -> None:
    """Run five frames in the preset's size, with both experts, so that no client waits while the engine compiles
    kernels and tries algorithms."""
    from PIL import Image

    with contextlib.closing(WorkFolder(output)) as work:
        settings = {**resolved.request, "frames": 5, "steps": 2, "seed": 0}
        phases: tuple[Phase, ...] = settings["phases"] or ()
        if (steps := settings["denoising_step_list"]) is not None and len(steps) > 1:
            settings |= {"denoising_step_list": (steps[0], steps[-1]), "boundary_step_index": 1}
        if phases:  # one step each
            settings["phases"] = [replace(p, below_timestep=None, from_step=i or None) for i, p in enumerate(phases)]
            settings |= {"steps": len(phases), "boundary_step_index": None}
            settings["denoising_step_list"] = steps and range(TRAIN_STEPS, TRAIN_STEPS - len(phases), -1)
        if resolved.engine.task != "t2v":
            image = work.path / "grey.png"
            Image.new("RGB", (settings["width"], settings["height"]), "grey").save(image)
            settings |= {"task": "i2v", "image_path": str(image)}
        request = Request(prompt="warm-up", **settings)
        log.info("Warming up")
        engine.run(request, save_result_path=work.path / "warm.mp4", on_progress=on_progress, cancel=cancel)


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if the port is not available, before minutes of loading. Port 0 means any port."""
    try:
        if not 0 <= port <= 65535:  # getaddrinfo accepts some of these, as another port
            raise OverflowError
        kind, *_, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(at)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no such port"
        address = f"{host}:{port}" if port else host
        other = "--port" if port else "--host"
        raise ConfigError(f"Cannot listen on {address}: {reason}. Choose another {other}.") from None


def _resolved(options: argparse.Namespace, overrides: dict[str, Any], environment: Environment) -> Resolved:
    """The model to serve. A found model is served under its own name."""
    if options.preset and options.config_json:
        raise ConfigError("--preset and --config_json exclude each other. Keep one of them.")
    files = FileChoice.of(options)
    if not (options.preset or options.config_json or options.model_path or files.names_experts):
        raise ConfigError("No model to serve. Give --preset NAME, --high FILE, or --model_path P --config_json FILE.")
    named = options.preset or options.config_json
    preset = named_preset(named, files.model_dirs, environment) if named else {}
    if files.names_experts:
        preset = files.settings(preset)
    resolved = resolve(preset, overrides | files.overrides(preset), environment=environment)
    name = resolved.preset.name or resolved.preset.title
    return replace(resolved, preset=replace(resolved.preset, name=name))


def _keys(options: argparse.Namespace, environment: Environment) -> list[str]:
    """The accepted keys. ConfigError if other machines could reach the server without one."""
    keys = options.api_key or [key for key in (environment.api_key or "").split(",") if key.strip()]
    operator = _operator(options, environment)
    if not (keys or operator) and not is_loopback(options.host):
        raise ConfigError(
            f"Other machines can reach a server on --host {options.host}, so it needs a key. Set LIGHTX2V_API_KEY, or "
            "give --api_key KEY. Clients send the header Authorization: Bearer KEY."
        )
    keys = [key.strip() for key in keys]
    checked = [*keys, operator] if operator else keys
    if any(len(key) < MIN_KEY for key in checked):
        raise ConfigError(f"An API key needs at least {MIN_KEY} characters. Make one with: openssl rand -hex 16")
    for number, key in enumerate(checked, 1):
        if wrong := [char for char in key if not (char.isascii() and char.isprintable())]:
            raise ConfigError(
                f"API key {number} holds the character {wrong[0]!a}, which no HTTP header can carry, so no client "
                "could sign in; expected letters, digits and signs of ASCII. Make one with: openssl rand -hex 16"
            )
    return keys


def _operator(options: argparse.Namespace, environment: Environment) -> str:
    return (options.operator_key or environment.operator_key or "").strip()


def _hosts(options: argparse.Namespace) -> frozenset[str] | None:
    """The accepted Host headers: on loopback only those of loopback, against DNS rebinding."""
    if not is_loopback(options.host):
        return frozenset(name.lower() for name in options.allow_host) or None
    return frozenset({"127.0.0.1", "localhost", "[::1]", options.host.lower(), *map(str.lower, options.allow_host)})


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lightx2v.server",
        description="Serve one model over HTTP. Exit codes: 1 failed, 2 bad usage, 130 or 143 stopped by a signal.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to serve").add_argument
    add("--preset", metavar="NAME", help="a preset by its name, e.g. t2v_distill_lora")
    add("--config_json", metavar="FILE", help="a preset from a JSON file in LightX2V's format")
    add("--model_cls", metavar="CLASS", help="wan2.2_moe or wan2.2_moe_distill")
    add("--task", choices=("t2v", "i2v", "flf2v"))
    add("--model_path", metavar="PATH", help="a folder, or a Hub name such as Wan-AI/Wan2.2-T2V-A14B")
    add("--vram_gb", type=float, metavar="N", help="use at most N GB of the GPU (default: all that is free)")
    add("--models_dir", metavar="FOLDER", help="where relative paths are looked for first")
    add("--lora_dir", type=Path, metavar="FOLDER", help="LoRA files that requests may add")
    offer = "let requests add the found LoRAs of this name; may be repeated, * stands for any"
    add("--offer", action="append", default=[], metavar="NAME", help=offer)
    add_file_flags(parser.add_argument_group("files of your own").add_argument)
    add("--input_dir", type=Path, metavar="FOLDER", help="images that requests may name")
    add("--warmup", action="store_true", help="make one very short video before the port opens")

    add_farm_flags(parser.add_argument_group("several GPUs, several machines").add_argument)

    add = parser.add_argument_group("access").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000)
    add("--api_key", action="append", metavar="KEY", help="accept this key; repeat the flag for further clients")
    add("--operator_key", metavar="KEY", help="accept this key too; it alone shows and drains the workers")
    add("--allow_host", action="append", default=[], metavar="NAME", help="also accept this host name")

    add = parser.add_argument_group("jobs and results").add_argument
    add("--output_dir", metavar="FOLDER", help="jobs and videos (default: LIGHTX2V_OUTPUT_DIR, or outputs)")
    add("--max_queue_size", type=_count, default=10, metavar="N", help="jobs that may wait; further ones get 429")
    add("--result_ttl_hours", type=amount, default=168.0, metavar="H", help="delete results after H hours; 0: never")
    add(
        "--result_cap_gb",
        type=amount,
        default=50.0,
        metavar="GB",
        help="delete the oldest results beyond it; 0: no limit",
    )
    add_save_every(add)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError("expected a number from 1 to 10000")
    return value
