"""The docker backend against a real engine: how instances are made, walled in, reached and frozen."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

import pool_docker_kit
import pytest
import trio
from pool_docker_kit import (
    ANSWER,
    ANSWERING,
    FOREVER,
    GET,
    PORT,
    Kit,
    ask,
    next_exit,
    write_code,
)

from pool import netns
from pool.backends import docker as docker_backend
from pool.backends import docker_client
from pool.errors import BackendUnavailable, ChannelClosed, StartError
from pool.spec import FunctionSpec, MountSpec, SecuritySpec

image = pool_docker_kit.image
kit = pool_docker_kit.kit


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
        data = pool_docker_kit.busybox_tar(**{word: ""})
        pool_docker_kit.import_image(
            docker_host, name, data, ['CMD ["/busybox","sh","-c","echo /*; /busybox sleep 1000"]']
        )
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
    image_id = pool_docker_kit.import_image(docker_host, name, pool_docker_kit.busybox_tar(x="y"), ['CMD ["/x"]'])
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


@pytest.mark.trio
async def test_a_network_that_the_user_made(kit: Kit) -> None:
    name = f"poold-test-{uuid.uuid4().hex[:8]}"
    await kit.engine("create_network", name)
    revision = await kit.revision(kit.shell(ANSWERING, network=name))
    running = await kit.backend.start(kit.request(revision))
    info = await kit.engine("inspect_container", pool_docker_kit.container_of(running))
    assert list(info["NetworkSettings"]["Networks"]) == [name]
    assert await ask(running) == ANSWER
    await running.stop(0)
    await kit.engine("remove_network", name)
    with pytest.raises(StartError, match="network") as caught:
        await kit.backend.start(kit.request(revision))
    assert caught.value.hint == "see docker network ls"


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
