"""How the process backend encloses an instance: the command lines for bubblewrap, unshare and neither.

Each kind gets its orders (mounts, environment) through a descriptor, not in arguments, which every user of the host
can read. In each, the process that poold starts is the parent of the sandbox's first process, which is the parent of
the code; without a sandbox it becomes the code itself.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pool.spec import MountSpec

Kind = Literal["bwrap", "unshare", "plain"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USERLAND = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # besides /usr; links to it on most hosts
# What programs of the host's userland need to run at all: libraries, certificates, names of users and times.
ETC = (
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/ssl",
    "/etc/ca-certificates",
    "/etc/pki",
    "/etc/passwd",
    "/etc/group",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/localtime",
    "/etc/mime.types",
)
STAGE = "poold-stage"  # an argument of every step of ours, to tell it from the code
PLAIN_CODE_FD = 10  # where plain code has its directory: /proc/self/fd/10
SETPRIV = ["/usr/bin/setpriv", "--reuid"]
# Enters the cgroups named before --, then becomes what comes after it.
_ENTER = """n=$1; shift
while [ "$1" != -- ]; do echo 0 >"$1" || exit 125; shift; done
shift; ulimit -n "$n"; exec "$@\""""

ISOLATION: dict[Kind, str] = {
    "bwrap": "bubblewrap: each instance has its own mounts (this host's userland, read-only), processes, IPC and "
    "host name, a network of nothing but its own loopback, and no capability; system calls are not filtered",
    "unshare": "unshare: each instance has its own mounts (this host's userland, read-only), processes, IPC and "
    "host name, a network of nothing but its own loopback, and no capability; system calls are not filtered",
    "plain": "nothing isolates instances: they are plain processes on this host's file system and network "
    "(install bubblewrap, or allow user namespaces)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one instance needs, whatever encloses it."""

    command: tuple[str, ...]
    env: dict[str, str]
    code_path: str
    code_target: str
    workdir: str
    mounts: tuple[MountSpec, ...] = ()
    uid: int = 65534
    gid: int = 65534
    read_only: bool = True
    tmpfs_mb: int = 64
    nofile: int = 4096
    hostname: str = "instance"
    cgroup_files: tuple[str, ...] = ()


def config(kind: Kind, plan: Plan, *, root: bool) -> bytes:
    """What is to be read from the descriptor that command() names. `root`: the daemon runs as root.

    Raises ValueError for a NUL character in what it holds."""
    if kind == "bwrap":
        parts = [os.fsencode(part) for part in _bwrap_arguments(plan, root=root)]
        if any(b"\0" in part for part in parts):  # would be read as the end of an argument and the start of another
            raise ValueError("a NUL character in the environment or in a path")
        return b"".join(part + b"\0" for part in parts)
    links, system = _userland()
    plain = kind == "plain"
    orders = {
        "command": plan.command,
        "env": {"PATH": PATH, **plan.env},
        "workdir": plan.workdir,
        "uid": plan.uid,
        "gid": plan.gid,
        "own_user_namespace": not root and not plain,
        "new_root": not plain,
        "hostname": plan.hostname,
        "links": links,
        # Links are followed here: from the new root they would lead elsewhere.
        "system": [(os.path.realpath(path), path, True) for path in system],
        "code_path": plan.code_path,
        "code_fd": PLAIN_CODE_FD,
        "binds": [(os.path.realpath(source), target, read_only) for source, target, read_only in _binds(plan)],
        "read_only": plan.read_only,
        "tmpfs_mb": plan.tmpfs_mb,
    }
    return json.dumps(orders).encode()


def command(kind: Kind, plan: Plan, config_fd: int, *, root: bool) -> list[str]:
    """The command line that starts an instance; `config_fd` is open in it. Exit code 125: a cgroup refused it."""
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    nofile = plan.nofile if hard_limit == resource.RLIM_INFINITY else min(plan.nofile, hard_limit)
    enter = ["/bin/sh", "-c", _ENTER, STAGE, str(nofile), *plan.cgroup_files, "--"]
    if kind == "bwrap":
        return [*enter, "bwrap", "--args", str(config_fd), "--", *_as_user(plan, root=root), *plan.command]
    inside = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "inside.py"), str(config_fd), STAGE]
    if kind == "plain":
        return [*enter, *inside]
    user = [] if root else ["--user", "--map-root-user"]
    spaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=SIGKILL"]
    # unshare ends its child when it ends itself; setpriv makes unshare end with the daemon.
    return [*enter, "setpriv", "--pdeathsig", "SIGKILL", "unshare", *user, *spaces, "--", *inside]


def is_ours(cmdline: bytes, init_cmdline: bytes) -> bool:
    """Whether a process, by its /proc/PID/cmdline, is still one of the steps before the code."""
    mark = STAGE.encode() + b"\0"
    change_of_user = b"".join(part.encode() + b"\0" for part in SETPRIV)
    return cmdline == init_cmdline or mark in cmdline or cmdline.startswith(change_of_user)


def _as_user(plan: Plan, *, root: bool) -> list[str]:
    if not root:
        return []  # a user namespace gives the user
    user = [str(plan.uid), "--regid", str(plan.gid), "--clear-groups"]
    return [*SETPRIV, *user, "--bounding-set", "-all", "--inh-caps", "-all", "--ambient-caps", "-all", "--"]


def _userland() -> tuple[list[tuple[str, str]], list[str]]:
    """(link target, path) of the host's links into /usr, and the paths to show as they are."""
    links: list[tuple[str, str]] = []
    paths = ["/usr"]
    for name in USERLAND:
        path = Path(name)
        if path.is_symlink():
            links.append((str(path.readlink()), name))
        elif path.exists():
            paths.append(name)
    paths.extend(name for name in ETC if Path(name).exists())
    return links, paths


def _binds(plan: Plan) -> list[tuple[str, str, bool]]:
    mounts = sorted(plan.mounts, key=lambda m: m.target.count("/"))  # what lies deeper is mounted later
    return [(plan.code_path, plan.code_target, True), *((m.source, m.target, m.read_only) for m in mounts)]


def _bwrap_arguments(plan: Plan, *, root: bool) -> list[str]:
    arguments = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--die-with-parent", "--new-session", "--hostname", plan.hostname, "--cap-drop", "ALL"]
    if root:
        # As root without a user namespace: a real change of user, for which setpriv needs these until it has done it.
        arguments += [part for name in ("SETUID", "SETGID", "SETPCAP") for part in ("--cap-add", f"CAP_{name}")]
    else:
        arguments += ["--unshare-user", "--uid", str(plan.uid), "--gid", str(plan.gid)]
    links, paths = _userland()
    arguments += ["--perms", "0755", "--dir", "/etc"]
    for path in paths:
        arguments += ["--ro-bind", path, path]
    for target, path in links:
        arguments += ["--symlink", target, path]
    size = ["--perms", "1777", "--size", str(plan.tmpfs_mb << 20), "--tmpfs"]
    arguments += ["--proc", "/proc", "--dev", "/dev", *size, "/dev/shm", *size, "/tmp"]
    made = {"/", "/etc", "/tmp", "/usr", "/dev", "/proc"}
    for source, target, read_only in _binds(plan):
        # The directories that bwrap makes on the way are for root alone unless they are asked for.
        for parent in reversed(Path(target).parents):
            if str(parent) not in made:
                made.add(str(parent))
                arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind" if read_only else "--bind", source, target]
    arguments += ["--remount-ro", "/"] if plan.read_only else ["--chmod", "1777", "/"]
    arguments += ["--remount-ro", "/dev", "--chdir", plan.workdir, "--clearenv"]
    for name, value in {"PATH": PATH, **plan.env}.items():
        arguments += ["--setenv", name, value]
    return arguments
