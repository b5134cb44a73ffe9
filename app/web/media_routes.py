"""Media routes: a run's video, poster and latent preview, under the run's unguessable id.

Only these files leave the output folder. Their names come from the job manager, never from the request. If the page has
a password, these routes require it as gradio's own routes do.
"""

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ..backend.studio import JOB_ID, Studio
from ..form.examples import picture
from ..gradio_compat import signed_in

HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; media-src 'self'"}
FOREVER = {**HEADERS, "Cache-Control": "private, max-age=86400, immutable"}


def media_routes(studio: Studio) -> list[BaseRoute]:
    """The routes, to mount before gradio's own. Each answers HEAD too."""

    def route(path: str, answer: Callable[[Request], Response]) -> Route:
        def checked(request: Request) -> Response:
            return answer(request) if signed_in(request) else PlainTextResponse("Sign in first.", status_code=401)

        return Route(f"/studio/{path}", checked)

    def not_found() -> Response:
        return PlainTextResponse("Not found.", status_code=404)

    def file(path: Path | None, kind: str, name: str | None = None) -> Response:
        return FileResponse(path, media_type=kind, filename=name, headers=FOREVER) if path else not_found()

    def video(request: Request) -> Response:
        job_id = _job_id(request)
        name = studio.download_name(job_id) if "download" in request.query_params else None
        return file(studio.video_of(job_id), "video/mp4", name)

    def original(request: Request) -> Response:
        job_id = _job_id(request)
        name = studio.download_name(job_id).replace(".mp4", ".original.mp4")
        return file(studio.original_of(job_id), "video/mp4", name if "download" in request.query_params else None)

    def preview(request: Request) -> Response:
        data = studio.preview_of(_job_id(request))
        headers = {**HEADERS, "Cache-Control": "no-store"}
        if isinstance(data, Path):
            return FileResponse(data, media_type="image/jpeg", headers=headers)
        # A run that has just ended has no preview any more, which is no error.
        return Response(data, media_type="image/jpeg", headers=headers) if data else Response(status_code=204)

    def thumbnail(request: Request) -> Response:
        data = studio.thumbnail_of(request.path_params["name"])
        return Response(data, media_type="image/jpeg", headers=FOREVER) if data else not_found()

    return [
        route("examples/{name}.png", lambda request: file(picture(request.path_params["name"]), "image/png")),
        route("loras/{name:path}.jpg", thumbnail),
        route("alive", lambda request: Response(status_code=204, headers={"Cache-Control": "no-store"})),
        route("sample.mp4", lambda request: file(studio.sample, "video/mp4")),
        route("{id}/video.mp4", video),
        route("{id}/original.mp4", original),
        route("{id}/poster.jpg", lambda request: file(studio.poster_of(_job_id(request)), "image/jpeg")),
        route("{id}/preview.jpg", preview),
        route("{id}/shown.mp4", lambda request: file(studio.uploaded_video(_job_id(request)), "video/mp4")),
    ]


def _job_id(request: Request) -> str:
    value = request.path_params.get("id", "")
    return value if JOB_ID.fullmatch(value) else ""
