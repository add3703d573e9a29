"""The management routes over fakes of the daemon's parts: deploying, looking, steering."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from gateway_fake_parts import Parts, fake_view

from gateway.database import StoreError
from gateway.metrics import FUNCTION_ERROR, OK
from gateway.request import Request, Response
from gateway.router import Match
from pool.errors import ArtifactError, BackendUnavailable, PoolError, StartError
from pool.spec import FunctionSpec, PoolSpec
from scheduler.breaker import BreakerState
from scheduler.model import InstanceState, StartKind


@pytest.fixture
def parts(nursery: trio.Nursery) -> Parts:
    return Parts(nursery)


async def _chunks(response: Response) -> list[bytes]:
    assert not isinstance(response.body, bytes)
    return [chunk async for chunk in response.body]


async def _lines(response: Response) -> list[Any]:
    return [json.loads(line) for line in b"".join(await _chunks(response)).splitlines()]


# --- deploying --------------------------------------------------------------------------------------------

SPEC = b"name: hello\nimage: demo:1\npool:\n  min: 1\n"


@pytest.mark.trio
@pytest.mark.parametrize("query", ["", "?wait=true&code=abc", "?wait=0"])
async def test_a_spec_is_deployed_as_it_is_asked(parts: Parts, query: str) -> None:
    status, body = await parts.ask("PUT", f"/v1/functions/hello{query}", SPEC)
    waited = "0" not in query
    assert status == 200
    assert body["name"] == "hello"
    assert body["ready"] is waited
    assert body["revision"].startswith("hello@")
    spec = FunctionSpec(name="hello", image="demo:1", pool=PoolSpec(min=1))
    assert parts.registry.calls == [("deploy", spec, "abc" if "code" in query else None, waited)]


@pytest.mark.trio
async def test_json_is_a_spec_too(parts: Parts) -> None:
    status, _ = await parts.ask("PUT", "/v1/functions/hello", b'{"name": "hello", "image": "demo:1"}')
    assert status == 200


@pytest.mark.trio
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"name: hello\nimage: demo:1\ntimeuot_s: 3\n", "timeuot_s"),
        (b"name: other\nimage: demo:1\n", "other"),
        (b"name: hello\nimage: a\n---\nname: b\nimage: b\n", "2"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "no function spec"),
    ],
)
async def test_a_wrong_spec_is_refused_with_its_reason(parts: Parts, body: bytes, words: str) -> None:
    status, answer = await parts.ask("PUT", "/v1/functions/hello", body)
    assert status == 400
    assert answer["error"]["code"] == "invalid_spec"
    assert words in json.dumps(answer)
    assert parts.registry.calls == []


@pytest.mark.trio
async def test_a_wrong_specs_problems_name_line_and_path(parts: Parts) -> None:
    status, answer = await parts.ask("POST", "/v1/specs/check", b"name: hello\nimage: a\npool:\n  min: -1\n  mx: 3\n")
    details = answer["error"]["details"]
    assert status == 400
    assert [(one["line"], one["path"]) for one in details] == [(4, "pool.min"), (5, "pool.mx")]


@pytest.mark.trio
async def test_a_check_deploys_nothing(parts: Parts) -> None:
    assert await parts.ask("POST", "/v1/specs/check", SPEC) == (200, {"functions": ["hello"], "ok": True})
    assert parts.registry.calls == []


@pytest.mark.trio
async def test_a_spec_over_the_limit_is_413(parts: Parts) -> None:
    status, _ = await parts.ask("PUT", "/v1/functions/hello", b"#" * 300_000)
    assert status == 413


@pytest.mark.trio
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (ArtifactError("no image demo:1", hint="docker pull it"), 422, "artifact_error"),
        (StartError("it never listened on 9000", log_tail="Traceback"), 422, "start_failed"),
        (StartError("the engine broke", backend_fault=True), 503, "backend_unavailable"),
        (BackendUnavailable("no Docker"), 503, "backend_unavailable"),
    ],
)
async def test_a_deploy_that_fails_says_why_either_way(
    parts: Parts, failure: PoolError, status: int, code: str
) -> None:
    parts.registry.failure = failure
    got, answer = await parts.ask("PUT", "/v1/functions/hello", SPEC)
    assert (got, answer["error"]["code"], answer["error"]["message"]) == (status, code, failure.message)
    streamed = await parts.call("PUT", "/v1/functions/hello", SPEC, accept="application/x-ndjson")
    lines = await _lines(streamed)
    assert lines[-1] == answer
    if isinstance(failure, StartError) and failure.log_tail:
        assert answer["error"]["details"][0]["log_tail"] == "Traceback"


@pytest.mark.trio
async def test_a_followed_deploy_tells_its_course_then_its_result(parts: Parts) -> None:
    response = await parts.call("PUT", "/v1/functions/hello", SPEC, accept="application/x-ndjson")
    assert response.content_type == b"application/x-ndjson"
    lines = await _lines(response)
    assert lines[:2] == [{"progress": "pulling demo:1"}, {"progress": "starting 1 instance"}]
    assert lines[2]["result"]["name"] == "hello"
    assert len(lines) == 3


@pytest.mark.trio
async def test_a_client_that_goes_away_ends_its_deploy(parts: Parts) -> None:
    parts.registry.gate = trio.Event()
    response = await parts.call("PUT", "/v1/functions/hello", SPEC, accept="application/x-ndjson")
    course: Any = response.body
    assert json.loads(await anext(course)) == {"progress": "pulling demo:1"}
    await course.aclose()
    await parts.registry.cancelled.wait()


@pytest.mark.trio
async def test_a_fault_of_ours_in_a_followed_deploy_is_told_without_its_traceback(parts: Parts) -> None:
    parts.registry.failure = ZeroDivisionError("inner secret")
    response = await parts.call("PUT", "/v1/functions/hello", SPEC, accept="application/x-ndjson")
    last = (await _lines(response))[-1]
    assert last["error"]["code"] == "internal"
    assert "secret" not in json.dumps(last)


@dataclass
class Trickle:
    """A body that comes in parts."""

    parts: list[bytes]

    async def receive(self) -> bytes:
        return self.parts.pop(0) if self.parts else b""


@pytest.mark.trio
async def test_code_is_taken_from_its_first_byte_to_its_last(parts: Parts) -> None:
    found = parts.router.match(b"PUT", b"/v1/code")
    assert isinstance(found, Match)
    assert found.route.function is not None
    request = Request(b"PUT", b"", b"", b"", [], body=b"one", stream=Trickle([b"two", b"three"]))
    response = await found.route.function(request, {})
    assert response.body == b'{"digest":"sha256:code"}\n'
    assert parts.codestore.data == b"onetwothree"


@pytest.mark.trio
async def test_code_that_is_no_code_is_422_and_too_much_413(parts: Parts) -> None:
    parts.codestore.failure = ArtifactError("not a tar")
    assert (await parts.ask("PUT", "/v1/code", b"x"))[0] == 422
    assert (await parts.ask("PUT", "/v1/code", b"x" * 1001))[0] == 413


@pytest.mark.trio
@pytest.mark.parametrize(("method", "action"), [("DELETE", ""), ("POST", "/scale")])
async def test_a_function_that_goes_while_it_is_changed_is_404(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, method: str, action: str
) -> None:
    async def gone(*_: object) -> None:
        raise KeyError("hello")

    parts.registry.add()
    monkeypatch.setattr(parts.registry, "remove", gone)
    monkeypatch.setattr(parts.registry, "scale", gone)
    status, answer = await parts.ask(method, f"/v1/functions/hello{action}", b'{"min": 1}')
    assert (status, answer["error"]["code"]) == (404, "function_not_found")


@pytest.mark.trio
async def test_a_fault_of_ours_is_500_and_ends_nothing_else(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> bytes:
        raise ZeroDivisionError("inner secret")

    monkeypatch.setattr(parts.pools, "journal", broken)
    status, answer = await parts.ask("GET", "/v1/journal")
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "secret" not in json.dumps(answer)


@pytest.mark.trio
async def test_a_store_that_cannot_write_is_503(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> None:
        raise StoreError("the disk is full", hint="make room")

    parts.registry.add()
    monkeypatch.setattr(parts.registry, "remove", full)
    status, answer = await parts.ask("DELETE", "/v1/functions/hello")
    assert (status, answer["error"]["code"], answer["error"]["hint"]) == (503, "store_failed", "make room")
    assert "hello" in parts.registry.functions


# --- looking ----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_list_counts_instances_by_state(parts: Parts) -> None:
    for name in ("zeta", "alpha"):
        revision = parts.registry.add(name).revision.id
        parts.pools.views.append(fake_view(1, revision))
    parts.pools.views.append(fake_view(2, revision, InstanceState.FROZEN))
    parts.metrics.of("alpha").observe(StartKind.WARM, OK, 0.001)
    parts.metrics.of("alpha").observe(StartKind.COLD, FUNCTION_ERROR, 0.3)
    status, answer = await parts.ask("GET", "/v1/functions")
    assert status == 200
    assert [row["name"] for row in answer["functions"]] == ["alpha", "zeta"]
    alpha = answer["functions"][0]
    assert alpha["instances"] == {"starting": 0, "idle": 1, "busy": 0, "frozen": 1, "stopping": 0}
    assert alpha["totals"] == {"warm": 1, "thawed": 0, "prewarmed": 0, "cold": 1}
    assert (alpha["state"], alpha["errors"], alpha["queued"]) == ("ready", 1, 3)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("states", "breaker", "shown"),
    [
        ([], BreakerState.CLOSED, "empty"),
        ([InstanceState.STARTING], BreakerState.CLOSED, "starting"),
        ([InstanceState.STARTING, InstanceState.BUSY], BreakerState.CLOSED, "ready"),
        ([], BreakerState.OPEN, "failing"),
        ([InstanceState.STARTING], BreakerState.HALF_OPEN, "failing"),
    ],
)
async def test_a_functions_state_is_one_word(
    parts: Parts, states: list[InstanceState], breaker: BreakerState, shown: str
) -> None:
    revision = parts.registry.add().revision.id
    parts.pools.views = [fake_view(number, revision, state) for number, state in enumerate(states)]
    parts.pools.breaker = breaker
    _, answer = await parts.ask("GET", "/v1/functions/hello")
    assert answer["state"] == shown


@pytest.mark.trio
async def test_inspect_shows_spec_breaker_estimates_and_old_instances_too(parts: Parts) -> None:
    revision = parts.registry.add(description="says hello").revision.id
    parts.pools.views = [fake_view(2, revision), fake_view(1, "hello@old", InstanceState.BUSY, idle_since=None)]
    parts.pools.breaker = BreakerState.OPEN
    parts.pools.until = trio.current_time() + 60
    parts.metrics.of("hello").reject("queue_full")
    status, answer = await parts.ask("GET", "/v1/functions/hello")
    assert status == 200
    assert answer["spec"] == {"name": "hello", "image": "demo:1", "description": "says hello"}
    assert answer["digest"] == "sha256:1"
    assert answer["deployed_at"].endswith("Z")
    assert answer["breaker"]["open"] is True
    assert 50 < answer["breaker"]["retry_after_s"] <= 60
    assert answer["estimates"] == {"start_s": 0.2, "run_s": None, "thaw_s": 0.0001}
    assert answer["rejected_by_reason"] == {"queue_full": 1}
    assert [(one["id"], one["revision"]) for one in answer["instance_list"]] == [
        ("3-1", "hello@old"),
        ("3-2", revision),
    ]
    assert answer["instance_list"][0]["idle_s"] is None
    assert answer["instance_list"][1]["memory_mb"] == 20.0


@pytest.mark.trio
async def test_instances_come_by_function_and_age(parts: Parts) -> None:
    parts.pools.views = [fake_view(2, "b@1"), fake_view(1, "b@1"), fake_view(9, "a@1")]
    _, answer = await parts.ask("GET", "/v1/instances")
    assert [one["id"] for one in answer["instances"]] == ["3-9", "3-1", "3-2"]


@pytest.mark.trio
async def test_status_sums_up_the_host(parts: Parts) -> None:
    revision = parts.registry.add().revision.id
    parts.pools.views = [fake_view(1, revision)]
    parts.pools.breaker = BreakerState.OPEN
    parts.metrics.of("hello").observe(StartKind.THAWED, OK, 0.001)
    status, answer = await parts.ask("GET", "/v1/status")
    assert status == 200
    assert answer["backend"] == "simulated"
    assert answer["memory"] == {"charged_mb": 512, "limit_mb": 4096}
    assert answer["totals"]["thawed"] == 1
    assert answer["breakers"][0]["detail"] == "exit code 3"
    assert answer["warnings"] == ["be careful"]


@pytest.mark.trio
async def test_health_tells_of_a_drain(parts: Parts) -> None:
    assert await parts.ask("GET", "/healthz") == (200, {"status": "ok"})
    assert (await parts.ask("POST", "/v1/drain"))[0] == 202
    assert await parts.ask("GET", "/healthz") == (200, {"status": "draining"})


@pytest.mark.trio
async def test_the_journal_is_handed_out_as_it_is(parts: Parts) -> None:
    assert (await parts.call("GET", "/v1/journal")).body == b"\x93journal"


# --- steering ---------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_scale_recycle_and_reset_reach_the_pool(parts: Parts) -> None:
    revision = parts.registry.add().revision.id
    assert (await parts.ask("POST", "/v1/functions/hello/scale", b'{"min": 3}'))[0] == 200
    assert (await parts.ask("POST", "/v1/functions/hello/recycle"))[0] == 200
    assert (await parts.ask("POST", "/v1/functions/hello/reset"))[0] == 200
    assert parts.registry.calls == [("scale", "hello", 3, None), ("recycle", "hello")]
    assert parts.pools.resets == [revision]


@pytest.mark.trio
@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"min": "3"}', b'{"min": -1}', b'{"min": 11}', b'{"max": 0}', b'{"mim": 1}']
)
async def test_a_scale_that_cannot_be_is_400(parts: Parts, body: bytes) -> None:
    parts.registry.add()
    status, answer = await parts.ask("POST", "/v1/functions/hello/scale", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_scale")
    assert parts.registry.calls == []


@pytest.mark.trio
async def test_a_removed_function_takes_its_series_along(parts: Parts) -> None:
    parts.registry.add()
    parts.metrics.of("hello").observe(StartKind.WARM, OK, 0.001)
    assert (await parts.ask("DELETE", "/v1/functions/hello"))[0] == 200
    assert parts.metrics.functions == {}
    assert (await parts.ask("DELETE", "/v1/functions/hello"))[0] == 404


@pytest.mark.trio
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/functions/x"),
        ("DELETE", "/v1/functions/x"),
        ("POST", "/v1/functions/x/scale"),
        ("POST", "/v1/functions/x/recycle"),
        ("POST", "/v1/functions/x/reset"),
        ("GET", "/v1/functions/x/logs"),
    ],
)
async def test_an_unknown_function_is_404_everywhere(parts: Parts, method: str, path: str) -> None:
    status, answer = await parts.ask(method, path, b"{}")
    assert (status, answer["error"]["code"]) == (404, "function_not_found")
