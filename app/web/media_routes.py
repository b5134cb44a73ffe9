"""Routes for what the page shows: a run's video, poster and latent preview, by the run's unguessable id.

Only these files leave the output folder. The names come from the job manager, never from the request, and where the
page has a password these routes ask for it as gradio's own do.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ..backend.studio import JOB_ID, Studio
from ..form.examples import picture
from ..gradio_compat import signed_in

HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; media-src 'self'"}
FOREVER = {**HEADERS, "Cache-Control": "private, max-age=86400, immutable"}


def media_routes(studio: Studio) -> list[BaseRoute]:
    """To be mounted before gradio's own routes."""

    def guarded(answer: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def checked(request: Request) -> Response:
            return answer(request) if signed_in(request) else PlainTextResponse("Sign in first.", status_code=401)

        return checked

    def video(request: Request) -> Response:
        path = studio.video_of(job_id := _job_id(request))
        if path is None:
            return _missing()
        name = f"lightx2v-{job_id[:8]}.mp4" if "download" in request.query_params else None
        return FileResponse(path, media_type="video/mp4", filename=name, headers=FOREVER)

    def poster(request: Request) -> Response:
        data = studio.poster_of(_job_id(request))
        return Response(data, media_type="image/jpeg", headers=FOREVER) if data else _missing()

    def preview(request: Request) -> Response:
        data = studio.preview_of(_job_id(request))
        headers = {**HEADERS, "Cache-Control": "no-store"}
        # A run that ended while the page asked has no preview any more; that is no error.
        return Response(data, media_type="image/jpeg", headers=headers) if data else Response(status_code=204)

    def uploaded(request: Request) -> Response:
        path = studio.uploaded_video(_job_id(request))
        return FileResponse(path, media_type="video/mp4", headers=FOREVER) if path else _missing()

    def sample(request: Request) -> Response:
        path = studio.sample
        return FileResponse(path, media_type="video/mp4", headers=FOREVER) if path else _missing()

    def example(request: Request) -> Response:
        path = picture(request.path_params["name"])
        return FileResponse(path, media_type="image/png", headers=FOREVER) if path else _missing()

    return [
        Route("/studio/examples/{name}.png", guarded(example)),
        Route("/studio/sample.mp4", guarded(sample)),
        Route("/studio/{id}/video.mp4", guarded(video)),
        Route("/studio/{id}/poster.jpg", guarded(poster)),
        Route("/studio/{id}/preview.jpg", guarded(preview)),
        Route("/studio/{id}/shown.mp4", guarded(uploaded)),
    ]


def _job_id(request: Request) -> str:
    value = request.path_params.get("id", "")
    return value if JOB_ID.fullmatch(value) else ""


def _missing() -> Response:
    return PlainTextResponse("There is nothing here.", status_code=404)
