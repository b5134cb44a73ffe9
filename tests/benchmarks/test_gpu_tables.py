"""docs/performance.md: the last run of a measurement counts, toy sizes do not, and what was not run is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import tables
from benchmarks.gpu.__main__ import RESULTS, SECTIONS

START = {"section": "forward", "name": "start", "torch": "2.11", "at": "2026-01-01 10:00", "device": "GPU"}
LINE = {"section": "forward", "name": "480p", "clip": "480p", "linears": "bf16", "steps": "fused", "tflops": 600.0}


def rows(page: str, title: str) -> list[dict[str, str]]:
    """The first table of a section of a page, each row by the words of its head."""
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def test_the_last_run_of_a_measurement_counts_and_toy_sizes_do_not() -> None:
    page = tables.page([START, LINE | {"seconds": 3.14}, LINE | {"seconds": 2.72}, LINE | {"seconds": 9, "tiny": True}])
    (row,) = rows(page, "One forward of an expert, 40 blocks")
    assert (row["video"], row["s"], row["TFLOP/s"]) == ("480p", "2.72", "600")
    assert rows(page, "How it was measured")[0]["from (UTC)"] == "2026-01-01 10:00"


def test_inexact_attention_is_compared_with_the_exact_one_of_its_run() -> None:
    shared = {"section": "inexact", "clip": "720p", "device": "GPU"}
    kernels = [
        shared | {"name": f"{way}{values}{order}", "way": way, "values": values, "order": order, "error": error} | more
        for way, values, order, error, more in (
            ("auto", "random", "", 2e-3, {"seconds": 0.17}),
            ("auto", "like a video", "", 1e-3, {}),
            ("sol_attn, tau 1", "random", "", 0.7, {"seconds": 0.06}),
            ("sol_attn, tau 1", "like a video", "Morton order", 7e-3, {}),
            ("sol_attn, tau 1", "random", "Morton order", 0.8, {}),
        )
    ]
    runs = [
        shared | {"name": way, "way": way, "linears": "bf16", "seconds": seconds, "error": error}
        for way, seconds, error in (("auto", 10.0, 0.0), ("sol_attn, tau 1", 5.0, 3e-2))
    ]
    page = tables.page([START, *kernels, *runs])
    first = rows(page, "Attention that is not exact")[:3]
    assert [row["attention"] for row in first] == ["flash_attn3, exact", *["sol_attn, tau 1"] * 2]
    assert (first[2]["order of tokens"], first[2]["on values like a video"], first[2]["ms"]) == (
        "Morton order",
        "7.0e-03",
        "60.0",
    )
    assert "| 720p | bf16 | sol_attn, tau 1 | 5 | 2.00 | 3.0e-02 |" in page


def test_sections_that_did_not_end_are_listed() -> None:
    page = tables.page([START, LINE | {"seconds": 1.0}, {"section": "host", "name": "end"}])
    listed = dict(line.strip("- `").split("`: ") for line in page.partition("## Not run")[2].strip().splitlines())
    assert set(listed) == set(SECTIONS) - {"host"}
    assert (listed["forward"], listed["presets"]) == ("not finished", "not run")


@pytest.fixture
def cold_run() -> dict[str, object]:
    return {
        "section": "presets",
        "preset": "i2v_distill_fp8",
        "name": "i2v_distill_fp8, cold",
        "clip": "720p",
        "mode": "resident",
        "seconds": 89.4,
        "load": 33.7,
        "total": 51.6,
        "stages": {},
        "steps": 4,
        "steps_seconds": [13.3, 8.6, 8.7, 8.7],
        "smi_mib": 47275.0,
        "exposed": {"experts": 0.0006},
        "device": "NVIDIA H100 80GB HBM3",
        "peaks": {"decode": {"allocated": 43_300_000_000}, "text": {"allocated": 1}},
    }


def test_a_preset_has_the_tutorials_numbers_beside_it_at_its_own_size_only(cold_run: dict[str, object]) -> None:
    elsewhere = cold_run | {"preset": "t2v_base", "where": " at 480p", "name": "t2v_base at 480p, cold", "steps": 40}
    page = tables.page([START | {"section": "presets"}, cold_run, elsewhere])
    by_name = {row["preset"]: row for row in rows(page, "The presets, whole")}
    shown = by_name["i2v_distill_fp8"]
    seconds, mib = tables.TUTORIAL["i2v_distill_fp8"]
    assert (shown["cold s"], shown["of which loading"], shown["its run"]) == ("89.4", "33.7", "51.6")
    assert (shown["nvidia-smi MiB"], shown["tensors GB"]) == ("47 275", "43.3")
    assert shown["steps"] == "4 of 8.70 s" and shown["waited for experts, ms"] == "0.6"
    assert (shown["tutorial s"], shown["tutorial MiB"].replace(" ", "")) == (f"{seconds:.1f}", str(mib))
    assert not by_name["t2v_base at 480p"].get("tutorial s", "").strip()


def test_presets_and_steps_that_were_not_run_are_named(cold_run: dict[str, object]) -> None:
    base = {"preset": "t2v_base", "name": "t2v_base, cold", "clip": "480p"}
    start = START | {"section": "presets"}
    whole = tables.page([start, cold_run, cold_run | base | {"steps": 40}]).partition("## Not run")[2]
    assert "all steps of" not in whole
    assert not [name for name in ("i2v_distill_fp8`,", "`t2v_base`") if name in whole]
    assert all(f"`{name}`" in whole for name in tables.TUTORIAL if name not in ("i2v_distill_fp8", "t2v_base"))
    cut = tables.page([start, cold_run | base | {"steps": 2}]).partition("## Not run")[2]
    assert "- all steps of `t2v_base`: 2 of 40" in cut


def test_streaming_is_measured_against_all_blocks_kept() -> None:
    way = {"section": "streaming", "name": "x", "way": "no block kept", "clip": "480p", "attention": "cudnn"}
    way |= {"seconds": 2.0, "ratio": 1.0123, "least": 1.01, "most": 1.02, "waited": 0.0005}
    page = tables.page([START, way])
    (row,) = rows(page, "Streaming in bf16: one forward, its blocks from host memory")
    assert (row["over all blocks kept"], row["from round to round"]) == ("+1.23%", "+1.00% to +2.00%")
    assert (row["s"], row["waited, ms"]) == ("2", "0.5")


def test_the_page_is_the_one_that_the_results_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table or a number that is edited by hand would not come from a run."""
    committed = tables.PAGE.read_text("utf-8")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "performance.md")
    tables.main()
    assert (tmp_path / "performance.md").read_text("utf-8") == committed
    assert RESULTS.is_file()
