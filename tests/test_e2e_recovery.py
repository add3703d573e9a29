"""The daemon and its engine end, die and come back: what should stay is there again, and nothing else is."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Iterator

import pytest
from daemon_bystander import Bystander
from daemon_kit import Poold
from daemon_traces import instance_cgroups
from daemon_waiting import background, wait_until

from pool.backends.docker_container import LABEL_DAEMON
from scripts.engine import Engine

ONE = {"min": 1, "max": 1}
BACKENDS = ["process", "docker"]


@pytest.fixture
def docker_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("docker_host"))


def host_of(backend: str, request: pytest.FixtureRequest) -> str:
    """An engine is only started where it is needed."""
    return str(request.getfixturevalue("docker_host")) if backend == "docker" else ""


@pytest.fixture(params=BACKENDS)
def poold(request: pytest.FixtureRequest) -> Iterator[Poold]:
    with Poold(request.param, host_of(request.param, request)) as poold:
        yield poold


def containers_by_instance(poold: Poold) -> dict[str, str]:
    """Container ids by the instances' names."""
    return {one["Names"][0]: one["Id"] for one in poold.containers()}


def run_to_its_end(poold: Poold) -> tuple[int, str]:
    """Start a daemon that cannot run: its exit code, and what it said."""
    poold.write_config()
    code = poold.launch().wait(60)
    return code, poold.log()


# --- the end of the daemon ---


def test_functions_are_there_again_after_a_restart(poold: Poold) -> None:
    poold.deploy("warm", "counter", pool=ONE)
    poold.deploy("cold", "echo")
    revisions = {name: poold.info(name)["revision"] for name in ("warm", "cold")}
    poold.restart()
    assert {name: poold.info(name)["revision"] for name in ("warm", "cold")} == revisions
    poold.until_idle("warm")
    assert poold.ask("warm").start_kind == "prewarmed"
    assert poold.ask("cold", body=b"again").body == b"again"


def test_sigterm_lets_what_runs_end(poold: Poold) -> None:
    poold.deploy("slow", "slow", pool=ONE)
    with background() as begin, poold.follow("slow") as followed:
        running = begin(poold.ask, "slow", "/?s=1")
        assert next(followed.lines())["text"] == "sleeping 1"
        poold.terminate()
        reply = running.result()
    assert (reply.status, reply.body) == (200, b"slept 1")
    assert poold.wait_exit() == 0
    assert poold.left_over() == []


def test_a_second_sigterm_cuts(poold: Poold) -> None:
    poold.deploy("slow", "slow", pool=ONE)
    with background() as begin, poold.follow("slow") as followed:
        running = begin(poold.ask, "slow", "/?s=3600")
        assert next(followed.lines())["text"] == "sleeping 3600"
        poold.terminate()
        wait_until(lambda: poold.logged("draining"), bool)
        poold.terminate()
        assert poold.wait_exit(20) == 0
        assert running.result().status == 502
    assert poold.left_over() == []


def test_the_drain_has_its_limit(request: pytest.FixtureRequest) -> None:
    with Poold("process", config={"daemon": {"drain_timeout_s": 0.5}}) as poold:
        poold.deploy("slow", "slow", pool=ONE)
        with background() as begin, poold.follow("slow") as followed:
            running = begin(poold.ask, "slow", "/?s=3600")
            assert next(followed.lines())["text"] == "sleeping 3600"
            poold.terminate()
            assert poold.wait_exit(20) == 0
            assert running.result().status == 502
        assert poold.logged("stopped")[0]["in_time"] is False


def test_draining_by_poolctl(poold: Poold) -> None:
    poold.deploy("f", "echo", pool=ONE)
    with poold.follow("f") as followed:
        done = poold.ctl("drain")
        assert done.returncode == 0, done.stderr
        assert list(followed.lines()) == []  # whoever follows logs does not hold up the end
    assert poold.wait_exit() == 0
    assert poold.left_over() == []


def test_a_killed_daemon_leaves_nothing_to_its_successor_that_it_does_not_own(docker_url: str) -> None:
    """kill -9 on docker: what is healthy and wanted is adopted with no cold start, the rest removed."""
    with Poold("docker", docker_url) as poold:
        poold.deploy("kept", "counter", pool={"min": 2, "max": 2})
        poold.deploy("orphan", "counter", pool=ONE)
        poold.until_idle("kept", 2)
        poold.ask("kept")
        before = containers_by_instance(poold)
        poold.kill()
        forget_function(poold, "orphan")
        poold.start()
        after = containers_by_instance(poold)
        assert after == {name: key for name, key in before.items() if "-kept-" in name}
        assert poold.logged("recovered")[-1]["adopted"] == 2
        assert poold.logged("recovered")[-1]["removed"] == 1
        replies = [poold.ask("kept") for _ in range(3)]
        assert all(reply.status == 200 and reply.start_kind != "cold" for reply in replies)
        assert poold.info("kept")["totals"]["cold"] == 0
        assert containers_by_instance(poold) == after
        poold.remove("kept")
        poold.until("kept", lambda found: not found)


def forget_function(poold: Poold, name: str) -> None:
    """Take a function out of the store of a daemon that is down, so that its instances are nobody's."""
    with contextlib.closing(sqlite3.connect(poold.directory / "state/poold.db")) as db, db:
        db.execute("DELETE FROM functions WHERE name=?", (name,))


def test_a_killed_daemons_processes_end_with_it() -> None:
    with Poold("process") as poold:
        poold.deploy("f", "counter", pool={"min": 2, "max": 2})
        pids = [one["pid"] for one in poold.until_idle("f", 2)]
        poold.kill()
        wait_until(lambda: [pid for pid in pids if os.path.exists(f"/proc/{pid}")], lambda left: not left)
        poold.start()
        poold.until_idle("f", 2)
        assert poold.ask("f").start_kind == "prewarmed"
        assert len({path.name for path in instance_cgroups(poold.daemon_id())}) in (0, 2)


def test_instances_that_are_kept_for_the_next_daemon(docker_url: str) -> None:
    with Poold("docker", docker_url, config={"daemon": {"on_exit": "keep"}}) as poold:
        poold.deploy("f", "counter", pool=ONE)
        instance, _ = poold.ask("f").body.split()
        poold.until_idle("f")
        before = containers_by_instance(poold)
        poold.restart()
        assert containers_by_instance(poold) == before
        reply = poold.ask("f")
        assert (reply.body.split()[0], reply.start_kind) == (instance, "thawed") or reply.start_kind in (
            "warm",
            "prewarmed",
        )
        assert reply.body.split() == [instance, b"2"]
        poold.write_config({"daemon": {"on_exit": "stop"}})
        poold.signal(signal.SIGHUP)
        wait_until(lambda: poold.logged("reloaded"), bool)


def test_two_daemons_do_not_share_a_state_directory() -> None:
    with Poold("process") as first:
        second = Poold("process", config={"daemon": {"state_dir": str(first.directory / "state")}})
        try:
            code, said = run_to_its_end(second)
            assert code == 1
            assert f"another poold (pid {first.status()['pid']})" in said
            assert "Traceback" not in said
        finally:
            shutil.rmtree(second.directory)
        assert first.request("GET", "/healthz").status == 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_signals_while_it_starts(backend: str, request: pytest.FixtureRequest) -> None:
    """From its first file on it hears them: it ends in order, and has nothing to reload yet."""
    with Poold(backend, host_of(backend, request)) as poold:
        poold.deploy("f", "echo", pool=ONE)
        poold.terminate()
        assert poold.wait_exit() == 0
        lock = poold.directory / "state/lock"
        lock.unlink()
        poold.launch()
        wait_until(lock.exists, bool)
        poold.signal(signal.SIGHUP)
        poold.terminate()
        assert poold.wait_exit() == 0
        assert poold.left_over() == []
        assert "Traceback" not in poold.log()


def test_a_port_that_is_taken() -> None:
    with Poold("process") as first:
        second = Poold("process", config={"http": {"listen": [f"127.0.0.1:{first.port}"]}})
        try:
            code, said = run_to_its_end(second)
            assert code == 1
            assert f"127.0.0.1:{first.port}" in said
            assert "Traceback" not in said
            assert second.left_over() == []
        finally:
            shutil.rmtree(second.directory)


# --- reloading ---


def test_a_valid_configuration_is_taken_and_an_invalid_one_refused() -> None:
    with Poold("process") as poold:
        bystander = Bystander(poold)
        assert poold.request("GET", "/v1/functions").status == 403
        poold.write_config({"http": {"admin_on_tcp": True, "max_header_count": 20}})
        poold.signal(signal.SIGHUP)
        wait_until(lambda: poold.logged("reloaded"), bool)
        assert poold.request("GET", "/v1/functions").status == 200
        assert poold.ask(bystander.NAME, headers={f"x-{n}": "1" for n in range(30)}).status == 431
        poold.write_config({"http": {"admin_on_tcpp": True, "max_header_count": "many"}})
        poold.signal(signal.SIGHUP)
        (refused,) = wait_until(lambda: poold.logged("not reloaded: the old configuration stays"), bool)
        assert "http.admin_on_tcpp" in refused["problem"]
        assert "http.max_header_count" in refused["problem"]
        assert poold.request("GET", "/v1/functions").status == 200
        assert any("admin_on_tcpp" in warning for warning in poold.status()["warnings"])
        poold.write_config({"limits": {"max_starts": 7}})
        poold.signal(signal.SIGHUP)
        wait_until(lambda: poold.status()["warnings"], lambda found: "limits.max_starts" in str(found))
        assert poold.status()["max_starts"] != 7
        bystander.check()


# --- the engine ---


def test_no_engine_where_one_is_asked_for() -> None:
    poold = Poold("docker", "unix:///no/such/docker.sock")
    try:
        code, said = run_to_its_end(poold)
        assert code == 1
        assert "unix:///no/such/docker.sock" in said
        assert "Traceback" not in said
        # What to do: start it, point elsewhere, or go without.
        assert "backend" in said
        assert "process" in said
    finally:
        shutil.rmtree(poold.directory)


def test_no_engine_where_none_is_needed() -> None:
    with Poold("auto", "unix:///no/such/docker.sock") as poold:
        status = poold.status()
        assert status["backend"] == "process"
        assert "unix:///no/such/docker.sock" in status["backend_reason"]
        poold.deploy("f", "echo")
        assert poold.ask("f", body=b"x").body == b"x"
        poold.docker_host = ""


def test_an_engine_that_is_there_is_taken(docker_url: str) -> None:
    with Poold("auto", docker_url) as poold:
        assert poold.status()["backend"] == "docker"
        # On a network this time, which is the daemon's own and goes with it.
        poold.deploy("f", "echo", network="bridge", pool=ONE)
        assert poold.ask("f", body=b"x").body == b"x"
        names = [one["Name"] for one in poold.engine("networks", filters={"label": LABEL_DAEMON})]
        assert poold.network in names


@pytest.fixture
def own_engine() -> Iterator[Engine]:
    with Engine(tempfile.mkdtemp(prefix="poold-e2e-"), own_rules=False) as engine:
        yield engine


def test_the_engine_restarts_under_a_running_daemon(own_engine: Engine) -> None:
    with Poold("docker", own_engine.url) as poold:
        poold.deploy("f", "counter", pool={"min": 2, "max": 2})
        poold.deploy("cold", "echo")
        poold.until_idle("f", 2)
        before = set(containers_by_instance(poold).values())
        own_engine.stop()
        wait_until(lambda: poold.status()["engine_problem"], bool, what="the loss to be seen")
        for name in ("f", "cold"):
            reply = poold.ask(name)
            assert (reply.status, reply.error["code"]) == (503, "backend_down")
            assert own_engine.url in reply.error["message"]
        assert poold.request("GET", "/healthz").status == 200
        own_engine.start()
        wait_until(lambda: poold.status()["engine_problem"], lambda problem: problem is None, timeout_s=30)
        poold.until_idle("f", 2)
        assert poold.ask("f").start_kind == "prewarmed"
        assert poold.ask("cold", body=b"x").body == b"x"
        after = containers_by_instance(poold)
        assert len(after) == 3
        assert not before & set(after.values())


def test_the_engine_crashes_and_what_runs_goes_on(own_engine: Engine) -> None:
    """Instances outlive their engine until it is back; invocations go on meanwhile."""
    with Poold("docker", own_engine.url) as poold:
        poold.deploy("f", "counter", pool=ONE)
        instance, _ = poold.ask("f").body.split()
        own_engine.kill()
        wait_until(lambda: poold.status()["engine_problem"], bool, what="the loss to be seen")
        reply = poold.ask("f")
        assert (reply.status, reply.body.split()[0]) == (200, instance)
        own_engine.start()
        wait_until(lambda: poold.status()["engine_problem"], lambda problem: problem is None, timeout_s=30)
        # The engine ended what ran before its crash.
        reply = wait_until(lambda: poold.ask("f"), lambda reply: reply.body.split()[:1] != [instance])
        wait_until(lambda: poold.ask("f").status, lambda status: status == 200)
        poold.until_idle("f")
        assert len(poold.containers()) == 1


def test_an_invocation_that_runs_when_the_engine_goes(own_engine: Engine) -> None:
    with Poold("docker", own_engine.url) as poold:
        poold.deploy("slow", "slow", pool=ONE)
        with background() as begin, poold.follow("slow") as followed:
            running = begin(poold.ask, "slow", "/?s=3600")
            assert next(followed.lines())["text"] == "sleeping 3600"
            own_engine.stop()
            assert running.result().status == 502
        own_engine.start()
        poold.until_idle("slow")
        assert poold.ask("slow").body == b"slept 0"
