"""The HTTP API beside the page: the server's own routes on the same port, over the same job manager.

The page's password is a key of the API, and LIGHTX2V_API_KEY sets others. A public page without a password has an API
only with such a key, because callers without one could list each other's jobs. ZeroGPU has no API: there a GPU is lent
to a visitor's own request only.
"""

import os
from collections.abc import Mapping

from starlette.routing import BaseRoute

from lightx2v.jobs.queue import JobManager
from lightx2v.server.application import ApiMount, create_app
from lightx2v.server.metrics import Metrics
from lightx2v.server.service import Service

from ..backend.studio import Studio, settings_of


def api_routes(studio: Studio, variables: Mapping[str, str] = os.environ) -> list[BaseRoute]:
    """The routes, to mount before gradio's own; [] if this page has no API."""
    exposure = studio.exposure
    keys = [exposure.password, *(key.strip() for key in variables.get("LIGHTX2V_API_KEY", "").split(","))]
    keys = [key for key in keys if key]
    if not isinstance(studio.jobs, JobManager) or exposure.open_to_others and not keys:
        return []
    names = sorted((info.name for info in studio.presets), key=lambda name: name != studio.default_preset)
    service = Service(studio.jobs, {name: settings_of(name) for name in names}, check=exposure.limits.check)
    return [ApiMount(create_app(service, Metrics(), keys=keys, limits=False))]
