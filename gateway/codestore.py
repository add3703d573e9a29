"""Uploaded code directories, each unpacked once under the digest of its content."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, TypeVar

import trio

from gateway.untar import GZIP_MAGIC, UnpackLimits, gunzip, refused, unpack
from pool.contracts.base import BodySource
from pool.errors import ArtifactError

T = TypeVar("T")

INCOMING = ".incoming"
THREADS = 2
WRITE_BYTES = 1_048_576
UNUSED_S = 3600.0  # what was uploaded this recently may be about to be deployed

_DIGEST = re.compile(r"[0-9a-f]{64}")


class CodeStore:
    """The directories below `directory`; call open() first. Each is complete: it appears by one rename.

    All disk work is done in threads of its own. Cancelling a method leaves nothing half-made.
    """

    def __init__(self, directory: Path, limits: UnpackLimits | None = None) -> None:
        self.directory = directory
        self._limits = limits or UnpackLimits()
        self._incoming = directory / INCOMING
        self._threads = trio.CapacityLimiter(THREADS)
        self._homes = threading.Lock()  # held while a home appears, is made young, or goes

    async def open(self) -> None:
        """Make the directory, and remove what an interrupted daemon left of uploads. Raises ArtifactError."""
        await self._in_thread(self._prepare)

    async def add_tar(self, source: BodySource, limit_bytes: int) -> str:
        """Receive a tar, plain or gzip, of at most `limit_bytes`, and unpack it. The digest of its content.

        The same content gives the same digest, whatever its order, owners and times, and is kept once. Raises
        ArtifactError, and what `source` raises; then, or cancelled, nothing of it stays.
        """
        place = self._incoming / secrets.token_hex(8)
        try:
            await self._in_thread(place.mkdir)
            await self._receive(source, place / "upload", limit_bytes)
            return await self._in_thread(self._take_in, place)
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(shutil.rmtree, place, True)

    def path(self, digest: str) -> Path:
        """The unpacked directory of that digest. Raises ArtifactError when there is none."""
        found = self.directory / digest
        if not _DIGEST.fullmatch(digest) or not found.is_dir():
            raise ArtifactError(
                f"there is no uploaded code {digest[:64]!r} here", hint="upload the code directory again"
            )
        return found

    async def collect(self, used: Collection[str], *, unused_s: float = UNUSED_S) -> list[str]:
        """Remove what is not in `used` and was not uploaded within `unused_s`; the digests removed."""
        return await self._in_thread(self._collect, frozenset(used), unused_s)

    # --- pieces -------------------------------------------------------------------------------------------

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        try:
            return await trio.to_thread.run_sync(call, *args, limiter=self._threads)
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            hint = "make room below state_dir" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise ArtifactError(f"the uploaded code cannot be stored: {reason}", hint=hint) from exc

    async def _receive(self, source: BodySource, target: Path, limit_bytes: int) -> None:
        file: IO[bytes] = await self._in_thread(target.open, "xb")
        size, waiting = 0, bytearray()
        try:
            while data := await source.receive():
                size += len(data)
                if size > limit_bytes:
                    raise refused(f"it is larger than {limit_bytes} bytes", "leave out what the code does not need")
                waiting += data
                if len(waiting) >= WRITE_BYTES:
                    await self._in_thread(file.write, bytes(waiting))
                    waiting.clear()
            await self._in_thread(file.write, bytes(waiting))
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(file.close)
        if not size:
            raise refused("nothing was uploaded", "send a tar of the code directory as the request's body")

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)  # instances of other users read below it
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(mode=0o700)

    def _take_in(self, place: Path) -> str:
        upload, root = place / "upload", place / "code"
        with upload.open("rb") as file:
            packed = file.read(2) == GZIP_MAGIC
        if packed:
            gunzip(upload, place / "plain", self._limits, trio.from_thread.check_cancelled)
            upload = place / "plain"
        digest = unpack(upload, root, self._limits, trio.from_thread.check_cancelled)
        home = self.directory / digest
        with self._homes:
            if home.is_dir():
                os.utime(home)  # so that it counts as uploaded now
            else:
                root.rename(home)
                _sync_directory(self.directory)
        return digest

    def _collect(self, used: frozenset[str], unused_s: float) -> list[str]:
        removed: list[str] = []
        now_s = time.time()
        for home in self.directory.iterdir():
            grave = self._incoming / f"removed-{home.name}"
            with self._homes:
                if not _DIGEST.fullmatch(home.name) or home.name in used or now_s - home.stat().st_mtime < unused_s:
                    continue
                # Out of the way in one step, so that no half-removed directory is ever found under its digest.
                home.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
            removed.append(home.name)
        return removed


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
