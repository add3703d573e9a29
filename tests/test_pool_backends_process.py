"""The process backend's own: each way of enclosing an instance, refusals, and what a killed daemon leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
import trio.testing
from backend_kinds import Printed, ProcessKind, answer, ask, connect, make, make_code, request

from pool.backends.base import InstanceExited, Output, Running
from pool.backends.process import Asked, ProcessBackend
from pool.errors import ArtifactError, BackendUnavailable, StartError
from pool.instance_cgroup import Parents
from pool.spec import FunctionSpec, MountSpec, SecuritySpec


@dataclass(frozen=True)
class Variant:
    """A way of enclosing; `root` False: as a daemon does that has no privilege (it may still be run by root)."""

    sandbox: Asked
    root: bool

    def __str__(self) -> str:
        return f"{self.sandbox}-{'root' if self.root else 'rootless'}"


VARIANTS = [Variant(sandbox, root) for sandbox in ("bwrap", "unshare", "plain") for root in (True, False)]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
enclosed = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.sandbox != "plain"], ids=str)
plain = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.sandbox == "plain"], ids=str)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return make_code(tmp_path)


@pytest.fixture
def kind(daemon_id: str, tmp_path: Path) -> ProcessKind:
    return ProcessKind(daemon_id, tmp_path)


@asynccontextmanager
async def opened(kind: ProcessKind, variant: Variant) -> AsyncIterator[ProcessBackend]:
    backend = ProcessBackend(kind.daemon_id, kind.state_dir, sandbox=variant.sandbox)
    if not variant.root:
        backend._root = backend._privileged = False
    async with backend:
        if not variant.root:
            backend._parents = Parents({}, {})
        yield backend
    assert await trio.to_thread.run_sync(kind.leftovers) == []


@asynccontextmanager
async def started(
    kind: ProcessKind, variant: Variant, code: Path, printed: Printed | None = None, **env: str
) -> AsyncIterator[tuple[ProcessBackend, Running]]:
    async with opened(kind, variant) as backend:
        revision = await make(backend, code)
        running = await backend.start(request(revision, "i1", printed, DAEMON=kind.daemon_id, **env))
        yield backend, running
        with trio.fail_after(20):
            await running.stop(0.1)
        assert await trio.to_thread.run_sync(kind.leftovers) == []


@every_variant
@pytest.mark.trio
async def test_it_answers_says_how_it_is_enclosed_and_leaves_nothing(
    kind: ProcessKind, variant: Variant, code: Path
) -> None:
    async with started(kind, variant, code) as (backend, running):
        assert ("nothing isolates" in backend.isolation) == (variant.sandbox == "plain")
        facts = await backend.describe()
        assert facts["sandbox"] == variant.sandbox
        assert ("not limited here: cpu, memory, pids" in facts["limits"]) == (not variant.root)
        assert running.can_freeze == variant.root == (facts["freezing"] == "by cgroup")
        channel = await connect(running)
        await ask(channel, b"hello")
        assert await answer(channel) == b"hello"
        channel.close()
        usage = await running.sample()
        assert usage.memory_mb > 0
        assert running.pid is not None
        assert psutil.pid_exists(running.pid)


@enclosed
@pytest.mark.trio
async def test_what_the_code_sees(kind: ProcessKind, variant: Variant, code: Path) -> None:
    async with started(kind, variant, code, SECRET="hush hush") as (_, running):
        channel = await connect(running)
        await ask(channel, path="/facts")
        facts: dict[str, Any] = json.loads(await answer(channel))
        channel.close()
        family = [psutil.Process(running.pid), *psutil.Process().children(recursive=True)]
        assert not any("hush" in " ".join(process.cmdline()) for process in family)
    assert facts["user"] == 65534
    assert facts["env"]["HOME"] == "/tmp"
    assert int(facts["capabilities"], 16) == 0
    assert facts["no_new_privileges"] == "1"
    assert facts["writable"] == ["/tmp/here"]
    assert facts["directory"] == "/code"
    assert facts["processes"] <= 3
    assert facts["interfaces"] == ["lo"]
    assert facts["env"].keys() - {"LC_CTYPE"} <= {"PATH", "HOME", "PWD", "PORT", "DAEMON", "SECRET"}
    assert facts["env"]["SECRET"] == "hush hush"


@every_variant
@pytest.mark.trio
async def test_stopping_asks_the_code_itself(kind: ProcessKind, variant: Variant, code: Path) -> None:
    printed = Printed()
    async with started(kind, variant, code, printed, MODE="polite") as (_, running):
        (await connect(running)).close()
        await running.stop(20.0)
        assert running.exited == "exit code 0"
        assert printed.text[Output.STDOUT] == b"started\nbye\n"
        assert printed.text[Output.STDERR] == b""


@enclosed
@pytest.mark.trio
async def test_what_does_not_listen_to_asking_dies_with_all_it_started(
    kind: ProcessKind, variant: Variant, code: Path
) -> None:
    for mode in ("stubborn", "leaves children"):
        async with started(kind, variant, code, MODE=mode) as (_, running):
            (await connect(running)).close()


@every_variant
@pytest.mark.trio
async def test_an_interpreter_that_does_not_exist(kind: ProcessKind, variant: Variant, tmp_path: Path) -> None:
    code = make_code(tmp_path, "#!/usr/bin/no-such-language\n")
    async with opened(kind, variant) as backend:
        revision = await make(backend, code)
        with pytest.raises(StartError, match="cannot be executed") as caught:
            await backend.start(request(revision))
        assert caught.value.permanent
        assert "#!" in caught.value.hint
        assert not backend._running


@every_variant
@pytest.mark.trio
async def test_a_start_given_up_at_any_moment_leaves_nothing(kind: ProcessKind, variant: Variant, code: Path) -> None:
    async with opened(kind, variant) as backend:
        revision = await make(backend, code)
        for step in range(12):
            running = None
            with trio.move_on_after(0.002 * step):
                running = await backend.start(request(revision, f"i{step}", DAEMON=kind.daemon_id))
            if running is not None:
                await running.stop(0)
        assert await trio.to_thread.run_sync(kind.leftovers) == []
        assert not backend._running


@pytest.mark.trio
async def test_a_bootstrap_spoiled_after_the_deploy_is_a_start_error(kind: ProcessKind, code: Path) -> None:
    async with opened(kind, VARIANTS[0]) as backend:
        revision = await make(backend, code)
        (code / "bootstrap").chmod(0o644)
        with pytest.raises(StartError, match="0644") as caught:
            await backend.start(request(revision))
        assert caught.value.permanent
        assert await trio.to_thread.run_sync(kind.leftovers) == []


@pytest.mark.trio
async def test_out_of_memory_is_told(kind: ProcessKind, tmp_path: Path) -> None:
    code = make_code(tmp_path, "#!/usr/bin/python3 -SE\nb = bytearray(300 << 20)\n")
    async with opened(kind, VARIANTS[0]) as backend:
        revision = await make(backend, code, memory_mb=32)
        running = await backend.start(request(revision))
        async with aclosing(backend.events()) as events:
            with trio.fail_after(20):
                assert await anext(events) == InstanceExited("i1", "out of memory")
        await running.stop(0)


@every_variant
@pytest.mark.trio
async def test_an_instance_that_was_asked_to_stop_has_not_ended_by_itself(
    kind: ProcessKind, variant: Variant, tmp_path: Path
) -> None:
    code = make_code(tmp_path, "#!/bin/sh\nexec sleep 1000\n")
    told: list[str] = []
    async with opened(kind, variant) as backend:

        async def listen() -> None:
            async with aclosing(backend.events()) as events:
                async for event in events:
                    assert isinstance(event, InstanceExited)
                    told.append(event.instance_id)
                    if event.instance_id == "other":
                        return

        revision = await make(backend, code)
        asked = await backend.start(request(revision, "asked"))
        other = await backend.start(request(revision, "other"))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                await trio.testing.wait_all_tasks_blocked()
                await asked.stop(5)
                os.kill(other.pid or 0, signal.SIGKILL)
        await other.stop(0)
    assert told == ["other"]


@plain
@pytest.mark.trio
async def test_plain_processes_get_a_port_each_and_cannot_be_asked(
    kind: ProcessKind, variant: Variant, code: Path
) -> None:
    async with opened(kind, variant) as backend:
        revision = await make(backend, code)
        two = [await backend.start(request(revision, name, FC_SERVER_PORT="8080", N="8080")) for name in ("a", "b")]
        ports = set()
        for running in two:
            channel = await connect(running)
            await ask(channel, path="/facts")
            env = json.loads(await answer(channel))["env"]
            assert env["PORT"] == env["FC_SERVER_PORT"] != "8080"
            assert env["N"] == "8080"
            ports.add(env["PORT"])
            channel.close()
            with pytest.raises(BackendUnavailable, match="cannot be given to each") as caught:
                await running.listen(9001)
            assert "bubblewrap" in caught.value.hint
        assert len(ports) == 2
        for running in two:
            await running.stop(0)


@pytest.mark.trio
async def test_instances_freeze_by_cgroup_v2_too(kind: ProcessKind, code: Path) -> None:
    async with ProcessBackend(kind.daemon_id, kind.state_dir) as backend:
        backend._parents = Parents.find(versions=(2,))
        running = await backend.start(request(await make(backend, code), DAEMON=kind.daemon_id))
        channel = await connect(running)
        await running.freeze()
        await ask(channel, b"wake up")
        with trio.move_on_after(0.05) as limit:
            await channel.receive()
        assert limit.cancelled_caught
        await running.thaw()
        assert await answer(channel) == b"wake up"
        channel.close()
        await running.freeze()
        await running.stop(1)
    assert await trio.to_thread.run_sync(kind.leftovers) == []


@pytest.mark.trio
async def test_mounts_are_honoured(kind: ProcessKind, tmp_path: Path) -> None:
    for sandbox in ("bwrap", "unshare"):
        given, taken = tmp_path / "given", tmp_path / f"taken-{sandbox}"
        given.mkdir(exist_ok=True)
        taken.mkdir()
        taken.chmod(0o777)
        (given / "word").write_text("please")
        code = make_code(
            tmp_path,
            "#!/bin/sh\ncp /in/put/word /out/word && echo copied\necho no >/in/put/word || echo refused\nsleep 1000\n",
        )
        mounts = (
            MountSpec(source=str(given), target="/in/put"),
            MountSpec(source=str(taken), target="/out", read_only=False),
        )
        printed = Printed()
        async with opened(kind, Variant(sandbox, os.geteuid() == 0)) as backend:
            running = await backend.start(request(await make(backend, code, mounts=mounts), "i1", printed))
            await printed.has(b"copied\nrefused\n")
            await running.stop(0)
        assert (taken / "word").read_text() == "please"
        assert (given / "word").read_text() == "please"


def spec_with(**values: Any) -> FunctionSpec:
    return FunctionSpec(name="f", code="x", **values)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FunctionSpec(name="f", image="python:3"), "python:3 needs Docker"),
        (FunctionSpec(name="f", image="python:3", code="x"), "python:3 needs Docker"),
        (spec_with(network="host"), "this host's network"),
        (spec_with(network="backend-net"), "'backend-net' needs Docker"),
        (spec_with(security=SecuritySpec(cap_add=("NET_ADMIN",))), "cap_add needs Docker"),
        (spec_with(security=SecuritySpec(runtime="runsc")), "runtime needs Docker"),
        (spec_with(security=SecuritySpec(user="www-data")), "'www-data'"),
        (spec_with(security=SecuritySpec(user="0:0")), "asks for root"),
        (spec_with(mounts=(MountSpec(source="/usr", target="/a/../b"),)), "leads upwards"),
        (spec_with(mounts=(MountSpec(source="/nowhere/at/all", target="/a"),)), "/nowhere/at/all does not exist"),
        (spec_with(env={"A": "x\0--bind\0/\0/host"}), "NUL"),
        (spec_with(env={"A=B": "x"}), "NUL character, or a name in env an ="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.trio
async def test_what_it_cannot_do_is_refused_at_the_deploy(
    kind: ProcessKind, code: Path, spec: FunctionSpec, message: str
) -> None:
    backend = ProcessBackend(kind.daemon_id, kind.state_dir)
    with pytest.raises(ArtifactError, match=message) as caught:
        await backend.resolve(spec, str(code), lambda line: None)
    assert caught.value.hint


@pytest.mark.trio
async def test_the_user_of_the_spec_is_taken(kind: ProcessKind, tmp_path: Path) -> None:
    code = make_code(tmp_path, "#!/bin/sh\nid -u; id -g\nsleep 1000\n")
    for sandbox in ("bwrap", "unshare"):
        printed = Printed()
        async with opened(kind, Variant(sandbox, os.geteuid() == 0)) as backend:
            revision = await make(backend, code, security=SecuritySpec(user="1234:4321"))
            running = await backend.start(request(revision, "i1", printed))
            await printed.has(b"1234\n4321\n")
            await running.stop(0)


def without(program: str) -> Callable[..., str | None]:
    real = shutil.which
    return lambda name, *rest, **options: None if name == program else real(name, *rest, **options)


@pytest.mark.trio
async def test_auto_takes_the_next_best_and_says_why(kind: ProcessKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool.backends.process.shutil.which", without("bwrap"))
    async with ProcessBackend(kind.daemon_id, kind.state_dir) as backend:
        facts = await backend.describe()
    assert facts["sandbox"] == "unshare"
    assert facts["no bwrap"] == "bubblewrap is not installed"


@pytest.mark.trio
async def test_what_was_asked_for_and_is_not_there_is_an_error(
    kind: ProcessKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pool.backends.process.shutil.which", without("bwrap"))
    with pytest.raises(BackendUnavailable, match="bubblewrap is not installed") as caught:
        await ProcessBackend(kind.daemon_id, kind.state_dir, sandbox="bwrap").__aenter__()
    assert "install bubblewrap" in caught.value.hint


@pytest.mark.trio
async def test_leaving_the_backend_ends_what_still_runs(kind: ProcessKind, code: Path) -> None:
    async with ProcessBackend(kind.daemon_id, kind.state_dir) as backend:
        running = await backend.start(request(await make(backend, code), DAEMON=kind.daemon_id))
        (await connect(running)).close()
    assert running.exited
    assert await trio.to_thread.run_sync(kind.leftovers) == []


CRASHING_DAEMON = """
import os, signal, sys, trio
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from backend_kinds import ProcessKind, connect, make, make_code, request

async def main():
    kind = ProcessKind(sys.argv[3], Path(sys.argv[4]))
    async with kind.open() as backend:
        running = await backend.start(request(await make(backend, make_code(kind.state_dir)), DAEMON=kind.daemon_id))
        (await connect(running)).close()
        if running.can_freeze and sys.argv[5] == "frozen":
            await running.freeze()
        os.kill(os.getpid(), signal.SIGKILL)

trio.run(main)
"""


@pytest.mark.parametrize("state", ["running", "frozen"])
@pytest.mark.trio
async def test_a_killed_daemon_leaves_nothing_that_the_next_does_not_remove(
    kind: ProcessKind, tmp_path: Path, state: str
) -> None:
    tests = Path(__file__).parent
    arguments = [str(tests.parent), str(tests), kind.daemon_id, str(tmp_path), state]
    with trio.fail_after(60):
        done = await trio.run_process(
            [sys.executable, "-c", CRASHING_DAEMON, *arguments], check=False, capture_stderr=True
        )
    assert done.returncode == -9, done.stderr.decode()
    async with kind.open() as backend:
        assert await backend.find() == []
        with trio.fail_after(20):
            while await trio.to_thread.run_sync(kind.leftovers):
                await trio.sleep(0.01)
