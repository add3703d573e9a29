"""Requests that are too many or too large, specs that are wrong, doors that are closed: refused at once, in words."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator

import pytest
from daemon_bystander import Bystander
from daemon_kit import Poold
from daemon_waiting import background, wait_until

from gateway.client import function_path
from gateway.client_errors import RequestFailed

SMALL = {"http": {"max_header_count": 20, "max_header_bytes": 2048, "max_target_bytes": 512, "max_body_mb": 2}}
ONE = {"min": 1, "max": 1}


@pytest.fixture(scope="module")
def daemon() -> Iterator[tuple[Poold, Bystander]]:
    with Poold("process", config=SMALL) as poold:
        yield poold, Bystander(poold)


@pytest.fixture
def poold(daemon: tuple[Poold, Bystander]) -> Iterator[Poold]:
    """The daemon; after each test the other function must have gone on, and nothing else be left."""
    poold, bystander = daemon
    bystander.check()
    yield poold
    bystander.alone()


# --- specs ---


@pytest.mark.parametrize(
    ("line", "path", "word"),
    [
        ("memroy_mb: 64", "memroy_mb", "memory_mb"),
        ("memory_mb: lots", "memory_mb", "whole number"),
        ("memory_mb: -64", "memory_mb", "4"),
        ("pool: {min: -1}", "pool.min", "0"),
        ("timeout_s: [3]", "timeout_s", ""),
    ],
)
def test_a_spec_that_is_wrong(poold: Poold, line: str, path: str, word: str) -> None:
    text = f"# a comment\nname: wrong\ncode: .\n{line}\n"
    with poold._client.request("PUT", function_path("wrong"), body=text.encode()) as answer:
        assert answer.status == 400
        error = answer.failure()
    assert error.code == "invalid_spec"
    (problem,) = error.details
    assert (problem["line"], problem["path"]) == (4, path)
    assert word in problem["message"] + problem.get("hint", "")
    assert poold.request("GET", "/fn/wrong/").status == 404


def test_poolctl_says_where_a_spec_is_wrong(poold: Poold) -> None:
    done = poold.ctl("deploy", "-", stdin=b"name: wrong\nimage: x\nmemory_mb: -1\nportt: 80\n")
    assert done.returncode == 1
    said = done.stderr.decode()
    assert ":3: memory_mb" in said
    assert ":4: portt" in said
    assert "Traceback" not in said


# --- large requests ---


def test_a_header_over_the_limit(poold: Poold) -> None:
    for headers in ({"x-long": "a" * 3000}, {f"x-{n}": "a" for n in range(30)}):
        reply = poold.ask(Bystander.NAME, headers=headers)
        assert reply.status == 431
        assert reply.error["message"]
        assert reply.headers["connection"] == "close"


def test_a_target_over_the_limit(poold: Poold) -> None:
    reply = poold.ask(Bystander.NAME, "/" + "a" * 600)
    assert reply.status == 414
    assert reply.error["message"]


def test_a_head_that_never_ends_is_cut_when_it_is_too_long(poold: Poold) -> None:
    with poold.connect() as sock:
        # That the first request is answered shows that the beginning of the second has been read.
        begun = b"GET /fn/bystander/ HTTP/1.1\r\nHost: x\r\n"
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + begun)
        assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"x-a: bcdefghijkl\r\n" * 300)
        assert sock.recv(65_536).startswith(b"HTTP/1.1 431 ")


def test_a_declared_body_over_the_functions_limit_is_refused_before_it_is_sent(poold: Poold) -> None:
    poold.deploy("echo", "echo", max_body_mb=1, pool=ONE)
    with poold.connect() as sock:
        sock.sendall(b"POST /fn/echo/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n")
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 413
        assert b"echo" in answer.read()
        answer.close()
    assert poold.ask("echo", body=bytes(1_048_576)).status == 200
    assert poold.info("echo")["totals"]["cold"] == 0


def test_a_chunked_body_over_the_functions_limit(poold: Poold) -> None:
    poold.deploy("echo", "echo", max_body_mb=1, pool=ONE)
    pieces = [bytes(65_536)] * 16
    assert len(poold.ask("echo", body=iter(pieces)).body) == 1_048_576
    reply = poold.ask("echo", body=iter([*pieces, b"x"]))
    assert reply.status == 413
    assert "1048576" in reply.error["message"]
    assert poold.ask("echo", body=b"again").body == b"again"


def test_a_chunked_body_over_the_servers_limit(poold: Poold) -> None:
    poold.deploy("echo", "echo", pool=ONE)
    reply = poold.ask("echo", body=iter([bytes(65_536)] * 33))
    assert reply.status == 413
    assert poold.ask("echo", body=b"again").body == b"again"


def test_what_is_no_http_at_all(poold: Poold) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELO there\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        assert poold.raw(data).startswith(b"HTTP/1.1 400 "), data


def test_two_lengths_are_refused(poold: Poold) -> None:
    head = b"POST /fn/bystander/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert poold.raw(head + b"0\r\n\r\n").startswith(b"HTTP/1.1 400 ")


# --- many requests ---


def test_more_requests_than_slots_and_queue(poold: Poold) -> None:
    """What does not fit is refused at once; what fits is answered."""
    poold.deploy("slow", "slow", pool=ONE, queue={"max": 2})
    with background() as begin, poold.connect() as blocking:
        blocking.sendall(b"GET /fn/slow/?s=3600 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: poold.info("slow")["running"], lambda running: running == 1)
        waiting = [begin(poold.ask, "slow") for _ in range(2)]
        wait_until(lambda: poold.info("slow")["queued"], lambda queued: queued == 2)
        for _ in range(5):
            reply = poold.ask("slow")
            assert (reply.status, reply.error["code"]) == (429, "queue_full")
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.error["message"]
        assert not any(future.done() for future in waiting)
        blocking.close()
        assert [future.result().status for future in waiting] == [200, 200]
    assert poold.info("slow")["rejected_by_reason"] == {"queue_full": 5}


def test_no_queue_at_all(poold: Poold) -> None:
    poold.deploy("slow", "slow", pool=ONE, queue={"max": 0})
    with poold.connect() as blocking:
        blocking.sendall(b"GET /fn/slow/?s=3600 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: poold.info("slow")["running"], lambda running: running == 1)
        reply = poold.ask("slow")
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1


def test_a_place_in_the_queue_that_leads_to_nothing_in_time(poold: Poold) -> None:
    poold.deploy("slow", "slow", pool=ONE, queue={"timeout_s": 0.3})
    with poold.connect() as blocking:
        blocking.sendall(b"GET /fn/slow/?s=3600 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: poold.info("slow")["running"], lambda running: running == 1)
        reply = poold.ask("slow")
        assert (reply.status, reply.error["code"]) in ((503, "queue_timeout"), (503, "would_miss_deadline"))
        assert int(reply.headers["retry-after"]) >= 1


def test_a_function_larger_than_the_memory_there_is(poold: Poold) -> None:
    poold.deploy("huge", "echo", memory_mb=1_000_000)
    reply = poold.ask("huge")
    assert (reply.status, reply.error["code"]) == (503, "no_capacity")
    assert "MB" in reply.error["message"]


def test_one_functions_backlog_does_not_block_anothers_instance(poold: Poold) -> None:
    poold.deploy("slow", "slow", pool=ONE)
    poold.deploy("quick", "echo", pool=ONE)
    with background() as begin, poold.connect() as blocking:
        blocking.sendall(b"GET /fn/slow/?s=3600 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: poold.info("slow")["running"], lambda running: running == 1)
        waiting = [begin(poold.ask, "slow") for _ in range(10)]
        wait_until(lambda: poold.info("slow")["queued"], lambda queued: queued == 10)
        assert poold.ask("quick", body=b"now").body == b"now"
        blocking.close()
        assert {future.result().status for future in waiting} == {200}


def test_more_connections_than_there_may_be(poold: Poold) -> None:
    limits = {"http": {**SMALL["http"], "max_connections": 3}}
    with Poold("process", config=limits) as small:
        held = [small.connect() for _ in range(3)]
        try:
            for sock in held:  # each has been accepted when it is answered
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")
            reply = small.request("GET", "/healthz")
            assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
            assert reply.headers["retry-after"] == "1"
        finally:
            for sock in held:
                sock.close()
        wait_until(lambda: small.request("GET", "/healthz").status, lambda status: status == 200)


# --- closed doors ---


def test_an_unknown_function(poold: Poold) -> None:
    for target in ("/fn/nobody/", "/fn/nobody", "/v1/functions/nobody/invoke"):
        reply = poold.request("POST", target, body=b"")
        assert (reply.status, reply.error["code"]) == (404, "function_not_found")
        assert "nobody" in reply.error["message"]
        assert Bystander.NAME in reply.error["hint"]


def test_administration_over_tcp_is_refused(poold: Poold) -> None:
    """Whoever reaches the port may invoke, not deploy, remove, look or drain."""
    for method, path in (
        ("GET", "/v1/functions"),
        ("GET", "/v1/status"),
        ("PUT", "/v1/functions/x"),
        ("DELETE", f"/v1/functions/{Bystander.NAME}"),
        ("GET", f"/v1/functions/{Bystander.NAME}/logs"),
        ("POST", "/v1/drain"),
        ("PUT", "/v1/code"),
        ("GET", "/v1/journal"),
    ):
        reply = poold.request(method, path, body=b"" if method != "GET" else None)
        assert (reply.status, reply.error["code"]) == (403, "admin_refused"), path
        assert "admin_on_tcp" in reply.error["hint"]
    for path in ("/healthz", "/metrics", "/v1/openapi.json"):
        assert poold.request("GET", path).status == 200


def test_administration_over_tcp_where_it_is_allowed() -> None:
    with Poold("process", config={"http": {"admin_on_tcp": True}}) as poold:
        assert json.loads(poold.request("GET", "/v1/functions").body) == {"functions": []}


def test_a_host_that_is_not_ours() -> None:
    with Poold("process", config={"http": {"allowed_hosts": ["poold.example"]}}) as poold:
        assert poold.request("GET", "/healthz", headers={"Host": "rebound.example"}).status == 421
        assert poold.request("GET", "/healthz", headers={"Host": "poold.example:80"}).status == 200


def test_poolctls_exit_codes(poold: Poold) -> None:
    poold.deploy("fails", "exits-mid-request", pool=ONE)
    assert poold.ctl("invoke", "fails", "-d", "stay").returncode == 0
    failed = poold.ctl("invoke", "fails", "-d", "go")
    assert failed.returncode == 1
    assert b"error:" in failed.stderr
    assert poold.ctl("invoke").returncode == 2
    unknown = poold.ctl("invoke", "nobody")
    assert unknown.returncode == 4
    assert b"nobody" in unknown.stderr
    for command in (("ls",), ("ps",), ("status",), ("inspect", "fails"), ("logs", "fails"), ("--json", "ls")):
        assert poold.ctl(*command).returncode == 0, command
    assert poold.ctl("rm", "nobody").returncode == 4
    assert poold.ctl("-H", "unix:///no/such/socket", "ls").returncode == 3


def test_a_refusal_takes_no_time(poold: Poold) -> None:
    """A hundred refused at once, while something runs: none waits for anything."""
    poold.deploy("slow", "slow", pool=ONE, queue={"max": 0})
    with poold.connect() as blocking:
        blocking.sendall(b"GET /fn/slow/?s=3600 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: poold.info("slow")["running"], lambda running: running == 1)
        began_s = time.monotonic()
        for _ in range(100):
            assert poold.ask("slow").status == 429
        assert time.monotonic() - began_s < 10  # a queue's timeout would be 30 s for each


def test_an_invalid_scale(poold: Poold) -> None:
    with pytest.raises(RequestFailed) as caught:
        poold.call("POST", function_path(Bystander.NAME, "scale"), {"min": 5, "max": 2})
    assert caught.value.status == 400
    assert "5" in caught.value.message
