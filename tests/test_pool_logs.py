"""What instances print: bounded, whole lines, each with the invocation it belongs to."""

from __future__ import annotations

import pytest
import trio

from pool.backends.base import Output
from pool.logbook import FOLLOW_LINES, LogBook
from pool.logs import LINE_BYTES, LINES_BURST, InstanceLog, LogLine


def texts(log: InstanceLog) -> list[tuple[str, str]]:
    return [(line.invocation, line.text) for line in log.lines()]


def test_a_line_waits_for_its_newline_and_streams_do_not_mix():
    log = InstanceLog("i")
    log.write(Output.STDOUT, b"one\ntw")
    log.write(Output.STDERR, b"error")
    log.write(Output.STDOUT, b"o\r\n")
    assert [(line.stream, line.text) for line in log.lines()] == [(Output.STDOUT, "one"), (Output.STDOUT, "two")]
    log.close()
    assert log.lines()[-1].text == "error"


def test_a_line_belongs_to_the_invocation_that_alone_holds_the_instance_or_held_it_last():
    log = InstanceLog("i")
    log.write(Output.STDOUT, b"start\n")
    log.enter("a")
    log.write(Output.STDOUT, b"during\n")
    log.leave("a")
    log.write(Output.STDOUT, b"late\n")
    log.enter("b")
    log.leave("b")
    log.write(Output.STDOUT, b"later\n")
    assert texts(log) == [("", "start"), ("a", "during"), ("a", "late"), ("b", "later")]


def test_with_several_at_a_time_nobody_can_tell_not_even_afterwards():
    log = InstanceLog("i")
    log.enter("a")
    log.enter("b")
    log.write(Output.STDOUT, b"whose\n")
    log.leave("a")
    log.write(Output.STDOUT, b"still\n")
    log.leave("b")
    log.write(Output.STDOUT, b"after\n")
    assert {invocation for invocation, _ in texts(log)} == {""}


def test_a_long_line_is_cut_and_the_oldest_make_room():
    log = InstanceLog("i", keep_bytes=3 * LINE_BYTES)
    log.write(Output.STDOUT, b"x" * (2 * LINE_BYTES + 5) + b"\n")
    assert [len(line.text) for line in log.lines()] == [LINE_BYTES, LINE_BYTES, 5]
    for _ in range(10):
        log.write(Output.STDOUT, b"y" * LINE_BYTES + b"\n")
    assert sum(len(line.text) for line in log.lines()) <= 3 * LINE_BYTES
    assert log.dropped > 0


def test_a_flood_is_counted_not_kept():
    log = InstanceLog("i", keep_bytes=100_000_000)
    for _ in range(3):
        log.write(Output.STDOUT, b"y\n" * (2 * LINES_BURST))
    # The allowance grows again while the test runs, but not by thousands in a moment.
    assert LINES_BURST <= len(log.lines()) < 4 * LINES_BURST
    assert len(log.lines()) + log.dropped == 6 * LINES_BURST


def line(text: str, instance: str = "i", invocation: str = "") -> LogLine:
    return LogLine(0.0, instance, invocation, Output.STDOUT, text)


def test_the_book_keeps_the_last_lines_of_each_function():
    book = LogBook(keep_bytes=500)
    for number in range(100):
        book.add("f", line(str(number), instance=f"i{number % 2}"))
    book.add("g", line("other"))
    assert [entry.text for entry in book.tail("f", 2)] == ["98", "99"]
    assert [entry.text for entry in book.tail("f", 2, instance="i0")] == ["96", "98"]
    assert len(book.tail("f", 1000)) < 10
    assert book.tail("unknown", 5) == []
    book.forget("f")
    assert book.tail("f", 5) == []


@pytest.mark.trio
async def test_a_follower_gets_new_lines_and_loses_those_it_is_too_slow_for():
    book = LogBook()
    with book.subscribe("f") as follower:
        book.add("f", line("first"))
        assert (await follower.lines.receive()).text == "first"
        for number in range(FOLLOW_LINES + 7):
            book.add("f", line(str(number)))
        assert follower.missed == 7
        assert (await follower.lines.receive()).text == "0"
    book.add("f", line("nobody listens"))
    with pytest.raises(trio.ClosedResourceError):
        await follower.lines.receive()


def test_a_removed_function_leaves_nothing_when_its_last_follower_goes():
    book = LogBook()
    with book.subscribe("f"), book.subscribe("f"), book.subscribe("never"):
        book.add("f", line("x"))
        book.forget("f")
    assert book._functions == {}
    with book.subscribe("f"):
        book.add("f", line("y"))
    assert [entry.text for entry in book.tail("f", 5)] == ["y"]
