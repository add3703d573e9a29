"""Sockets in another process's network namespace, both ways of entering it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest
import trio

from pool.channel import SocketChannel
from pool.errors import BackendUnavailable, ChannelClosed
from pool.netns import NetNamespace, can_enter


@pytest.fixture
def namespace_pid() -> Iterator[int]:
    """The pid of a process that waits in a user and a network namespace of its own."""
    options = ["--user", "--map-root-user", "--net"]
    with subprocess.Popen(
        ["unshare", *options, "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.kill()


@pytest.fixture(params=["thread", "child"])
def namespace(request: pytest.FixtureRequest, namespace_pid: int) -> Iterator[NetNamespace]:
    if request.param == "thread" and not can_enter():
        pytest.fail("run these tests as root: without CAP_SYS_ADMIN the thread's way cannot be shown")
    found = NetNamespace.open(namespace_pid, privileged=request.param == "thread")
    yield found
    found.close()


def own_namespace() -> str:
    return os.readlink("/proc/thread-self/ns/net")


@pytest.mark.trio
async def test_what_listens_there_is_reached_there_and_not_here(namespace: NetNamespace) -> None:
    before = own_namespace()
    await namespace.raise_loopback()
    listener = await namespace.listen("127.0.0.1", 0)
    async with listener:
        port = listener.socket.getsockname()[1]
        channel = await namespace.dial("127.0.0.1", port)
        stream = await listener.accept()
        await channel.send_all(b"ping")
        assert await stream.receive_some() == b"ping"
        await stream.send_all(b"pong")
        assert await channel.receive() == b"pong"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)
        channel.close()
        await stream.aclose()
    assert own_namespace() == before
    assert await trio.to_thread.run_sync(own_namespace) == before


@pytest.mark.trio
async def test_nothing_listens(namespace: NetNamespace) -> None:
    await namespace.raise_loopback()
    with pytest.raises(ChannelClosed, match=r"127\.0\.0\.1:9: .*refused"):
        await namespace.dial("127.0.0.1", 9)


@pytest.mark.trio
async def test_a_taken_port_is_an_os_error(namespace: NetNamespace) -> None:
    await namespace.raise_loopback()
    async with await namespace.listen("127.0.0.1", 9001):
        with pytest.raises(OSError, match="in use"):
            await namespace.listen("127.0.0.1", 9001)


@pytest.mark.trio
async def test_many_at_once_and_it_outlives_the_process(namespace: NetNamespace, namespace_pid: int) -> None:
    await namespace.raise_loopback()
    listener = await namespace.listen("127.0.0.1", 0)
    os.kill(namespace_pid, 9)
    port = listener.socket.getsockname()[1]
    channels: list[SocketChannel] = []

    async def dial() -> None:
        channels.append(await namespace.dial("127.0.0.1", port))

    async with listener:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(dial)
        assert len(channels) == 10
        for channel in channels:
            channel.close()


@pytest.mark.trio
async def test_closed_says_so(namespace: NetNamespace) -> None:
    namespace.close()
    namespace.close()
    with pytest.raises(BackendUnavailable, match="was closed"):
        await namespace.dial("127.0.0.1", 80)


@pytest.mark.trio
async def test_a_dial_that_nobody_accepts_ends_at_its_limit(namespace: NetNamespace) -> None:
    await namespace.raise_loopback()
    async with await namespace.listen("127.0.0.1", 0) as listener:
        port = listener.socket.getsockname()[1]
        listener.socket.listen(0)
        held = await namespace.dial("127.0.0.1", port)  # a backlog of 0 holds one connection
        with pytest.raises(ChannelClosed, match=r"no answer .* in 0\.05 s"):
            await namespace.dial("127.0.0.1", port, timeout_s=0.05)
        held.close()


@pytest.mark.trio
async def test_a_cancelled_dial_leaves_no_socket(namespace: NetNamespace) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    with trio.CancelScope() as scope:
        scope.cancel()
        await namespace.dial("127.0.0.1", 80)
    assert scope.cancelled_caught
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.parametrize("privileged", [True, False])
def test_no_such_process(privileged: bool) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(BackendUnavailable, match="has ended"):
        NetNamespace.open(process.pid, privileged=privileged)


@pytest.mark.trio
async def test_a_thread_that_may_not_enter_says_what_to_do(namespace_pid: int) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)  # setns refuses what is no namespace, as it does without the capability
    namespace = NetNamespace(fd, None)
    with pytest.raises(BackendUnavailable, match="cannot enter") as caught:
        await namespace.dial("127.0.0.1", 80)
    assert "CAP_SYS_ADMIN" in caught.value.hint
    namespace.close()


@pytest.mark.trio
async def test_a_child_that_may_not_enter_says_why(namespace_pid: int) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    namespace = NetNamespace(os.dup(null), null)
    with pytest.raises(BackendUnavailable, match="Invalid argument"):
        await namespace.listen("127.0.0.1", 80)
    namespace.close()
