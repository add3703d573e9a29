"""The docker backend against a real engine: how instances end, and what is taken over, removed or refused."""

from __future__ import annotations

import contextlib
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
    Kit,
    ask,
    container_of,
    earlier,
    entered,
    make_backend,
    next_exit,
    write_code,
)

from pool.backends.base import InstanceExited
from pool.errors import ArtifactError, StartError
from pool.spec import FunctionSpec, SecuritySpec

image = pool_docker_kit.image
kit = pool_docker_kit.kit


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
    pool_docker_kit.build_image(docker_host, name, f"FROM {kit.image}\nSTOPSIGNAL SIGUSR1\n")
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
    _, layout = kit.backend._code._userland or ("", None)
    assert layout is not None
    kit.backend._code._userland = f"sha256:{'0' * 64}", layout  # as if it had been removed: others may be using it
    await (await kit.backend.start(kit.request(revision))).stop(0)


# Taking over


@pytest.mark.trio
async def test_a_later_daemon_finds_adopts_and_removes(docker_host: str, image: str, tmp_path: Path) -> None:
    daemon_id = uuid.uuid4().hex
    script = f"trap 'echo usr1' USR1; {ANSWERING} & while :; do /busybox sleep 0.05; done"
    async with earlier(make_backend(docker_host, tmp_path, daemon_id), docker_host, image) as old:
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
        await kit.engine("kill", container_of(taken), signal="USR1")
        assert await kit.printed.wait_for("usr1\n") == "usr1\n"
        assert [item.instance_id for item in await kit.backend.find()] == sorted(
            [paused.instance_id, ended.instance_id]
        )
        assert await kit.backend.reconcile() == 0  # what was found waits for its verdict
        await kit.backend.remove(found[paused.instance_id])
        await kit.backend.remove(found[ended.instance_id])
        assert len(await kit.left()) == 1
        await kit.engine("kill", container_of(taken))
        assert (await next_exit(kit.backend)).instance_id == frozen.instance_id
        await kit.backend.remove(found[frozen.instance_id])


@pytest.mark.trio
async def test_a_frozen_container_of_an_earlier_daemon_can_be_removed(
    docker_host: str, image: str, tmp_path: Path
) -> None:
    daemon_id = uuid.uuid4().hex
    async with earlier(make_backend(docker_host, tmp_path, daemon_id), docker_host, image) as old:
        running = await old.run(f"echo ready; {FOREVER}")
        await old.printed.wait_for("ready\n")
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
    pool_docker_kit.import_image(docker_host, name, pool_docker_kit.busybox_tar(), [])
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
