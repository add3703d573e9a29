"""The load generator: pacing, coordinated omission, percentiles by kind, errors by kind, what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from click.testing import CliRunner

from bench import cli, load
from bench.engine import Engine
from bench.latency import Recorder
from bench.link import UNTOLD, Link, Outcome
from bench.pacing import SECOND_NS
from bench.target import Plan

Serve = Callable[[trio.SocketStream, bytes, int], Awaitable[bool]]  # (stream, head, number) -> keep the connection


@asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[str]:
    """The URL of a small server."""
    number = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal number
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                part = await stream.receive_some()
                if not part:
                    return
                data += part
            head, _, data = data.partition(b"\r\n\r\n")
            number += 1
            if not await serve(stream, head, number):
                return

    async def client(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):  # a generator that ends closes what it has
                await answer(stream)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, client, listeners)
        with trio.fail_after(20):
            yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x?y=z"
        nursery.cancel_scope.cancel()


async def run(plan: Plan) -> Outcome:
    return await trio.to_thread.run_sync(Engine(plan).run)


def ok(kind: str = "", body: bytes = b"ok") -> bytes:
    told = f"X-Poold-Start: {kind}\r\n".encode() if kind else b""
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (told, len(body), body)


def fixed(data: bytes, *, keep: bool = True) -> Serve:
    async def serve(stream: trio.SocketStream, head: bytes, number: int) -> bool:
        await stream.send_all(data)
        return keep

    return serve


# What is due, and what came back


def engine_with(plan: Plan) -> Engine:
    engine = Engine(plan)
    engine.poll.close()
    engine._begin(0)
    return engine


def test_an_open_loop_takes_what_is_due_and_no_more() -> None:
    engine = engine_with(Plan(url="http://127.0.0.1:1/", rate=10, duration_s=1))
    at = 250_000_000
    assert [engine._take(at) for _ in range(4)] == [0, 100_000_000, 200_000_000, None]
    assert engine._next_due(at) == 300_000_000
    assert [engine._take(9 * SECOND_NS) for _ in range(8)][6:] == [900_000_000, None]
    assert engine._next_due(at) is None


def test_an_open_loop_gives_up_what_waited_its_whole_time() -> None:
    engine = engine_with(Plan(url="http://127.0.0.1:1/", rate=10, duration_s=1, timeout_s=0.5))
    engine._give_up(700_000_000)
    assert engine.outcome.errors == {"timeout": 3}  # due at 0, 100 and 200 ms
    assert engine._take(700_000_000) == 300_000_000


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (ok(), UNTOLD),
        (ok("warm"), "warm"),
        (b"HTTP/1.1 200 OK\r\nx-poold-start:cold\r\nCONTENT-LENGTH: 0\r\n\r\n", "cold"),
        (ok("warm")[:-1], None),  # not all of it
        (ok("warm") + b"x", None),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nok", None),
        (b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nok", None),
        (b"HTTP/1.1 200 OK\r\n\r\n", None),
    ],
)
def test_the_short_way_takes_only_what_is_ordinary(data: bytes, kind: str | None) -> None:
    engine = engine_with(Plan(url="http://127.0.0.1:1/"))
    assert engine.usual(data) == kind


def test_an_interim_answer_is_not_the_answer() -> None:
    link = Link()
    link.parser.feed_data(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    assert (link.status, link.complete) == (103, False)
    link.parser.feed_data(b"HTTP/1.1 200 OK\r\nX-Poold-Start: thawed\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert link.complete
    assert link.kind == "thawed"


# Against a server


@pytest.mark.trio
async def test_a_closed_loop_of_a_number_of_requests() -> None:
    heads: list[bytes] = []

    async def serve(stream: trio.SocketStream, head: bytes, number: int) -> bool:
        heads.append(head)
        await stream.send_all(ok("cold" if number == 1 else "warm"))
        return True

    async with served(serve) as url:
        outcome = await run(Plan(url=url, connections=3, requests=50, headers=[("X-A", "1")]))
    assert outcome.answers == len(heads) == 50
    assert {kind: recorder.summary()["count"] for kind, recorder in outcome.kinds.items()} == {"cold": 1, "warm": 49}
    assert outcome.errors == {}
    assert heads[0].startswith(b"GET /x?y=z HTTP/1.1\r\n")
    assert b"X-A: 1" in heads[0]


@pytest.mark.trio
async def test_an_open_loop_sends_what_is_due() -> None:
    async with served(fixed(ok())) as url:
        outcome = await run(Plan(url=url, connections=4, rate=400, duration_s=0.25))
    assert outcome.answers == 100
    assert outcome.lateness.summary()["count"] + outcome.waited == 100
    assert outcome.elapsed_s >= 0.2475  # the last one was due then


@pytest.mark.trio
async def test_coordinated_omission_is_not_committed() -> None:
    """One pause of 300 ms at 100 requests a second: some 30 requests were due in it, and each waited its part."""

    async def serve(stream: trio.SocketStream, head: bytes, number: int) -> bool:
        if number == 10:
            await trio.sleep(0.3)
        await stream.send_all(ok())
        return True

    async with served(serve) as url:
        outcome = await run(Plan(url=url, connections=1, rate=100, duration_s=1))
    (recorder,) = outcome.kinds.values()
    slow = sum(count for unit, count in recorder.counts().items() if unit >= 500_000)  # 50 ms
    assert outcome.answers == 100
    assert slow >= 20  # a generator that waits for its answer before it looks at the clock would see one
    assert outcome.waited >= 20


@pytest.mark.trio
@pytest.mark.parametrize(
    ("data", "keep", "error"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", True, "status_404"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False, "status_503"),
        (b"", False, "reset"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", False, "reset"),
        (b"pardon?\r\n\r\n", True, "bad_answer"),
    ],
)
async def test_errors_by_kind(data: bytes, keep: bool, error: str) -> None:
    async with served(fixed(data, keep=keep)) as url:
        outcome = await run(Plan(url=url, connections=2, requests=6))
    assert outcome.errors == {error: 6}
    assert outcome.answers == 0


@pytest.mark.trio
async def test_a_target_that_never_answers_is_a_timeout() -> None:
    async def serve(stream: trio.SocketStream, head: bytes, number: int) -> bool:
        await trio.sleep_forever()

    async with served(serve) as url:
        outcome = await run(Plan(url=url, connections=2, requests=2, timeout_s=0.05))
    assert outcome.errors == {"timeout": 2}


@pytest.mark.trio
async def test_nothing_listens() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/"
        outcome = await run(Plan(url=url, connections=2, requests=3))
    assert outcome.errors == {"connect": 3}


@pytest.mark.trio
@pytest.mark.parametrize(
    ("data", "keep"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (ok(), False),  # closes without having said so
        (ok(body=b"x" * 600_000), True),
    ],
)
async def test_every_shape_of_answer(data: bytes, keep: bool) -> None:
    async with served(fixed(data, keep=keep)) as url:
        outcome = await run(Plan(url=url, connections=1, requests=3))
    # A connection that closes unannounced may do so under the next request.
    assert outcome.answers + outcome.errors.pop("reset", 0) == 3
    assert outcome.answers >= 1
    assert outcome.errors == {}


@pytest.mark.trio
async def test_head_requests() -> None:
    async with served(fixed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")) as url:
        outcome = await run(Plan(url=url, method="HEAD", connections=1, requests=3))
    assert (outcome.answers, outcome.errors) == (3, {})


@pytest.mark.trio
async def test_a_large_body_is_sent_whole() -> None:
    size = 2_000_000
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    received = 0

    async def client(stream: trio.SocketStream) -> None:
        nonlocal received
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some()
        received = len(data.partition(b"\r\n\r\n")[2])
        while received < size:
            received += len(await stream.receive_some())
        await stream.send_all(ok())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, client, listeners)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        outcome = await run(Plan(url=url, method="PUT", body=b"x" * size, connections=1, requests=1))
        nursery.cancel_scope.cancel()
    assert outcome.answers == 1
    assert received == size


@pytest.mark.trio
async def test_a_unix_socket() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/s"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()

            def serve() -> None:
                sock, _ = listener.accept()
                with sock:
                    sock.recv(65536)
                    sock.sendall(ok("prewarmed"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, serve)
                outcome = await run(Plan(url=f"http+unix://{path}:/", connections=1, requests=1))
    assert list(outcome.kinds) == ["prewarmed"]


# What it comes to


def test_the_result_has_a_stable_shape() -> None:
    outcome = Outcome(answers=3, elapsed_s=1.5, cpu_s=0.3, errors={"timeout": 1})
    for kind, latency_ms in (("warm", 1), ("warm", 2), ("cold", 300)):
        outcome.kinds.setdefault(kind, Recorder()).record(latency_ms * 1_000_000)
    result = load.as_result(Plan(url="http://127.0.0.1:1/", rate=2, duration_s=1.5), outcome, 1)
    assert list(result) == [
        "poolbench",
        "schema",
        "machine",
        "url",
        "method",
        "loop",
        "rate",
        "connections",
        "processes",
        "elapsed_s",
        "answers",
        "requests_per_s",
        "latency_ms",
        "errors",
        "lateness_ms",
        "waited_for_connection",
        "unfinished",
        "generator_cpu",
        "warnings",
    ]
    assert (result["poolbench"], result["schema"], result["loop"]) == ("load", 1, "open")
    assert list(result["latency_ms"]) == ["all", "warm", "cold"]
    assert result["latency_ms"]["all"]["count"] == 3
    assert result["latency_ms"]["warm"]["max"] == pytest.approx(2, rel=0.01)
    assert {"cores", "kernel", "python"} <= set(result["machine"])
    json.dumps(result)


def test_a_generator_that_was_the_bottleneck_says_so() -> None:
    plan = Plan(url="http://127.0.0.1:1/", rate=100, duration_s=1)
    assert load.warnings(plan, Outcome(answers=1, elapsed_s=1.0, cpu_s=0.5)) == []
    (busy,) = load.warnings(plan, Outcome(answers=1, elapsed_s=1.0, cpu_s=0.95))
    assert "--processes" in busy
    late = Outcome(answers=1, elapsed_s=1.0)
    for _ in range(100):
        late.lateness.record(5_000_000)
    (warning,) = load.warnings(plan, late)
    assert "5.0 ms late" in warning
    (waited,) = load.warnings(plan, Outcome(answers=1, elapsed_s=1.0, waited=50))
    assert "--connections" in waited
    (nothing,) = load.warnings(plan, Outcome(errors={"connect": 5}, elapsed_s=1.0))
    assert "listen" in nothing


def test_outcomes_survive_the_way_between_processes() -> None:
    parts = []
    for latency_ns in (1_000_000, 2_000_000):
        outcome = Outcome(answers=1, elapsed_s=1.0, cpu_s=0.1, errors={"reset": 1}, waited=1)
        outcome.kinds["warm"] = Recorder()
        outcome.kinds["warm"].record(latency_ns)
        data = msgspec.msgpack.encode(load.pack(outcome))
        parts.append(msgspec.msgpack.decode(data, type=load.Counted))
    whole = load.combine(parts)
    assert (whole.answers, whole.errors, whole.waited, whole.cpu_s) == (2, {"reset": 2}, 2, 0.1)
    assert whole.kinds["warm"].summary()["count"] == 2


@pytest.mark.trio
async def test_several_processes_share_the_requests() -> None:
    async with served(fixed(ok("warm"))) as url:
        plan = Plan(url=url, connections=4, requests=41)
        outcome = await trio.to_thread.run_sync(load.run, plan, 2)
    assert outcome.answers == 41


@pytest.mark.trio
async def test_ctrl_c_prints_what_there_is() -> None:
    interrupted = trio.Event()

    async def serve(stream: trio.SocketStream, head: bytes, number: int) -> bool:
        if number > 20:
            interrupted.set()
        await stream.send_all(ok("warm"))
        return True

    async with served(serve) as url:
        command = [sys.executable, "-m", "bench.cli", "load", url, "-d", "60", "-c", "2", "--json"]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        await interrupted.wait()
        process.send_signal(signal.SIGINT)
        output = b"".join([part async for part in process.stdout])
        assert await process.wait() == 0
        await process.stdout.aclose()
    result = json.loads(output)
    assert result["answers"] >= 20
    assert result["elapsed_s"] < 60


# The command


def test_the_command_says_what_is_wrong() -> None:
    runner = CliRunner()
    for arguments, said in (
        (["ftp://x/"], "http://HOST:PORT/PATH"),
        (["http://127.0.0.1:1/", "-H", "nonsense"], "NAME: VALUE"),
        (["http://127.0.0.1:1/", "--rate", "0"], "--rate"),
        (["http://127.0.0.1:1/", "--body", "a", "--body-file", os.devnull], "cannot both"),
    ):
        result = runner.invoke(cli.main, ["load", *arguments])
        assert result.exit_code != 0
        assert said in result.output
        assert "Traceback" not in result.output


def test_the_command_prints_a_table_and_fails_without_answers() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/"
        result = CliRunner().invoke(cli.main, ["load", url, "-n", "2", "-c", "1"])
    assert result.exit_code == 1
    assert "connect 2" in result.output
    assert "cores" in result.output
