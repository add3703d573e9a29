"""The client against a daemon of canned answers, and against the ways in which none answers."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_fake_daemon import Canned, FakeDaemon, canned, failing, running

from gateway.client import Client, function_path
from gateway.client_errors import BadHost, ClientError, RequestFailed, Unreachable


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running(tmp_path / "d.sock") as fake:
        yield fake


def test_a_call_sends_json_and_returns_json(daemon: FakeDaemon) -> None:
    daemon.on("POST", "/v1/functions/a%20b/scale", canned({"ok": True}))
    assert Client(daemon.host).call("POST", function_path("a b", "scale"), body={"min": 2}) == {"ok": True}
    assert daemon.seen[0].body == b'{"min": 2}'
    assert daemon.seen[0].headers["content-type"] == "application/json"


def test_an_answer_without_content_is_none(daemon: FakeDaemon) -> None:
    daemon.on("DELETE", "/x", Canned(204))
    assert Client(daemon.host).call("DELETE", "/x") is None


def test_an_error_carries_everything_the_daemon_said(daemon: FakeDaemon) -> None:
    details = [{"line": 3, "path": "pool.min", "message": "is negative"}]
    daemon.on("GET", "/x", failing(400, "invalid_spec", "the spec is wrong", hint="mend it", details=details))
    with pytest.raises(RequestFailed) as caught:
        Client(daemon.host).call("GET", "/x")
    error = caught.value
    assert (error.status, error.code, error.message, error.hint) == (
        400,
        "invalid_spec",
        "the spec is wrong",
        "mend it",
    )
    assert error.details == details


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"[]", b'{"error": "text"}', b""])
def test_an_error_that_is_not_the_daemons_still_says_its_status(daemon: FakeDaemon, body: bytes) -> None:
    daemon.on("GET", "/x", Canned(502, body))
    with pytest.raises(RequestFailed, match="502"):
        Client(daemon.host).call("GET", "/x")


def test_an_answer_that_is_not_json_is_a_clear_error(daemon: FakeDaemon) -> None:
    daemon.on("GET", "/x", Canned(200, b"hello"))
    with pytest.raises(ClientError, match="not JSON"):
        Client(daemon.host).call("GET", "/x")


def test_lines_come_one_by_one_as_they_are_sent(daemon: FakeDaemon) -> None:
    gate = threading.Event()

    def parts() -> Iterator[bytes]:
        yield b'{"n": 1}\n{"n":'
        assert gate.wait(10)
        yield b" 2}\n\n"
        yield b'{"n": 3}'

    daemon.on("GET", "/lines", Canned(200, parts()))
    with Client(daemon.host).stream("GET", "/lines") as answer:
        lines = answer.lines()
        assert next(lines) == {"n": 1}  # while the second is not whole yet
        gate.set()
        assert list(lines) == [{"n": 2}, {"n": 3}]
    assert daemon.seen[0].headers["accept"] == "application/x-ndjson"


def test_a_refused_stream_raises(daemon: FakeDaemon) -> None:
    daemon.on("GET", "/lines", failing(404, "function_not_found", "no such function"))
    with pytest.raises(RequestFailed, match="no such function"):
        Client(daemon.host).stream("GET", "/lines")


def test_a_garbled_line_is_a_clear_error(daemon: FakeDaemon) -> None:
    daemon.on("GET", "/lines", Canned(200, [b"oops\n"]))
    with Client(daemon.host).stream("GET", "/lines") as answer, pytest.raises(ClientError, match="oops"):
        list(answer.lines())


@pytest.mark.parametrize("length", [None, 300_000])
def test_a_file_is_uploaded_whole(daemon: FakeDaemon, length: int | None) -> None:
    daemon.on("PUT", "/v1/code", canned({"digest": "d"}))
    data = bytes(range(250)) * 1200
    with Client(daemon.host).request("PUT", "/v1/code", body=io.BytesIO(data), length=length) as answer:
        assert answer.json() == {"digest": "d"}
    assert daemon.seen[0].body == data
    assert ("content-length" in daemon.seen[0].headers) == (length is not None)


def test_a_head_is_found_whatever_its_case(daemon: FakeDaemon) -> None:
    daemon.on("GET", "/x", Canned(200, b"", [("x-poold-start", "warm")]))
    with Client(daemon.host).request("GET", "/x") as answer:
        assert answer.header("X-Poold-Start") == "warm"
        assert answer.header("X-Other") == ""


def test_no_socket_says_that_poold_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match=r"does not answer at unix://.*is it running\?") as caught:
        Client(f"unix://{tmp_path}/none.sock").call("GET", "/")
    assert "systemctl start poold" in caught.value.hint


def test_a_socket_that_nobody_listens_on_says_so_too(tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(Unreachable, match="is it running"):
        Client(str(path)).call("GET", "/")


def test_a_closed_port_says_so_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(Unreachable, match=f"http://127.0.0.1:{port}"):
        Client(f"http://127.0.0.1:{port}").call("GET", "/")


def test_a_refused_socket_names_the_group() -> None:
    assert "group" in Client().lost(PermissionError(13, "Permission denied")).hint


def _serve_once(sock: socket.socket, answer: bytes) -> threading.Thread:
    def serve() -> None:
        connection, _ = sock.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a"',
    ],
)
def test_an_answer_cut_off_is_never_taken_for_a_whole_one(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = _serve_once(sock, answer)
        with pytest.raises(Unreachable):
            Client(f"http://127.0.0.1:{sock.getsockname()[1]}").call("GET", "/")
        thread.join()


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        client = Client(f"http://127.0.0.1:{sock.getsockname()[1]}", timeout_s=0.05)
        with pytest.raises(Unreachable, match="did not answer in time"):
            client.call("GET", "/")


@pytest.mark.parametrize("host", ["", "poold", "unix:relative", "ftp://x", "http://", "http://h:99999", "unix://h/p"])
def test_what_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(BadHost):
        Client(host)
