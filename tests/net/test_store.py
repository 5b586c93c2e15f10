"""The store: all or nothing, moves forward only, and leaves files of a newer weft alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from node.errors import LimitReached, LocalError
from node.store import Store

FIRST = "CREATE TABLE a (x INTEGER PRIMARY KEY)"
SECOND = "CREATE TABLE b (x INTEGER REFERENCES a (x)); INSERT INTO a VALUES (7)"


def test_a_transaction_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", migrations=(FIRST,))
    with pytest.raises(RuntimeError), store.transaction():
        store.change("INSERT INTO a VALUES (1)")
        with store.transaction():
            store.change("INSERT INTO a VALUES (2)")
        raise RuntimeError
    assert store.rows("SELECT * FROM a") == []


def test_migrations_run_once_and_in_order(tmp_path: Path) -> None:
    Store(tmp_path / "s.db", migrations=(FIRST,)).close()
    Store(tmp_path / "s.db", migrations=(FIRST, SECOND)).close()
    store = Store(tmp_path / "s.db", migrations=(FIRST, SECOND))
    assert [row["x"] for row in store.rows("SELECT x FROM a")] == [7]
    with pytest.raises(Exception, match="FOREIGN KEY"):
        store.change("INSERT INTO b VALUES (8)")


def test_a_failed_migration_changes_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "s.db", migrations=(FIRST,)).close()
    with pytest.raises(LocalError, match="cannot be opened"):
        Store(tmp_path / "s.db", migrations=(FIRST, SECOND + "; nonsense"))
    store = Store(tmp_path / "s.db", migrations=(FIRST,))
    assert store.rows("SELECT name FROM sqlite_master WHERE name = 'b'") == []


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path / "s.db", migrations=(FIRST, SECOND)).close()
    with pytest.raises(LocalError, match="newer weft"):
        Store(tmp_path / "s.db", migrations=(FIRST,))


def test_a_file_that_is_no_database_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"this is not a database, whatever its name says" * 50)
    with pytest.raises(LocalError, match="cannot be opened"):
        Store(tmp_path / "s.db")


def test_a_full_disk_is_a_limit_and_the_store_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", migrations=("CREATE TABLE a (x BLOB)",))
    (pages,) = store.rows("PRAGMA page_count")[0]
    store.rows(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(LimitReached, match=r"s\.db: .*full"):
        store.change("INSERT INTO a VALUES (zeroblob(1000000))")
    with pytest.raises(LimitReached), store.transaction():
        store.change("INSERT INTO a VALUES (1)")
        store.change("INSERT INTO a VALUES (zeroblob(1000000))")
    assert store.rows("SELECT * FROM a") == []
    store.change("INSERT INTO a VALUES (2)")
    assert [row["x"] for row in Store(tmp_path / "s.db").rows("SELECT x FROM a")] == [2]


def test_a_locked_file_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.store.BUSY_SECONDS", 0.0)
    store, other = (Store(tmp_path / "s.db", migrations=(FIRST,)) for _ in range(2))
    with other.transaction(), pytest.raises(LocalError, match=r"s\.db: database is locked"):
        store.change("INSERT INTO a VALUES (1)")
    assert store.change("INSERT INTO a VALUES (1)") == 1


def test_threads_share_a_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", migrations=(FIRST,))

    def insert(first: int) -> None:
        for x in range(first, first + 50):
            with store.transaction():
                store.change("INSERT INTO a VALUES (?)", x)

    threads = [threading.Thread(target=insert, args=(1 + 50 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    row = store.row("SELECT count(*) AS n FROM a")
    assert row is not None and row["n"] == 200
