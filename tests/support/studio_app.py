"""A launched page: app.py in a process of its own on a free port, for tests and screenshots."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from patience import PATIENCE, eventually, free_port

ROOT = Path(__file__).parents[2]
PRESET = "demo_t2v_distill_lora"
LEAKS = re.compile(r"Traceback|File \"|/tmp/|/(?:root|home)/|site-packages|" + re.escape(str(ROOT)))
"""No answer may contain this: a traceback, or a path of this machine."""


@dataclass(frozen=True)
class Page:
    """A running page. `said` is its output so far."""

    url: str
    folder: Path
    process: subprocess.Popen[str]
    log: Path
    http: httpx.Client
    """One for all requests: creating a client costs more than most requests."""

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def painted(self) -> list[dict[str, Any]]:
        """The painting engine's log: {"event": "open" | "begin" | "end", "prompt": …, …}, in order."""
        file = self.folder / "painted.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def ask(self, endpoint: str, *, session: httpx.Client | None = None, **values: Any) -> Any:
        """Calls a public endpoint by plain HTTP; raises Refused with its message."""
        http = session or self.http
        url = f"/gradio_api/call/v2/{endpoint}"
        # All tests are one client to the page's rate limit, which says to wait.
        made = eventually(lambda: (r := http.post(url, json=values)).status_code != 429 and r)
        assert made.status_code == 200, made.text
        event = made.json()["event_id"]
        answer = http.get(f"/gradio_api/call/{endpoint}/{event}").text
        kind, data = re.findall(r"event: (\w+)\ndata: (.*)", answer)[-1]
        if kind != "complete":
            raise Refused(answer)
        return json.loads(data)[0]

    def upload(self, data: bytes, name: str) -> dict[str, Any]:
        """Uploads a file as the page does; returns the value that endpoints take for an image."""
        answer = self.http.post("/gradio_api/upload", files={"files": (name, data)})
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def wait(self, id: str, *states: str) -> dict[str, Any]:
        """The job's status once it is over, or in one of `states`."""
        wanted = states or ("succeeded", "failed", "cancelled", "interrupted")
        return eventually(lambda: (s := self.ask("status", id=id))["state"] in wanted and s)

    def stop(self, ids: Iterable[str]) -> None:
        """Ends all unfinished jobs of these, so that the next test finds an idle page."""
        for id in (left := list(dict.fromkeys(ids))):
            self.ask("cancel", id=id)
        for id in left:
            self.wait(id)

    def let_go(self, prompt: str) -> None:
        """Releases the run of this prompt, which contains "held"."""
        (self.folder / f"{prompt}.go").touch()

    def make(self, prompt: str = "a red ball", **values: Any) -> dict[str, Any]:
        """Makes a video and returns its finished job."""
        done = self.wait(self.ask("generate", prompt=prompt, **values)["id"])
        assert done["state"] == "succeeded", done
        return done


class Refused(Exception):
    """An endpoint answered with an error; the text is its whole answer."""


@contextmanager
def launched(
    folder: Path, *flags: str, demo: bool = False, port: int | None = None, **variables: str
) -> Iterator[Page]:
    """Runs the page until the block ends, with the demo model if `demo`, else with the painting engine."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".log")
    command = [sys.executable, str(ROOT / "tests" / "support" / "painted_app.py"), "--port", str(port), *flags]
    environment = {**os.environ, **variables, "LIGHTX2V_OUTPUT_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    environment |= {"GRADIO_SERVER_PORT": str(port)}  # on a Space the flags have no effect
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # leave cores to other tests
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(["--demo"] if demo else [])],
            stdout=output,
            stderr=output,
            text=True,
            env=environment,
            cwd=ROOT,
        )
    url = f"http://127.0.0.1:{port}"
    # A connection each: what is refused early may cut its own.
    with httpx.Client(base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0)) as http:
        page = Page(url=url, folder=folder, process=process, log=log, http=http)
        try:
            eventually(lambda: "LightX2V Studio is on" in page.said or process.poll() is not None)
            assert process.poll() is None, page.said
            yield page
        finally:
            stop(process)


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    """Ends a page with a signal; returns its exit code."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
