"""A job that fails ends alone: it says why, frees what it held, and the next one runs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable

import pytest
from fake_engine import Garage, Script
from job_runs import CONFIG, OTHER, ask, done
from patience import PATIENCE, eventually

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest, Busy, Cancelled, OutOfMemory
from lightx2v.jobs.engine_slot import public_error, release_frames
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.replica import Outcome

pytestmark = pytest.mark.slow


class HostError(RuntimeError):
    pass


@pytest.mark.parametrize("stage", ["text", "denoise", "decode", "write"])
def test_an_error_ends_its_job_only(
    stage: str, manager: JobManager, garage: Garage, caplog: pytest.LogCaptureFixture
) -> None:
    garage.script["bad"] = Script(error=HostError("/home/user/secret token=xyz"), at=(stage, 2))
    bad = manager.submit(CONFIG, ask("bad"))
    good = manager.submit(CONFIG, ask("good"))
    bad = done(manager, bad)
    assert bad.state == "failed" and bad.error is not None and bad.error["type"] == "HostError"
    assert not any(word in bad.error["message"] for word in ("secret", "xyz", "/home", "Traceback"))
    assert bad.id in bad.error["message"] and bad.path is None
    assert "HostError: /home/user/secret" in caplog.text and "_incident" in caplog.text
    assert done(manager, good).state == "succeeded"
    assert manager.alive and manager.events(bad.id)[-1].data == {"state": "failed", "error": bad.error}


def test_after_a_bug_the_next_job_gets_a_fresh_engine_and_after_a_known_error_it_does_not(
    manager: JobManager, garage: Garage
) -> None:
    garage.script["user"] = Script(error=BadRequest("The image is too small."))
    garage.script["bug"] = Script(error=ValueError("?"))
    for prompt in ("user", "fine", "bug", "fine"):
        done(manager, manager.submit(CONFIG, ask(prompt)))
    assert len(garage.opened) == 2 and garage.most == 1


def test_our_own_errors_are_shown_as_they_are(manager: JobManager, garage: Garage) -> None:
    garage.script["nan"] = Script(nan=True)
    job = done(manager, manager.submit(CONFIG, ask("nan")))
    assert job.error == {
        "type": "NumericsError",
        "message": "NaN at step 2 of 4, attention torch_sdpa. Try dtype fp32.",
    }
    assert not (manager.folder / f"{job.id}.mp4").exists()


def out_of_memory_errors() -> list[BaseException]:
    import torch

    return [
        MemoryError(),
        OutOfMemory("Out of memory at 1280x720. Make the video smaller."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_out_of_memory_gives_advice_frees_the_step_and_the_next_job_runs(
    stage: str, index: int, manager: JobManager, garage: Garage
) -> None:
    garage.script["huge"] = Script(error=out_of_memory_errors()[index], at=(stage, 2))
    huge = done(manager, manager.submit(CONFIG, ask("huge")))
    assert huge.state == "failed" and huge.error is not None and huge.error["type"] == "OutOfMemory"
    assert "smaller" in huge.error["message"]
    assert [ref for ref in garage.step_tensors if ref() is not None] == []
    assert done(manager, manager.submit(CONFIG, ask("small"))).state == "succeeded"
    assert len(garage.opened) == 1, "the weights are fine: no need to load them again"


def test_nothing_holds_the_frames_of_a_failed_step_even_through_causes(manager: JobManager, garage: Garage) -> None:
    inner = MemoryError("inner")
    try:
        try:
            raise inner
        except MemoryError as error:
            raise OutOfMemory("outer") from error
    except OutOfMemory as error:
        outer = error
    garage.script["chain"] = Script(error=outer)
    done(manager, manager.submit(CONFIG, ask("chain")))
    assert outer.__traceback__ is None and inner.__traceback__ is None
    assert [ref for ref in garage.step_tensors if ref() is not None] == []


def test_releasing_an_error_copes_with_circles() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__context__ = second, first
    release_frames(first)


def test_out_of_memory_while_loading_fails_the_job_and_loading_is_tried_again(
    manager: JobManager, garage: Garage
) -> None:
    garage.open_error = MemoryError()
    assert done(manager, manager.submit(CONFIG, ask())).state == "failed"
    garage.open_error = None
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"
    assert garage.alive == 1


def test_a_full_disk_says_so() -> None:
    assert "disk is full" in public_error(OSError(28, "No space left on device"), "x")["message"]


@pytest.mark.parametrize("output", [b""])
def test_a_run_without_a_file_is_a_failure(output: bytes, manager: JobManager, garage: Garage) -> None:
    garage.script["empty"] = Script(output=output)
    job = done(manager, manager.submit(CONFIG, ask("empty")))
    assert job.state == "failed" and job.error is not None and job.error["type"] == "OutputError"


def test_a_lost_device_stops_the_worker_and_turns_health_red(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    garage.script["assert"] = Script(error=RuntimeError("CUDA error: device-side assert triggered"))
    first = manager.submit(CONFIG, ask("assert"))
    job = done(manager, first)
    assert job.state == "failed" and job.error is not None and "Restart" in job.error["message"]
    eventually(lambda: not manager.alive)
    with pytest.raises(Busy, match="restart"):
        manager.submit(CONFIG, ask())
    assert manager.get(first.id).state == "failed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_worker_turns_health_red_and_old_ids_still_answer(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    old = done(manager, manager.submit(CONFIG, ask()))
    assert manager.alive
    garage.script["kill"] = Script(error=SystemExit(1))
    killed = manager.submit(CONFIG, ask("kill"))
    job = done(manager, killed)
    assert job.state == "interrupted" and job.error is not None and "worker has stopped" in job.error["message"]
    eventually(lambda: not manager.alive)
    assert manager.get(old.id).state == "succeeded"
    assert garage.alive == 0
    with pytest.raises(Busy):
        manager.submit(CONFIG, ask())
    manager.close()
    again = open_manager()
    again.requeue(job.id)
    garage.script.clear()
    assert done(again, job).state == "succeeded"


def test_an_engine_that_fails_to_close_does_not_stop_the_queue(
    open_manager: Callable[..., JobManager], caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(Garage):
        def __call__(self, *args: object, **options: object) -> object:  # type: ignore[override]
            engine = super().__call__(*args, **options)  # type: ignore[arg-type]
            engine.close = lambda: 1 / 0  # type: ignore[method-assign, assignment]
            return engine

    manager = open_manager(garage=Stuck())
    for config in (CONFIG, OTHER):
        assert done(manager, manager.submit(config, ask())).state == "succeeded"
    assert "closing the engine failed" in caplog.text


def test_a_folder_that_is_removed_while_a_job_runs_costs_no_video(manager: JobManager, garage: Garage) -> None:
    hold = threading.Event()
    garage.script["held"] = Script(hold=hold)
    running = manager.submit(CONFIG, ask("held"))
    assert garage.started.wait(PATIENCE)
    shutil.rmtree(manager.folder)
    hold.set()
    first = done(manager, running)
    assert first.state == "succeeded" and first.path is not None and first.path.is_file(), first.error
    shutil.rmtree(manager.folder)
    second = done(manager, manager.submit(CONFIG, ask("next")))
    assert second.state == "succeeded" and second.path is not None and second.path.is_file(), second.error


def test_every_run_is_reported_once_and_a_failing_hook_costs_no_video(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    seen: list[tuple[str, bool, bool]] = []

    def on_finished(config: EngineConfig, request: Request, outcome: Outcome) -> None:
        seen.append((request.prompt, outcome.report is not None, outcome.cancelled))
        raise ValueError

    garage.script |= {"bad": Script(error=RuntimeError()), "stop": Script(error=Cancelled("The run was cancelled."))}
    manager = open_manager(on_finished=on_finished)
    jobs = [manager.submit(CONFIG, ask(prompt)) for prompt in ("fine", "bad", "stop", "fine")]
    assert [done(manager, job).state for job in jobs] == ["succeeded", "failed", "cancelled", "succeeded"]
    assert seen == [("fine", True, False), ("bad", False, False), ("stop", False, True), ("fine", True, False)]
