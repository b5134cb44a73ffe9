"""The names that clients choose for their videos: file names, never paths, and never the names on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import SIZE, serve

from lightx2v.errors import BadRequest
from lightx2v.server.file_names import MAX_NAME, file_name

BAD = [
    *("/etc/x.mp4", "../x.mp4", "a/b.mp4", "a\\b.mp4", "C:\\x.mp4", "~/x.mp4", "x\0.mp4", "x" * 300, "-vf.mp4"),
    *(
        "a%03d.mp4",
        "concat:x",
        "CON",
        "con.mp4",
        "nul.txt",
        "dot..mp4",
        "x .mp4",
        ".hidden",
        "a\r\nSet-Cookie: b",
        "..",
        "././x",
    ),
    *('a"b', "a;b", "a|b", "a\u202eb", "\ud800"),
]


@pytest.mark.parametrize("requested", BAD)
def test_paths_and_odd_names_are_refused(requested: str) -> None:
    with pytest.raises(BadRequest, match="must be a file name"):
        file_name(requested)


@pytest.mark.parametrize(
    ("requested", "name"),
    [
        ("./cat_boxing_seed42.mp4", "cat_boxing_seed42.mp4"),
        ("cat", "cat.mp4"),
        ("猫 2.MP4", "猫 2.MP4"),
        ("v1.5", "v1.5.mp4"),
    ],
)
def test_plain_names_are_accepted(requested: str, name: str) -> None:
    assert file_name(requested) == name


@given(st.text(max_size=200))
def test_whatever_is_accepted_stays_inside_a_folder(requested: str) -> None:
    try:
        name = file_name(requested)
    except BadRequest:
        return
    folder = Path("/somewhere/outputs")
    assert (folder / name).parent == folder and len(name.encode()) <= MAX_NAME and name.isprintable()


@pytest.mark.slow
def test_on_disk_a_video_is_called_by_its_id_and_the_newest_of_a_name_is_given(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        first, second = (served.submit(text, file_name="cat") for text in ("one", "two"))
        served.end_of(first)
        served.end_of(second)
        assert sorted(path.name for path in tmp_path.glob("*.mp4")) == sorted([f"{first}.mp4", f"{second}.mp4"])
        answer = served.client.get("/v1/files/download/cat.mp4")
        assert answer.headers["content-disposition"] == 'attachment; filename="cat.mp4"'
        served.client.delete(f"/v1/videos/{second}")
        assert served.client.get("/v1/files/download/cat.mp4").status_code == 200
        assert served.client.get(f"/v1/files/download/{first}.mp4").status_code == 200
        for name in ("jobs.sqlite", "../jobs.sqlite", "%2e%2e/x", f"{second}.mp4", "cat"):
            assert served.client.get(f"/v1/files/download/{name}").status_code == 404
        for requested in BAD:
            if requested.isascii() and len(requested) < 200:
                body = {"prompt": "a cat", "save_result_path": requested, "target_shape": [64, 64]}
                assert served.client.post("/v1/tasks/video/", json=body).status_code == 422, (requested, SIZE)
