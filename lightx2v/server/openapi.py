"""What OpenAPI says beyond the types of functions: bodies that are JSON or a form, and the form of all errors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from .request_bodies import FILES, TaskBody, VideoBody
from .responses import ErrorResponse

DESCRIPTIONS = {
    400: "The form cannot be read.",
    401: "No key, or a wrong one.",
    403: "From another site, or for a host name that is not served.",
    404: "There is nothing of this name, or it is not yours.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is neither JSON nor a form.",
    422: "Something cannot be done as asked; the message says what would do.",
    429: "The queue is full, or you ask too often.",
    503: "Not now.",
    507: "The disk is full.",
}
_REFERENCE = "#/components/schemas/{model}"


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these errors and those that every route has."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ErrorResponse")}}}
    return {status: {"content": content, "description": DESCRIPTIONS[status]} for status in (401, 403, *statuses)}


SUBMISSION = error_responses(400, 408, 413, 415, 422, 429, 507)
"""`responses` of a route that takes a job."""


def request_body(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes `kind` as JSON or as a form."""
    name = kind.__name__
    content = {
        "application/json": {"schema": {"$ref": _REFERENCE.format(model=name)}},
        "multipart/form-data": {"schema": {"$ref": _REFERENCE.format(model=f"{name}Form")}},
    }
    return {"requestBody": {"required": True, "content": content}}


def complete_schema(app: FastAPI, *, keyed: bool) -> None:
    """Makes `app.openapi` hold the schemas that `request_body` refers to, and that a key is needed where one is."""
    plain = app.openapi

    def completed() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            schemas = document["components"]["schemas"]
            for kind in (VideoBody, TaskBody, ErrorResponse):
                schema = kind.model_json_schema(ref_template=_REFERENCE)
                schemas |= schema.pop("$defs", {})
                schemas[kind.__name__] = schema
                if kind is not ErrorResponse:
                    schemas[f"{kind.__name__}Form"] = _as_form(schema, FILES[:2] if kind is VideoBody else FILES[2:])
            if keyed:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = completed  # type: ignore[method-assign]


def _as_form(schema: dict[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Everything as text, but for files."""
    form = copy.deepcopy(schema)
    form["properties"] = {
        name: {key: value for key, value in about.items() if key in ("description", "maxLength", "minLength")}
        | {"type": "string"}
        for name, about in form["properties"].items()
    } | {name: {"type": "string", "format": "binary"} for name in files}
    form["title"] += "Form"
    return form
