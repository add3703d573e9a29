"""A function's life in a running daemon: kinds of start, redeploys, scaling, logs, the breaker."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from daemon_bystander import Bystander
from daemon_kit import ROOT, Poold
from daemon_reply import Reply
from daemon_waiting import background, wait_until
from pool_docker_kit import busybox_tar, import_image

from gateway.client import function_path
from gateway.client_errors import RequestFailed

ONE = {"min": 1, "max": 1}
FEW = {"max": 1}


@pytest.fixture(scope="module", params=["process", "docker"])
def daemon(request: pytest.FixtureRequest) -> Iterator[tuple[Poold, Bystander]]:
    host = request.getfixturevalue("docker_host") if request.param == "docker" else ""
    with Poold(request.param, host) as poold:
        yield poold, Bystander(poold)


@pytest.fixture
def poold(daemon: tuple[Poold, Bystander]) -> Iterator[Poold]:
    """The daemon; after each test the other function must have gone on, and nothing else be left."""
    poold, bystander = daemon
    bystander.check()
    yield poold
    bystander.alone()


# --- kinds of start ---


def test_a_cold_start_then_a_warm_one(poold: Poold) -> None:
    poold.deploy("f", "counter", pool={**FEW, "freeze_after_s": None})
    first, second = poold.ask("f"), poold.ask("f")
    assert (first.start_kind, second.start_kind) == ("cold", "warm")
    assert first.body.split()[0] == second.body.split()[0]
    stages = [part.split(";")[0] for part in first.headers["server-timing"].split(", ")]
    assert stages == ["queue", "start", "connect", "init", "run"]


def test_a_prewarmed_start_then_a_thawed_one(poold: Poold) -> None:
    """Frozen as soon as it rests: the first use is prewarmed all the same, the second has to be thawed."""
    poold.deploy("f", "counter", pool={**ONE, "freeze_after_s": 0})
    poold.until_idle("f", 1, "frozen")
    first = poold.ask("f")
    assert first.start_kind == "prewarmed"
    assert "thaw;dur=" in first.headers["server-timing"]
    poold.until_idle("f", 1, "frozen")
    second = poold.ask("f")
    assert second.start_kind == "thawed"
    assert "thaw;dur=" in second.headers["server-timing"]
    assert first.body.split()[0] == second.body.split()[0]
    totals = poold.info("f")["totals"]
    assert totals == {"warm": 0, "thawed": 1, "prewarmed": 1, "cold": 0}


def test_an_event_function_with_an_initializer(poold: Poold) -> None:
    """The example a newcomer begins with, by poolctl."""
    done = poold.ctl("deploy", str(ROOT / "examples/python-event"))
    assert done.returncode == 0, done.stderr
    done = poold.ctl("invoke", "python-event", "-d", '{"text": "to be or not to be"}')
    assert done.returncode == 0, done.stderr
    assert b'"to": 2' in done.stdout
    assert b'"initialized": true' in done.stdout
    refused = poold.ctl("invoke", "python-event", "-d", "no JSON")
    assert refused.returncode == 1
    (row,) = (row for row in poold.call("GET", "/v1/functions")["functions"] if row["name"] == "python-event")
    assert row["errors"] == 1


# --- redeploying ---


class Load:
    """Invokes one function without a pause, from several threads, until told to stop."""

    def __init__(self, poold: Poold, name: str, threads: int = 3) -> None:
        self._poold, self._name, self._threads = poold, name, threads
        self._stop = threading.Event()
        self.replies: list[Reply] = []

    def run(self) -> None:
        while not self._stop.is_set():
            self.replies.append(self._poold.ask(self._name))

    def seen(self) -> set[bytes]:
        """The instances that have answered so far."""
        return {reply.body.split()[0] for reply in list(self.replies)}

    def begin(self, submit: Any) -> list[Future[Any]]:
        return [submit(self.run) for _ in range(self._threads)]

    def end(self) -> None:
        self._stop.set()


def test_a_redeploy_under_load_fails_nobody(poold: Poold) -> None:
    poold.deploy("f", "counter", pool={"min": 1, "max": 2}, env={"V": "1"})
    old = {one["id"] for one in poold.until_idle("f")}
    load = Load(poold, "f")
    with background() as submit:
        futures = load.begin(submit)
        try:
            wait_until(lambda: len(load.replies), lambda count: count > 20, what="answers of the old revision")
            before = load.seen()
            result = poold.deploy("f", "counter", pool={"min": 1, "max": 2}, env={"V": "2"})
            assert (result["outcome"], result["ready"]) == ("updated", True)
            answered = len(load.replies)
            wait_until(lambda: len(load.replies), lambda count: count > answered + 20, what="the new one's")
        finally:
            load.end()
        for future in futures:
            future.result()
    assert {reply.status for reply in load.replies} == {200}
    assert before < load.seen()
    remaining = poold.until("f", lambda found: all(one["revision"] == result["revision"] for one in found))
    assert not old & {one["id"] for one in remaining}


@pytest.mark.parametrize("code", ["exits-at-once", "not-executable"])
def test_a_bad_redeploy_keeps_the_old_revision(poold: Poold, code: str) -> None:
    first = poold.deploy("f", "counter", pool=ONE)
    before = poold.ask("f").body.split()[0]
    with pytest.raises(RequestFailed) as caught:
        poold.deploy("f", code, pool=ONE)
    assert caught.value.status == 422
    reply = poold.ask("f")
    assert (reply.status, reply.body.split()[0]) == (200, before)
    assert poold.info("f")["revision"] == first["revision"]
    assert len(poold.until_idle("f")) == 1


def test_the_same_again_changes_nothing(poold: Poold) -> None:
    first = poold.deploy("f", "counter", pool=ONE)
    before = poold.ask("f").body.split()[0]
    again = poold.deploy("f", "counter", pool=ONE)
    assert (again["outcome"], again["revision"]) == ("unchanged", first["revision"])
    assert poold.ask("f").body.split()[0] == before


# --- steering ---


def test_scaling(poold: Poold) -> None:
    poold.deploy("f", "counter", pool={"max": 3})
    assert poold.instances("f") == []
    poold.call("POST", function_path("f", "scale"), {"min": 2})
    poold.until_idle("f", 2)
    done = poold.ctl("scale", "f", "--min", "0", "--max", "1")
    assert done.returncode == 0, done.stderr
    poold.until_idle("f", 1)
    assert (poold.info("f")["min"], poold.info("f")["max"]) == (0, 1)


def test_recycling(poold: Poold) -> None:
    poold.deploy("f", "counter", pool=ONE)
    (before,) = poold.until_idle("f")
    poold.call("POST", function_path("f", "recycle"))
    after = poold.until("f", lambda found: [one["state"] in ("idle", "frozen") for one in found] == [True])
    if after[0]["id"] == before["id"]:
        after = poold.until("f", lambda found: len(found) == 1 and found[0]["id"] != before["id"])
    poold.until_idle("f")
    assert poold.ask("f").body.split()[1] == b"1"


def test_max_uses(poold: Poold) -> None:
    poold.deploy("f", "counter", pool={**FEW, "max_uses": 2})
    answers = [poold.ask("f").body.split() for _ in range(4)]
    assert [count for _, count in answers] == [b"1", b"2", b"1", b"2"]
    assert len({instance for instance, _ in answers}) == 2


def test_keep_alive_runs_out(poold: Poold) -> None:
    poold.deploy("f", "counter", pool={**FEW, "keepalive_s": 0.2})
    assert poold.ask("f").status == 200
    poold.until_idle("f", 0)
    assert poold.ask("f").start_kind == "cold"


def test_the_breaker_is_closed_by_hand(poold: Poold) -> None:
    poold.deploy("f", "exits-at-once")
    reply = wait_until(lambda: poold.ask("f"), lambda reply: reply.status == 503, what="the breaker")
    assert reply.error["code"] == "crash_loop"
    assert poold.ctl("reset", "f").returncode == 0
    assert poold.ask("f").error["code"] == "start_failed"


@pytest.mark.parametrize("state", ["idle", "frozen"])
def test_a_floor_instance_that_dies_is_replaced(poold: Poold, state: str) -> None:
    poold.deploy("f", "counter", pool={**ONE, "freeze_after_s": 0 if state == "frozen" else None})
    (before,) = poold.until_idle("f", 1, state)
    if poold.backend == "docker":
        (container,) = (one["Id"] for one in poold.containers() if "-f-" in one["Names"][0])
        poold.engine("kill", container)
    else:
        os.kill(before["pid"], signal.SIGKILL)
        if state == "frozen":
            poold.ask("f")  # under cgroup v1 a frozen process ends only when it is thawed
    wait_until(
        lambda: poold.instances("f"),
        lambda found: [one["state"] in ("idle", "frozen") and one["id"] != before["id"] for one in found] == [True],
        what="its successor",
        timeout_s=5,
    )
    assert poold.ask("f").start_kind == "prewarmed"


def test_an_image_is_a_function_too(poold: Poold) -> None:
    """A new image under the same name is a new revision; poold starts what the digest says."""
    if poold.backend != "docker":
        with pytest.raises(RequestFailed, match="needs Docker"):
            poold.deploy("image", None, image="any:1")
        return
    name = f"{poold.network}:1"
    images = []
    try:
        for text in ("first", "second"):
            data = busybox_tar(page=text)
            images.append(import_image(poold.docker_host, name, data, ['CMD ["/busybox","httpd","-f","-p","8080"]']))
            outcome = poold.deploy("image", None, image=name, pool=ONE)["outcome"]
            assert outcome == ("created" if text == "first" else "updated")
            reply = poold.ask("image", "/page")
            assert (reply.status, reply.body, reply.start_kind) == (200, text.encode(), "prewarmed")
        poold.remove("image")
        poold.until("image", lambda found: not found)
    finally:
        for image in images:
            poold.engine("remove_image", image, force=True)


# --- logs ---


def test_logs_are_followed_and_belong_to_their_invocation(poold: Poold) -> None:
    poold.deploy("f", "echo", pool=ONE)
    with poold.follow("f") as followed:
        lines = followed.lines()
        for _ in range(3):
            reply = poold.ask("f")
            called = reply.headers["x-poold-invocation"]
            line = next(lines)
            assert (line["text"], line["invocation"], line["stream"]) == (f"served {called}", called, "stdout")
    assert [line["text"] for line in poold.logs("f", f"&invocation={called}")] == [f"served {called}"]
    assert poold.logs("f", "&invocation=none") == []
    shown = poold.ctl("logs", "f")
    assert f"served {called}".encode() in shown.stdout


def test_a_function_that_is_removed_leaves_no_logs_to_its_namesake(poold: Poold) -> None:
    poold.deploy("f", "echo", pool=ONE)
    poold.ask("f")
    wait_until(lambda: poold.logs("f"), bool, what="its output")
    poold.remove("f")
    poold.until("f", lambda found: not found)
    poold.deploy("f", "echo", pool=ONE)
    assert poold.logs("f") == []
