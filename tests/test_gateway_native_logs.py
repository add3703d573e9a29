"""The log route: tails, filters, following, and what a slow reader loses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from gateway_fake_parts import Parts

from gateway.request import Response
from pool.backends.base import Output
from pool.logbook import FOLLOW_LINES
from pool.logs import LogLine


@pytest.fixture
def parts(nursery: trio.Nursery) -> Parts:
    return Parts(nursery)


async def _chunks(response: Response) -> list[bytes]:
    assert not isinstance(response.body, bytes)
    return [chunk async for chunk in response.body]


async def _lines(response: Response) -> list[Any]:
    return [json.loads(line) for line in b"".join(await _chunks(response)).splitlines()]


def _line(number: int, instance: str = "3-1", invocation: str = "") -> LogLine:
    return LogLine(1_795_292_520.5 + number, instance, invocation, Output(1 + number % 2), f"line {number}")


@pytest.mark.trio
async def test_logs_are_the_last_lines_filtered(parts: Parts) -> None:
    parts.registry.add()
    for number in range(600):
        parts.logs.add("hello", _line(number, f"3-{number % 3}", f"i{number}"))
    lines = await _lines(await parts.call("GET", "/v1/functions/hello/logs?tail=400"))
    assert [line["text"] for line in lines] == [f"line {number}" for number in range(200, 600)]
    assert lines[0]["stream"] == "stdout"
    assert lines[1]["stream"] == "stderr"
    assert lines[0]["at"].endswith(".500Z")
    lines = await _lines(await parts.call("GET", "/v1/functions/hello/logs?tail=2&instance=3-1"))
    assert [line["text"] for line in lines] == ["line 595", "line 598"]
    lines = await _lines(await parts.call("GET", "/v1/functions/hello/logs?invocation=i7"))
    assert [line["invocation"] for line in lines] == ["i7"]
    assert await _chunks(await parts.call("GET", "/v1/functions/hello/logs?tail=0")) == []


@pytest.mark.trio
@pytest.mark.parametrize("query", ["tail=-1", "tail=x", "tail=9999999999", "follow=maybe"])
async def test_a_wrong_query_is_400(parts: Parts, query: str) -> None:
    parts.registry.add()
    assert (await parts.ask("GET", f"/v1/functions/hello/logs?{query}"))[0] == 400


@pytest.mark.trio
async def test_followed_logs_go_on_and_tell_what_was_lost(parts: Parts) -> None:
    parts.registry.add()
    parts.logs.add("hello", _line(0))
    response = await parts.call("GET", "/v1/functions/hello/logs?follow=1&instance=3-1")
    chunks: Any = response.body
    assert json.loads(await anext(chunks))["text"] == "line 0"
    for number in range(1, FOLLOW_LINES + 11):  # more than a follower's room
        parts.logs.add("hello", _line(number, "3-2" if number == 1 else "3-1"))
    # The next line tells of the loss, then each comes once.
    first = (await anext(chunks)).splitlines()
    assert (json.loads(first[0])["text"], json.loads(first[0])["dropped"]) == ("line 2", 10)
    assert all(json.loads(line)["dropped"] == 0 for line in first[1:])
    await chunks.aclose()
    parts.logs.add("hello", _line(1))  # nobody is left to be offered it
