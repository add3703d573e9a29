"""One SQLite file, one connection, one thread: durable writes without ever blocking the trio loop.

Writes that wait together are committed together, so that a burst costs one fsync, and one that fails does not fail
its neighbours.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import trio

from pool.errors import PoolError

T = TypeVar("T")

MAX_WAITING = 1024  # works that wait for the thread; further callers wait for a place
MAX_GROUP = 256  # works in one commit
BUSY_TIMEOUT_S = 2.0
APPLICATION_ID = 0x706F6F6C  # "pool": tells our files from other SQLite files

Work = Callable[[sqlite3.Connection], T]


class StoreError(PoolError):
    """The database cannot be opened or written: damaged, full, read-only, of another version, in use."""

    code = "store_failed"


@dataclass(slots=True)
class _Task(Generic[T]):
    work: Work[T]
    result: T | None = None
    error: Exception | None = None
    done: trio.Event = field(default_factory=trio.Event)


class Database:
    """An open database. `migrations[n]` leads from schema version n to n + 1; a new file begins at 0.

    Open it with `await Database.open(...)` and end it with `await aclose()`.
    """

    def __init__(self, path: Path, migrations: tuple[str, ...]) -> None:
        self.path = path
        self._migrations = migrations
        # One more than the places there are, so that the end of the file always fits.
        self._tasks: queue.Queue[_Task[object] | None] = queue.Queue(MAX_WAITING + 1)
        self._places = trio.Semaphore(MAX_WAITING)
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._run, name="poold-store", daemon=True)
        self._opened = trio.Event()
        self._failure: StoreError | None = None
        self._closed = False

    @classmethod
    async def open(cls, path: Path, migrations: tuple[str, ...]) -> Database:
        """Open or make the file, check it and bring its schema up to date. Raises StoreError."""
        database = cls(path, migrations)
        database._thread.start()
        with trio.CancelScope(shield=True):  # the thread is short here, and must not be left behind
            await database._opened.wait()
            if database._failure is not None:
                await trio.to_thread.run_sync(database._thread.join)
                raise database._failure
        return database

    async def run(self, work: Work[T]) -> T:
        """Carry out `work` in the thread, in a transaction, and return its result once that is on disk.

        Raises StoreError, or what `work` raised; then nothing of it is stored. `work` may be called twice (the first
        time without effect), and must not commit. Cancelled while it waits for a place: it never starts. After
        that it is carried out whatever happens, the call returns when it has been, and says what came of it: a
        caller that gets a result knows that it is stored, one that gets Cancelled knows that nothing is.
        """
        await self._places.acquire()
        task: _Task[T] = _Task(work)
        try:
            if self._closed:
                raise StoreError(f"{self.path} is closed")
            self._tasks.put_nowait(task)  # type: ignore[arg-type]  # the thread never looks at the result's type
            with trio.CancelScope(shield=True):
                await task.done.wait()
        finally:
            self._places.release()
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]  # set when there is no error, and T may be None

    async def aclose(self) -> None:
        """Carry out what waits, then close the file. Idempotent."""
        with trio.CancelScope(shield=True):
            if not self._closed:
                self._closed = True
                self._tasks.put_nowait(None)
            await trio.to_thread.run_sync(self._thread.join)

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            connection = self._connect()
        except StoreError as exc:
            self._failure = exc
            self._tell(self._opened.set)
            return
        self._tell(self._opened.set)
        try:
            while (group := self._next_group()) is not None:
                self._carry_out(connection, group)
                self._tell(lambda group=group: [task.done.set() for task in group])  # type: ignore[misc]  # bound now
        finally:
            connection.close()

    def _tell(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # then nobody is left to be told
            self._token.run_sync_soon(call)

    def _next_group(self) -> list[_Task[object]] | None:
        first = self._tasks.get()
        if first is None:
            return None
        group = [first]
        while len(group) < MAX_GROUP:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is None:
                self._tasks.put_nowait(None)  # the end, for the next round; its place is free again
                break
            group.append(task)
        return group

    def _carry_out(self, connection: sqlite3.Connection, group: list[_Task[object]]) -> None:
        """All in one transaction; where that is lost (a full disk ends it as a whole), each in one of its own."""
        try:
            connection.execute("BEGIN IMMEDIATE")
            for task in group:
                task.result, task.error = self._attempt(connection, task)
                if not connection.in_transaction:
                    raise sqlite3.OperationalError("the transaction was lost")
            connection.execute("COMMIT")
        except sqlite3.Error as exc:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if len(group) == 1:
                group[0].error = group[0].error or explain(exc, self.path)
            else:
                for task in group:
                    self._carry_out(connection, [task])

    def _attempt(self, connection: sqlite3.Connection, task: _Task[object]) -> tuple[object, Exception | None]:
        connection.execute("SAVEPOINT work")
        try:
            result = task.work(connection)
        except Exception as exc:  # noqa: BLE001  # whatever it is, it goes to the caller that brought the work
            if connection.in_transaction:
                connection.execute("ROLLBACK TO work")
                connection.execute("RELEASE work")
            return None, explain(exc, self.path) if isinstance(exc, sqlite3.Error) else exc
        connection.execute("RELEASE work")
        return result, None

    # --- opening ------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Specs have secrets in their environment. SQLite gives its other files the mode of this one.
            os.close(os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            with contextlib.suppress(PermissionError):
                self.path.chmod(0o600)
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            # Two daemons on one state would remove each other's instances.
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            self._check(connection)
            self._migrate(connection)
            return connection
        except (sqlite3.Error, OSError) as exc:
            if connection is not None:
                connection.close()
            raise explain(exc, self.path) from exc
        except StoreError:
            if connection is not None:
                connection.close()
            raise

    def _check(self, connection: sqlite3.Connection) -> None:
        (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise damaged(self.path, problem)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION_ID and (tables or version):
            raise StoreError(
                f"{self.path} is another program's database", hint="name another state_dir, or move the file away"
            )
        if version > len(self._migrations):
            raise StoreError(
                f"{self.path} was written by a newer poold (its schema is {version}, this one knows "
                f"{len(self._migrations)})",
                hint="run the newer poold, or name another state_dir",
            )

    def _migrate(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for number, script in enumerate(self._migrations[version:], start=version + 1):
            connection.execute("BEGIN IMMEDIATE")
            try:
                for statement in script.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version={number}")
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")


def damaged(path: Path, detail: str) -> StoreError:
    """The error for a file that is no intact database."""
    hint = f"restore it from a backup, or move {path.name} (with {path.name}-wal) away: the functions are then to be "
    return StoreError(f"{path} is damaged or not a database: {detail}", hint=hint + "deployed again")


def explain(exc: Exception, path: Path) -> StoreError:
    """A database's or file system's error as one for people."""
    if isinstance(exc, OSError):
        return StoreError(f"{path} cannot be opened: {(exc.strerror or str(exc)).lower()}", hint="check state_dir")
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # the high bits only say more of the same
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return damaged(path, str(exc))
    if code == sqlite3.SQLITE_FULL:
        return StoreError(f"{path} cannot grow: the disk is full", hint="make room; nothing stored before is lost")
    if code == sqlite3.SQLITE_READONLY:
        return StoreError(
            f"{path} cannot be written", hint="check the file's owner, and that its disk is not read-only"
        )
    if code == sqlite3.SQLITE_CANTOPEN:
        return StoreError(f"{path} cannot be opened", hint="check that its directory exists and may be written")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError(f"{path} is in use by another poold", hint="end it, or name another state_dir")
    return StoreError(f"{path}: {exc}", hint="check the disk")
