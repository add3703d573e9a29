"""poolbench overhead, and the function that it measures."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
from click.testing import CliRunner

from bench import cli, overhead
from bench.asker import Asker, NoAnswer
from bench.overhead import Program, Series, TargetFailed, order_of, printing_server, rows_of
from bench.target import parse_target

# The function that is measured


@pytest.fixture
def function_address() -> Iterator[str]:
    command = [sys.executable, "-m", "bench.function_server"]
    with printing_server(command, {**os.environ, "HOST": "127.0.0.1", "PORT": "0"}) as program:
        yield program.url.removeprefix("http://").rstrip("/")


def test_the_function_answers_whatever_is_asked(function_address: str) -> None:
    asker = Asker(parse_target(f"http://{function_address}/"))
    for method, body in (("GET", b""), ("POST", b"x" * 500_000), ("GET", b"")):
        answer = asker.ask(method, "/", body)
        assert (answer.status, answer.body) == (200, b"poold\n")
        assert answer.latency_ms > 0
    asker.close()


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n", 2),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n", 2),
        (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 0),
    ],
)
def test_the_function_reads_requests_properly(function_address: str, sent: bytes, answers: int) -> None:
    host, _, port = function_address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    assert data.count(b"HTTP/1.1 200 OK") == answers
    assert data.count(b" 400 ") == (0 if answers else 1)


def test_an_answer_that_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort")

        thread = threading.Thread(target=serve)
        thread.start()
        asker = Asker(parse_target(f"http://127.0.0.1:{listener.getsockname()[1]}/"))
        with pytest.raises(NoAnswer, match="whole answer"):
            asker.ask("GET", "/")
        thread.join()


# Comparing


def test_nobody_always_comes_first() -> None:
    assert {order_of(number)[0] for number in range(3)} == set(overhead.TARGETS)
    assert all(set(order_of(number)) == set(overhead.TARGETS) for number in range(3))


def series(p50_ms: list[float], requests_per_s: list[float], cpu: float = 0.5) -> Series:
    return Series(p50_ms, [2 * value for value in p50_ms], requests_per_s, [cpu] * len(p50_ms), p50_ms)


def test_the_result_of_overhead_has_a_stable_shape() -> None:
    targets = {"direct": series([0.05, 0.1], [16000, 8000]), "proxy": series([0.1, 0.2], [8000, 4000])}
    targets["poold"] = series([0.15, 0.3], [6000, 2000])
    (row,) = rows_of({1: targets})
    assert list(row) == ["connections", "direct", "proxy", "poold", "ratios"]
    assert list(row["poold"]) == ["p50_ms", "p99_ms", "requests_per_s", "generator_cpu", "cpu_us"]
    assert list(row["ratios"]) == ["poold/proxy", "poold/direct", "proxy/direct"]
    assert row["ratios"]["poold/proxy"] == {"p50_ms": 1.5, "p99_ms": 1.5, "requests_per_s": 0.625, "cpu_us": 1.5}
    assert overhead.warnings({1: targets}) == []
    targets["direct"] = series([0.05], [16000], cpu=0.99)
    (warning,) = overhead.warnings({1: targets})
    assert "direct at 1" in warning


def test_a_program_that_does_not_start() -> None:
    with (
        pytest.raises(TargetFailed, match="did not start"),
        printing_server([sys.executable, "-c", "print('no')"]),
    ):
        pytest.fail("it did not start")


def test_a_target_that_fails_is_no_measurement() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        program = Program(f"http://127.0.0.1:{reserved.getsockname()[1]}/", psutil.Process())
        with pytest.raises(TargetFailed, match="connect"):
            overhead.one(program, 1, 0.05, Series())


def test_overhead_with_a_poold_of_its_own() -> None:
    before = {child.pid for child in psutil.Process().children()}
    result = CliRunner().invoke(cli.main, ["overhead", "--backend", "process", "--rounds", "1", "-d", "0.05", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert [row["connections"] for row in shown["rows"]] == [1, 8, 32]
    assert shown["rows"][0]["ratios"]["poold/proxy"]["p50_ms"] > 0
    assert {child.pid for child in psutil.Process().children()} <= before
