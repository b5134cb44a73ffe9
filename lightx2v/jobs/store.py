"""JobStore: the jobs on disk, in one SQLite file that survives reloads, restarts and crashes.

It holds jobs and their changes of state, and knows no threads and no engines; JobManager holds a lock around every
call. The file stays locked while it is open (database.py), so a second process on the same folder gets an error instead
of running the jobs twice.
"""

import json
import logging
import sqlite3
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..errors import BadRequest, ConfigError, LightX2VError, quoted, short_path
from ..progress import Progress
from .database import Database

log = logging.getLogger("lightx2v.jobs")

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
STATES: tuple[State, ...] = ("queued", "running", "succeeded", "failed", "cancelled", "interrupted")
OVER: frozenset[State] = frozenset(("succeeded", "failed", "cancelled", "interrupted"))
"""The states that a job leaves only through a requeue."""

MAX_DEATHS = 2
"""So many ends of the program in a row while a job runs may be the job's fault: it then waits for a person."""
INTERRUPTED = {
    "type": "Interrupted",
    "message": "The program, or its worker, ended twice while this job was running. Run it again: it goes on at its "
    "last saved step.",
}
GOES_ON = "The program ended while this job was running. The job goes on at its last saved step, if there is one."
WORKER_ENDED = "The worker that ran this job has ended. The job goes on at its last saved step, if there is one."
MOVED = "The worker that ran this job was put out of service. The job goes on where it stopped."

LOST_EVENTS = 1_000_000
"""More event ids than a run takes. After a restart its ids continue beyond those that clients have seen."""
REMOVED_JOBS = 10_000
"""Removed jobs whose places in the lists are remembered, for clients that go through a list and remove what it has."""
LOGGED_JOBS = 20
LOGGED_EVENTS = 1000
"""Per job; of a longer run the first ones go. One takes about 600 bytes."""

_NEWEST_FIRST = """
SELECT * FROM jobs WHERE (? IS NULL OR owner = ?) AND instr(?, state)
    AND (? IS NULL OR number < ?) ORDER BY number DESC LIMIT ?"""
_OLDEST_FIRST = """
SELECT * FROM jobs WHERE (? IS NULL OR owner = ?) AND instr(?, state)
    AND (? IS NULL OR number > ?) ORDER BY number LIMIT ?"""
_PLAIN = ("id", "state", "owner", "preset", "client_id", "created", "started", "finished", "source")
"""The columns that Job has as they are."""
_VERSION = 4
_ADDED = {
    "ending": "INTEGER",
    "source": "TEXT",
    "deaths": "INTEGER NOT NULL DEFAULT 0",
    "cancelling": "INTEGER NOT NULL DEFAULT 0",
}
"""Columns that older versions lack."""
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    client_id TEXT,
    owner TEXT NOT NULL,
    preset TEXT NOT NULL,
    state TEXT NOT NULL,
    place REAL,             -- order in the queue; NULL unless queued
    config TEXT NOT NULL,   -- JSON, like request, result and error
    request TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    ending INTEGER,         -- 1, 2, 3 ... in the order in which jobs ended, even if the clock was put back
    deaths INTEGER NOT NULL DEFAULT 0,      -- ends of the program in a row while the job ran
    cancelling INTEGER NOT NULL DEFAULT 0,  -- 1 if a person has stopped the run
    result TEXT,
    error TEXT,
    source TEXT,            -- id of the job whose settings this one has taken; it may have been removed
    UNIQUE (owner, client_id)
);
CREATE INDEX jobs_by_state ON jobs (state, place);
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE TABLE events (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    id INTEGER NOT NULL,    -- increases within the job; progress events, kept in memory, take the ids between
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, id)
) WITHOUT ROWID;
"""


class UnknownJob(BadRequest):
    """There is no job with this id, or no longer."""

    status = 404


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One event of a job. `kind` is "state" (data: state, error, note) or "progress" (data: the fields of Progress)."""

    id: int
    time: float
    kind: Literal["state", "progress"]
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A snapshot of a job. Times are seconds since 1970.

    `position` is 1 for the next job, None unless queued; `starts_in` predicts the seconds until the start, None if
    that is not possible; `note` says why no worker can run it now, if that is so. `cancelling`: a cancel was requested,
    and the engine has not stopped yet. `progress` and `preview` (JPEG) exist while the job runs, `result` (the engine's
    report) and `path` once it has succeeded.
    """

    id: str
    state: State
    owner: str
    preset: str
    client_id: str | None
    config: EngineConfig
    request: Request
    created: float
    source: str | None = None
    started: float | None = None
    finished: float | None = None
    position: int | None = None
    starts_in: float | None = None
    note: str = ""
    cancelling: bool = False
    progress: Progress | None = None
    preview: bytes | None = field(default=None, repr=False)
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    path: Path | None = None

    @property
    def over(self) -> bool:
        return self.state in OVER


class JobStore:
    """The jobs of one folder. Every method is one transaction; sqlite3.Error passes to the caller."""

    def __init__(self, file: Path) -> None:
        self._database = Database(file, partial(_make_tables, file))
        self.transaction = self._database.transaction
        self._removed: OrderedDict[str, int] = OrderedDict()

    @property
    def _db(self) -> sqlite3.Connection:
        return self._database.connection

    @property
    def in_place(self) -> bool:
        """False once the file was removed or replaced: `put_back` writes it again."""
        return self._database.in_place

    def put_back(self) -> None:
        self._database.put_back()

    def close(self) -> None:
        self._database.close()

    def add(
        self,
        id: str,
        config: EngineConfig,
        request: Request,
        *,
        owner: str,
        preset: str,
        client_id: str | None,
        time: float,
        source: str | None = None,
    ) -> None:
        """A new job at the end of the queue."""
        values = (id, client_id, owner, preset, _dump(config.to_json()), _dump(request.to_json()), time, source)
        with self.transaction():
            self._db.execute(
                "INSERT INTO jobs (id, client_id, owner, preset, config, request, created, source, state, place)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'queued', (SELECT coalesce(max(place), 0) + 1 FROM jobs))",
                values,
            )
            self._add_event(id, time, "queued")

    def job(self, id: str) -> Job:
        row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise UnknownJob(f"There is no job {id[:40]!r}. It may have been deleted.")
        return _job(row)

    def find(self, owner: str, client_id: str) -> Job | None:
        sql = "SELECT * FROM jobs WHERE owner = ? AND client_id = ?"
        row = self._db.execute(sql, (owner, client_id)).fetchone()
        return None if row is None else _job(row)

    def jobs(
        self,
        owner: str | None,
        states: Iterable[State],
        limit: int,
        *,
        after: str | None = None,
        oldest_first: bool = False,
    ) -> list[Job]:
        """The jobs in these states, the newest first unless `oldest_first`; of all owners for None. With `after` those
        that follow this job in the order, also if it was removed since the program started; else UnknownJob."""
        sql = _OLDEST_FIRST if oldest_first else _NEWEST_FIRST
        number = None if after is None else self._number(after)
        return [_job(row) for row in self._db.execute(sql, (owner, owner, " ".join(states), number, number, limit))]

    def _number(self, id: str) -> int:
        """The place of a job, or of a removed one, in the order of submission."""
        row = self._db.execute("SELECT number FROM jobs WHERE id = ?", (id,)).fetchone()
        number = self._removed.get(id) if row is None else row["number"]
        if number is None:
            raise UnknownJob(f"There is no job {quoted(id)} to list the others after. List them from the start again.")
        return number

    def queued(self) -> list[str]:
        """Ids in the order in which they will run."""
        return [id for (id,) in self._db.execute("SELECT id FROM jobs WHERE state = 'queued' ORDER BY place, number")]

    def over(self) -> list[tuple[str, float]]:
        """(id, end time) of the jobs that are over, in the order in which they ended."""
        sql = (
            "SELECT id, coalesce(finished, created) AS ended FROM jobs WHERE instr(?, state)"
            " ORDER BY ending, ended, number"
        )
        return [(row["id"], row["ended"]) for row in self._db.execute(sql, (" ".join(OVER),))]

    def counts(self) -> dict[State, int]:
        found = dict(self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def succeeded_since(self, time: float) -> int:
        sql = "SELECT count(*) FROM jobs WHERE state = 'succeeded' AND finished >= ?"
        return int(self._db.execute(sql, (time,)).fetchone()[0])

    def start(self, id: str, time: float) -> int:
        """Mark the job as running; returns the id of that event."""
        with self.transaction():
            self._db.execute(
                "UPDATE jobs SET state = 'running', place = NULL, started = ?, cancelling = 0 WHERE id = ?", (time, id)
            )
            return self._add_event(id, time, "running")

    def finish(
        self,
        id: str,
        state: State,
        time: float,
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, str] | None = None,
        skip: int = 0,
    ) -> None:
        """Record the end of a job; `skip` is the number of event ids that its progress took."""
        values = (state, time, None if result is None else _dump(result), None if error is None else _dump(error), id)
        with self.transaction():
            self._db.execute(
                "UPDATE jobs SET state = ?, place = NULL, finished = ?, result = ?, error = ?,"
                " ending = (SELECT coalesce(max(ending), 0) + 1 FROM jobs) WHERE id = ?",
                values,
            )
            self._add_event(id, time, state, error, skip)

    def request_cancel(self, id: str) -> None:
        """Remember that a running job is to stop, also if the program ends before it does."""
        self._db.execute("UPDATE jobs SET cancelling = 1 WHERE id = ?", (id,))

    def resume_later(self, id: str, time: float, *, died: bool, note: str = GOES_ON, skip: int = 0) -> None:
        """What runs this job ends: the job becomes the next one. `died`: it was not stopped, but ended by itself.

        After MAX_DEATHS in a row it is interrupted.
        """
        with self.transaction():
            self._db.execute("UPDATE jobs SET deaths = (deaths + 1) * ? WHERE id = ?", (died, id))
            (deaths,) = self._db.execute("SELECT deaths FROM jobs WHERE id = ?", (id,)).fetchone()
            if deaths >= MAX_DEATHS:
                self.finish(id, "interrupted", time, error=INTERRUPTED, skip=skip)
                return
            self._db.execute(
                "UPDATE jobs SET state = 'queued', started = NULL,"
                " place = (SELECT coalesce(min(place), 1) - 1 FROM jobs) WHERE id = ?",
                (id,),
            )
            self._add_event(id, time, "queued", skip=skip, note=note)

    def note(self, id: str, time: float, note: str) -> None:
        """Tell those who watch a queued job why it waits."""
        self._add_event(id, time, "queued", note=note)

    def requeue(self, id: str, time: float) -> None:
        """Put the job back at the end of the queue, without its result."""
        with self.transaction():
            self._db.execute(
                "UPDATE jobs SET state = 'queued', started = NULL, finished = NULL, result = NULL, error = NULL,"
                " deaths = 0, place = (SELECT coalesce(max(place), 0) + 1 FROM jobs) WHERE id = ?",
                (id,),
            )
            self._add_event(id, time, "queued")

    def order(self, ids: Sequence[str]) -> None:
        """Set the order of the queued jobs."""
        with self.transaction():
            self._db.executemany("UPDATE jobs SET place = ? WHERE id = ?", enumerate(ids, 1))

    def change(self, id: str, *, config: EngineConfig, request: Request, preset: str) -> None:
        values = (_dump(config.to_json()), _dump(request.to_json()), preset, id)
        self._db.execute("UPDATE jobs SET config = ?, request = ?, preset = ? WHERE id = ?", values)

    def ids(self) -> set[str]:
        return {id for (id,) in self._db.execute("SELECT id FROM jobs")}

    def remove(self, id: str) -> None:
        for (number,) in self._db.execute("DELETE FROM jobs WHERE id = ? RETURNING number", (id,)).fetchall():
            self._removed[id] = number
        if len(self._removed) > REMOVED_JOBS:
            self._removed.popitem(last=False)

    def _add_event(
        self, id: str, time: float, state: State, error: dict[str, str] | None = None, skip: int = 0, note: str = ""
    ) -> int:
        data = {"state": state} | ({"error": error} if error else {}) | ({"note": note} if note else {})
        (last,) = self._db.execute("SELECT coalesce(max(id), 0) FROM events WHERE job = ?", (id,)).fetchone()
        event = last + skip + 1
        self._db.execute(
            "INSERT INTO events (job, id, time, kind, data) VALUES (?, ?, ?, 'state', ?)",
            (id, event, time, _dump(data)),
        )
        return event

    def events(self, id: str, after: int) -> list[JobEvent]:
        sql = "SELECT id, time, kind, data FROM events WHERE job = ? AND id > ? ORDER BY id"
        return [
            JobEvent(id=row["id"], time=row["time"], kind=row["kind"], data=json.loads(row["data"]))
            for row in self._db.execute(sql, (id, after))
        ]

    def recover(self, time: float) -> None:
        """After a restart: put the running jobs back to the head of the queue, in the order of submission,
        and drop jobs that this version cannot read."""
        with self.transaction():
            for row in self._db.execute("SELECT * FROM jobs ORDER BY number DESC").fetchall():
                try:
                    _job(row)
                except (LightX2VError, ValueError, TypeError, KeyError) as error:
                    log.warning("dropping job %s, which another version wrote: %s", row["id"], error)
                    self.remove(row["id"])
                    continue
                if row["state"] != "running":
                    continue
                if row["cancelling"]:
                    self.finish(row["id"], "cancelled", time, skip=LOST_EVENTS)
                else:
                    self.resume_later(row["id"], time, died=True, skip=LOST_EVENTS)


class StepLog:
    """A ring buffer of progress events for each of the latest LOGGED_JOBS jobs, and of more where more run at once, in
    memory, because a step is not worth a commit to the disk. It does not survive a restart."""

    def __init__(self) -> None:
        self._events: OrderedDict[str, deque[JobEvent]] = OrderedDict()
        self._room = LOGGED_JOBS

    def grow(self, running: int) -> None:
        """Have room for so many jobs that run at once."""
        self._room = max(self._room, LOGGED_JOBS + running)

    def add(self, job: str, event: JobEvent) -> None:
        self._events.setdefault(job, deque(maxlen=LOGGED_EVENTS)).append(event)
        self._events.move_to_end(job)
        if len(self._events) > self._room:
            self._events.popitem(last=False)

    def events(self, job: str, after: int) -> list[JobEvent]:
        """The job's progress events with larger ids than `after`, in order."""
        return [event for event in self._events.get(job, ()) if event.id > after]

    def remove(self, job: str) -> None:
        self._events.pop(job, None)


def _make_tables(file: Path, db: sqlite3.Connection) -> None:
    """Bring a database, also an empty one, to this version. ConfigError for that of a newer one."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise ConfigError(f"{short_path(file)} was written by a newer version. Update this one, or move the file away.")
    if version == 0:
        for statement in _SCHEMA.split(";\n"):
            db.execute(statement)
    columns = _columns(db)
    for name, kind in _ADDED.items():
        if ("jobs", name) not in columns and ("jobs", "id") in columns:
            db.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
    with closing(sqlite3.connect(":memory:")) as empty:
        empty.executescript(_SCHEMA)
        if missing := _columns(empty) - _columns(db):
            raise sqlite3.DatabaseError(f"it has no column {'.'.join(min(missing))}")
    if version < _VERSION:
        db.execute(f"PRAGMA user_version={_VERSION}")


def _columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """(table, column) of everything in the tables of the jobs."""
    return {(table, row[1]) for table in ("jobs", "events") for row in db.execute(f"PRAGMA table_info({table})")}


def _job(row: sqlite3.Row) -> Job:
    return Job(
        **{key: row[key] for key in _PLAIN},
        config=_config(row["config"]),
        request=Request.from_json(json.loads(row["request"])),
        result=None if row["result"] is None else json.loads(row["result"]),
        error=None if row["error"] is None else json.loads(row["error"]),
    )


@lru_cache(maxsize=64)
def _config(text: str) -> EngineConfig:
    """Queues hold many jobs of few models, and the checks take longer than the rest of a row."""
    return EngineConfig.from_json(json.loads(text))


def _dump(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))
