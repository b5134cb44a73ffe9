"""The page's command line without a launched page: flags, folders, messages, and what gradio is told to keep."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from page_engine import Painter
from patience import PATIENCE
from studio_app import ROOT

from app import main, page
from app.backend.studio import Studio
from app.exposure import Exposure
from lightx2v.errors import OutputError


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--public",), "--share or --host"),
        (("--public", "--share", "--auth", "a:b"), "--public means without"),
        (("--mcp",), "gradio[mcp]"),
        (("--auth", "nocolon"), "USER:PASSWORD"),
    ],
)
def test_contradictory_flags_end_with_one_sentence(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(flags) == 2
    assert said in capsys.readouterr().err


def test_an_impossible_output_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main.main(["--output_dir", str(tmp_path / "file")]) == OutputError.exit_code
    said = capsys.readouterr().err
    assert "Could not create the folder" in said and "file/uploads" in said and "--output_dir" in said


@pytest.mark.slow
def test_an_unknown_preset_is_refused_by_name(tmp_path: Path) -> None:
    command = [sys.executable, "app.py", "--output_dir", str(tmp_path), "--preset", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False)
    assert done.returncode == 2 and "demo_t2v_base" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_share_link_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    demo = SimpleNamespace(local_url="http://127.0.0.1:7860/", share_url=None)
    main.announce(demo, Exposure(share=True, open_to_others=True, user="studio", password="pw123"))
    said = capsys.readouterr().out
    assert "no share link" in said and "api.gradio.app" in said and "User studio, password pw123" in said
    demo.share_url = "https://abc.gradio.live"
    main.announce(demo, Exposure(share=True, open_to_others=True))
    said = capsys.readouterr().out
    assert "https://abc.gradio.live" in said and "Anyone" in said


def test_abandoned_pages_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes half a megabyte, any request can open one, and by default gradio keeps 10 000."""
    asked: dict[str, Any] = {}
    demo = SimpleNamespace(
        launch=lambda **flags: asked.update(flags), local_url="http://127.0.0.1:7860/", share_url="", server=None
    )
    monkeypatch.setattr(page, "build_page", lambda studio: demo)
    studio = Studio(Painter(), tmp_path, Exposure())
    try:
        main.launch(studio)
    finally:
        studio.close()
    assert asked["state_session_capacity"] <= 500
    assert inspect.signature(gr.Blocks.launch).parameters["state_session_capacity"].default > 500
