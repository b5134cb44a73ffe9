"""Database: the SQLite file of the jobs, which one process at a time uses, also where its folder is removed meanwhile.

The file stays locked while it is open. A removed file lives on, unseen, for the process that has it open: `put_back`
makes it a file again, locked as before. A file that SQLite cannot read is moved away, and an empty one takes its place.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError, OutputError, short_path

log = logging.getLogger("lightx2v.jobs")

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
PRAGMAS = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON")


class Database:
    """`connection` to a file; `prepare(connection)` makes its tables. ConfigError while another process has it open."""

    def __init__(self, file: Path, prepare: Callable[[sqlite3.Connection], None]) -> None:
        self.file = file
        self._prepare = prepare
        self._has_log = False
        self._handle = -1
        self.connection = self._open()

    def close(self) -> None:
        self.connection.close()
        if self._handle >= 0:  # not before: closing any handle of a file frees the locks that SQLite has on it
            os.close(self._handle)
            self._handle = -1

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside, or nothing. Inside another transaction this one is part of it."""
        db = self.connection
        if db.in_transaction:
            yield
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # SQLite has already rolled back on a full disk
                db.execute("ROLLBACK")
            raise

    @property
    def in_place(self) -> bool:
        """False once the file, or its log, was removed or another file has its name."""
        try:
            return self._is_own() and (not self._has_log or self._log.exists())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # the disk does not answer: no reason to write there
            return True

    def put_back(self) -> None:
        """Write the content to the file's place and lock it there. ConfigError if another process has a file there."""
        copy = self.file.with_name(f"{self.file.name}.new")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self.file.exists() and not self._is_own():
                with contextlib.closing(sqlite3.connect(self.file, timeout=0.1)) as other:
                    other.execute("BEGIN EXCLUSIVE")  # fails while another process uses it
            with contextlib.closing(sqlite3.connect(copy)) as other:
                self.connection.backup(other)
        except sqlite3.Error as error:
            if not self._is_damage(error):
                raise self._explained(error) from None
        self.close()
        os.replace(copy, self.file)
        self._log.unlink(missing_ok=True)
        self.connection = self._open()

    def _is_own(self) -> bool:
        """Whether the file of this name is the one that is open."""
        return os.path.samestat(os.stat(self.file), os.fstat(self._handle))

    @property
    def _log(self) -> Path:
        return self.file.with_name(f"{self.file.name}-wal")

    def _open(self) -> sqlite3.Connection:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                db = self._connect()
            except sqlite3.Error as error:
                if not self._is_damage(error):
                    raise self._explained(error) from None
                self._move_away()
                db = self._connect()
            self._handle = os.open(self.file, os.O_RDONLY)
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"{short_path(self.file)} cannot be opened: {error}. Check the folder's permissions."
            ) from None
        self._has_log = self._log.exists()
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.file, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            db.row_factory = sqlite3.Row
            for pragma in PRAGMAS:
                db.execute(f"PRAGMA {pragma}").fetchall()
            db.execute("BEGIN IMMEDIATE")  # takes the lock, and keeps it
            (state,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
            self._prepare(db)
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    @staticmethod
    def _is_damage(error: sqlite3.Error) -> bool:
        code = getattr(error, "sqlite_errorcode", None)
        return type(error) is sqlite3.DatabaseError if code is None else code & 0xFF in DAMAGED

    def _move_away(self) -> None:
        """Give the damaged file another name, so that an empty one can take its place."""
        other = self.file.with_name(f"{self.file.name}.damaged")
        os.replace(self.file, other)
        self._log.unlink(missing_ok=True)
        log.error(
            "%s is damaged and is now called %s. Finished jobs come from their videos; those that waited are lost.",
            short_path(self.file),
            other.name,
        )

    def _explained(self, error: sqlite3.Error) -> Exception:
        if "locked" in str(error):
            return ConfigError(
                f"Another process is already using the jobs in {short_path(self.file.parent)}. "
                "Stop it first, or give this one another folder with --output_dir."
            )
        return OutputError(
            f"{short_path(self.file)} cannot be used: {error}. Free some disk space, make the folder writable, or move "
            "the file away to start with an empty history; the videos stay."
        )
