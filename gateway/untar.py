"""Unpacking a tar from a stranger: nothing lands outside, nothing grows without bound, and the content is named.

Python 3.11.2 (Debian 12's) has no extraction filters, and its tarfile can be led in circles by a bad header, so
nothing is left to extractall(): tarfile only reads the headers, through a file that bounds what it may read.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from pool.errors import ArtifactError

BLOCK = 512
READ_BYTES = 262_144
HEADER_BYTES = 1_048_576  # the largest single thing tarfile may read at once: an extended header
GZIP_MAGIC = b"\x1f\x8b"
NAME_BYTES = 4_096

Pulse = Callable[[], object]  # called often; raises to end the work


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackLimits:
    """What an archive may come to."""

    entries: int = 50_000
    unpacked_bytes: int = 2 * 1024 * 1024 * 1024


def refused(message: str, hint: str = "") -> ArtifactError:
    """The error for an archive that cannot be used."""
    return ArtifactError(f"the uploaded code cannot be used: {message}", hint=hint)


def gunzip(source: Path, target: Path, limits: UnpackLimits, pulse: Pulse) -> None:
    """Unpack a gzip file, one or several members. Raises ArtifactError when it is damaged or too large."""
    total = 0
    with source.open("rb") as packed, target.open("xb") as plain:
        decoder = zlib.decompressobj(wbits=31)
        data = b""
        while data := (data or packed.read(READ_BYTES)):
            if decoder.eof:
                if not data.strip(b"\0"):
                    data = b""  # padding after the end, which gzip allows
                    continue
                decoder = zlib.decompressobj(wbits=31)
            try:
                out = decoder.decompress(data, READ_BYTES)
            except zlib.error as exc:
                raise refused("it is a damaged gzip file") from exc
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            total += len(out)
            if total > limits.unpacked_bytes:
                raise _too_large(limits)
            plain.write(out)
            pulse()
        if not decoder.eof:
            raise refused("it ends in the middle", "upload it again")


def unpack(archive: Path, root: Path, limits: UnpackLimits, pulse: Pulse) -> str:
    """Unpack a plain tar into the new directory `root`; the content's digest, 64 hexadecimal digits.

    The digest covers names, kinds, contents, link targets and whether a file may be executed; not owners, times
    and the order in the archive. Blocks; call it in a thread. Raises ArtifactError; what was unpacked then stays
    for the caller to remove.
    """
    unpacker = _Unpacker(root, limits, pulse)
    root.mkdir()
    root.chmod(0o755)
    with archive.open("rb") as file:
        unpacker.unpack(file)
    unpacker.check_links()
    _sync(root)
    return unpacker.digest()


def _too_large(limits: UnpackLimits) -> ArtifactError:
    megabytes = limits.unpacked_bytes // 1_048_576
    return refused(f"unpacked it is larger than {megabytes} MB", "leave out what the code does not need")


class _Bounded(io.RawIOBase):
    """What tarfile may read of an archive: no single huge piece, and not the same place again and again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        self._left = 3 * size + HEADER_BYTES  # headers, padding and small reads count double

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= HEADER_BYTES:
            raise refused("one of its headers names an impossible size")
        self._left -= max(size, BLOCK)
        if self._left < 0:
            raise refused("its headers lead in a circle")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if offset < 0:
            raise refused("one of its headers names an impossible place")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Unpacker:
    """One archive on its way to disk. `_found` is what has been made so far: (kind, digest material)."""

    def __init__(self, root: Path, limits: UnpackLimits, pulse: Pulse) -> None:
        self._root = root
        self._limits = limits
        self._pulse = pulse
        self._found: dict[str, tuple[bytes, bytes]] = {}
        self._entries = 0
        self._bytes = 0

    def unpack(self, file: IO[bytes]) -> None:
        bounded = cast(IO[bytes], _Bounded(file))
        try:
            with tarfile.open(fileobj=bounded, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    cast(Any, tar).members.clear()  # tarfile would keep them all
                    self._entries += 1
                    if self._entries > self._limits.entries:
                        hint = "leave out what the code does not need"
                        raise refused(f"it has more than {self._limits.entries} entries", hint)
                    self._pulse()
                    self._add(tar, member)
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as exc:
            raise refused(
                f"it is not a complete tar archive ({exc})", "upload a tar, or a tar packed with gzip"
            ) from exc
        file.seek(end)
        mark = file.read(BLOCK)
        if len(mark) != BLOCK or mark.strip(b"\0"):  # tarfile takes a damaged header for the end
            raise refused("it ends in the middle, or is damaged", "upload it again")
        if not self._found:
            raise refused("it is empty", "the code directory needs at least a bootstrap")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = self._clean(member.name, member.name)
        if not name:
            if member.isdir():
                return  # the root itself
            raise refused(f"{member.name!r} is no name for a file")
        self._make_parents(name)
        if member.isdir():
            self._make_directory(name)
        elif member.isreg():
            self._make_file(tar, member, name)
        elif member.issym():
            self._make_symlink(member, name)
        elif member.islnk():
            self._make_hardlink(member, name)
        else:
            raise refused(f"{name} is a device, a pipe or a socket", "only files, directories and links can be code")

    def _clean(self, path: str, shown: str) -> str:
        """A path without empty and `.` parts. Raises ArtifactError when it could lead out."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/"):
            raise refused(f"{shown!r} is an absolute path", "pack the directory's content: tar -C DIR -cf code.tar .")
        if ".." in parts:
            raise refused(f"{shown!r} leads out of the code directory")
        if len(os.fsencode(path)) > NAME_BYTES or "\0" in path:
            raise refused(f"a name in it is not usable: {shown[:60]!r}")
        return "/".join(parts)

    def _make_parents(self, name: str) -> None:
        parts = name.split("/")[:-1]
        for length in range(1, len(parts) + 1):
            self._make_directory("/".join(parts[:length]))

    def _make_directory(self, name: str) -> None:
        kind = self._found.get(name)
        if kind is None:
            path = self._root / name
            path.mkdir()
            path.chmod(0o755)
            self._found[name] = (b"d", b"")
        elif kind[0] != b"d":
            raise refused(f"{name} is there as a directory and as something else")

    def _make_room(self, name: str) -> None:
        """A later entry of the same name replaces the earlier, as tar has it."""
        kind = self._found.pop(name, None)
        if kind is None:
            return
        if kind[0] == b"d":
            raise refused(f"{name} is there as a directory and as something else")
        (self._root / name).unlink()

    def _make_file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        self._make_room(name)
        if member.size < 0:
            raise refused("one of its headers names an impossible size")
        self._bytes += member.size
        if self._bytes > self._limits.unpacked_bytes:
            raise _too_large(self._limits)
        source = tar.extractfile(member)
        if source is None:
            raise refused(f"{name} cannot be read")
        digest = hashlib.sha256()
        written = 0
        path = self._root / name
        with path.open("xb") as target:
            while data := source.read(READ_BYTES):
                digest.update(data)
                target.write(data)
                written += len(data)
                self._pulse()
        if written != member.size:
            raise refused("it ends in the middle", "upload it again")
        executable = member.mode & 0o111 != 0
        path.chmod(0o755 if executable else 0o644)
        self._found[name] = (b"x" if executable else b"f", digest.digest())

    def _make_symlink(self, member: tarfile.TarInfo, name: str) -> None:
        target = member.linkname
        if target.startswith("/"):
            raise refused(f"the link {name} leads to the absolute path {target!r}", "make it relative")
        if not target or "\0" in target or len(os.fsencode(target)) > NAME_BYTES:
            raise refused(f"the link {name} leads to {target[:60]!r}")
        self._make_room(name)
        (self._root / name).symlink_to(target)
        self._found[name] = (b"l", os.fsencode(target))

    def _make_hardlink(self, member: tarfile.TarInfo, name: str) -> None:
        target = self._clean(member.linkname, member.linkname)
        kind = self._found.get(target)
        if kind is None or kind[0] not in (b"f", b"x"):
            raise refused(f"the link {name} leads to {member.linkname!r}, which is no file in the archive")
        if target != name:
            self._make_room(name)
            os.link(self._root / target, self._root / name)
            self._found[name] = kind

    def check_links(self) -> None:
        """Follow every symlink as the system would. Only when all are there can it be told where one leads."""
        root = os.path.realpath(self._root)
        for name, (kind, target) in self._found.items():
            if kind != b"l":
                continue
            self._pulse()
            led_to = os.path.realpath(self._root / name)
            if led_to != root and not led_to.startswith(root + os.sep):
                raise refused(f"the link {name} to {os.fsdecode(target)!r} leads out of the code directory")

    def digest(self) -> str:
        digest = hashlib.sha256(b"poold code 1\0")
        for name, (kind, material) in sorted((os.fsencode(name), found) for name, found in self._found.items()):
            digest.update(b"%b%d:%b%d:%b" % (kind, len(name), name, len(material), material))
        return digest.hexdigest()


def _sync(root: Path) -> None:
    """Bring it to disk: the record that names it is durable, so it must be too. One call for all files."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(root))
    finally:
        os.close(descriptor)
