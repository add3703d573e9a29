"""The last step before a function's code, where bubblewrap is not there to do it: run as a script by the process
backend, in the new namespaces (unshare) or in none (plain).

Reads its orders as JSON from a descriptor, builds the root file system, gives up every privilege and becomes the
code, or a small shell that starts it and reaps what it leaves. The environment comes with the orders: in an argument
every user of the host could read it. Mounts as in mount(2), mount_setattr(2) and pivot_root(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC = 2, 4, 8, 4096, 16384
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # the same on every architecture
AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x8000, 1, 2, 4
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 24, 38, 9
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# The first process of a pid namespace: passes SIGTERM on, reaps everything, ends as the code ends, says nothing.
INIT = """trap 'kill -TERM $c 2>/dev/null' TERM
"$@" <&0 & c=$!; exec 2>/dev/null
while :; do wait $c; r=$?; kill -0 $c 2>/dev/null || exit $r; done"""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = (source.encode(), target.encode(), kind.encode() if kind else None)
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() if data else None), f"mounting {target}")


def _restrict(target: str, *, read_only: bool, devices: bool = False, recursive: bool = True) -> None:
    flags = MOUNT_ATTR_NOSUID | (MOUNT_ATTR_RDONLY if read_only else 0) | (0 if devices else MOUNT_ATTR_NODEV)
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    how = AT_RECURSIVE if recursive else 0
    done = _libc.syscall(SYS_MOUNT_SETATTR, -100, target.encode(), how, ctypes.byref(attributes), 32)
    _check(done, f"restricting {target}")


def _tmpfs(target: str, mode: int, size_mb: int) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o},size={size_mb}m")


def _bind(source: str, target: str, *, read_only: bool, devices: bool = False) -> None:
    if Path(source).is_dir():
        Path(target).mkdir(parents=True, exist_ok=True)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).touch(exist_ok=True)
    _mount(source, target, None, MS_BIND | MS_REC)
    _restrict(target, read_only=read_only, devices=devices)


def build_root(orders: dict[str, Any]) -> None:
    """Replace the root by a new one that holds what the orders name. Raises OSError."""
    # From a root of our own, with the old one below it, every source can still be reached.
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    Path("/tmp/old").mkdir()
    Path("/tmp/new").mkdir()
    _check(_libc.pivot_root(b"/tmp", b"/tmp/old"), "changing the root")
    os.chdir("/")
    _tmpfs("/new", 0o755, 1)
    for target, path in orders["links"]:
        Path(f"/new{path}").symlink_to(target)
    for source, target, read_only in orders["system"]:
        _bind(f"/old{source}", f"/new{target}", read_only=read_only)
    Path("/new/proc").mkdir()
    _mount("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _tmpfs("/new/dev", 0o755, 1)
    for name in DEVICES:
        _bind(f"/old/dev/{name}", f"/new/dev/{name}", read_only=False, devices=True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        Path(f"/new/dev/{name}").symlink_to(f"/proc/self/fd/{number}")
    Path("/new/dev/fd").symlink_to("/proc/self/fd")
    _tmpfs("/new/dev/shm", 0o1777, orders["tmpfs_mb"])
    _restrict("/new/dev", read_only=True, devices=True, recursive=False)
    _tmpfs("/new/tmp", 0o1777, orders["tmpfs_mb"])
    for source, target, read_only in orders["binds"]:
        _bind(f"/old{source}", f"/new{target}", read_only=read_only)
    if orders["read_only"]:
        _restrict("/new", read_only=True, recursive=False)
    else:
        Path("/new").chmod(0o1777)
    os.chdir("/new")
    _check(_libc.pivot_root(b".", b"."), "changing the root")
    _check(_libc.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir("/")


def drop_privileges(orders: dict[str, Any]) -> None:
    """Become the function's user, without a capability and with no way to gain one. Raises OSError."""
    uid, gid = orders["uid"], orders["gid"]
    if orders["own_user_namespace"]:
        own_uid, own_gid = os.geteuid(), os.getegid()
        _check(_libc.unshare(CLONE_NEWUSER), "making a user namespace")
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {own_uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {own_gid} 1")
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # past the last one this kernel knows, or no right to (then there is nothing to drop)
    if os.geteuid() == 0 and not orders["own_user_namespace"]:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "giving up privileges")
    # A change of user clears it, so it is set last.
    _check(_libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "tying it to the daemon")


def main() -> None:
    """Do as ordered and become the code. Exit code 126 and a line on stderr when that cannot be done."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        orders = json.load(file)
    command: list[str] = orders["command"]
    try:
        if orders["new_root"]:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            from pool.nschild import loopback_up

            socket.sethostname(orders["hostname"])
            loopback_up()
            build_root(orders)
            command = ["/bin/sh", "-c", INIT, "poold-stage", *command]
        else:
            # Nothing is mounted, and the way to the code may be closed to its user: it goes through a descriptor.
            os.dup2(os.open(orders["code_path"], os.O_PATH | os.O_DIRECTORY), orders["code_fd"])
        os.chdir(orders["workdir"])
        drop_privileges(orders)
        os.execvpe(command[0], command, orders["env"])
    except OSError as exc:
        print(f"poold: cannot start {orders['command'][0]}: {exc}", file=sys.stderr)
        sys.exit(126)


if __name__ == "__main__":
    main()
