"""The root of code functions that name no image: the host's own programs, mounted read-only into an empty image.

The image holds only what must not be the host's: empty directories to mount on, the links of a merged /usr, a
passwd and group of two names. Everything else is bound from the host at start, so it follows the host's updates.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from pool.backends.docker_container import Mount

REPOSITORY = "poold-userland"
LABEL_USERLAND = "io.poold.userland"
TOP = ("bin", "lib", "lib32", "lib64", "libx32")
HOST_SBIN = "/.sbin"  # where a host's own /sbin appears when it is not a link into /usr
EMPTY = ("code", "dev", "etc", "home", "opt", "proc", "root", "run", "sys", "tmp", "usr", "var/tmp", "var/user")
# What programs in /usr look up outside of it: the loader's cache, Debian's alternatives, the roots of trust.
ETC = (
    "ld.so.cache",
    "alternatives",
    "ssl/certs",
    "ssl/openssl.cnf",
    "pki/tls",
    "pki/ca-trust/extracted",
    "crypto-policies",
    "localtime",
    "mime.types",
    "python3*",
    "java-*",
)
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/tmp:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}


@dataclass(frozen=True, slots=True)
class Userland:
    """An image to import and what to mount into it. `tag` names its content."""

    archive: bytes
    mounts: tuple[Mount, ...]

    @property
    def tag(self) -> str:
        return hashlib.sha256(self.archive).hexdigest()[:12]


def host_userland(root: Path = Path("/")) -> Userland:
    """From this host as it is now. Reads directories: not for the event loop."""
    links: dict[str, str] = {}
    folders = set(EMPTY)
    mounts = [Mount("/usr", "/usr")]
    for name in TOP:
        path = root / name
        if path.is_symlink():
            links[name] = str(path.readlink())
        elif path.is_dir():
            folders.add(name)
            mounts.append(Mount(f"/{name}", f"/{name}"))
    # The engine puts its init at /sbin/docker-init, which must not be created on the host: /sbin is the image's own.
    merged = (root / "sbin").is_symlink()
    sbin = root / "usr/sbin" if merged else root / "sbin"
    for entry in sorted(sbin.iterdir()) if sbin.is_dir() else ():
        links[f"sbin/{entry.name}"] = f"/usr/sbin/{entry.name}" if merged else f"{HOST_SBIN}/{entry.name}"
    if not merged and sbin.is_dir():
        folders.add(HOST_SBIN.strip("/"))
        mounts.append(Mount("/sbin", HOST_SBIN))
    files = dict(FILES)
    for pattern in ETC:
        for path in sorted((root / "etc").glob(pattern)):
            inside = f"etc/{path.relative_to(root / 'etc')}"
            mounts.append(Mount(f"/{inside}", f"/{inside}"))
            if path.is_dir():
                folders.add(inside)
            else:
                files[inside] = ""
    return Userland(_archive(folders, links, files), tuple(mounts))


def remote_userland() -> Userland:
    """For an engine on another host, whose files cannot be looked at: any with a merged /usr will do."""
    links = {name: f"usr/{name}" for name in ("bin", "lib", "lib64")} | {"sbin/ldconfig": "/usr/sbin/ldconfig"}
    return Userland(_archive(set(EMPTY), links, FILES), (Mount("/usr", "/usr"),))


def _archive(folders: set[str], links: dict[str, str], files: dict[str, str]) -> bytes:
    """A tar of them with fixed times and owners, so that equal content gives the equal tag."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in sorted({parent for folder in folders | {"sbin"} for parent in _with_parents(folder)}):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name in ("tmp", "var/tmp") else 0o755
            tar.addfile(entry)
        for name, target in sorted(links.items()):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(entry)
        for name, text in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def _with_parents(folder: str) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]
