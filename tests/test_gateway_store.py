"""The database thread and the store: durability, group commit, faults of the file, cancellation."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from gateway import database
from gateway.database import Database
from gateway.store import DamagedFunction, Store, StoredFunction, StoreError
from pool.spec import Artifact, FunctionSpec, PoolSpec

NOTES = ("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL)",)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    store = await Store.open(path)
    try:
        yield store
    finally:
        await store.aclose()


@asynccontextmanager
async def notes(path: Path) -> AsyncIterator[Database]:
    base = await Database.open(path, NOTES)
    try:
        yield base
    finally:
        await base.aclose()


def record(name: str = "a", **changes: object) -> StoredFunction:
    fields: dict[str, object] = {
        "name": name,
        "spec": FunctionSpec(name=name, image="x", pool=PoolSpec(freeze_after_s=None), env={"A": "é"}),
        "artifact": Artifact(digest="sha256:1", image="sha256:1", entrypoint=("x",)),
        "revision": f"{name}@123",
        "code_digest": None,
        "deployed_at_s": 1.5,
        "generation": 1,
    }
    return StoredFunction(**{**fields, **changes})  # type: ignore[arg-type]  # a table of keyword arguments


def insert(text: str | None) -> database.Work[int | None]:
    return lambda db: db.execute("INSERT INTO notes(text) VALUES (?)", (text,)).lastrowid


def count(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM notes").fetchone()[0])


@pytest.mark.trio
async def test_functions_are_there_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "poold.db"
    async with opened(path) as store:
        await store.put_function(record("b", code_digest="ab"))
        await store.put_function(record("a"))
        await store.put_function(record("a", generation=2))
        await store.put_function(record("c"))
        assert await store.delete_function("c") is True
        assert await store.delete_function("c") is False
    async with opened(path) as store:
        assert await store.functions() == [record("a", generation=2), record("b", code_digest="ab")]


@pytest.mark.trio
async def test_the_daemon_keeps_its_id_and_counts_its_starts(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        async with opened(tmp_path / "poold.db") as store:
            seen.append((store.daemon_id, store.epoch))
    assert [epoch for _, epoch in seen] == [1, 2, 3]
    assert len({daemon_id for daemon_id, _ in seen}) == 1
    async with opened(tmp_path / "other.db") as store:
        assert store.daemon_id != seen[0][0]


@pytest.mark.trio
async def test_a_write_that_was_acknowledged_is_on_disk_without_a_clean_end(tmp_path: Path) -> None:
    path = tmp_path / "poold.db"
    async with opened(path) as store:
        await store.put_function(record("a"))
        # What a crash would leave is what lies on disk now.
        for name in ("poold.db", "poold.db-wal"):
            (tmp_path / f"crashed-{name}").write_bytes((tmp_path / name).read_bytes())
    async with opened(tmp_path / "crashed-poold.db") as store:
        assert await store.functions() == [record("a")]


@pytest.mark.trio
async def test_a_record_of_another_version_is_reported_and_spares_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path / "poold.db") as store:
        await store.put_function(record("a", code_digest="ff"))
        await store.put_function(record("b"))
        await store.run(lambda db: db.execute("UPDATE functions SET spec='{\"zzz\":1}' WHERE name='a'") and None)
        damaged, intact = await store.functions()
    assert isinstance(damaged, DamagedFunction)
    assert (damaged.name, damaged.code_digest) == ("a", "ff")
    assert "zzz" in damaged.problem
    assert intact == record("b")


@pytest.mark.trio
async def test_writes_that_wait_together_are_committed_together(tmp_path: Path) -> None:
    commits: list[int] = []
    async with notes(tmp_path / "n.db") as base:
        busy, go = trio.Event(), threading.Event()
        token = trio.lowlevel.current_trio_token()

        def block(db: sqlite3.Connection) -> None:
            db.set_trace_callback(lambda sql: commits.append(1) if sql == "COMMIT" else None)
            token.run_sync_soon(busy.set)
            go.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(base.run, block)
            await busy.wait()
            for i in range(50):
                nursery.start_soon(base.run, insert(f"note {i}"))
            await trio.testing.wait_all_tasks_blocked()
            go.set()
        assert len(commits) == 2  # the blocking one and all fifty
        assert await base.run(count) == 50


@pytest.mark.trio
async def test_one_that_fails_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    outcomes: dict[str, str] = {}

    async def write(base: Database, text: str | None) -> None:
        try:
            await base.run(insert(text))
            outcomes[str(text)] = "stored"
        except StoreError as exc:
            outcomes[str(text)] = exc.message

    def broken(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO notes(text) VALUES ('half')")
        raise ValueError("the work's own fault")

    async with notes(tmp_path / "n.db") as base:
        async with trio.open_nursery() as nursery:
            for text in ("a", None, "b"):
                nursery.start_soon(write, base, text)
        with pytest.raises(ValueError, match="the work's own fault"):
            await base.run(broken)
        assert await base.run(count) == 2
    assert outcomes["a"] == outcomes["b"] == "stored"
    assert "NOT NULL" in outcomes["None"]


@pytest.mark.trio
async def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(tmp_path: Path) -> None:
    outcomes: dict[int, str] = {}

    async def write(base: Database, size: int) -> None:
        try:
            await base.run(insert("x" * size))
            outcomes[size] = "stored"
        except StoreError as exc:
            outcomes[size] = exc.message

    async with notes(tmp_path / "n.db") as base:
        # SQLite's own limit gives the very error a full disk gives.
        await base.run(lambda db: db.execute("PRAGMA max_page_count=20").fetchone() and None)
        async with trio.open_nursery() as nursery:
            for size in (10, 500_000, 20):
                nursery.start_soon(write, base, size)
        assert outcomes == {10: "stored", 500_000: f"{tmp_path / 'n.db'} cannot grow: the disk is full", 20: "stored"}
        assert await base.run(count) == 2


@pytest.mark.trio
async def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    async with notes(tmp_path / "n.db") as base:
        await base.run(lambda db: db.execute("PRAGMA query_only=ON") and None)
        with pytest.raises(StoreError, match="cannot be written"):
            await base.run(insert("a"))


@pytest.mark.trio
async def test_a_cancelled_caller_before_its_turn_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "MAX_WAITING", 1)
    async with notes(tmp_path / "n.db") as base:
        busy, go = trio.Event(), threading.Event()
        token = trio.lowlevel.current_trio_token()

        def block(db: sqlite3.Connection) -> None:
            token.run_sync_soon(busy.set)
            go.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(base.run, block)
            await busy.wait()
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_blocked, scope)
                await base.run(insert("never"))
            assert scope.cancelled_caught
            go.set()
        assert await base.run(count) == 0


async def cancel_when_blocked(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


@pytest.mark.trio
async def test_a_cancelled_caller_after_its_turn_began_learns_that_it_is_stored(tmp_path: Path) -> None:
    async with notes(tmp_path / "n.db") as base:
        busy, go = trio.Event(), threading.Event()
        token = trio.lowlevel.current_trio_token()

        def slow(db: sqlite3.Connection) -> str:
            token.run_sync_soon(busy.set)
            go.wait()
            insert("kept")(db)
            return "stored"

        async def cancel_then_let_go(scope: trio.CancelScope) -> None:
            await busy.wait()
            scope.cancel()
            go.set()

        result = ""
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_then_let_go, scope)
                result = await base.run(slow)
        assert result == "stored"
        assert await base.run(count) == 1


@pytest.mark.trio
async def test_what_waits_at_the_end_is_carried_out(tmp_path: Path) -> None:
    base = await Database.open(tmp_path / "n.db", NOTES)
    async with trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(base.run, insert(str(i)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(base.aclose)
    await base.aclose()
    with pytest.raises(StoreError, match="is closed"):
        await base.run(count)
    async with notes(tmp_path / "n.db") as again:
        assert await again.run(count) == 20


@pytest.mark.trio
async def test_files_that_are_no_database(tmp_path: Path) -> None:
    path = tmp_path / "poold.db"
    path.write_bytes(b"these are somebody's notes, not a database" * 100)
    with pytest.raises(StoreError, match="damaged or not a database") as caught:
        await Store.open(path)
    assert "move poold.db" in caught.value.hint
    assert path.read_bytes().startswith(b"these are")


@pytest.mark.trio
async def test_a_damaged_database(tmp_path: Path) -> None:
    path = tmp_path / "poold.db"
    async with opened(path) as store:
        for i in range(200):
            await store.put_function(record(f"function-{i}"))
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 512] = b"\xaa" * 512
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged or not a database"):
        await Store.open(path)


@pytest.mark.trio
async def test_another_programs_database(tmp_path: Path) -> None:
    path = tmp_path / "poold.db"
    foreign = sqlite3.connect(path)
    foreign.execute("CREATE TABLE theirs (x)")
    foreign.commit()
    foreign.close()
    with pytest.raises(StoreError, match="another program's database"):
        await Store.open(path)


@pytest.mark.trio
async def test_a_newer_schema_and_an_older_one(tmp_path: Path) -> None:
    async with notes(tmp_path / "n.db") as base:
        await base.run(insert("old"))
    newer = (*NOTES, "ALTER TABLE notes ADD COLUMN at_s REAL NOT NULL DEFAULT 0; CREATE TABLE more (x)")
    base = await Database.open(tmp_path / "n.db", newer)
    assert await base.run(lambda db: db.execute("SELECT text, at_s FROM notes").fetchall()) == [("old", 0.0)]
    await base.aclose()
    with pytest.raises(StoreError, match="newer poold"):
        await Database.open(tmp_path / "n.db", NOTES)


@pytest.mark.trio
async def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    async with notes(tmp_path / "n.db") as base:
        await base.run(insert("old"))
    with pytest.raises(StoreError, match="no such table"):
        await Database.open(tmp_path / "n.db", (*NOTES, "CREATE TABLE half (x); INSERT INTO nowhere VALUES (1)"))
    async with notes(tmp_path / "n.db") as base:
        assert await base.run(lambda db: [row[0] for row in db.execute("SELECT name FROM sqlite_master")]) == ["notes"]


@pytest.mark.trio
async def test_two_daemons_on_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    async with opened(tmp_path / "poold.db") as store:
        with pytest.raises(StoreError, match="in use by another poold"):
            await Store.open(tmp_path / "poold.db")
        await store.put_function(record("a"))


@pytest.mark.trio
async def test_directories_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        await Store.open(tmp_path / "file" / "poold.db")
    (tmp_path / "poold.db").mkdir()
    with pytest.raises(StoreError, match="cannot be opened"):
        await Store.open(tmp_path / "poold.db")
    assert [thread.name for thread in threading.enumerate() if thread.name == "poold-store"] == []


@pytest.mark.trio
async def test_only_its_owner_reads_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "poold.db"
    for _ in range(2):
        store = await Store.open(path)
        assert set(_modes(tmp_path).values()) == {0o600}
        await store.aclose()
        path.chmod(0o644)  # as an earlier poold left it


def _modes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in directory.iterdir()}
