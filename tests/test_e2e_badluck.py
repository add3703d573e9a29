"""Code that fails in every way: the right status, words that help, the others untouched, nothing left over."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_bystander import Bystander
from daemon_kit import Poold
from daemon_waiting import background, wait_until

from gateway.client_errors import RequestFailed

ONE = {"min": 1, "max": 1}
FEW = {"max": 1}

HUNGRY = """#!/usr/bin/python3 -SE
import http.server, os

class Requests(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        kept = bytes(b"x" * 1_048_576 * int(self.path[1:]))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

http.server.HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Requests).serve_forever()
"""


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


def refused(poold: Poold, name: str, code: str | None, **spec: Any) -> RequestFailed:
    """A deployment that fails; it leaves no function behind."""
    with pytest.raises(RequestFailed) as caught:
        poold.deploy(name, code, **spec)
    assert poold.request("GET", f"/fn/{name}/").status == 404
    return caught.value


# --- what cannot be deployed ---


def test_a_bootstrap_that_is_missing(poold: Poold) -> None:
    error = refused(poold, "none", "no-bootstrap", pool=ONE)
    assert error.status == 422
    assert "bootstrap" in error.message
    assert error.hint


def test_a_bootstrap_that_is_not_executable(poold: Poold) -> None:
    error = refused(poold, "mode", "not-executable", pool=ONE)
    assert error.status == 422
    assert "executable" in error.message
    assert "chmod" in error.hint


def test_an_image_that_does_not_exist(poold: Poold) -> None:
    error = refused(poold, "image", None, image="poold-e2e-no-such-image:1", pool=ONE)
    assert error.status == 422
    assert "poold-e2e-no-such-image:1" in error.message
    assert error.hint


# --- what does not start ---


@pytest.mark.parametrize(
    ("code", "printed"), [("wrong-port", "listening on 8081"), ("never-listens", "still loading the model")]
)
def test_code_that_does_not_listen_where_it_should(poold: Poold, code: str, printed: str) -> None:
    error = refused(poold, code, code, pool=ONE, start_timeout_s=1.5)
    assert error.status == 422
    assert "not ready within 1.5 s" in error.message
    assert "8080" in error.hint
    assert printed in error.details[0]["log_tail"]


def test_code_that_exits_at_once(poold: Poold) -> None:
    error = refused(poold, "exits", "exits-at-once", pool=ONE)
    assert error.status == 422
    assert "exit code 3" in error.message
    assert "cannot find the settings file" in error.details[0]["log_tail"]


def test_code_of_the_fc_contract_that_does_not_start(poold: Poold) -> None:
    """In the words that Alibaba's own error has."""
    error = refused(poold, "fc", "exits-at-once", contract="fc", pool=ONE)
    assert error.status == 422
    assert "The CA's http server cannot be started" in error.message
    assert "cannot find the settings file" in error.message + str(error.details)


def test_a_deployment_whose_client_goes_away_is_undone(poold: Poold) -> None:
    digest = poold.upload("never-listens")
    spec = b'{"name": "left", "code": "code", "network": "none", "pool": {"min": 1}}'
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(poold.socket_path))
        head = f"PUT /v1/functions/left?code={digest} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(spec)}\r\n\r\n"
        sock.sendall(head.encode() + spec)
        poold.until("left", lambda found: len(found) == 1)
    poold.until("left", lambda found: not found)
    assert poold.request("GET", "/fn/left/").status == 404


def test_an_invocation_that_waits_for_a_start_that_fails(poold: Poold) -> None:
    poold.deploy("exits", "exits-at-once")
    reply = poold.ask("exits")
    assert reply.status == 502
    assert reply.error["code"] == "start_failed"
    assert "exit code 3" in reply.error["message"]
    assert "8080" in reply.error["hint"]
    assert "cannot find the settings file" in reply.error["details"][0]["log_tail"]
    # Tried again and again, it is not started any more for a while.
    reply = wait_until(lambda: poold.ask("exits"), lambda reply: reply.status != 502, what="the breaker")
    assert (reply.status, reply.error["code"]) == (503, "crash_loop")
    assert int(reply.headers["retry-after"]) >= 1
    assert "exit code 3" in reply.error["message"]
    assert poold.info("exits")["state"] == "failing"
    assert poold.info("exits")["breaker"]["failures"] >= 3


# --- what fails in mid-request ---


def test_code_that_exits_in_mid_request(poold: Poold) -> None:
    poold.deploy("exits", "exits-mid-request", pool=FEW)
    assert poold.ask("exits", body=b"stay").body == b"stayed"
    reply = poold.ask("exits", body=b"go")
    assert reply.status == 502
    assert reply.error["code"] == "instance_failed"
    assert "exit code 4" in reply.error["message"]
    assert "poolctl logs exits" in reply.error["hint"]
    again = poold.ask("exits", body=b"stay")
    assert (again.status, again.body) == (200, b"stayed")
    assert again.start_kind in ("cold", "prewarmed")
    assert "a fatal error in the middle of a request" in [line["text"] for line in poold.logs("exits")]


def test_code_that_exits_in_the_middle_of_its_answer(poold: Poold) -> None:
    """The answer had not begun to be sent on, or it breaks off: never does it look whole."""
    poold.deploy("exits", "exits-mid-request", pool=FEW)
    answer = poold.raw(b"POST /fn/exits/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\nhalf")
    if answer.startswith(b"HTTP/1.1 200"):
        assert b"content-length: 100" in answer.lower()
        assert answer.endswith(b"\r\n\r\nthe first of it")
    else:
        assert answer.startswith(b"HTTP/1.1 502")
    assert poold.ask("exits", body=b"stay").status == 200


def test_code_that_answers_garbage(poold: Poold) -> None:
    poold.deploy("garbage", "garbage", pool=FEW)
    reply = poold.ask("garbage")
    assert reply.status == 502
    assert reply.error["code"] == "bad_answer"
    assert "HTTP" in reply.error["message"]


def test_code_that_never_answers(poold: Poold) -> None:
    poold.deploy("never", "never-answers", pool=ONE, timeout_s=0.5)
    (before,) = poold.until_idle("never")
    reply = poold.ask("never")
    assert reply.status == 504
    assert reply.error["code"] == "invocation_timeout"
    assert "0.5 s" in reply.error["message"]
    assert "timeout_s" in reply.error["hint"]
    # The slot is free again on another instance, and the work has ended with the first.
    after = poold.until("never", lambda found: [one["state"] for one in found] in (["idle"], ["frozen"]))
    assert after[0]["id"] != before["id"]
    wait_until(lambda: os.path.exists(f"/proc/{before['pid']}"), lambda there: not there, what="the process's end")


def test_code_that_floods_its_output(poold: Poold) -> None:
    poold.deploy("flood", "floods-stdout", pool={**ONE, "freeze_after_s": None}, cpu=0.3)
    poold.deploy("calm", "counter", pool=ONE)
    assert poold.ask("flood").body == b"ok\n"
    assert poold.ask("calm").status == 200
    start_mb = poold.rss_mb()
    with poold.follow("flood") as followed:
        lines = followed.lines()
        for _ in range(2000):
            assert next(lines)["text"]
            assert next(lines)["stream"] in ("stdout", "stderr")
    for _ in range(50):
        assert poold.ask("calm").status == 200
    assert poold.ask("flood").status == 200
    assert poold.rss_mb() < start_mb + 40


def test_code_that_takes_more_memory_than_it_may(poold: Poold, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "bootstrap").write_text(HUNGRY)
    (tmp_path / "bootstrap").chmod(0o755)
    poold.deploy("hungry", tmp_path, memory_mb=32, pool=ONE)
    assert poold.ask("hungry", "/1").body == b"ok"
    reply = poold.ask("hungry", "/200")
    assert (reply.status, reply.error["code"]) == (502, "instance_failed")
    assert "out of memory" in reply.error["message"]
    assert poold.ask("hungry", "/1").body == b"ok"


# --- clients that go away ---


def test_a_client_that_goes_away_in_mid_request(poold: Poold) -> None:
    poold.deploy("slow", "slow", pool=FEW)
    assert poold.ask("slow").status == 200
    (before,) = poold.until_idle("slow")
    with poold.follow("slow") as followed:
        lines = followed.lines()
        with poold.connect() as sock:
            sock.sendall(b"GET /fn/slow/?s=3600 HTTP/1.1\r\nHost: x\r\n\r\n")
            while next(lines)["text"] != "sleeping 3600":
                pass
    assert poold.ask("slow").body == b"slept 0"
    (after,) = poold.until_idle("slow")
    assert after["id"] != before["id"]
    wait_until(lambda: os.path.exists(f"/proc/{before['pid']}"), lambda there: not there, what="the process's end")


def test_a_client_that_goes_away_while_it_waits(poold: Poold) -> None:
    poold.deploy("slow", "slow", pool=ONE)
    with background() as begin, poold.connect() as first:
        first.sendall(b"GET /fn/slow/?s=3600 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: poold.info("slow")["running"], lambda running: running == 1)
        with poold.connect() as second:
            second.sendall(b"GET /fn/slow/?s=3601 HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: poold.info("slow")["queued"], lambda queued: queued == 1)
        wait_until(lambda: poold.info("slow")["queued"], lambda queued: queued == 0)
        third = begin(poold.ask, "slow", "/?s=0")
        wait_until(lambda: poold.info("slow")["queued"], lambda queued: queued == 1)
        first.close()
        assert third.result().status == 200
    assert "sleeping 3601" not in [line["text"] for line in poold.logs("slow")]
