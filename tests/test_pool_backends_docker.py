"""The docker backend against a real engine: containers as they are made, reached, frozen, ended, lost and found."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pool_docker_kit as kit_module
import pytest
import trio
from pool_docker_kit import ANSWERING, GET, PORT, Kit, ask, entered, next_event, write_code

from pool import netns
from pool.backends import docker as docker_backend
from pool.backends import docker_client
from pool.backends.base import InstanceExited
from pool.backends.docker import DockerBackend
from pool.backends.docker_running import DockerInstance
from pool.errors import ArtifactError, BackendUnavailable, ChannelClosed, StartError
from pool.spec import FunctionSpec, MountSpec, SecuritySpec

ANSWER = b"HTTP/1.1 "
FOREVER = "while :; do /busybox sleep 1000; done"


@pytest.fixture(scope="module")
def image(docker_host: str) -> Iterator[str]:
    """Busybox; its user is root, as most images' is."""
    name = f"poold-test-{uuid.uuid4().hex[:8]}:1"
    kit_module.import_image(docker_host, name, kit_module.busybox_tar(), ['CMD ["/busybox","sleep","1000"]'])
    yield name
    with contextlib.closing(kit_module.client_of(docker_host)) as client:
        client.remove_image(name)


def make_backend(url: str, tmp_path: Path, daemon_id: str = "") -> DockerBackend:
    return DockerBackend(daemon_id or uuid.uuid4().hex, tmp_path, docker_host=url)


@pytest.fixture
async def kit(docker_host: str, image: str, tmp_path: Path) -> AsyncIterator[Kit]:
    async with entered(make_backend(docker_host, tmp_path), docker_host, image) as entered_kit:
        yield entered_kit


async def next_exit(backend: DockerBackend) -> InstanceExited:
    event = await next_event(backend)
    assert isinstance(event, InstanceExited), event
    return event


# Starting


@pytest.mark.trio
async def test_output_of_both_streams_arrives_whole_and_apart(kit: Kit) -> None:
    running = await kit.run("for i in 1 2 3; do echo out $i; echo err $i >&2; done; echo end; " + FOREVER)
    await kit.printed.wait_for("end\n")
    assert kit.printed.out == "out 1\nout 2\nout 3\nend\n"
    await running.stop(0)
    assert kit.printed.err == "err 1\nerr 2\nerr 3\n"


@pytest.mark.trio
async def test_an_instance_is_walled_in(kit: Kit) -> None:
    script = """
        /busybox id -u; /busybox id -g
        /busybox grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status
        /busybox touch /here 2>&1; /busybox touch /tmp/here && echo tmp writable
        /busybox df -m /tmp | /busybox tail -n 1
        ulimit -n; /busybox cat /proc/1/cmdline | /busybox tr '\\0' ' '; echo
        /busybox ip -o link 2>&1 | /busybox grep -c LOOPBACK; /busybox ip -o link | /busybox grep -vc LOOPBACK
        echo end; """
    security = SecuritySpec(pids=99, nofile=512, tmpfs_mb=7)
    running = await kit.run(script + FOREVER, memory_mb=32, cpu=0.5, security=security)
    lines = (await kit.printed.wait_for("end\n")).splitlines()
    assert lines[:2] == ["65534", "65534"]
    facts = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert facts == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    assert any("Read-only file system" in line for line in lines)
    assert "tmp writable" in lines
    assert next(line for line in lines if line.startswith("tmpfs")).split()[1] == "7"
    assert "512" in lines
    assert any("docker-init" in line for line in lines)
    info = await kit.engine("inspect_container", running.container_id)
    host = info["HostConfig"]
    assert (host["Memory"], host["MemorySwap"]) == (32 << 20, 32 << 20)
    assert (host["CpuQuota"], host["CpuPeriod"], host["PidsLimit"]) == (50_000, 100_000, 99)
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "8m", "max-file": "2"}}
    assert not host["PortBindings"]
    assert not host["Privileged"]
    assert info["Config"]["Labels"]["io.poold.instance"] == running.instance_id
    assert info["Name"].startswith(f"/poold-{kit.backend.daemon_id[:8]}-probe-")
    await running.stop(0)


@pytest.mark.parametrize(
    ("security", "user"),
    [
        (SecuritySpec(), "65534 65534"),
        (SecuritySpec(allow_root=True), "0 0"),
        (SecuritySpec(user="1234:99"), "1234 99"),
    ],
)
@pytest.mark.trio
async def test_who_the_code_runs_as(kit: Kit, security: SecuritySpec, user: str) -> None:
    running = await kit.run("echo $(/busybox id -u) $(/busybox id -g) end; " + FOREVER, security=security)
    assert (await kit.printed.wait_for("end\n")) == f"{user} end\n"
    await running.stop(0)


@pytest.mark.trio
async def test_the_tag_may_move_and_the_revision_stays(kit: Kit, docker_host: str) -> None:
    name = f"poold-test-{uuid.uuid4().hex[:8]}:1"
    for word in ("first", "second"):
        data = kit_module.busybox_tar(**{word: ""})
        kit_module.import_image(docker_host, name, data, ['CMD ["/busybox","sh","-c","echo /*; /busybox sleep 1000"]'])
        if word == "first":
            spec = FunctionSpec(name="pinned", image=name, network="none")
            revision = await kit.revision(spec)
    assert (await kit.revision(spec)).id != revision.id
    running = await kit.backend.start(kit.request(revision))
    assert "first" in await kit.printed.wait_for("\n")
    await running.stop(0)
    for image_id in (name, revision.artifact.image):
        await kit.engine("remove_image", image_id, force=True)


@pytest.mark.trio
async def test_code_alone_runs_on_the_hosts_userland(kit: Kit, tmp_path: Path) -> None:
    script = (
        "#!/usr/bin/python3\nimport os, ssl, time\nprint(os.getcwd(), os.getuid(), os.listdir('/code'), flush=True)\n"
    )
    script += "print(open('/etc/passwd').read().count('\\n'), os.path.exists('/sbin/ldconfig'), flush=True)\n"
    script += "try:\n    open('/code/x', 'w')\nexcept OSError as exc:\n    print(exc.strerror, 'end', flush=True)\n"
    code = write_code(tmp_path / "code", script + "time.sleep(1000)\n")
    revision = await kit.revision(FunctionSpec(name="plain", code=code, network="none"), code)
    running = await kit.backend.start(kit.request(revision))
    assert await kit.printed.wait_for("end\n") == "/code 65534 ['bootstrap']\n2 True\nRead-only file system end\n"
    await running.stop(0)


@pytest.mark.trio
async def test_code_on_a_base_image_is_mounted_where_the_contract_wants_it(kit: Kit, tmp_path: Path) -> None:
    code = write_code(tmp_path / "code", "#!/busybox sh\necho $0 $WORD end\nexec /busybox sleep 1000\n")
    revision = await kit.revision(FunctionSpec(name="based", code=code, image=kit.image, network="none"), code)
    request = kit.request(revision, env={"WORD": "hello"})
    object.__setattr__(request, "code_target", "/var/user")
    running = await kit.backend.start(request)
    assert await kit.printed.wait_for("end\n") == "/var/user/bootstrap hello end\n"
    await running.stop(0)


@pytest.mark.trio
async def test_mounts_of_the_spec(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    source = str(tmp_path / "data")
    mounts = (MountSpec(source=source, target="/rw", read_only=False), MountSpec(source=source, target="/ro"))
    running = await kit.run(
        "echo 1 > /rw/file; /busybox cat /ro/file; echo 2 > /ro/file; echo end; " + FOREVER, mounts=mounts
    )
    assert await kit.printed.wait_for("end\n") == "1\nend\n"
    await running.stop(0)
    assert (tmp_path / "data/file").read_text() == "1\n"


# Starts that fail


@pytest.mark.parametrize(
    ("fields", "permanent", "words"),
    [
        ({"mounts": (MountSpec(source="/no/such/path", target="/x"),)}, True, "host path"),
        ({"security": SecuritySpec(runtime="nosuch")}, True, "runtime"),
        ({"security": SecuritySpec(user="nosuch")}, True, "user"),
        ({"security": SecuritySpec(allow_root=True, cap_add=("NOSUCH",))}, True, "capability"),
    ],
)
@pytest.mark.trio
async def test_a_start_that_cannot_work_says_why(kit: Kit, fields: dict[str, Any], permanent: bool, words: str) -> None:
    revision = await kit.revision(kit.shell(FOREVER, **fields))
    with pytest.raises(StartError) as caught:
        await kit.backend.start(kit.request(revision))
    assert caught.value.permanent is permanent
    assert words in caught.value.message
    assert caught.value.hint
    assert await kit.left() == []


@pytest.mark.trio
async def test_an_image_removed_after_the_deployment(kit: Kit, docker_host: str) -> None:
    name = f"poold-test-{uuid.uuid4().hex[:8]}:1"
    image_id = kit_module.import_image(docker_host, name, kit_module.busybox_tar(x="y"), ['CMD ["/x"]'])
    revision = await kit.revision(FunctionSpec(name="gone", image=name, network="none"))
    await kit.engine("remove_image", image_id, force=True)
    with pytest.raises(StartError, match="removed from the engine") as caught:
        await kit.backend.start(kit.request(revision))
    assert caught.value.permanent


@pytest.mark.trio
async def test_a_command_that_is_not_there_ends_at_once_and_says_so(kit: Kit) -> None:
    spec = FunctionSpec(name="absent", image=kit.image, entrypoint=("/no/such",), network="none")
    running = await kit.backend.start(kit.request(await kit.revision(spec)))
    event = await next_exit(kit.backend)
    assert event.instance_id == running.instance_id
    assert "not found" in event.detail
    assert running.exited == event.detail
    await running.stop(0)
    assert "/no/such" in kit.printed.err


@pytest.mark.parametrize("step", ["_create", "_start"])
@pytest.mark.trio
async def test_a_cancelled_start_leaves_nothing(kit: Kit, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while the engine is at it: the call goes through all the same, and is undone."""
    revision = await kit.revision(kit.shell(FOREVER))
    original = getattr(docker_backend, step)
    begun = trio.Event()
    token = trio.lowlevel.current_trio_token()
    came_back = threading.Event()

    def slow(*arguments: Any) -> Any:
        token.run_sync_soon(begun.set)
        try:
            return original(*arguments)
        finally:
            came_back.set()

    monkeypatch.setattr(docker_backend, step, slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kit.backend.start, kit.request(revision))
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert came_back.is_set()
    assert await kit.left() == []
    assert await kit.backend.find() == []


@pytest.mark.trio
async def test_a_create_that_comes_back_too_late_is_removed_by_reconcile(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = await kit.revision(kit.shell(FOREVER))
    original = docker_backend._create
    begun, created, go_on = trio.Event(), trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def stuck(*arguments: Any) -> str:
        token.run_sync_soon(begun.set)
        go_on.wait(20)
        try:
            return original(*arguments)
        finally:
            token.run_sync_soon(created.set)

    monkeypatch.setattr(docker_backend, "_create", stuck)
    monkeypatch.setattr(docker_client, "SETTLE_S", 0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kit.backend.start, kit.request(revision))
        await begun.wait()
        nursery.cancel_scope.cancel()
    go_on.set()
    await created.wait()
    assert len(await kit.left()) == 1
    assert await kit.backend.reconcile() == 0  # it may be one that was started a moment ago
    kit.backend._census.stray_after_s = 0.0
    assert await kit.backend.reconcile() == 1
    assert await kit.left() == []


# Reaching


@pytest.mark.parametrize("network", ["none", "bridge"])
@pytest.mark.trio
async def test_dial_and_listen_inside_its_network_namespace(kit: Kit, network: str) -> None:
    script = f"{ANSWERING} & until /busybox nc 127.0.0.1 9001 < /dev/null; do /busybox sleep 0.05; done; echo end; "
    running = await kit.run(script + FOREVER, network=network)
    assert await ask(running) == ANSWER
    with pytest.raises(ChannelClosed):
        await running.dial(1)
    listener = await running.listen(9001)
    with pytest.raises(OSError, match="in use"):
        await running.listen(9001)
    stream = await listener.accept()
    await stream.send_all(b"from poold ")
    await stream.aclose()
    await listener.aclose()
    assert "from poold end\n" in await kit.printed.wait_for("end\n")
    await running.stop(0)


@pytest.mark.trio
async def test_without_the_capability_the_bridge_address_is_dialled(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "can_enter", lambda: False)
    bridged = await kit.run(ANSWERING, network="bridge")
    assert await ask(bridged) == ANSWER
    with pytest.raises(ChannelClosed):
        await bridged.dial(1)
    with pytest.raises(BackendUnavailable) as caught:
        await bridged.listen(9001)
    assert "CAP_SYS_ADMIN" in caught.value.hint
    alone = await kit.run(ANSWERING, network="none")
    with pytest.raises(BackendUnavailable) as caught:
        await alone.dial(PORT)
    assert "network: bridge" in caught.value.hint
    assert "addresses on the bridge" in (await kit.backend.describe())["reached by"]
    await bridged.stop(0)
    await alone.stop(0)


@pytest.mark.trio
async def test_instances_reach_out_but_not_each_other(kit: Kit) -> None:
    """Out: a listener of this host's, at the bridge's own address."""
    first = await kit.run(ANSWERING, network="bridge")
    info = await kit.engine("inspect_container", first.container_id)
    network = next(iter(info["NetworkSettings"]["Networks"].values()))
    assert await ask(first) == ANSWER
    listener = (await trio.open_tcp_listeners(0, host=network["Gateway"]))[0]
    port = listener.socket.getsockname()[1]
    script = f"""
        /busybox nc -w 2 {network["IPAddress"]} {PORT} < /dev/null; echo other $?
        until /busybox nc -w 5 {network["Gateway"]} {port} < /dev/null; do /busybox sleep 0.1; done; echo end; """
    second = await kit.run(script + FOREVER, network="bridge")
    stream = await listener.accept()
    await stream.send_all(b"out ")
    await stream.aclose()
    assert await kit.printed.wait_for("end\n") == "other 1\nout end\n"
    await listener.aclose()
    await first.stop(0)
    await second.stop(0)


# Freezing


@pytest.mark.parametrize("by", ["cgroup", "pause"])
@pytest.mark.trio
async def test_frozen_it_does_not_answer_and_thawed_it_does(kit: Kit, by: str) -> None:
    running = await kit.run(ANSWERING)
    assert await ask(running) == ANSWER
    if by == "pause":
        running._freezer = None
    assert running.can_freeze
    await running.freeze()
    channel = await running.dial(PORT)
    await channel.send_all(GET)
    with trio.move_on_after(0.2) as limit:
        await channel.receive()
    assert limit.cancelled_caught
    await running.thaw()
    assert (await channel.receive()).startswith(ANSWER)
    channel.close()
    await running.freeze()
    await running.stop(5)
    assert running.exited == "killed by signal 15 (SIGTERM)"


@pytest.mark.trio
async def test_a_sample_of_what_it_uses(kit: Kit) -> None:
    running = await kit.run("x=$(/busybox head -c 20000000 /dev/zero | /busybox tr '\\0' x); echo end; " + FOREVER)
    await kit.printed.wait_for("end\n")
    by_cgroup = await running.sample()
    running._cgroup = None
    by_engine = await running.sample()
    for usage in (by_cgroup, by_engine):
        assert 15 < usage.memory_mb < 200
        assert 0 < usage.cpu_s < 20
    await running.stop(0)


# Ending


@pytest.mark.trio
async def test_stop_asks_and_waits(kit: Kit) -> None:
    script = "trap 'echo bye; exit 7' TERM; echo ready; while :; do /busybox sleep 0.05; done"
    running = await kit.run(script)
    await kit.printed.wait_for("ready\n")
    with trio.fail_after(15):
        await running.stop(20)
    assert kit.printed.out == "ready\nbye\n"
    assert running.exited == "exit code 7"
    assert await kit.left() == []
    await running.stop(20)


@pytest.mark.trio
async def test_stop_kills_what_does_not_listen_and_stop_from_two_sides(kit: Kit) -> None:
    running = await kit.run("trap '' TERM; echo ready; while :; do /busybox sleep 0.05; done")
    await kit.printed.wait_for("ready\n")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.stop, 0.2)
        nursery.start_soon(running.stop, 0)
    assert await kit.left() == []
    assert running.exited


@pytest.mark.trio
async def test_stop_sends_the_images_own_signal(kit: Kit, docker_host: str) -> None:
    name = f"poold-test-{uuid.uuid4().hex[:8]}:1"
    kit_module.build_image(docker_host, name, f"FROM {kit.image}\nSTOPSIGNAL SIGUSR1\n")
    script = "trap 'echo usr1; exit 0' USR1; echo ready; while :; do /busybox sleep 0.05; done"
    spec = FunctionSpec(name="signal", image=name, entrypoint=("/busybox", "sh", "-c", script), network="none")
    running = await kit.backend.start(kit.request(await kit.revision(spec)))
    await kit.printed.wait_for("ready\n")
    await running.stop(20)
    assert kit.printed.out == "ready\nusr1\n"
    assert running.exited == "exit code 0"
    await kit.engine("remove_image", name)


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "killed by signal 9 (SIGKILL)"),
        ("/busybox head -c 100m /dev/zero | /busybox tail", "out of memory"),
    ],
)
@pytest.mark.trio
async def test_an_instance_that_ends_by_itself_is_reported(kit: Kit, script: str, detail: str) -> None:
    """It ends only when told to, long after its start."""
    script = f"{ANSWERING} & trap '{script}; exit $?' USR1; echo ready; while :; do /busybox sleep 0.05; done"
    running = await kit.run(script, memory_mb=16)
    await kit.printed.wait_for("ready\n")
    assert not running.ended.is_set()
    await kit.engine("kill", running.container_id, signal="USR1")
    event = await next_exit(kit.backend)
    assert event == InstanceExited(running.instance_id, detail)
    assert running.exited == detail
    await running.stop(1)


@pytest.mark.trio
async def test_a_container_removed_by_somebody_else(kit: Kit) -> None:
    running = await kit.run(FOREVER)
    await kit.engine("remove_container", running.container_id, force=True)
    assert (await next_exit(kit.backend)).instance_id == running.instance_id
    await running.stop(1)


@pytest.mark.trio
async def test_stop_waits_for_a_removal_that_somebody_else_has_begun(kit: Kit) -> None:
    running = await kit.run(FOREVER)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(quietly_remove, kit, running.container_id)
        await running.stop(0)
        assert await kit.left() == []


async def quietly_remove(kit: Kit, container_id: str) -> None:
    with contextlib.suppress(Exception):
        await kit.engine("remove_container", container_id, force=True)


@pytest.mark.trio
async def test_what_the_daemon_made_is_made_again_when_somebody_removed_it(kit: Kit, tmp_path: Path) -> None:
    code = write_code(tmp_path / "code", "#!/bin/sh\necho end\nsleep 1000\n")
    revision = await kit.revision(FunctionSpec(name="plain", code=code), code)
    await (await kit.backend.start(kit.request(revision))).stop(0)
    await kit.engine("remove_network", kit.backend._network_name)
    running = await kit.backend.start(kit.request(revision))
    await kit.printed.wait_for("end\n")
    await running.stop(0)
    userland, _ = await kit.backend._code.userland()
    await kit.engine("remove_image", userland, force=True)
    await (await kit.backend.start(kit.request(revision))).stop(0)


# Taking over


@pytest.mark.trio
async def test_a_later_daemon_finds_adopts_and_removes(docker_host: str, image: str, tmp_path: Path) -> None:
    daemon_id = uuid.uuid4().hex
    script = f"trap 'echo usr1' USR1; {ANSWERING} & while :; do /busybox sleep 0.05; done"
    async with make_backend(docker_host, tmp_path, daemon_id) as first:
        old = Kit(first, docker_host, image)
        frozen, paused, ended = [await old.run(script) for _ in range(3)]
        revision = await old.revision(old.shell(script))
        await frozen.freeze()
        await old.engine("pause", paused.container_id)
        await old.engine("kill", ended.container_id)
        await ended.ended.wait()
    async with entered(make_backend(docker_host, tmp_path, daemon_id), docker_host, image) as kit:
        found = {item.instance_id: item for item in await kit.backend.find()}
        assert set(found) == {running.instance_id for running in (frozen, paused, ended)}
        assert {item.revision_id for item in found.values()} == {revision.id}
        assert [found[r.instance_id].running for r in (frozen, paused, ended)] == [True, True, False]
        assert [found[r.instance_id].frozen for r in (frozen, paused, ended)] == [True, True, False]
        with pytest.raises(StartError, match="has ended"):
            await kit.backend.adopt(found[ended.instance_id], revision, kit.printed)
        taken = await kit.backend.adopt(found[frozen.instance_id], revision, kit.printed)
        assert await ask(taken) == ANSWER
        await kit.engine("kill", taken_id(taken), signal="USR1")
        assert await kit.printed.wait_for("usr1\n") == "usr1\n"
        assert [item.instance_id for item in await kit.backend.find()] == sorted(
            [paused.instance_id, ended.instance_id]
        )
        assert await kit.backend.reconcile() == 0  # what was found waits for its verdict
        await kit.backend.remove(found[paused.instance_id])
        await kit.backend.remove(found[ended.instance_id])
        assert len(await kit.left()) == 1
        await kit.engine("kill", taken_id(taken))
        assert (await next_exit(kit.backend)).instance_id == frozen.instance_id
        await kit.backend.remove(found[frozen.instance_id])


def taken_id(running: Any) -> str:
    assert isinstance(running, DockerInstance)
    return running.container_id


@pytest.mark.trio
async def test_a_frozen_container_of_an_earlier_daemon_can_be_removed(
    docker_host: str, image: str, tmp_path: Path
) -> None:
    daemon_id = uuid.uuid4().hex
    async with make_backend(docker_host, tmp_path, daemon_id) as first:
        running = await Kit(first, docker_host, image).run(FOREVER)
        await running.freeze()
    async with entered(make_backend(docker_host, tmp_path, daemon_id), docker_host, image) as kit:
        for found in await kit.backend.find():
            await kit.backend.remove(found)


# What is refused before anything starts


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"network": "host"}, "refused"),
        ({"network": "container:abc"}, "refused"),
        ({"network": "no-such-network"}, "no network"),
        ({"memory_mb": 4}, "no less than 6"),
        ({"security": SecuritySpec(cap_add=("NET_RAW",))}, "does nothing"),
        ({"image": "Not A Name"}, "not an image's name"),
        ({"image": "sha256:" + "0" * 64}, "has no image"),
        ({"image": "127.0.0.1:1/nowhere:1"}, "cannot reach its registry"),
    ],
)
@pytest.mark.trio
async def test_resolve_refuses(kit: Kit, fields: dict[str, Any], words: str) -> None:
    spec = FunctionSpec(**({"name": "probe", "image": kit.image} | fields))
    with pytest.raises(ArtifactError) as caught:
        await kit.backend.resolve(spec, None, lambda line: None)
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.trio
async def test_an_image_that_does_not_say_what_to_run(kit: Kit, docker_host: str) -> None:
    name = f"poold-test-{uuid.uuid4().hex[:8]}:1"
    kit_module.import_image(docker_host, name, kit_module.busybox_tar(), [])
    with pytest.raises(ArtifactError, match="does not say what to run"):
        await kit.backend.resolve(FunctionSpec(name="mute", image=name), None, lambda line: None)
    await kit.engine("remove_image", name)


@pytest.mark.trio
async def test_bootstraps_are_checked(kit: Kit, tmp_path: Path) -> None:
    code = write_code(tmp_path / "code", "#!/bin/sh\n")
    (tmp_path / "code/bootstrap").chmod(0o644)
    with pytest.raises(ArtifactError, match="not executable"):
        await kit.revision(FunctionSpec(name="plain", code=code), code)


@pytest.mark.trio
async def test_what_ended_while_nobody_listened_is_still_told(kit: Kit) -> None:
    running = await kit.run("exit 0")
    with trio.fail_after(10):
        await running.ended.wait()
    assert await next_exit(kit.backend) == InstanceExited(running.instance_id, "exit code 0")
    await running.stop(0)
