"""A code directory as a tar, made so that the same files give the same bytes, and with them the same digest."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path
from typing import IO

# What a checkout or an interpreter leaves beside the code; it differs from place to place without meaning anything.
LEFT_OUT = frozenset((".git", "__pycache__"))


class CodeDirectoryError(Exception):
    """The directory cannot be used as a function's code. The message says why and what to do."""


def check_directory(directory: Path) -> None:
    """Raises CodeDirectoryError when it is not a directory."""
    if not directory.exists():
        raise CodeDirectoryError(f"the code directory {directory} does not exist")
    if not directory.is_dir():
        raise CodeDirectoryError(f"{directory} is a file: `code` names the directory with the bootstrap in it")


def write_tar(directory: Path, out: IO[bytes]) -> int:
    """Write the directory's content (paths relative to it) as an uncompressed tar. Returns the number of files.

    Names are sorted; owners and times are left out; links are kept as links. Raises CodeDirectoryError, OSError.
    """
    check_directory(directory)
    files = 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _below(directory):
            name = path.relative_to(directory).as_posix()
            info = tar.gettarinfo(path, arcname=name)
            if info is None or not (info.isfile() or info.isdir() or info.issym() or info.islnk()):
                raise CodeDirectoryError(f"{path} is neither a file nor a directory nor a link: it cannot be uploaded")
            if info.islnk():
                info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = 0
            info.mode = _mode(info)
            if info.isfile():
                with path.open("rb") as source:
                    tar.addfile(info, source)
                files += 1
            else:
                tar.addfile(info)
    return files


def _mode(info: tarfile.TarInfo) -> int:
    # Only whether it may be executed means something; the rest is the umask of whoever checked it out.
    return 0o755 if info.isdir() or info.mode & stat.S_IXUSR else 0o644


def _below(directory: Path) -> list[Path]:
    found: list[Path] = []
    for root, directories, files in os.walk(directory):
        directories[:] = sorted(name for name in directories if name not in LEFT_OUT)
        found += [Path(root) / name for name in (*directories, *files) if name not in LEFT_OUT]
    return sorted(found)
