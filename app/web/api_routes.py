"""The HTTP API beside the page: the server's own routes on the same port, over the same job manager.

The page's password is a key of the API, LIGHTX2V_API_KEY sets others, and LIGHTX2V_OPERATOR_KEY the operator's. A
public page without a password has an API only with such a key, because callers without one could list each other's
jobs. ZeroGPU has no API: there a GPU is lent to a visitor's own request only.
"""

import os
from collections.abc import Iterator, Mapping

from starlette.routing import BaseRoute

from lightx2v.config.presets import Resolved
from lightx2v.jobs.queue import JobManager
from lightx2v.server.application import ApiMount, create_app
from lightx2v.server.guess_limit import GuessLimit
from lightx2v.server.metrics import Metrics
from lightx2v.server.service import Service

from ..backend.studio import Studio


class OfferedPresets(Mapping[str, Resolved]):
    """The presets on offer now, the default first. Found models and saved presets come and go."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def __getitem__(self, name: str) -> Resolved:
        if name not in self._studio.tasks:
            raise KeyError(name)
        return self._studio.settings(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._studio.tasks, key=lambda name: name != self._studio.default_preset))

    def __len__(self) -> int:
        return len(self._studio.tasks)


def api_routes(
    studio: Studio, variables: Mapping[str, str] = os.environ, *, guesses: GuessLimit | None = None
) -> list[BaseRoute]:
    """The routes, to mount before gradio's own; [] if this page has no API. `guesses` counts wrong keys."""
    exposure = studio.exposure
    keys = [exposure.password, *(key.strip() for key in variables.get("LIGHTX2V_API_KEY", "").split(","))]
    keys, operator = [key for key in keys if key], variables.get("LIGHTX2V_OPERATOR_KEY", "").strip()
    if not isinstance(studio.jobs, JobManager) or exposure.open_to_others and not (keys or operator):
        return []
    service = Service(
        studio.jobs, OfferedPresets(studio), check=exposure.limits.check, loras=lambda: studio.offer.catalog.loras
    )
    app = create_app(service, Metrics(), keys=keys, operator=operator, limits=False, guesses=guesses)
    return [ApiMount(app)]
