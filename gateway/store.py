"""What poold keeps over its own end: the deployed functions and who it is."""

from __future__ import annotations

import secrets
import sqlite3
from pathlib import Path

import msgspec

from gateway.database import Database, StoreError, T, Work
from pool.spec import Artifact, FunctionSpec

__all__ = ["DamagedFunction", "Store", "StoreError", "StoredFunction"]

MIGRATIONS = (
    """
    CREATE TABLE functions (
        name TEXT PRIMARY KEY,
        spec TEXT NOT NULL,
        artifact TEXT NOT NULL,
        revision TEXT NOT NULL,
        code_digest TEXT,
        deployed_at_s REAL NOT NULL,
        generation INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID
    """,
)


class StoredFunction(msgspec.Struct, frozen=True, kw_only=True):
    """One deployed function. `deployed_at_s`: seconds since the epoch; `generation` counts its deployments."""

    name: str
    spec: FunctionSpec
    artifact: Artifact
    revision: str
    code_digest: str | None
    deployed_at_s: float
    generation: int


class DamagedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function whose record this version cannot read."""

    name: str
    problem: str
    code_digest: str | None


class Store:
    """The functions and the daemon's identity, in one SQLite file.

    `daemon_id` is made once for the file; `epoch` counts the daemon's starts on it, from 1.
    What cancellation does to a write is said in Database.run.
    """

    def __init__(self, database: Database, daemon_id: str, epoch: int) -> None:
        self._database = database
        self.daemon_id = daemon_id
        self.epoch = epoch

    @classmethod
    async def open(cls, path: Path) -> Store:
        """Open or make the file; counts a start of the daemon. Raises StoreError."""
        database = await Database.open(path, MIGRATIONS)
        try:
            daemon_id, epoch = await database.run(_begin)
        except BaseException:
            await database.aclose()
            raise
        return cls(database, daemon_id, epoch)

    async def aclose(self) -> None:
        """Finish what waits and close the file."""
        await self._database.aclose()

    async def run(self, work: Work[T]) -> T:
        """Any other work on the database; see Database.run."""
        return await self._database.run(work)

    async def put_function(self, function: StoredFunction) -> None:
        """Store a function, in place of an older one of its name. Raises StoreError; it is then as before."""
        row = (
            function.name,
            msgspec.json.encode(function.spec).decode(),
            msgspec.json.encode(function.artifact).decode(),
            function.revision,
            function.code_digest,
            function.deployed_at_s,
            function.generation,
        )
        await self.run(lambda db: db.execute("INSERT OR REPLACE INTO functions VALUES (?,?,?,?,?,?,?)", row) and None)

    async def delete_function(self, name: str) -> bool:
        """Forget a function; False when it was not there. Raises StoreError."""
        return await self.run(lambda db: db.execute("DELETE FROM functions WHERE name=?", (name,)).rowcount > 0)

    async def functions(self) -> list[StoredFunction | DamagedFunction]:
        """Every stored function, by name. Raises StoreError."""
        query = "SELECT name,spec,artifact,revision,code_digest,deployed_at_s,generation FROM functions ORDER BY name"
        return [_function(row) for row in await self.run(lambda db: db.execute(query).fetchall())]


def _begin(db: sqlite3.Connection) -> tuple[str, int]:
    db.execute("INSERT OR IGNORE INTO meta VALUES ('daemon_id', ?)", (secrets.token_hex(6),))
    db.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', '0')")
    db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key='epoch'")
    found = dict(db.execute("SELECT key, value FROM meta").fetchall())
    return found["daemon_id"], int(found["epoch"])


def _function(row: tuple[str, str, str, str, str | None, float, int]) -> StoredFunction | DamagedFunction:
    name, spec, artifact, revision, code_digest, deployed_at_s, generation = row
    try:
        return StoredFunction(
            name=name,
            spec=msgspec.json.decode(spec, type=FunctionSpec),
            artifact=msgspec.json.decode(artifact, type=Artifact),
            revision=revision,
            code_digest=code_digest,
            deployed_at_s=deployed_at_s,
            generation=generation,
        )
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        return DamagedFunction(name=name, problem=f"its stored spec cannot be read: {exc}", code_digest=code_digest)
