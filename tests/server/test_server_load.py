"""Many clients at once, a smaller version of benchmarks/server_load.py: nothing is lost, doubled or stuck."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import listening, serve

from benchmarks.server_load import load


@pytest.mark.slow
def test_forty_mixed_jobs_from_eight_clients_are_all_accounted_for(tmp_path: Path) -> None:
    with serve(tmp_path, max_queue=5) as served, listening(served) as client:
        tally = load(str(client.base_url), 40, 8, patience=120)
        jobs = served.jobs.list(limit=1000)
        assert not tally.wrong
        assert len(set(tally.ids)) == 40 == len(jobs) and set(tally.ids) == {job.id for job in jobs}
        assert {job.id: job.state for job in jobs} == {
            id: {"completed": "succeeded"}.get(end, end) for id, end in tally.ends.items()
        }
        assert served.garage.most_running == 1 and len(set(served.garage.ran)) == len(served.garage.ran)
        videos = {path.stem for path in tmp_path.glob("*.mp4")}
        assert videos == {job.id for job in jobs if job.state == "succeeded"}
