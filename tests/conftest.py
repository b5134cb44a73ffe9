"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from chromium import Person, browser, person
from fake_engine import Garage
from huggingface_hub import constants
from hypothesis import settings
from page_events import Keyboard
from studio_app import Page, launched
from tiny import build_tiny

from lightx2v.jobs.queue import JobManager

if TYPE_CHECKING:
    from playwright.sync_api import Browser


settings.load_profile("ci")  # the same examples every time, and no time limit for each: a machine may stand still


def pytest_collection_finish() -> None:
    """Takes what was imported out of the garbage collector's work: the engine collects after each model that it closes,
    and would walk through gradio, torch and every test for a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, alone and after others."""
    torch.manual_seed(0)


@dataclass(frozen=True)
class TinyModels:
    """Folders in the official layout. Shared by the whole session: a test that edits one copies it first."""

    t2v: Path
    i2v: Path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the engine keeps between starts goes here and not into the home folder. The Hub is out of reach, and its
    cache empty; in this process, where huggingface_hub has read its settings, and in those that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTX2V_CACHE_DIR", str(folder))
        patch.setenv("LIGHTX2V_USER_DIR", str(folder / "user"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "huggingface" / "hub"))
        yield folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    root = tmp_path_factory.mktemp("tiny")
    return TinyModels(t2v=build_tiny(root / "t2v", "t2v"), i2v=build_tiny(root / "i2v", "i2v", seed=10))


@pytest.fixture
def garage() -> Garage:
    return Garage()


@pytest.fixture
def open_manager(garage: Garage, tmp_path: Path) -> Iterator[Callable[..., JobManager]]:
    """Makes managers on tmp_path and closes them after the test."""
    made: list[JobManager] = []

    def make(**options: object) -> JobManager:
        made.append(JobManager(options.pop("garage", garage), tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for manager in made:
        manager.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "lightx2v-jobs"]


@pytest.fixture
def manager(open_manager: Callable[..., JobManager]) -> JobManager:
    return open_manager(max_queue=1000)


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page as `python app.py` serves it to this machine alone, over the painting engine."""
    with launched(tmp_path_factory.mktemp("studio") / "outputs") as started:
        yield started


@pytest.fixture(scope="session")
def keyboard(page: Page) -> Keyboard:
    """The events of that page."""
    return Keyboard(page, page.http.get("/config").json())


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page as a Hugging Face Space serves it to everybody: ten jobs may wait, and other limits."""
    with launched(tmp_path_factory.mktemp("space") / "outputs", SPACE_ID="someone/studio") as started:
        yield started


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def visitor(chrome: Browser, page: Page) -> Iterator[Person]:
    """Somebody with a tab on the launched page."""
    with person(chrome, page) as someone:
        yield someone
