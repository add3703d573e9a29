"""HTTP as clients speak it: what passes through to a function, streams, connections kept and closed."""

from __future__ import annotations

import hashlib
import http.client
import socket
import time
from collections.abc import Iterator

import pytest
from daemon_bystander import Bystander
from daemon_kit import Poold
from daemon_waiting import wait_until

MEGABYTE = bytes(range(256)) * 4096
ONE = {"min": 1, "max": 1}


@pytest.fixture(scope="module")
def poold() -> Iterator[Poold]:
    """One daemon with the functions of this file; at the end everything must be as it began."""
    with Poold("process", config={"http": {"max_body_mb": 128}}) as poold:
        bystander = Bystander(poold)
        poold.deploy("echo", "echo", pool=ONE, concurrency=8)
        poold.deploy("streaming", "streaming", pool=ONE, concurrency=8, max_body_mb=100)
        poold.deploy("big", "big", pool=ONE, concurrency=8)
        poold.deploy("deaf", "never-answers", pool=ONE, timeout_s=3)
        yield poold
        bystander.alone()


class Conversation:
    """A bare connection, and answers read from it one after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")

    def send(self, text: str, body: bytes = b"") -> None:
        self.sock.sendall(text.replace("\n", "\r\n").encode() + body)

    def head(self) -> tuple[int, dict[str, str]]:
        status = int(self.file.readline().split()[1])
        headers = {}
        while (line := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, b"".join(self.chunks())
        return status, headers, self.file.read(int(headers.get("content-length", 0)))

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.file.readline(), 16):
            yield self.file.read(size)
            self.file.readline()
        self.file.readline()

    def ended(self) -> bool:
        return self.file.read() == b""


@pytest.fixture
def talk(poold: Poold) -> Iterator[Conversation]:
    with poold.connect() as sock:
        conversation = Conversation(sock)
        with conversation.file:
            yield conversation


# --- passing through ---


def test_everything_passes_through(poold: Poold) -> None:
    reply = poold.ask("echo", "/a/b%20c//d?x=1&y=%2F", method="PATCH", body=b"\x00\xff body", headers={"X-Own": "kept"})
    assert reply.body == b"\x00\xff body"
    assert reply.headers["x-method"] == "PATCH"
    assert reply.headers["x-target"] == "/a/b%20c//d?x=1&y=%2F"
    head = poold.ask("echo", "/head", headers={"X-Own": "kept", "Accept": "text/html"}).body.decode().lower()
    assert "x-own: kept\r\n" in head
    assert "accept: text/html\r\n" in head


def test_the_functions_own_status_is_the_answers(poold: Poold) -> None:
    for status in (201, 302, 404, 418, 500, 503):
        assert poold.ask("echo", f"/?status={status}").status == status


def test_a_path_of_the_function_alone(poold: Poold) -> None:
    assert poold.ask("echo", "").headers["x-target"] == "/"
    assert poold.request("GET", "/fn/echo?x=1").headers["x-target"] == "/?x=1"


def test_each_reply_says_how_it_started_and_where_its_time_went(poold: Poold) -> None:
    poold.ask("echo")
    reply = poold.ask("echo")
    assert reply.start_kind in ("warm", "thawed")
    stages = dict(part.split(";dur=") for part in reply.headers["server-timing"].split(", "))
    assert {"queue", "run"} <= stages.keys()
    assert all(0 <= float(value) < 30_000 for value in stages.values())
    assert reply.headers["x-poold-invocation"] == reply.headers["x-call-id"]
    assert poold.ask("echo").headers["x-poold-invocation"] != reply.headers["x-poold-invocation"]


def test_what_poold_adds_cannot_be_forged(poold: Poold) -> None:
    reply = poold.ask("echo", headers={"X-Poold-Invocation": "mine"})
    assert reply.headers["x-call-id"] == reply.headers["x-poold-invocation"] != "mine"


# --- methods and answers without a body ---


def test_head(talk: Conversation) -> None:
    talk.send("HEAD /fn/big/?mb=1 HTTP/1.1\nHost: x\n\n")
    # The function under test sends a body all the same, which is the instance's fault; echo does not.
    status, _ = talk.head()
    assert status in (200, 502)
    talk.send("HEAD /fn/echo/ HTTP/1.1\nHost: x\n\n")
    status, headers = talk.head()
    assert (status, headers["content-length"], headers["x-method"]) == (200, "0", "HEAD")
    talk.send("GET /healthz HTTP/1.1\nHost: x\n\n")
    assert talk.answer()[0] == 200


def test_no_content(talk: Conversation) -> None:
    talk.send("GET /fn/echo/?status=204 HTTP/1.1\nHost: x\n\n")
    status, headers = talk.head()
    assert status == 204
    assert "content-length" not in headers
    assert "transfer-encoding" not in headers
    talk.send("GET /fn/echo/ HTTP/1.1\nHost: x\n\n")
    assert talk.answer()[0] == 200


def test_not_modified(talk: Conversation) -> None:
    talk.send("GET /fn/echo/?status=304 HTTP/1.1\nHost: x\n\n")
    assert talk.head()[0] == 304
    talk.send("GET /fn/echo/ HTTP/1.1\nHost: x\n\n")
    assert talk.answer()[0] == 200


# --- connections ---


def test_a_connection_is_kept(talk: Conversation) -> None:
    for number in range(5):
        body = b"%d" % number
        talk.send(f"POST /fn/echo/ HTTP/1.1\nHost: x\nContent-Length: {len(body)}\n\n", body)
        status, headers, answer = talk.answer()
        assert (status, answer) == (200, body)
        assert headers.get("connection", "") != "close"
    talk.send("GET /fn/echo/ HTTP/1.1\nHost: x\nConnection: close\n\n")
    assert talk.answer()[1]["connection"] == "close"
    assert talk.ended()


def test_requests_sent_at_once_are_answered_in_order(talk: Conversation) -> None:
    bodies = [b"%d" % number * (number + 1) for number in range(20)]
    requests = [b"POST /fn/echo/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b) for b in bodies]
    talk.sock.sendall(b"".join(requests))
    assert [talk.answer()[2] for _ in bodies] == bodies


def test_http_1_0(talk: Conversation) -> None:
    talk.send("GET /fn/echo/ HTTP/1.0\n\n")
    assert talk.answer()[0] == 200
    assert talk.ended()


def test_http_1_0_with_a_stream(talk: Conversation) -> None:
    """No chunks for a client that does not know them: the end of the connection is the end."""
    talk.send("GET /fn/streaming/?n=3&gap=0 HTTP/1.0\n\n")
    status, headers = talk.head()
    assert status == 200
    assert "transfer-encoding" not in headers
    assert talk.file.read() == b"data: 1\n\ndata: 2\n\ndata: 3\n\n"


def test_a_client_that_asks_before_it_sends_its_body(talk: Conversation) -> None:
    for target, size in (("/fn/echo/", 5), ("/fn/streaming/", 200_000)):
        talk.send(f"POST {target} HTTP/1.1\nHost: x\nContent-Length: {size}\nExpect: 100-continue\n\n")
        assert talk.head()[0] == 100
        body = bytes(size)
        talk.sock.sendall(body)
        status, _, answer = talk.answer()
        assert (status, answer) == (200, body)


def test_a_body_that_nobody_wants_is_not_asked_for(talk: Conversation) -> None:
    talk.send("POST /fn/nobody/ HTTP/1.1\nHost: x\nContent-Length: 1000000\nExpect: 100-continue\n\n")
    status, headers, _ = talk.answer()
    assert (status, headers["connection"]) == (404, "close")
    assert talk.ended()


def test_a_connection_that_rests_too_long_is_closed() -> None:
    config = {"http": {"idle_timeout_s": 0.2, "head_timeout_s": 0.2}}
    with Poold("process", config=config) as short, short.connect() as resting, short.connect() as trickling:
        trickling.sendall(b"GET /healthz HT")
        assert resting.recv(1) == b""
        assert trickling.recv(65_536).startswith(b"HTTP/1.1 408 ")


# --- streams ---


def test_events_arrive_one_by_one(talk: Conversation, poold: Poold) -> None:
    """Each is here before the next is made; without end, until the client goes, which ends the work."""
    talk.send("GET /fn/streaming/?n=0&gap=0.05 HTTP/1.1\nHost: x\n\n")
    status, headers = talk.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    arrived_s = []
    chunks = talk.chunks()
    for number in range(1, 6):
        assert next(chunks) == b"data: %d\n\n" % number
        arrived_s.append(time.monotonic())
    assert arrived_s[-1] - arrived_s[0] > 0.1  # all at once would be none
    assert poold.info("streaming")["running"] == 1
    talk.sock.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: poold.info("streaming")["running"], lambda running: running == 0)


def test_both_ways_at_the_same_time(talk: Conversation) -> None:
    """The answer to the first part comes before the second is sent."""
    talk.send("POST /fn/streaming/ HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n")
    for text in (b"first", b"second", b"third"):
        talk.sock.sendall(b"%x\r\n%b\r\n" % (len(text), text))
        if text == b"first":
            assert talk.head()[0] == 200
            chunks = talk.chunks()
        assert next(chunks) == text
    talk.sock.sendall(b"0\r\n\r\n")
    assert list(chunks) == []


def test_a_large_body_both_ways_in_little_memory(poold: Poold) -> None:
    size_mb = 50
    poold.ask("streaming", body=MEGABYTE)
    before_mb = most_mb = poold.rss_mb()
    sent, received = hashlib.sha256(), hashlib.sha256()
    with poold.connect() as sock:
        sock.sendall(
            b"POST /fn/streaming/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (size_mb * len(MEGABYTE))
        )
        sock.sendall(MEGABYTE)
        sent.update(MEGABYTE)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 200
        # Sent and read in turns, one megabyte apart, as the function sends back at once what it gets.
        for _ in range(size_mb - 1):
            sock.sendall(MEGABYTE)
            sent.update(MEGABYTE)
            received.update(answer.read(len(MEGABYTE)))
            most_mb = max(most_mb, poold.rss_mb())
        received.update(answer.read())
        answer.close()
    assert received.hexdigest() == sent.hexdigest()
    assert most_mb < before_mb + 20


def test_a_reader_that_does_not_read_is_waited_for(poold: Poold) -> None:
    """Back-pressure: 200 MB for a client that takes nothing do not come to lie in the daemon."""
    before_mb = poold.rss_mb()
    with poold.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.sendall(b"GET /fn/big/?mb=200 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
        for _ in range(5):
            assert poold.ask("echo", body=b"meanwhile").body == b"meanwhile"
        assert poold.rss_mb() < before_mb + 20
    wait_until(lambda: poold.info("big")["running"], lambda running: running == 0)


def test_a_writer_that_is_too_quick_is_waited_for(poold: Poold) -> None:
    """Back-pressure the other way: a function that reads nothing stops its caller, not the daemon's memory."""
    before_mb = poold.rss_mb()
    with poold.connect() as sock:
        sock.settimeout(0.5)
        sock.sendall(b"POST /fn/deaf/ HTTP/1.1\r\nHost: x\r\nContent-Length: 33000000\r\n\r\n")
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(33_000_000))
        assert poold.rss_mb() < before_mb + 20
    # What the client has sent is not read, so that it went cannot be seen; the function's time ends it.
    wait_until(lambda: poold.info("deaf")["running"], lambda running: running == 0)


def test_a_large_answer_with_and_without_its_length(poold: Poold) -> None:
    for query in ("?mb=20", "?mb=20&close=1"):
        assert hashlib.sha256(poold.ask("big", f"/{query}").body).digest() == hashlib.sha256(MEGABYTE * 20).digest()


def test_invoke_by_the_native_route(poold: Poold) -> None:
    reply = poold.invoke("echo", b'{"an": "event"}')
    assert reply.body == b'{"an": "event"}'
    assert (reply.headers["x-method"], reply.headers["x-target"]) == ("POST", "/")
    assert poold.request("GET", "/v1/functions/echo/invoke").status == 405
