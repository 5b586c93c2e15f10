"""Store: the one SQLite file of a node (WAL), with its schema and how it moves forward.

Adverts, agreements, jobs and records each own their tables here; a job journal beside a merge's output is
the same file format. What the disk or another process does to the file is a LocalError. Rules: every change
is one transaction; a schema never changes in place, a migration is added; a file of a newer weft is left
alone.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from node.errors import LimitReached, LocalError

BUSY_SECONDS = 15.0

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        row INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL
    );
    CREATE TABLE events (
        job INTEGER NOT NULL REFERENCES jobs (row) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        at REAL NOT NULL,
        event TEXT NOT NULL,
        PRIMARY KEY (job, number)
    ) WITHOUT ROWID;

    CREATE TABLE heads (
        network TEXT NOT NULL,
        peer TEXT NOT NULL,
        seq INTEGER NOT NULL,
        first_seq INTEGER NOT NULL,
        parts INTEGER NOT NULL,
        digest TEXT NOT NULL,
        expires_at INTEGER NOT NULL,
        PRIMARY KEY (network, peer)
    ) WITHOUT ROWID;
    CREATE TABLE adverts (
        network TEXT NOT NULL,
        peer TEXT NOT NULL,
        seq INTEGER NOT NULL,
        digest TEXT NOT NULL,
        expires_at INTEGER NOT NULL,
        envelope BLOB NOT NULL,
        PRIMARY KEY (network, peer, seq),
        FOREIGN KEY (network, peer) REFERENCES heads (network, peer) ON DELETE CASCADE
    ) WITHOUT ROWID;
    CREATE TABLE contradictions (
        network TEXT NOT NULL,
        peer TEXT NOT NULL,
        one BLOB NOT NULL,
        other BLOB NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (network, peer)
    ) WITHOUT ROWID;

    CREATE TABLE negotiations (
        offer TEXT PRIMARY KEY,
        provider TEXT NOT NULL,
        requester TEXT NOT NULL,
        nonce TEXT NOT NULL,
        stage TEXT NOT NULL,
        agreement TEXT,
        expires_at INTEGER NOT NULL,
        offered BLOB NOT NULL,
        answer BLOB,
        sent INTEGER NOT NULL DEFAULT 0,
        UNIQUE (provider, requester, nonce)
    ) WITHOUT ROWID;
    CREATE INDEX negotiations_by_agreement ON negotiations (agreement);
    CREATE TABLE served (
        peer TEXT NOT NULL,
        day INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (peer, day)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE records (
        network TEXT NOT NULL,
        kind TEXT NOT NULL,
        digest TEXT NOT NULL,
        judged TEXT,
        envelope BLOB NOT NULL,
        PRIMARY KEY (network, kind, digest)
    ) WITHOUT ROWID;
    """,
)


class Store:
    """An open database; usable from every thread, closed by whoever opened it."""

    def __init__(self, path: Path, *, migrations: Sequence[str] = MIGRATIONS) -> None:
        """Open or create the file; raises LocalError when it is damaged, foreign or from a newer weft."""
        self.path = path
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(migrations)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as error:
            away = f"mv {path} {path}.damaged; experts and identity stay"
            hint = away if path.exists() else f"ls -ld {path.parent}"
            raise LocalError(f"{path} cannot be opened: {error}", hint=hint) from error

    def _prepare(self, migrations: Sequence[str]) -> None:
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        # A power cut may undo the last commits but never tears the file; nothing here has to outlive one.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self.transaction():
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if found > len(migrations):
                raise LocalError(
                    f"{self.path} was written by a newer weft ({found}, not {len(migrations)})",
                    hint="weft version",
                )
            for migration in migrations[found:]:
                for statement in filter(str.strip, migration.split(";")):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(migrations)}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make everything inside happen together or not at all; nested ones join the outermost."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            with self._explained():
                self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                with self._explained():
                    self._db.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def change(self, statement: str, *values: Any) -> int:
        """Run one statement that writes; return the number of rows it touched."""
        with self._lock, self.transaction(), self._explained():
            return self._db.execute(statement, values).rowcount

    def rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        """Every row of a query."""
        with self._lock, self._explained():
            return self._db.execute(statement, values).fetchall()

    def row(self, statement: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query."""
        with self._lock, self._explained():
            found: sqlite3.Row | None = self._db.execute(statement, values).fetchone()
            return found

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # a full disk may have ended it already
            self._db.execute("ROLLBACK")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise LimitReached where the disk is full, LocalError where the file cannot be read or written."""
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.Error as error:
            why = f"{self.path}: {error}"
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise LimitReached(why, hint=f"df -h {self.path.parent}") from error
            raise LocalError(why, hint="weft doctor") from error

    def close(self) -> None:
        """Close the file; twice does no harm."""
        with self._lock:
            self._db.close()

    def remove(self) -> None:
        """Close and delete the file with everything SQLite keeps beside it."""
        self.close()
        # The file itself goes last: as long as something lies beside it, it tells what that belongs to.
        for suffix in ("-wal", "-shm", "-lock", ""):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).unlink()


def integrity(path: Path) -> str:
    """What SQLite says of a file without changing it: `ok`, or what is wrong."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return str(database.execute("PRAGMA quick_check").fetchone()[0])
    except sqlite3.Error as error:
        return str(error)
