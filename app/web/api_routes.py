"""The HTTP API beside the page: the server's own routes on the same port, over the same job manager.

Where the page has a password, that is the API's key too; LIGHTX2V_API_KEY names others. A page that everybody may use
without a password has no API unless it has such a key: callers without one could list each other's jobs. Nor has
ZeroGPU, where a GPU is lent to a visitor's own request only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from starlette.routing import BaseRoute

from lightx2v.jobs.queue import JobManager
from lightx2v.server.application import ApiMount, create_app
from lightx2v.server.metrics import Metrics
from lightx2v.server.service import Service

from ..backend.studio import Studio, settings_of
from ..exposure import Exposure


def api_routes(studio: Studio, variables: Mapping[str, str] = os.environ) -> list[BaseRoute]:
    """To be mounted before gradio's own routes; none where there is no API."""
    exposure = studio.exposure
    keys = api_keys(exposure, variables)
    if not isinstance(studio.jobs, JobManager) or exposure.open_to_others and not keys:
        return []
    names = sorted((info.name for info in studio.presets), key=lambda name: name != studio.default_preset)
    service = Service(studio.jobs, {name: settings_of(name) for name in names}, check=exposure.limits.check)
    return [ApiMount(create_app(service, Metrics(), keys=keys, limits=False))]


def api_keys(exposure: Exposure, variables: Mapping[str, str]) -> list[str]:
    """The page's password and the keys of the environment."""
    given = [key.strip() for key in variables.get("LIGHTX2V_API_KEY", "").split(",")]
    return [key for key in (exposure.password, *given) if key]
