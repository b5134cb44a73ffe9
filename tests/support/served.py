"""A server over the engine without a model, for tests: in this process, or really listening on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fake_engine import Garage
from fastapi.testclient import TestClient
from patience import PATIENCE, free_port

from lightx2v.config.presets import resolve
from lightx2v.jobs.queue import JobManager
from lightx2v.media.web_images import ImageFetcher
from lightx2v.server.application import create_app
from lightx2v.server.input_images import InputImages
from lightx2v.server.metrics import Metrics
from lightx2v.server.service import Service

T2V, I2V = "demo_t2v_distill_lora", "demo_i2v_distill_lora"
BASE = "demo_t2v_base"
SIZE = {"size": "64x64", "num_frames": 5}
"""Of a quick video in the words of /v1/videos."""


@dataclass(frozen=True)
class Served:
    client: TestClient
    jobs: JobManager
    garage: Garage
    service: Service

    def submit(self, prompt: str = "a cat", **body: Any) -> str:
        """The id of a job that was taken."""
        answer = self.client.post("/v1/videos", json={"prompt": prompt, **SIZE, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def end_of(self, id: str) -> dict[str, Any]:
        """The job when it is over."""
        self.jobs.wait(self.jobs.get(id).id, PATIENCE)
        return self.client.get(f"/v1/videos/{id}").json()


@contextmanager
def serve(
    folder: Path,
    garage: Garage | None = None,
    *,
    presets: Sequence[str] = (T2V,),
    keys: Sequence[str] = (),
    operator: str = "",
    max_queue: int = 10,
    fetcher: ImageFetcher | None = None,
    input_dir: Path | None = None,
    lora_dir: Path | None = None,
    limits: bool = True,
    **more: Any,
) -> Iterator[Served]:
    """The application in this process. `more` goes to JobManager."""
    garage, metrics = garage or Garage(), Metrics()
    with JobManager(garage, folder, max_queue=max_queue, on_finished=metrics.observe_run, **more) as jobs:
        images = InputImages(fetcher=fetcher or ImageFetcher(), folder=input_dir)
        service = Service(jobs, {name: resolve(name) for name in presets}, images=images, lora_dir=lora_dir)
        hosts = frozenset({"testserver", "127.0.0.1"})
        app = create_app(service, metrics, keys=keys, operator=operator, hosts=hosts, limits=limits)
        client = TestClient(app, raise_server_exceptions=False)
        yield Served(client=client, jobs=jobs, garage=garage, service=service)


@contextmanager
def listening(served: Served) -> Iterator[httpx.Client]:
    """The same, on a port of this machine."""
    port = free_port()
    config = uvicorn.Config(served.client.app, host="127.0.0.1", port=port, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            while not server.started:
                assert thread.is_alive()
                thread.join(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
