"""The OpenAPI document against the server: whatever it allows is answered as it says, and nothing makes a 500."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.openapi import from_asgi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from served import I2V, T2V, serve

KEY = "8f14e45fceea167a5a36dedd4bea2543"
KNOWN = "known"
"""The client's own id of a job that is there."""

EXAMPLES = settings(
    max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
CHECKS: list[Any] = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
    ignored_auth,
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    folder: Path = tmp_path_factory.mktemp("schema")
    with serve(folder, presets=(T2V, I2V), keys=[KEY], max_queue=10_000, limits=False) as served:
        served.client.headers["Authorization"] = f"Bearer {KEY}"
        served.end_of(served.submit(client_id=KNOWN))
        yield from_asgi("/openapi.json", served.client.app, headers={"Authorization": f"Bearer {KEY}"})


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_server_does_what_its_document_says(api: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    tried = 0

    def attempt(case: schemathesis.Case) -> None:
        nonlocal tried
        tried += 1
        if case.path_parameters and "id" in case.path_parameters and len(str(case.path_parameters["id"])) % 2:
            case.path_parameters["id"] = KNOWN  # else nearly every id would be unknown
        # In a form, a query and a path everything is text, so only JSON can be of the wrong type.
        checks = [*CHECKS, negative_data_rejection] if case.media_type == "application/json" else CHECKS
        case.call_and_validate(checks=checks, headers={"Authorization": f"Bearer {KEY}"})

    for result in api.get_all_operations():
        strategy = result.ok().as_strategy(generation_mode=mode)
        with contextlib.suppress(Unsatisfiable):  # of a route that takes nothing, nothing is wrong
            EXAMPLES(given(strategy)(attempt))()
    assert tried > 60


@pytest.mark.slow
def test_the_document_names_every_route_and_both_kinds_of_bodies(api: schemathesis.BaseSchema) -> None:
    paths = api.raw_schema["paths"]
    assert {"/v1/videos", "/v1/videos/{id}/events", "/v1/tasks/video/", "/v1/tasks/{id}/result", "/metrics"} <= set(
        paths
    )
    for path in ("/v1/videos", "/v1/tasks/video/form"):
        assert set(paths[path]["post"]["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert api.raw_schema["security"] == [{"key": []}]
