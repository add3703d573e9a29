"""poolctl invoke: what it sends, what it shows, what it exits with."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_fake_daemon import Canned, FakeDaemon, failing, running

from gateway import ctl

STARTED = [("X-Poold-Start", "cold"), ("Server-Timing", "queue;dur=0.010, start;dur=200.5, run;dur=1.5")]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running(tmp_path / "d.sock") as fake:
        fake.on("POST", "/v1/functions/hello/invoke", Canned(200, b'{"hi": 1}', STARTED))
        yield fake


def _invoke(daemon: FakeDaemon, *arguments: str) -> int:
    return ctl.run(["-H", daemon.host, "invoke", *arguments])


@pytest.mark.parametrize("option", ["-d", "-e", "--data"])
def test_an_event_is_posted_and_its_answer_printed_as_it_is(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert _invoke(daemon, "hello", option, '{"a": "ä"}') == 0
    assert daemon.seen[0].body == '{"a": "ä"}'.encode()
    assert daemon.seen[0].headers["content-type"] == "application/json"
    out, err = capsys.readouterr()
    assert (out, err) == ('{"hi": 1}', "")


def test_a_file_is_the_event(daemon: FakeDaemon, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    (tmp_path / "event").write_bytes(data)
    assert _invoke(daemon, "hello", "-f", str(tmp_path / "event")) == 0
    assert daemon.seen[0].body == data
    assert daemon.seen[0].headers["content-type"] == "application/octet-stream"
    assert daemon.seen[0].headers["content-length"] == "200000"  # not in chunks, which some servers do not read


def test_nothing_given_is_an_empty_event(daemon: FakeDaemon) -> None:
    assert _invoke(daemon, "hello") == 0
    assert daemon.seen[0].body == b""


def test_i_shows_status_headers_and_stage_times(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert _invoke(daemon, "-i", "hello") == 0
    out, err = capsys.readouterr()
    assert out.startswith("HTTP 200 OK\n")
    assert "X-Poold-Start: cold\n" in out
    assert out.endswith('\n\n{"hi": 1}')
    assert "cold start: queue 10 µs, start 200 ms, run 1.5 ms" in err


def test_json_holds_the_whole_answer(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("POST", "/v1/functions/binary/invoke", Canned(200, b"\xff\x00", STARTED))
    assert _invoke(daemon, "hello", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["status"], shown["start_kind"], shown["body"]) == (200, "cold", '{"hi": 1}')
    assert shown["stages_s"] == {"queue": 1e-05, "start": 0.2005, "run": 0.0015}
    assert _invoke(daemon, "binary", "--json") == 0
    assert base64.b64decode(json.loads(capsys.readouterr().out)["body_base64"]) == b"\xff\x00"


@pytest.mark.parametrize(
    ("arguments", "method", "body"),
    [
        (["--path", "/items?n=3"], "GET", b""),
        (["--path", "/items?n=3", "-d", "x"], "POST", b"x"),
        (["--path", "/items?n=3", "-X", "put", "-d", "x"], "PUT", b"x"),
        (["--path", "/items?n=3", "-X", "DELETE"], "DELETE", b""),
    ],
)
def test_a_path_is_passed_through(daemon: FakeDaemon, arguments: list[str], method: str, body: bytes) -> None:
    daemon.on(method, "/fn/hello/items", Canned(200, b"ok", STARTED))
    assert _invoke(daemon, "hello", *arguments, "--header", "X-A: b c", "--header", "Content-Type: text/x") == 0
    seen = daemon.seen[0]
    assert (seen.query, seen.body, seen.headers["x-a"]) == ({"n": "3"}, body, "b c")
    assert seen.headers["content-type"] == "text/x"


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ([*STARTED, ("X-Poold-Function-Error", "it raised")], 200, "it raised"),
        (STARTED, 500, "status 500"),
        (STARTED, 404, "status 404"),
    ],
)
def test_a_failed_function_is_1_and_its_answer_still_printed(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], headers: list[tuple[str, str]], status: int, words: str
) -> None:
    daemon.on("POST", "/v1/functions/hello/invoke", Canned(status, b"its own words", headers))
    assert _invoke(daemon, "hello") == 1
    out, err = capsys.readouterr()
    assert out == "its own words"
    assert words in err


@pytest.mark.parametrize(("status", "code"), [(404, 4), (429, 1), (503, 1), (504, 1)])
def test_an_error_of_pooolds_own_goes_to_stderr(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    daemon.on("POST", "/v1/functions/hello/invoke", failing(status, "x", "what was wrong", hint="what to do"))
    assert _invoke(daemon, "hello") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: what was wrong\nhint: what to do" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["hello", "-d", "x", "-f", "/dev/null"],
        ["hello", "-X", "PUT"],
        ["hello", "--path", "no-slash"],
        ["hello", "--header", "no colon"],
        ["hello", "--header", "bad name: x"],
        ["hello", "-f", "/nowhere"],
    ],
)
def test_what_cannot_be_sent_is_2(daemon: FakeDaemon, arguments: list[str]) -> None:
    assert _invoke(daemon, *arguments) == 2
    assert daemon.seen == []


def _process(daemon: FakeDaemon, *arguments: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "gateway.ctl", "-H", daemon.host, "invoke", *arguments]
    return subprocess.run(command, timeout=60, capture_output=True, check=False, **streams)  # type: ignore[call-overload,no-any-return] # streams by name


def test_what_is_piped_in_is_the_event(daemon: FakeDaemon) -> None:
    assert _process(daemon, "hello", input=b"piped").returncode == 0
    assert daemon.seen[0].body == b"piped"


def test_a_socket_as_standard_input_is_not_waited_for(daemon: FakeDaemon) -> None:
    one, other = socket.socketpair()
    with one, other:  # never closed by the other side, as a service's or a container's may be
        assert _process(daemon, "hello", stdin=one).returncode == 0
    assert daemon.seen[0].body == b""
