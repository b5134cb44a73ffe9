"""The FastAPI application: all routes behind their middleware, and the responses to errors.

An error response says how to correct the request. It reveals no path, no traceback and nothing of the request.
"""

import logging
import secrets
import shutil
import traceback
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import URLPath
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..errors import BadRequest, Busy, LightX2VError, quoted
from .auth import ApiKeyAuth, is_operator
from .guess_limit import GuessLimit
from .head_requests import HeadRequests
from .limits import RequestLimits, RequestRefused, disk_full
from .metrics import Metrics, MetricsMiddleware
from .openapi import complete_schema, error_responses
from .responses import Health, error_response
from .service import Service
from .submit import Submitter
from .task_routes import task_routes
from .video_routes import video_routes
from .worker_routes import worker_routes

log = logging.getLogger("lightx2v.server")

MIN_FREE_DISK = 16_000_000
"""Bytes that must be free for the next video."""
PATHS = ("/v1/", "/health", "/ready", "/metrics", "/docs", "/openapi.json")
"""The paths of the routes, for an application that mounts them beside its own."""


def create_app(
    service: Service,
    metrics: Metrics,
    *,
    keys: Sequence[str] = (),
    operator: str = "",
    hosts: Set[str] | None = None,
    limits: bool = True,
    guesses: GuessLimit | None = None,
) -> FastAPI:
    """`keys` are the accepted API keys; without any, every client is accepted. `operator` is one more, and the only one
    that opens the routes about workers. `hosts` are the accepted host names,
    None for any. Without `limits` the caller checks host, origin, size and rate. `guesses` counts wrong keys together
    with those at other doors of the program."""
    app = FastAPI(
        title="LightX2V",
        version=__version__,
        description="Videos from text and images. Jobs continue when the client disconnects; DELETE stops them.",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        dependencies=[Depends(_given_once)],
    )
    app.add_middleware(HeadRequests)
    app.add_middleware(ApiKeyAuth, keys=keys, operator=operator, guesses=guesses)
    if limits:
        app.add_middleware(RequestLimits, hosts=hosts)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    submitter = Submitter(service)
    app.include_router(task_routes(service, submitter))
    app.include_router(video_routes(service, submitter))
    app.include_router(worker_routes(service.jobs))
    _add_health(app, service, metrics)
    _add_error_handlers(app, service)
    complete_schema(app, keyed=bool(keys or operator))
    return app


async def _given_once(request: Request) -> None:
    """Refuse a query parameter that is given several times: which of the values is meant?"""
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if count > 1:
            raise BadRequest(f"{quoted(name)} is given {count} times; expected once. Leave the others out.")


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    jobs = service.jobs

    @app.get("/", include_in_schema=False)
    def root() -> Response:
        return RedirectResponse("docs")

    @app.get("/health", tags=["state"], responses=error_responses(503))
    def health() -> Health:
        """Check that the worker is alive; after 503 only a restart helps."""
        if not jobs.alive:
            raise HTTPException(503, "The worker has stopped. See the program's log, then restart it.")
        return Health(status="ok")

    @app.get("/ready", tags=["state"], responses=error_responses(503))
    def ready() -> Health:
        """Check that the server would accept a job now; 503 while the queue or the disk is full."""
        health()
        try:
            jobs.check_room()
        except Busy as full:
            raise HTTPException(503, str(full)) from None
        try:
            disk = shutil.disk_usage(f"{jobs.folder}/")  # fails where a file has the folder's name
        except OSError as error:
            raise HTTPException(503, f"Cannot read the output folder: {error.strerror}.") from None
        if disk.free < MIN_FREE_DISK <= disk.total:  # some file systems report 0 for both
            raise HTTPException(503, "The disk is full.")
        return Health(status="ready")

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse, responses=error_responses())
    def prometheus(request: Request) -> PlainTextResponse:
        """Return the metrics in Prometheus' text format; with the operator's key also those of each worker."""
        text = metrics.text(jobs, operator=is_operator(request))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    @app.exception_handler(LightX2VError)
    def known_error(request: Request, error: LightX2VError) -> Response:
        jobs = service.jobs
        full = isinstance(error, Busy) and jobs.alive and jobs.waiting >= jobs.max_queue
        position = jobs.waiting + 1 if full else None
        headers = {"Retry-After": "10"} if error.status == 429 else None
        return error_response(error.status, type(error).__name__, str(error), headers, position=position)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        return error_response(422, "BadRequest", f"{where}: {first['msg'][:200]}.")

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, "HTTPError", error.detail, error.headers)

    @app.exception_handler(RequestRefused)
    def refused(request: Request, error: RequestRefused) -> Response:
        return error_response(*error.response)

    @app.exception_handler(OSError)
    def full_disk(request: Request, error: OSError) -> Response:
        """Images pass through the folder for temporary files, which may be on another disk than the videos."""
        return error_response(*disk_full(error).response)

    @app.exception_handler(ClientDisconnect)
    def gone(request: Request, error: ClientDisconnect) -> Response:
        """Nobody hears the answer to a request whose client has left in the middle of it."""
        return Response(status_code=400)

    @app.exception_handler(Exception)
    def unknown_error(request: Request, error: Exception) -> Response:
        number = secrets.token_hex(4)
        log.error("request %s failed\n%s", number, "".join(traceback.format_exception(error)))
        return error_response(500, "InternalError", f"Internal error. The server's log has the details under {number}.")


class ApiMount(BaseRoute):
    """A route for the list of another application: it passes requests for PATHS to `app` and no others."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self.original_router = app.router  # as FastAPI's included routers have, for code that lists all routes

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope.get("path", "")
        matches = any(path.startswith(known) if known.endswith("/") else path == known for known in PATHS)
        return (Match.FULL if matches and scope["type"] == "http" else Match.NONE), {}

    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
