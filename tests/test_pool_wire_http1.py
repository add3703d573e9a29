"""HTTP/1.1 between bytes and messages: limits by example; h11, which is not ours, as the oracle for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool.wire.http1 import BadMessage, Limits, RequestReader, ResponseReader, chunk, end_to_end, status_line

LIMITS = Limits(header_count=20, header_bytes=2_000, target_bytes=500)

# --- what was read, by us and by h11 ------------------------------------------------------------------------


@dataclass
class Message:
    first: tuple[bytes, ...]  # method and target, or the status
    headers: list[tuple[bytes, bytes]]
    body: bytes


def plain(headers: object) -> list[tuple[bytes, bytes]]:
    """Names in lower case, values without the blanks around them; a coding in lower case, as h11 gives it."""
    found = []
    for name, value in headers:  # type: ignore[attr-defined] # h11's list or ours
        lower = bytes(name).lower()
        text = bytes(value).strip(b" \t")
        found.append((lower, text.lower() if lower == b"transfer-encoding" else text))
    return found


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """The data cut at these places."""
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {len(data)})
    return [piece for start, end in zip([0, *ends], ends, strict=False) if (piece := data[start:end])]


def read_requests(pieces: list[bytes], limits: Limits = LIMITS) -> tuple[list[Message], bool]:
    """The complete requests, and whether the rest was refused."""
    reader = RequestReader(limits)
    refused = False
    for piece in pieces:
        try:
            reader.feed(piece)
        except BadMessage as exc:
            refused = bool(exc.message) and 400 <= exc.status < 600
            break
    return [
        Message((message.method, message.target), plain(message.headers), message.take_body())
        for message in reader.messages
        if message.done
    ], refused


def read_answer(pieces: list[bytes], *, head_only: bool = False, limits: Limits = LIMITS) -> Message | None:
    """The answer, which ends with the stream at the latest; None when it was refused."""
    reader = ResponseReader(limits)
    reader.begin(head_only=head_only)
    try:
        for piece in pieces:
            reader.feed(piece)
        reader.end_of_stream()
    except BadMessage:
        return None
    return Message((b"%d" % reader.status,), plain(reader.headers), reader.take_body())


def h11_message(connection: h11.Connection, data: bytes) -> Message | None:
    """The first message as h11 reads it from a stream of these bytes; None when it refuses or it is incomplete."""
    first: tuple[bytes, ...] = ()
    headers: list[tuple[bytes, bytes]] = []
    body = b""
    try:
        connection.receive_data(data)
        connection.receive_data(b"")
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                first, headers = (bytes(event.method), bytes(event.target)), plain(event.headers)
            elif isinstance(event, h11.Response):
                first, headers = (b"%d" % event.status_code,), plain(event.headers)
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return Message(first, headers, body)
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


def h11_request(data: bytes) -> Message | None:
    return h11_message(h11.Connection(h11.SERVER, max_incomplete_event_size=100_000), data)


def h11_answer(data: bytes, method: bytes) -> Message | None:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=100_000)
    connection.send(h11.Request(method=method, target=b"/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    return h11_message(connection, data)


# --- bytes that are nearly HTTP -----------------------------------------------------------------------------

tokens = st.sampled_from([b"x-a", b"X-B", b"Accept", b"cookie", b"a_b", b"~!#$"])
values = st.one_of(
    st.binary(max_size=12).map(lambda raw: bytes(c for c in raw if c >= 0x20 and c != 0x7F)),
    st.sampled_from([b"", b"a b", b"\xc3\xa4", b"\xff\x80", b"a\tb", b" padded ", b'"q"']),
)
plain_headers = st.lists(st.tuples(tokens, values), max_size=4)
odd_lines = st.sampled_from(
    [
        b"Content-Length: 3\r\n",
        b"Content-Length: 4\r\n",
        b"content-length: +3\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: 0x3\r\n",
        b"Content-Length:\r\n",
        b"Content-Length : 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"TRANSFER-ENCODING: Chunked\r\n",
        b"Connection: close\r\n",
        b"Connection: keep-alive, x-a\r\n",
        b"Expect: 100-continue\r\n",
        b"Host: other\r\n",
        b" folded\r\n",
        b"x-a: b\n",
        b"x-a: b\r",
        b"x-a:\x00b\r\n",
        b": empty\r\n",
        b"no colon\r\n",
        b"Upgrade: websocket\r\n",
    ]
)
bodies = st.binary(max_size=40)


def framed(body: bytes, how: int) -> tuple[bytes, bytes]:
    """Header lines, and the body as they announce it."""
    if how == 0:
        return b"Content-Length: %d\r\n" % len(body), body
    if how == 1:
        half = len(body) // 2
        parts = [part for part in (body[:half], body[half:]) if part]
        return b"Transfer-Encoding: chunked\r\n", b"".join(map(chunk, parts)) + chunk(b"")
    return b"", b"" if how == 2 else body


@st.composite
def requests(draw: st.DrawFn, *, odd: bool) -> bytes:
    method = draw(st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"HEAD"]))
    target = draw(st.sampled_from([b"/", b"/a%2Fb?c=%20&d", b"/\x7e", b"/a//b/../c", b"*", b"http://x/a", b"/?#"]))
    lines = [b"%b: %b\r\n" % pair for pair in draw(plain_headers)]
    framing, body = framed(draw(bodies), draw(st.integers(0, 2)))
    lines += [b"Host: example\r\n", framing]
    if odd:
        lines += draw(st.lists(odd_lines, max_size=2))
        lines = draw(st.permutations(lines))
    version = draw(st.sampled_from([b"1.1", b"1.0", b"2.0"])) if odd else b"1.1"
    return b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, target, version, b"".join(lines), body)


@st.composite
def answers(draw: st.DrawFn, *, odd: bool) -> bytes:
    status = draw(st.sampled_from([200, 201, 204, 302, 304, 404, 418, 500, 599]))
    lines = [b"%b: %b\r\n" % pair for pair in draw(plain_headers)]
    framing, body = framed(draw(bodies), draw(st.integers(0, 3)))
    lines.append(framing)
    if odd:
        lines += draw(st.lists(odd_lines, max_size=2))
        lines = draw(st.permutations(lines))
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 E\r\nlink: a\r\n\r\n"]))
    if status in (204, 304):
        body = b""
    return b"%bHTTP/1.1 %d Some Reason\r\n%b\r\n%b" % (interim, status, b"".join(lines), body)


@st.composite
def mangled(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> bytes:
    """With a few bytes replaced, removed or put in."""
    data = draw(source)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 3))
        data = (
            data[:at] + draw(st.sampled_from([b"", b"\r", b"\n", b"\0", b" ", b":", b"0", b"\xff"])) + data[at + cut :]
        )
    return data


cuts = st.lists(st.integers(0, 10_000), max_size=6)

# --- against the oracle -------------------------------------------------------------------------------------


@given(mangled(requests(odd=True)), cuts)
@settings(deadline=None)
def test_a_request_that_both_accept_is_the_same_to_both(data: bytes, at: list[int]) -> None:
    ours, _ = read_requests(pieces_of(data, at))
    theirs = h11_request(data)
    if ours and theirs is not None:
        assert ours[0] == theirs


@given(requests(odd=False), cuts)
@settings(deadline=None)
def test_a_proper_request_is_accepted(data: bytes, at: list[int]) -> None:
    ours, refused = read_requests(pieces_of(data * 3, at))
    if not data.split()[1].startswith((b"*", b"http")):
        assert not refused
        assert ours == [h11_request(data)] * 3


@given(mangled(answers(odd=True)), st.sampled_from([b"GET", b"HEAD"]), cuts)
@settings(deadline=None)
def test_an_answer_that_both_accept_is_the_same_to_both(data: bytes, method: bytes, at: list[int]) -> None:
    ours = read_answer(pieces_of(data, at), head_only=method == b"HEAD")
    theirs = h11_answer(data, method)
    if ours is not None and theirs is not None:
        assert ours == theirs


@given(answers(odd=False), cuts)
@settings(deadline=None)
def test_a_proper_answer_is_accepted(data: bytes, at: list[int]) -> None:
    ours = read_answer(pieces_of(data, at))
    assert ours is not None
    assert ours == h11_answer(data, b"GET")


# --- the cutting of the stream does not matter, and nothing but BadMessage comes out -------------------------


@given(st.one_of(st.binary(max_size=200), st.lists(mangled(requests(odd=True)), max_size=3).map(b"".join)), cuts)
@settings(deadline=None)
def test_requests_are_the_same_however_they_are_cut(data: bytes, at: list[int]) -> None:
    whole = read_requests([data] if data else [])
    assert read_requests(pieces_of(data, at)) == whole
    assert read_requests([bytes([byte]) for byte in data]) == whole


@given(st.one_of(st.binary(max_size=200), mangled(answers(odd=True))), st.booleans(), cuts)
@settings(deadline=None)
def test_answers_are_the_same_however_they_are_cut(data: bytes, head_only: bool, at: list[int]) -> None:
    whole = read_answer([data] if data else [], head_only=head_only)
    assert read_answer(pieces_of(data, at), head_only=head_only) == whole
    assert read_answer([bytes([byte]) for byte in data], head_only=head_only) == whole


# --- by example ---------------------------------------------------------------------------------------------


def refusal(data: bytes, limits: Limits = LIMITS) -> int:
    """The status with which a request is refused."""
    reader = RequestReader(limits)
    with pytest.raises(BadMessage) as raised:
        reader.feed(data)
    assert not reader.messages, "what was refused must not be served"
    with pytest.raises(BadMessage):
        reader.feed(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert not reader.messages
    return raised.value.status


def head(*lines: bytes, first: bytes = b"GET / HTTP/1.1", host: bytes = b"host: x\r\n") -> bytes:
    return first + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (head(first=b"GET /" + b"a" * 500 + b" HTTP/1.1"), 414),
        (head(*[b"a: b"] * 20), 431),
        (head(b"a: " + b"b" * 2_000), 431),
        (head(host=b""), 400),
        (head(b"host: y"), 400),
        (head(b"content-length: 1", b"transfer-encoding: chunked"), 400),
        (head(b"transfer-encoding: chunked", first=b"POST / HTTP/1.0"), 400),
        (head(b"transfer-encoding: gzip, chunked"), 501),
        (head(b"content-length: -1"), 400),
        (head(b"content-length: 1", b"content-length: 2"), 400),
        (head(b"a : b"), 400),
        (head(b" folded"), 400),
        (b"\x16\x03\x01", 400),
        (head(first=b"GET /\x00 HTTP/1.1"), 400),
        (head(first=b"GET / HTTP/3.0"), 400),
    ],
)
def test_what_is_refused_and_how(data: bytes, status: int) -> None:
    assert refusal(data) == status


def test_just_within_the_limits() -> None:
    target = b"/" + b"a" * (LIMITS.target_bytes - 1)
    found, refused = read_requests([head(*[b"a: b"] * 19, first=b"GET " + target + b" HTTP/1.1")])
    assert not refused
    assert found[0].first == (b"GET", target)
    assert len(found[0].headers) == LIMITS.header_count


def test_complete_requests_before_a_bad_one_stay() -> None:
    found, refused = read_requests([head() + head(first=b"POST /2 HTTP/1.1") + b"garbage\r\n\r\n"])
    assert refused
    assert [message.first for message in found] == [(b"GET", b"/"), (b"POST", b"/2")]


def feed_often(reader: RequestReader | ResponseReader, data: bytes) -> None:
    for _ in range(100):
        reader.feed(data)


@pytest.mark.parametrize(
    "start",
    [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\nx", head(b"transfer-encoding: chunked") + b"0\r\nx: "],
)
def test_a_head_or_trailer_that_never_ends_is_refused_while_it_arrives(start: bytes) -> None:
    reader = RequestReader(LIMITS)
    reader.feed(start)
    with pytest.raises(BadMessage):
        feed_often(reader, b"a" * 100)
    answer = ResponseReader(LIMITS)
    answer.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ")
    with pytest.raises(BadMessage):
        feed_often(answer, b"a" * 100)


def test_a_long_body_in_small_pieces_is_no_head() -> None:
    reader = RequestReader(LIMITS)
    reader.feed(head(b"transfer-encoding: chunked"))
    size = 0
    for _ in range(1_000):
        for piece in pieces_of(chunk(b"x" * 10), [2, 7]):
            reader.feed(piece)
            size += len(reader.messages[0].take_body())
    reader.feed(chunk(b""))
    assert size == 10_000
    assert reader.messages[0].done


def test_what_a_request_says_of_itself() -> None:
    reader = RequestReader(LIMITS)
    reader.feed(head(b"content-length: 12", b"expect: 100-continue", b"connection: close", first=b"PUT /a HTTP/1.1"))
    message = reader.messages[0]
    assert (message.length, message.expects_continue, message.keep_alive) == (12, True, False)
    assert (message.head_done, message.done, message.chunked) == (True, False, False)
    reader.feed(b"x" * 12)
    assert (message.done, message.take_body(), message.take_body()) == (True, b"x" * 12, b"")


def test_an_upgrade_is_a_request_without_a_future() -> None:
    reader = RequestReader(LIMITS)
    reader.feed(head(b"connection: upgrade", b"upgrade: websocket"))
    assert (reader.messages[0].upgrade, reader.messages[0].keep_alive) == (True, False)


def test_trailers_are_dropped() -> None:
    found, _ = read_requests([head(b"transfer-encoding: chunked") + b"1\r\na\r\n0\r\nx-late: b\r\n\r\n"])
    assert (found[0].body, b"x-late" in dict(found[0].headers)) == (b"a", False)
    answer = read_answer([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-late: b\r\n\r\n"])
    assert answer is not None
    assert (answer.body, b"x-late" in dict(answer.headers)) == (b"a", False)


@pytest.mark.parametrize(
    ("lines", "short"),
    [(b"Content-Length: 999999", True), (b"Content-Length: 1000000", False), (b"Transfer-Encoding: chunked", False)],
)
def test_short_is_what_is_announced_as_short(lines: bytes, short: bool) -> None:
    reader = ResponseReader(LIMITS)
    reader.feed(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n\r\n")
    assert reader.headers_say_short() is short


def test_hop_by_hop_headers_do_not_pass() -> None:
    headers = [(b"Connection", b"close, X-Mine"), (b"x-mine", b"1"), (b"Keep-Alive", b"5"), (b"A", b"1"), (b"a", b"2")]
    assert end_to_end(headers) == [(b"A", b"1"), (b"a", b"2")]
    assert end_to_end([(b"TE", b"trailers"), (b"b", b"1")]) == [(b"b", b"1")]


def test_the_writing_side() -> None:
    assert status_line(200) == b"HTTP/1.1 200 OK\r\n"
    assert status_line(299) == b"HTTP/1.1 299 Status\r\n"
    assert status_line(999) == b"HTTP/1.1 999 Status\r\n"
    assert chunk(b"x" * 18) == b"12\r\n" + b"x" * 18 + b"\r\n"
    assert chunk(b"") == b"0\r\n\r\n"


@pytest.mark.parametrize("cut", [1, 7, 4096])
@pytest.mark.parametrize(
    "framed", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"]
)
def test_a_request_that_asks_for_an_upgrade_keeps_its_body(framed: bytes, cut: int) -> None:
    raw = b"POST /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + framed
    reader = RequestReader(Limits())
    for start in range(0, len(raw), cut):
        reader.feed(raw[start : start + cut])
    (message,) = reader.messages
    assert (message.method, message.target, message.done, message.keep_alive) == (b"POST", b"/a", True, False)
    assert message.take_body() == b"abc"


def test_what_follows_an_upgrades_body_is_not_part_of_it() -> None:
    reader = RequestReader(Limits())
    reader.feed(b"POST /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nab")
    (message,) = reader.messages
    assert not message.done
    reader.feed(b"cPOST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nde")
    assert message.done
    assert message.take_body() == b"abc"
    assert len(reader.messages) == 1


def test_a_damaged_body_of_a_request_that_asks_for_an_upgrade_is_refused() -> None:
    reader = RequestReader(Limits())
    with pytest.raises(BadMessage):
        reader.feed(
            b"POST /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
        )


def test_no_caller_can_take_the_host_away() -> None:
    headers = [(b"Host", b"h"), (b"X-Own", b"1"), (b"Connection", b"host, x-own")]
    assert end_to_end(headers) == [(b"Host", b"h")]
