"""RunTimes: the prediction of a job's seconds on a device, from the times of the jobs that ran before."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..cost.model_size import shape_of
from ..cost.run_time import Prediction, Rates, estimate_cost
from .replica import Outcome


class RunTimes:
    """Kept in one JSON file. Several threads may use it."""

    def __init__(self, file: Path) -> None:
        self._rates = Rates(file)

    def predict(self, config: EngineConfig, request: Request, *, device: str, loaded: bool) -> Prediction | None:
        """The seconds of each stage, without loading if the model is `loaded`; None if nothing is known."""
        cost = estimate_cost(request, shape_of(config))
        return self._rates.predict(device, engine_key(config), cost, loaded=loaded)

    def seconds(self, config: EngineConfig, request: Request, *, device: str, loaded: bool) -> float | None:
        """The same in total, as the dispatcher of the queue asks."""
        prediction = self.predict(config, request, device=device, loaded=loaded)
        return prediction.seconds if prediction is not None else None

    def learn(self, config: EngineConfig, request: Request, outcome: Outcome) -> None:
        """Record the seconds that each stage of a finished run took. This is an `OnFinished` of the queue."""
        if (report := outcome.report) is None:
            return
        # An input image may have changed the size of the video: count the work that was done.
        done = replace(request, height=report["height"], width=report["width"])
        seconds = dict(report["timings"]["seconds"])
        if report.get("resumed_after"):  # it did a part of the steps
            del seconds["denoise"]
        self.record(config, done, seconds, outcome.device)

    def record(self, config: EngineConfig, request: Request, seconds: dict[str, float], device: str) -> None:
        self._rates.record(device, engine_key(config), estimate_cost(request, shape_of(config)), seconds)


def engine_key(config: EngineConfig) -> str:
    """A short name for everything that the speed of an engine depends on."""
    text = json.dumps(config.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
