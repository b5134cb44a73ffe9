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
    assert "`forward`: not finished" in missing and "`presets`: not run" in missing and "`host`" not in missing


def test_presets_stand_beside_the_tutorial_and_those_that_were_not_run_are_named() -> None:
    start = START | {"section": "presets"}
    run = {
        "seconds": 89.4,
        "load": 33.7,
        "total": 51.6,
        "stages": {},
        "steps": 4,
        "steps_seconds": [13.3, 8.6, 8.7, 8.7],
    }
    run |= {
        "section": "presets",
        "preset": "i2v_distill_fp8",
        "name": "i2v_distill_fp8, cold",
        "clip": "720p",
        "mode": "resident",
        "smi_mib": 47275.0,
        "exposed": {"experts": 0.0006},
        "device": "NVIDIA H100 80GB HBM3",
        "peaks": {"decode": {"allocated": 43_300_000_000}},
    }
    base = {"preset": "t2v_base", "where": " at 480p", "name": "t2v_base at 480p, cold", "clip": "480p", "steps": 40}
    page = tables.page([start, run, run | base])
    numbers = "89.4 | 33.7 | 51.6 |  | 47 275 | 43.3 | resident"
    assert f"| i2v_distill_fp8 | H100 | 720p | {numbers} | 4 of 8.70 s | 0.6 | 57.1 | 47 274 |" in page
    assert f"| t2v_base at 480p | H100 | 480p | {numbers} | 40 of 8.70 s | 0.6 |  |  |" in page
    missing = page.partition("## Not run")[2]
    assert "- all steps of" not in missing
    assert "- all steps of `t2v_base`: 2 of 40" in tables.page([start, run | base | {"where": "", "steps": 2}])
    assert "`presets`: not finished; without `t2v_base`, `t2v_base_offload`" in missing
    assert "i2v_distill_fp8`," not in missing


def test_streaming_is_told_against_all_blocks_kept() -> None:
    way = {"section": "streaming", "name": "x", "way": "no block kept", "clip": "480p", "attention": "cudnn"}
    way |= {"seconds": 2.0, "ratio": 1.0123, "least": 1.01, "most": 1.02, "waited": 0.0005}
    page = tables.page([START, way])
    assert "| 480p | no block kept | cudnn | 2 | +1.23% | +1.00% to +2.00% | 0.5 |" in page


def test_the_page_is_the_one_that_the_results_make(tmp_path: Path, monkeypatch) -> None:
    committed = tables.PAGE.read_text("utf-8")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "performance.md")
    tables.main()
    assert (tmp_path / "performance.md").read_text("utf-8") == committed
    assert RESULTS.is_file() and len(set(SECTIONS)) == len(SECTIONS)
