"""The OpenAPI schema beyond the types of the routes: bodies that are JSON or a form, and the form of all errors."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.responses import FileResponse

from .request_bodies import FILES, RemixBody, TaskBody, VideoBody
from .responses import ErrorResponse

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
DESCRIPTIONS = {
    400: "Malformed form.",
    401: "Missing or invalid API key.",
    403: "The request comes from another site, the host name is not allowed, or the route is for the operator only.",
    404: "Not found, or not yours.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is neither JSON nor a form.",
    422: "Invalid request; the message explains how to fix it.",
    429: "The queue is full, or there are too many requests or wrong keys.",
    503: "Not available now.",
    507: "The disk is full.",
}
_REFERENCE = "#/components/schemas/{model}"


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these errors, and those that every route has."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ErrorResponse")}}}
    return {status: {"content": content, "description": DESCRIPTIONS[status]} for status in (401, 403, 429, *statuses)}


_VIDEO = {
    "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    "description": "The video, or the requested range.",
}
_FILE = {200: _VIDEO, 206: _VIDEO, 416: {"description": "Invalid range."}, **error_responses(404, 422)}
SUBMISSION = error_responses(400, 408, 413, 415, 422, 429, 507)
"""`responses` of a route that queues a job."""


def serves_file(router: APIRouter, path: str, **responses: Any) -> Callable[[Endpoint], Endpoint]:
    """A decorator for what GET of `path` does, which returns a FileResponse. HEAD has the headers and no body: players
    and download managers ask for it first. `responses` are those that differ from a video's, by their statuses."""

    def add(endpoint: Endpoint) -> Endpoint:
        router.get(path, response_class=FileResponse, responses=_FILE | responses)(endpoint)
        router.head(path, response_class=FileResponse, include_in_schema=False)(endpoint)
        return endpoint

    return add


def request_body(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that accepts `kind` as JSON or as a form."""
    name = kind.__name__
    content = {
        "application/json": {"schema": {"$ref": _REFERENCE.format(model=name)}},
        "multipart/form-data": {"schema": {"$ref": _REFERENCE.format(model=f"{name}Form")}},
    }
    return {"requestBody": {"required": True, "content": content}}


def complete_schema(app: FastAPI, *, keyed: bool) -> None:
    """Add to the document, which `app.openapi` makes once, the schemas that `request_body` refers to, and the API key
    if `keyed`. Call this after the last route."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    for kind, files in ((VideoBody, FILES[:2]), (TaskBody, FILES[2:]), (RemixBody, ()), (ErrorResponse, ())):
        schema = kind.model_json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
        if kind is not ErrorResponse:
            schemas[f"{kind.__name__}Form"] = _as_form(schema, files)
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]


def _as_form(schema: dict[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """The schema of the form: every field is text, and `files` are files."""
    kept = ("description", "maxLength", "minLength")
    properties = {
        name: {key: field[key] for key in kept if key in field} | {"type": "string"}
        for name, field in schema["properties"].items()
    }
    properties |= {name: {"type": "string", "format": "binary"} for name in files}
    return {**schema, "properties": properties, "title": schema["title"] + "Form"}
