from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.systemd import SystemdError, inherited_sockets, notify, watchdog_interval_s


@pytest.fixture(autouse=True)
def _outside_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def supervisor() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        yield sock


def test_notify_without_a_supervisor_says_so() -> None:
    assert notify("READY=1") is False


def test_notify_reaches_a_path(supervisor: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert notify("READY=1\nSTATUS=warm") is True
    assert supervisor.recv(1024) == b"READY=1\nSTATUS=warm"


def test_notify_reaches_an_abstract_address(supervisor: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor.bind(b"\0poold-test-%d" % os.getpid())
    monkeypatch.setenv("NOTIFY_SOCKET", f"@poold-test-{os.getpid()}")
    assert notify("WATCHDOG=1") is True
    assert supervisor.recv(1024) == b"WATCHDOG=1"


def test_notify_never_blocks_on_a_supervisor_that_does_not_read(
    supervisor: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

    assert not all(notify("WATCHDOG=1") for _ in range(100_000))


@pytest.mark.parametrize("address", ["relative/path", "@", "vsock:2:1"])
def test_notify_refuses_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with pytest.raises(SystemdError, match="NOTIFY_SOCKET is"):
        notify("READY=1")


def test_a_supervisor_that_is_gone_does_not_end_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert notify("READY=1") is False


def test_the_watchdog_is_fed_at_half_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    assert watchdog_interval_s() == 5.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval_s() == 5.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval_s() is None


@pytest.mark.parametrize("value", ["0", "-5", "ten", "1.5", "٣"])
def test_a_watchdog_limit_that_is_no_time_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", value)
    with pytest.raises(SystemdError, match="WATCHDOG_USEC"):
        watchdog_interval_s()


def test_sockets_meant_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inherited_sockets() == []
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert inherited_sockets() == []
    assert "LISTEN_FDS" not in os.environ


# The descriptors start at 3, which a test runner has in use: a process of its own takes them.
TAKE = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 50) for fd in sys.argv[1:]]
for offset, fd in enumerate(high):
    os.dup2(fd, 3 + offset)
os.environ["LISTEN_PID"] = str(os.getpid())
from gateway.systemd import SystemdError, inherited_sockets
try:
    sockets = inherited_sockets()
except SystemdError as exc:
    print("error:", exc)
    print("open:", [fd for fd in (3, 4) if os.path.exists(f"/proc/self/fd/{fd}")])
else:
    for sock in sockets:
        print(sock.family.name, sock.fileno(), sock.get_inheritable(), sock.gettimeout())
    print(inherited_sockets(), [name for name in os.environ if name.startswith("LISTEN_")])
"""


def take(descriptors: list[int], **env: str) -> list[str]:
    """The lines that a process prints which was handed these descriptors."""
    done = subprocess.run(
        [sys.executable, "-c", TAKE, *map(str, descriptors)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "LISTEN_FDS": str(len(descriptors)), **env},
        pass_fds=descriptors,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def listeners(tmp_path: Path) -> Iterator[list[socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as http, socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "control"))
        control.listen()
        yield [http, control]


@pytest.mark.parametrize("names", [{}, {"LISTEN_FDNAMES": "poold.socket:poold.socket"}])
def test_handed_over_sockets_come_in_order_and_once(listeners: list[socket.socket], names: dict[str, str]) -> None:
    assert take([sock.fileno() for sock in listeners], **names) == [
        "AF_INET 3 False 0.0",
        "AF_UNIX 4 False 0.0",
        "[] []",
    ]


def test_names_that_do_not_match_are_an_error(listeners: list[socket.socket]) -> None:
    lines = take([sock.fileno() for sock in listeners], LISTEN_FDNAMES="http")
    assert lines[0] == "error: LISTEN_FDS is 2 but LISTEN_FDNAMES has 1 names: 'http'"


def test_a_descriptor_that_is_no_socket_is_an_error(listeners: list[socket.socket]) -> None:
    with open(os.devnull) as file:
        lines = take([listeners[0].fileno(), file.fileno()], LISTEN_FDNAMES="http:control")
    assert lines == ["error: descriptor 4 (control) of LISTEN_FDS is not a socket; use ListenStream= only", "open: []"]


def test_a_socket_that_does_not_listen_is_an_error() -> None:
    with socket.socket() as idle, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        for sock in (idle, datagram):
            lines = take([sock.fileno()])
            assert lines[0].startswith("error: descriptor 3 (unknown) of LISTEN_FDS does not listen")


def test_a_descriptor_that_is_closed_is_an_error() -> None:
    lines = take([], LISTEN_FDS="1")
    assert lines[0] == "error: descriptor 3 (unknown) of LISTEN_FDS is not open: Bad file descriptor"


def test_a_count_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "two")
    with pytest.raises(SystemdError, match="LISTEN_FDS is 'two': a whole number"):
        inherited_sockets()
