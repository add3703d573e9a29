"""The fc contract from inside the instance: each rule of the vendor's documentation an example."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import h11
import pytest
import trio
import trio.testing
from fake_instance import FakeInstance, Peer, Pieces, link_to, read_all

from pool.backends.base import Output
from pool.contracts.base import Call, Headers
from pool.contracts.fc import FcContract, FcSession, error_body, read_marker
from pool.contracts.registry import CONTRACTS
from pool.errors import CallRefused, RestartWanted, StartError
from pool.logs import InstanceLog
from pool.spec import FcSpec, FunctionSpec, HookSpec

FC = FcContract()
EVENT_SPEC = FunctionSpec(name="f", code=".", contract="fc", memory_mb=512, timeout_s=60)
HTTP_SPEC = FunctionSpec(name="f", code=".", contract="fc", fc=FcSpec(type="http"))

COMMON = {
    "x-fc-request-id",
    "x-fc-access-key-id",
    "x-fc-access-key-secret",
    "x-fc-security-token",
    "x-fc-function-name",
    "x-fc-function-handler",
    "x-fc-function-memory",
    "x-fc-function-timeout",
    "x-fc-function-initializer",
    "x-fc-initialization-timeout",
    "x-fc-instance-lifecycle-pre-stop-handler",
    "x-fc-instance-lifecycle-pre-freeze-handler",
    "x-fc-region",
    "x-fc-account-id",
    "x-fc-qualifier",
    "x-fc-version-id",
    "x-fc-service-name",
    "x-fc-service-logproject",
    "x-fc-service-logstore",
    "x-fc-control-path",
}

Answer = Callable[[Peer, h11.Request, bytes], Awaitable[None]]


def event(body: bytes = b"the event", **more: object) -> Call:
    return Call("req-1", b"POST", b"/", [(b"host", b"x"), (b"x-own", b"1")], body, event=True, **more)  # type: ignore[arg-type] # fields of Call


def http(method: bytes = b"GET", target: bytes = b"/", headers: Headers | None = None, body: bytes = b"") -> Call:
    return Call("req-1", method, target, headers or [(b"Host", b"x")], body)


def spec_with(**hooks: HookSpec) -> FunctionSpec:
    return FunctionSpec(name="f", code=".", contract="fc", fc=FcSpec(**hooks))  # type: ignore[arg-type] # names of hooks


class Code:
    """An instance whose code gives one scripted answer to every request, and what it was asked."""

    def __init__(self, nursery: trio.Nursery, answer: Answer) -> None:
        self._answer = answer
        self.running = FakeInstance(nursery, self._serve)
        self.asked: list[tuple[h11.Request, bytes]] = []

    async def _serve(self, stream: trio.SocketStream) -> None:
        peer = Peer(stream)
        while (request := await peer.request()) is not None:
            self.asked.append(request)
            await self._answer(peer, *request)

    def headers(self, number: int = -1) -> dict[str, str]:
        return {bytes(name).decode(): bytes(value).decode() for name, value in self.asked[number][0].headers}

    def lines(self) -> list[tuple[str, str]]:
        return [(bytes(request.method).decode(), bytes(request.target).decode()) for request, _ in self.asked]


async def ok(peer: Peer, request: h11.Request, body: bytes) -> None:
    await peer.answer(200, [], b"echo " + body)


def answers(status: int = 200, headers: list[tuple[str, str]] | None = None, body: bytes = b"answer") -> Answer:
    async def answer(peer: Peer, request: h11.Request, _: bytes) -> None:
        await peer.answer(status, headers, body)

    return answer


async def never(peer: Peer, request: h11.Request, body: bytes) -> None:
    await trio.sleep_forever()


@asynccontextmanager
async def code_with(
    spec: FunctionSpec, answer: Answer = ok, *, prepared: bool = True
) -> AsyncIterator[tuple[FcSession, Code]]:
    async with trio.open_nursery() as nursery:
        code = Code(nursery, answer)
        session = FC.session(link_to(code.running, spec))
        try:
            if prepared:
                await session.prepare()
            yield session, code
        finally:
            session.close()
            nursery.cancel_scope.cancel()


# --- invocations --------------------------------------------------------------------------------------------


def test_it_is_registered() -> None:
    assert CONTRACTS["fc"].name == "fc"
    assert FC.default_port == 9000
    assert FC.code_target == "/code"


@pytest.mark.trio
async def test_an_event_is_posted_to_invoke() -> None:
    async with code_with(EVENT_SPEC) as (session, code):
        reply = await session.exchange(event())
        assert (reply.status, reply.headers, reply.body, reply.function_error) == (200, [], b"echo the event", None)
        assert code.lines() == [("POST", "/invoke")]
        assert code.asked[0][1] == b"the event"
        headers = code.headers()
        assert headers["content-type"] == "application/octet-stream"
        assert headers["x-fc-request-id"] == "req-1"
        assert headers["x-fc-control-path"] == "/invoke"
        assert "x-own" not in headers, "an event has no headers of its own"


@pytest.mark.trio
async def test_the_common_headers_are_all_there_and_empty_where_unset() -> None:
    async with code_with(EVENT_SPEC) as (session, code):
        await session.exchange(event())
        headers = code.headers()
        assert {name for name in headers if name.startswith("x-fc-")} == COMMON
        assert headers["x-fc-function-name"] == "f"
        assert headers["x-fc-function-handler"] == "index.handler"
        assert headers["x-fc-function-memory"] == "512"
        assert headers["x-fc-function-timeout"] == "60"
        assert headers["x-fc-qualifier"] == "LATEST"
        for name in ("access-key-id", "access-key-secret", "security-token", "function-initializer", "region"):
            assert headers[f"x-fc-{name}"] == ""


@pytest.mark.trio
async def test_the_common_headers_say_what_the_spec_says() -> None:
    fc = FcSpec(
        handler="main.run",
        initializer=HookSpec(timeout_s=5),
        pre_stop=HookSpec(),
        pre_freeze=HookSpec(enabled=False),
        service="svc",
        qualifier="3",
        region="cn-hangzhou",
        account_id="12345",
    )
    async with code_with(FunctionSpec(name="f", code=".", contract="fc", fc=fc)) as (session, code):
        await session.exchange(event())
        headers = code.headers()
        assert headers["x-fc-function-initializer"] == "main.initializer"
        assert headers["x-fc-initialization-timeout"] == "5"
        assert headers["x-fc-instance-lifecycle-pre-stop-handler"] == "main.pre_stop"
        assert headers["x-fc-instance-lifecycle-pre-freeze-handler"] == ""
        assert (headers["x-fc-service-name"], headers["x-fc-version-id"]) == ("svc", "3")
        assert (headers["x-fc-region"], headers["x-fc-account-id"]) == ("cn-hangzhou", "12345")


@pytest.mark.trio
async def test_an_http_call_passes_through_with_the_common_headers() -> None:
    async with code_with(HTTP_SPEC, answers(418, [("X-A", "1"), ("X-A", "2")], b"tea")) as (session, code):
        call = http(b"PATCH", b"/a%2Fb?c=%20", [(b"Host", b"h"), (b"X-Two", b"1"), (b"X-Two", b"2")], b"body")
        call.base_path, call.client_ip, call.retry_count = b"/2016-08-15/proxy/s/f", b"10.0.0.9", 2
        reply = await session.exchange(call)
        assert (reply.status, reply.body, reply.function_error) == (418, b"tea", None)
        assert [value for name, value in reply.headers if name.lower() == b"x-a"] == [b"1", b"2"]
        assert code.lines() == [("PATCH", "/a%2Fb?c=%20")]
        assert code.asked[0][1] == b"body"
        assert [value for name, value in code.asked[0][0].headers if name == b"x-two"] == [b"1", b"2"]
        headers = code.headers()
        assert {name for name in headers if name.startswith("x-fc-")} == COMMON | {
            "x-fc-base-path",
            "x-fc-client-ip",
            "x-fc-retry-count",
        }
        assert headers["x-fc-control-path"] == "/http-invoke"
        assert (headers["x-fc-base-path"], headers["x-fc-client-ip"]) == ("/2016-08-15/proxy/s/f", "10.0.0.9")
        assert headers["x-fc-retry-count"] == "2"


@pytest.mark.trio
async def test_what_does_not_pass_into_an_http_function() -> None:
    dropped = [
        (b"X-Fc-Request-Id", b"forged"),
        (b"x-fc-account-id", b"forged"),
        (b"x-fc-anything", b"forged"),
        (b"Connection", b"keep-alive, x-mine"),
        (b"X-Mine", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Expect", b"100-continue"),
    ]
    async with code_with(HTTP_SPEC) as (session, code):
        await session.exchange(http(headers=[(b"Host", b"x"), *dropped, (b"Accept", b"*/*")]))
        headers = code.headers()
        assert headers["x-fc-request-id"] == "req-1"
        assert headers["x-fc-account-id"] == ""
        assert headers["accept"] == "*/*"
        assert headers.keys().isdisjoint({"x-fc-anything", "connection", "keep-alive", "x-mine", "expect"})


@pytest.mark.trio
async def test_what_does_not_pass_out_of_an_http_function() -> None:
    dropped = [("Connection", "keep-alive"), ("Date", "today"), ("Server", "mine"), ("Keep-Alive", "timeout=5")]
    async with code_with(HTTP_SPEC, answers(200, [*dropped, ("Content-Type", "a/b")])) as (session, _):
        reply = await session.exchange(http())
        assert [(name.lower(), value) for name, value in reply.headers] == [(b"content-type", b"a/b")]


@pytest.mark.trio
@pytest.mark.parametrize(("length", "pieces"), [(6, [b"abc", b"def"]), (None, [b"abc", b"def"])])
@pytest.mark.parametrize("spec", [EVENT_SPEC, HTTP_SPEC])
async def test_a_long_body_is_streamed_in(spec: FunctionSpec, length: int | None, pieces: list[bytes]) -> None:
    async with code_with(spec) as (session, code):
        call = Call("req-1", b"PUT", b"/", [(b"host", b"x")], b"first ", Pieces(*pieces), event=spec is EVENT_SPEC)
        call.length = length + 6 if length is not None else None
        reply = await session.exchange(call)
        assert reply.body == b"echo first abcdef"
        assert ("transfer-encoding" in code.headers()) == (length is None)


@pytest.mark.trio
async def test_a_long_answer_is_streamed_out() -> None:
    async with code_with(EVENT_SPEC, answers(body=b"x" * 2_000_000)) as (session, code):
        reply = await session.exchange(event())
        assert reply.stream is not None
        assert len(reply.body + await read_all(reply.stream)) == 2_000_000
        await session.exchange(event())
        assert code.running.dials == 1, "the connection was not given back"


# --- success and failure ------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("http_status", [200, 500])
@pytest.mark.parametrize("fc_status", [None, "200", "404", "400"])
@pytest.mark.parametrize("spec", [EVENT_SPEC, HTTP_SPEC])
async def test_x_fc_status_decides(spec: FunctionSpec, http_status: int, fc_status: str | None) -> None:
    headers = [("X-Fc-Status", fc_status)] if fc_status else []
    async with code_with(spec, answers(http_status, headers)) as (session, _):
        reply = await session.exchange(event() if spec is EVENT_SPEC else http())
        failed = fc_status in ("404", "400")
        assert (reply.function_error is not None) == failed
        if failed:
            assert fc_status is not None
            assert fc_status in str(reply.function_error)
        assert reply.status == (200 if spec is EVENT_SPEC else http_status)
        assert reply.body == b"answer"


@pytest.mark.trio
async def test_response_headers_over_8_kb_are_a_bad_response_and_cost_nothing_else() -> None:
    for size, status in ((8_000, 200), (8_300, 502)):
        for body in (b"small", b"x" * 2_000_000):
            async with code_with(HTTP_SPEC, answers(200, [("x-big", "v" * size)], body)) as (session, _):
                reply = await session.exchange(http())
                assert reply.status == status
                if status == 502:
                    assert reply.stream is None
                    assert json.loads(reply.body)["ErrorCode"] == "BadResponse"
                    assert "BadResponse" in str(reply.function_error)
                    assert (await session.exchange(http())).status == 502


def test_errors_carry_both_pairs_of_names() -> None:
    error = json.loads(error_body("C", "m"))
    assert error == {"ErrorCode": "C", "ErrorMessage": "m", "Code": "C", "Message": "m"}


# --- what is refused before anything is sent -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "call", "words"),
    [
        (EVENT_SPEC, http(), "event function"),
        (HTTP_SPEC, event(), "HTTP function"),
        (HTTP_SPEC, http(headers=[(b"a", b"b" * 8_200)]), "8192"),
        (HTTP_SPEC, http(target=b"/" + b"a" * 4_096), "4096"),
        (EVENT_SPEC, event(b"x" * (32 * 1024 * 1024 + 1)), "33554432"),
        (EVENT_SPEC, event(b"", stream=Pieces(), length=33_554_433), "33554432"),
    ],
)
def test_calls_that_are_refused(spec: FunctionSpec, call: Call, words: str) -> None:
    with pytest.raises(CallRefused, match=words) as refused:
        FC.check_call(spec, call)
    assert (refused.value.status, refused.value.code) == (400, "invalid_argument")


def test_calls_just_within_the_limits() -> None:
    FC.check_call(HTTP_SPEC, http(target=b"/" + b"a" * 4_095, headers=[(b"a", b"b" * 8_191)]))
    FC.check_call(EVENT_SPEC, event(b"x" * (32 * 1024 * 1024)))
    FC.check_call(EVENT_SPEC, Call("r", b"POST", b"/", [(b"a", b"b" * 9_000)], event=True))  # headers are not passed


@pytest.mark.trio
async def test_a_call_of_the_wrong_kind_is_never_sent() -> None:
    async with code_with(EVENT_SPEC) as (session, code):
        with pytest.raises(CallRefused):
            await session.exchange(http())
        assert code.asked == []
        await session.exchange(event())
        assert code.running.dials == 1


# --- the spec -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (FunctionSpec(name="f", code=".", env={"FC_X": "1"}), "env.FC_X"),
        (FunctionSpec(name="f", code=".", env={"A": "x" * 4_096}), "env"),
        (FunctionSpec(name="f", code=".", start_timeout_s=121), "start_timeout_s"),
        (FunctionSpec(name="f", code=".", fc=FcSpec(handler="a b")), "fc.handler"),
        (FunctionSpec(name="f", code=".", fc=FcSpec(handler="")), "fc.handler"),
        (FunctionSpec(name="f", code=".", fc=FcSpec(service="x\r\ny: z")), "fc.service"),
        (FunctionSpec(name="f", code=".", fc=FcSpec(region="ä")), "fc.region"),
    ],
)
def test_specs_that_are_refused(spec: FunctionSpec, path: str) -> None:
    found = FC.check(spec)
    assert [place for place, _ in found] == [path]
    assert all(problem for _, problem in found)


def test_specs_that_are_taken() -> None:
    assert FC.check(EVENT_SPEC) == []
    assert FC.check(FunctionSpec(name="f", code=".", env={"A": "x" * 4_095})) == []
    assert FC.check(FunctionSpec(name="f", code=".", fc=FcSpec(handler="not-used"))) == []


def test_the_environment() -> None:
    fc = FcSpec(initializer=HookSpec(), service="svc", qualifier="prod", region="r", account_id="1")
    spec = FunctionSpec(name="f", code=".", memory_mb=128, timeout_s=3, fc=fc)
    assert FC.environment(spec, "i-7", 9001) == {
        "FC_FUNC_CODE_PATH": "/code/",
        "FC_ACCOUNT_ID": "1",
        "FC_FUNCTION_HANDLER": "index.handler",
        "FC_FUNCTION_MEMORY_SIZE": "128",
        "FC_FUNCTION_NAME": "f",
        "FC_REGION": "r",
        "FC_CUSTOM_LISTEN_PORT": "9001",
        "FC_INSTANCE_ID": "i-7",
        "FC_SERVER_PORT": "9001",
        "FC_SERVICE_NAME": "svc",
        "FC_QUALIFIER": "prod",
        "FC_FUNCTION_VERSION": "prod",
        "FC_HANDLER": "index.handler",
        "FC_MEMORY_SIZE": "128",
        "FC_TIMEOUT": "3",
        "FC_INITIALIZER": "index.initializer",
        "FC_INITIALIZATION_TIMEOUT": "3",
        "ALIBABA_CLOUD_ACCESS_KEY_ID": "",
        "ALIBABA_CLOUD_ACCESS_KEY_SECRET": "",
        "ALIBABA_CLOUD_SECURITY_TOKEN": "",
    }


# --- hooks --------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_initializer_is_called_once_before_anything_else() -> None:
    async with code_with(spec_with(initializer=HookSpec())) as (session, code):
        await session.exchange(event())
        await session.exchange(event())
        assert code.lines() == [("POST", "/initialize"), ("POST", "/invoke"), ("POST", "/invoke")]
        headers = code.headers(0)
        assert code.asked[0][1] == b""
        assert headers["x-fc-control-path"] == "/initialize"
        assert headers["x-fc-request-id"] == "i-1-initialize"
        assert headers["x-fc-function-initializer"] == "index.initializer"
        assert {name for name in headers if name.startswith("x-fc-")} == COMMON
        assert session.link.stages.keys() == {"connect", "init"}


@pytest.mark.trio
@pytest.mark.parametrize("spec", [EVENT_SPEC, spec_with(initializer=HookSpec(enabled=False))])
async def test_without_an_initializer_nothing_is_called(spec: FunctionSpec) -> None:
    async with code_with(spec) as (_, code):
        assert code.asked == []
        assert code.running.dials == 1


@pytest.mark.trio
async def test_an_adopted_instance_is_not_initialised_again() -> None:
    async with code_with(spec_with(initializer=HookSpec()), prepared=False) as (session, code):
        session.link.adopted = True
        await session.prepare()
        await session.exchange(event())
        assert code.lines() == [("POST", "/invoke")]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (answers(404), "answered 404"),
        (answers(400), "answered 400"),
        (answers(500), "answered 500"),
        (answers(200, [("x-fc-status", "404")]), "x-fc-status: 404"),
    ],
)
async def test_an_initializer_that_fails_is_a_failed_start(answer: Answer, words: str) -> None:
    spec = spec_with(initializer=HookSpec())
    async with code_with(spec, answer, prepared=False) as (session, _):
        with pytest.raises(StartError, match=f"initialization failed: .*{words}") as raised:
            await session.prepare()
        explained = FC.start_error(spec, raised.value.message, "a line\n")
        assert "initialization failed" in explained.message
        assert explained.log_tail == "a line\n"


@pytest.mark.trio
@pytest.mark.parametrize("status", [200, 201, 204])
async def test_any_2xx_is_a_good_initializer(status: int) -> None:
    async with code_with(spec_with(initializer=HookSpec()), answers(status, body=b"")) as (_, code):
        assert code.lines() == [("POST", "/initialize")]


@pytest.mark.trio
async def test_an_initializer_has_its_own_time(autojump_clock: trio.testing.MockClock) -> None:
    async with code_with(spec_with(initializer=HookSpec(timeout_s=7)), never, prepared=False) as (session, _):
        began_s = trio.current_time()
        with pytest.raises(StartError, match="did not answer within 7 s"):
            await session.prepare()
        assert 7 <= trio.current_time() - began_s < 8


@pytest.mark.trio
async def test_the_hooks_before_freezing_and_before_the_end() -> None:
    async with code_with(spec_with(pre_freeze=HookSpec(), pre_stop=HookSpec())) as (session, code):
        await session.before_freeze()
        await session.before_stop()
        assert code.lines() == [("GET", "/pre-freeze"), ("GET", "/pre-stop")]
        assert code.headers(0)["x-fc-control-path"] == "/pre-freeze"
        assert code.headers(1)["x-fc-request-id"] == "i-1-pre-stop"
        assert session.link.log.lines() == []


@pytest.mark.trio
async def test_hooks_that_are_not_asked_for_are_not_called() -> None:
    async with code_with(spec_with(pre_freeze=HookSpec(enabled=False))) as (session, code):
        await session.before_freeze()
        await session.before_stop()
        assert code.asked == []


@pytest.mark.trio
@pytest.mark.parametrize("answer", [answers(404), answers(503), answers(200, [("x-fc-status", "400")]), never])
async def test_their_failures_are_only_noted(answer: Answer, autojump_clock: trio.testing.MockClock) -> None:
    async with code_with(spec_with(pre_freeze=HookSpec(), pre_stop=HookSpec()), answer) as (session, _):
        await session.before_freeze()
        await session.before_stop()
        noted = [line.text for line in session.link.log.lines()]
        assert len(noted) == 2
        assert "the pre-freeze hook failed" in noted[0]
        assert "the pre-stop hook failed" in noted[1]


@pytest.mark.trio
async def test_a_500_before_freezing_asks_for_a_restart() -> None:
    async with code_with(spec_with(pre_freeze=HookSpec(), pre_stop=HookSpec()), answers(500)) as (session, _):
        with pytest.raises(RestartWanted):
            await session.before_freeze()
        await session.before_stop()


@pytest.mark.trio
async def test_a_hook_of_code_that_is_gone_is_only_noted() -> None:
    async with code_with(spec_with(pre_freeze=HookSpec(), pre_stop=HookSpec())) as (session, code):
        code.running.exited = "exit code 1"
        session._idle.pop().close()
        await session.before_freeze()
        assert "pre-freeze" in session.link.log.tail()
        session.close()
        await session.before_stop()


# --- the start ----------------------------------------------------------------------------------------------


def test_the_error_of_a_start_is_the_vendors() -> None:
    error = FC.start_error(EVENT_SPEC, "not ready within 120 s", "first line\nthe last line\n")
    assert "FunctionNotStarted: The CA's http server cannot be started: not ready within 120 s" in error.message
    assert error.message.endswith("Logs : the last line")
    assert "0.0.0.0:9000" in error.hint
    assert error.log_tail == "first line\nthe last line\n"


@pytest.mark.trio
async def test_code_that_ends_before_it_listens_is_a_failed_start() -> None:
    async with code_with(EVENT_SPEC, prepared=False) as (session, code):
        code.running.exited = "exit code 3"
        with pytest.raises(StartError, match="exit code 3"):
            await session.prepare()


@pytest.mark.trio
async def test_the_port_is_the_links() -> None:
    async with code_with(EVENT_SPEC) as (_, code):
        assert code.running.port == 9000


# --- log markers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("FC Invoke Start RequestId: a-1", ("a-1", True)),
        ("FC Invoke End RequestId: a-1", ("a-1", False)),
        ("FC Invoke End RequestId: a-1, Error: Unhandled function error", ("a-1", False)),
        ("FC Initialize Start RequestId: a-1", ("a-1", True)),
        ("FC PreFreeze End RequestId: a-1", ("a-1", False)),
        ("FC PreStop Start RequestId:a-1", ("a-1", True)),
        ("FC Invoke Start RequestId: ", None),
        ("not FC Invoke Start RequestId: a-1", None),
        ("an ordinary line", None),
    ],
)
def test_markers(line: str, found: tuple[str, bool] | None) -> None:
    assert read_marker(line) == found


def test_lines_of_several_invocations_at_a_time_are_told_apart() -> None:
    log = InstanceLog("i-1")
    log.read_marker = read_marker
    log.enter("a")
    log.enter("b")
    text = b"unknown\nFC Invoke Start RequestId: a\nof a\nFC Invoke Start RequestId: b\nof b\n"
    log.write(Output.STDOUT, text + b"FC Invoke End RequestId: a\nstill of b\nFC Invoke End RequestId: b\nunknown\n")
    log.leave("a")
    log.leave("b")
    assert [line.invocation for line in log.lines()] == ["", "a", "a", "b", "b", "a", "b", "b", ""]
    assert log.tail_of("a") == "FC Invoke Start RequestId: a\nof a\nFC Invoke End RequestId: a"


def test_an_end_that_comes_late_is_still_its_own() -> None:
    log = InstanceLog("i-1")
    log.read_marker = read_marker
    log.enter("a")
    log.write(Output.STDOUT, b"FC Invoke Start RequestId: a\n")
    log.leave("a")
    log.write(Output.STDOUT, b"FC Invoke End RequestId: a\n")
    assert [line.invocation for line in log.lines()] == ["a", "a"]


def test_an_invocation_that_never_ends_its_lines_does_not_take_the_next_ones() -> None:
    log = InstanceLog("i-1")
    log.read_marker = read_marker
    log.enter("a")
    log.write(Output.STDOUT, b"FC Invoke Start RequestId: a\n")
    log.leave("a")
    log.enter("b")
    log.write(Output.STDOUT, b"without a marker\n")
    assert log.lines()[-1].invocation == "b"


def test_the_log_tail_of_one_invocation_is_4_kb() -> None:
    log = InstanceLog("i-1")
    log.enter("a")
    log.write(Output.STDOUT, ("ä" * 300 + "\n").encode() * 20)
    tail = log.tail_of("a")
    assert 4_090 < len(tail.encode()) <= 4_096
    assert log.tail_of("b") == ""


@pytest.mark.trio
async def test_a_session_teaches_its_log_the_markers() -> None:
    async with code_with(EVENT_SPEC) as (session, _):
        session.link.log.write(Output.STDOUT, b"FC Invoke Start RequestId: z\n")
        assert session.link.log.tail_of("z")
