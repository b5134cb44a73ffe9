"""docs/performance.md: the last run counts, toy sizes do not, and what was not run is said."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu import tables
from benchmarks.gpu.__main__ import RESULTS, SECTIONS

START = {"section": "forward", "name": "start", "torch": "2.11", "at": "2026-01-01 10:00", "device": "GPU"}
LINE = {"section": "forward", "name": "480p", "clip": "480p", "linears": "bf16", "steps": "fused", "tflops": 600.0}


def test_the_last_run_of_a_measurement_counts() -> None:
    page = tables.page([START, LINE | {"seconds": 3.14}, LINE | {"seconds": 2.72}, LINE | {"seconds": 9, "tiny": True}])
    assert "2.72" in page and "3.14" not in page and "| 9 |" not in page
    assert "| 2026-01-01 10:00 |" in page


def test_sections_that_did_not_end_are_listed() -> None:
    page = tables.page([START, LINE | {"seconds": 1.0}, {"section": "host", "name": "end"}])
    missing = page.partition("## Not run")[2]
    assert "`forward`: not finished" in missing and "`cold`: not run" in missing and "`host`" not in missing


def test_the_page_is_the_one_that_the_results_make(tmp_path: Path, monkeypatch) -> None:
    committed = tables.PAGE.read_text("utf-8")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "performance.md")
    tables.main()
    assert (tmp_path / "performance.md").read_text("utf-8") == committed
    assert RESULTS.is_file() and len(set(SECTIONS)) == len(SECTIONS)
