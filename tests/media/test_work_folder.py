"""Work folders: gone when they are closed, and swept when their process was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lightx2v.media.work_folder import WORK_PREFIX, WorkFolder, sweep


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    (work.path / "video.mp4").write_bytes(b"half")
    work.close()
    work.close()
    assert not list(tmp_path.iterdir())


def test_a_sweep_removes_what_the_dead_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from lightx2v.media.work_folder import WorkFolder;"
        "(WorkFolder(Path(sys.argv[1])).path / 'half').write_text('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert len(list(tmp_path.iterdir())) == 2, "the folder of a killed process, and its lock"
    (tmp_path / f"{WORK_PREFIX}old").mkdir()
    (tmp_path / f"{WORK_PREFIX}file").write_text("of an older version")
    (tmp_path / "mine.mp4").write_bytes(b"video")
    living = WorkFolder(tmp_path)
    sweep(tmp_path)
    assert living.path.is_dir()
    living.close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.mp4"]


def test_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    sweep(tmp_path / "gone")
