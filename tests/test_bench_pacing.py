"""The load generator's arithmetic: when requests are due, how latencies are kept, where they go."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.latency import Recorder
from bench.pacing import SECOND_NS, Pace, share
from bench.target import BadTarget, parse_target, request_bytes

# When


def test_due_times_do_not_drift() -> None:
    pace = Pace(rate=3.0, start_ns=1000)
    assert [pace.due_ns(number) - 1000 for number in range(4)] == [0, 333333333, 666666667, SECOND_NS]
    assert pace.due_ns(3_000_000) == 1000 + 1_000_000 * SECOND_NS


def test_a_rate_below_one() -> None:
    assert Pace(rate=0.5, start_ns=0).due_ns(1) == 2 * SECOND_NS
    assert Pace(rate=0.5, start_ns=0).total(4.0) == 2


@pytest.mark.parametrize(("rate", "duration_s", "total"), [(100, 1, 100), (0.1, 5, 1), (10, 0.31, 4), (3, 0.1, 1)])
def test_requests_due_before_the_end(rate: float, duration_s: float, total: int) -> None:
    pace = Pace(rate=rate, start_ns=0)
    assert pace.total(duration_s) == total
    assert pace.due_ns(total - 1) < duration_s * SECOND_NS <= pace.due_ns(total)


@given(rate=st.integers(1, 100_000), count=st.integers(1, 16), length=st.integers(1, 200))
def test_shares_together_are_the_whole(rate: int, count: int, length: int) -> None:
    whole = [Pace(rate, 0).due_ns(number) for number in range(length)]
    parts = [Pace(rate, 0, index, count) for index in range(count)]
    together = sorted(part.due_ns(number) for part in parts for number in range(length))[:length]
    assert together == whole
    assert sum(part.total(1.0) for part in parts) == rate
    assert sum(share(length, index, count) for index in range(count)) == length


# Latencies


def test_a_summary_is_in_milliseconds() -> None:
    recorder = Recorder()
    for microseconds in range(1, 1001):
        recorder.record(microseconds * 1000)
    summary = recorder.summary()
    assert summary["count"] == 1000
    assert summary["min"] == pytest.approx(0.001, rel=0.01)
    assert summary["p50"] == pytest.approx(0.5, rel=0.01)
    assert summary["p99"] == pytest.approx(0.99, rel=0.01)
    assert summary["max"] == pytest.approx(1.0, rel=0.01)
    assert list(summary) == ["count", "min", "mean", "p50", "p90", "p99", "p99.9", "max"]


def test_no_latencies_are_zeros() -> None:
    assert set(Recorder().summary().values()) == {0}


def test_recorders_merge() -> None:
    one, other = Recorder(), Recorder()
    one.record(1_000_000)
    other.record(3_000_000)
    other.merge(one.counts())
    assert other.summary()["count"] == 2
    assert other.summary()["min"] == pytest.approx(1.0, rel=0.01)


@given(latency_ns=st.integers(0, 10**13))
def test_what_is_kept_is_close_to_what_was_seen(latency_ns: int) -> None:
    recorder = Recorder()
    recorder.record(latency_ns)
    (unit,) = recorder.counts()
    assert unit <= max(1, min(latency_ns // 100, 3600 * 10_000_000)) <= unit * 1.001 + 1


def test_latencies_out_of_range_are_clamped() -> None:
    recorder = Recorder()
    recorder.record(0)
    recorder.record(10**16)
    assert recorder.summary()["max"] == pytest.approx(3_600_000, rel=0.01)


# Addresses and requests


def test_addresses() -> None:
    tcp = parse_target("http://127.0.0.1:81/a?b=c")
    assert (tcp.address, tcp.host, tcp.path) == (("127.0.0.1", 81), "127.0.0.1:81", "/a?b=c")
    for url in ("http+unix://%2Frun%2Fp.sock/a/b", "http+unix:///run/p.sock:/a/b"):
        unix = parse_target(url)
        assert (unix.family, unix.address, unix.path) == (socket.AF_UNIX, "/run/p.sock", "/a/b")


@pytest.mark.parametrize(
    "url", ["127.0.0.1", "https://127.0.0.1/", "http://", "http://127.0.0.1:99999/", "http+unix://x/"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(BadTarget):
        parse_target(url)


def test_a_request_as_bytes() -> None:
    target = parse_target("http://127.0.0.1:81/a")
    assert request_bytes(target, "GET", [], b"") == b"GET /a HTTP/1.1\r\nHost: 127.0.0.1:81\r\n\r\n"
    posted = request_bytes(target, "POST", [("Host", "h"), ("X", "y")], b"{}")
    assert posted == b"POST /a HTTP/1.1\r\nHost: h\r\nX: y\r\nContent-Length: 2\r\n\r\n{}"
    for method, headers in (("G T", []), ("GET", [("X", "a\r\nb")]), ("GET", [("a b", "c")])):
        with pytest.raises(BadTarget):
            request_bytes(target, method, headers, b"")
