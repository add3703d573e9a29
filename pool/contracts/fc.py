"""Alibaba Function Compute's custom runtime and custom container, seen from inside the instance.

Rules: shared/CONTRACTS.md section 1 (the vendor's documentation of custom runtimes, FC 2 and FC 3). An invocation is
either an event, POSTed to /invoke, or an HTTP request passed through with common headers; the spec's `fc.type` says
which of the two a function takes. `x-fc-status` in the answer decides about success, not the HTTP status.
"""

from __future__ import annotations

import json
import re

import trio

from pool.contracts.base import Call, Headers, Link, Reply
from pool.contracts.fc_environment import check_spec, common_headers, variables
from pool.contracts.push import PushSession, find_header
from pool.errors import CallRefused, ExchangeError, RestartWanted, StartError
from pool.spec import FunctionSpec, HookSpec
from pool.wire.http1 import HOP_BY_HOP, ResponseReader, end_to_end

REQUEST_HEADER_BYTES = 8 * 1024
REQUEST_TARGET_BYTES = 4 * 1024
REQUEST_BODY_BYTES = 32 * 1024 * 1024
ANSWER_HEADER_BYTES = 8 * 1024

EVENT_TYPE = b"content-type: application/octet-stream\r\n"
# Not passed on to the function, beside x-fc-*: what the head sets anew, and what was settled with the caller.
_NOT_IN = HOP_BY_HOP | {b"content-length", b"expect"}
_NOT_OUT = HOP_BY_HOP | {b"content-length", b"date", b"server"}

INITIALIZATION_FAILED = "initialization failed"
MARKER = re.compile(r"\s*FC (?:Invoke|Initialize|PreFreeze|PreStop) (Start|End) RequestId: ?([^\s,]{1,128})")


def read_marker(text: str) -> tuple[str, bool] | None:
    """The request id in a log marker, and whether it begins (else ends) that request's lines; None: no marker."""
    found = MARKER.match(text) if "FC " in text else None
    return (found[2], found[1] == "Start") if found is not None else None


class FcSession(PushSession):
    """A session with one instance under the fc contract."""

    __slots__ = ("_common", "_event_head", "_is_event")

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        spec = link.revision.spec
        self._is_event = spec.fc.type == "event"
        self._common = common_headers(spec)
        self._event_head = (
            b"POST /invoke HTTP/1.1\r\nhost: localhost\r\n%b%bx-fc-control-path: /invoke\r\nx-fc-request-id: "
            % (EVENT_TYPE, self._common)
        )
        link.log.read_marker = read_marker

    def render(self, call: Call) -> bytes:
        """An event: POST /invoke with the body. An HTTP request: as it came, with the common headers.

        Raises CallRefused; ask FcContract.check_call before the lease instead.
        """
        if call.event is not self._is_event:
            raise _wrong_kind(self.link.revision.spec)
        if call.stream is None:
            framing = b"content-length: %d\r\n" % len(call.body)
        elif call.length is None:
            framing = b"transfer-encoding: chunked\r\n"
        else:
            framing = b"content-length: %d\r\n" % call.length
        if call.event:
            return b"%b%b\r\n%b\r\n" % (self._event_head, call.id.encode(), framing)
        lines = [b"%b %b HTTP/1.1\r\n" % (call.method, call.target)]
        has_host = False
        for name, value in _passed_in(call.headers):
            lines.append(b"%b: %b\r\n" % (name, value))
            if name.lower() == b"host":
                has_host = True
        if not has_host:
            lines.append(b"host: localhost\r\n")
        if call.stream is not None or call.body or call.method in (b"POST", b"PUT", b"PATCH"):
            lines.append(framing)
        lines.append(
            b"%bx-fc-control-path: /http-invoke\r\nx-fc-request-id: %b\r\nx-fc-base-path: %b\r\nx-fc-client-ip: %b\r\n"
            b"x-fc-retry-count: %d\r\n\r\n"
            % (self._common, call.id.encode(), call.base_path, call.client_ip, call.retry_count)
        )
        return b"".join(lines)

    def interpret(self, call: Call, reader: ResponseReader) -> Reply:
        """x-fc-status decides; of an event's answer only the body is kept."""
        headers = reader.headers
        size = 0
        fc_status: bytes | None = None
        for name, value in headers:
            size += len(name) + len(value)
            if len(name) == 11 and name.lower() == b"x-fc-status":
                fc_status = value.strip()
        if size > ANSWER_HEADER_BYTES:
            why = f"the response headers are {size} bytes, more than {ANSWER_HEADER_BYTES}"
            body = error_body("BadResponse", why)
            return Reply(502, [(b"content-type", b"application/json")], body, function_error=f"BadResponse: {why}")
        error = None
        if fc_status is not None and fc_status != b"200":
            error = f"the function set x-fc-status: {fc_status.decode('latin-1')}"
        if call.event:
            return Reply(200, [], function_error=error, length=reader.length)
        return Reply(reader.status, _passed_out(headers), function_error=error, length=reader.length)

    async def initialise(self) -> None:
        """POST /initialize, where the spec has an initializer: once per instance, within its timeout.

        Raises StartError. Any status but 2xx is a failure, 400 and 404 and x-fc-status by the contract's own words.
        """
        hook = self.link.revision.spec.fc.initializer
        if hook is None or not hook.enabled:
            return
        _, problem = await self._ask_hook(b"POST", b"/initialize", hook)
        if problem:
            raise StartError(f"{INITIALIZATION_FAILED}: {problem}")

    async def before_freeze(self) -> None:
        """GET /pre-freeze, where the spec has it. A failure is only noted in the log; a 500 raises RestartWanted."""
        hook = self.link.revision.spec.fc.pre_freeze
        if hook is not None and hook.enabled:
            status, problem = await self._ask_hook(b"GET", b"/pre-freeze", hook)
            if problem:
                self.link.log.note(f"the pre-freeze hook failed: {problem}")
            if status == 500:
                raise RestartWanted("its pre-freeze hook answered 500")

    async def before_stop(self) -> None:
        """GET /pre-stop, where the spec has it. A failure is only noted in the log."""
        hook = self.link.revision.spec.fc.pre_stop
        if hook is not None and hook.enabled and self.open_:
            _, problem = await self._ask_hook(b"GET", b"/pre-stop", hook)
            if problem:
                self.link.log.note(f"the pre-stop hook failed: {problem}")

    async def _ask_hook(self, method: bytes, path: bytes, hook: HookSpec) -> tuple[int, str]:
        """Call a hook within its time. Returns its HTTP status (0: none came) and what went wrong, or ""."""
        name = path.decode()
        request = b"%b %b HTTP/1.1\r\nhost: localhost\r\n%bx-fc-control-path: %b\r\nx-fc-request-id: %b%b\r\n%b\r\n" % (
            method,
            path,
            self._common,
            path,
            self.link.running.instance_id.encode(),
            path.replace(b"/", b"-"),
            b"content-length: 0\r\n" if method == b"POST" else b"",
        )
        with trio.move_on_after(hook.timeout_s):
            try:
                reader = await self.ask_shortly(request, method)
            except ExchangeError as exc:
                return 0, f"{name}: {exc.message}"
            if not 200 <= reader.status < 300:
                return reader.status, f"{name} answered {reader.status}"
            fc_status = find_header(reader.headers, b"x-fc-status")
            if fc_status not in (None, b"200"):
                return reader.status, f"{name} set x-fc-status: {(fc_status or b'').decode('latin-1')}"
            return reader.status, ""
        return 0, f"{name} did not answer within {hook.timeout_s:g} s"


class FcContract:
    """See the module."""

    name = "fc"
    default_port = 9000
    code_target = "/code"

    def check(self, spec: FunctionSpec) -> list[tuple[str, str]]:
        """FC_* variables, more than 4 KB of variables, a start limit over 120 s, values unfit for a header."""
        return check_spec(spec)

    def environment(self, spec: FunctionSpec, instance_id: str, port: int) -> dict[str, str]:
        """See fc_environment.variables."""
        return variables(spec, instance_id, port)

    def check_call(self, spec: FunctionSpec, call: Call) -> None:
        """An event for an event function, HTTP for an HTTP function; 8 KB of headers, 4 KB of path and query, 32 MB
        of body. Raises CallRefused."""
        if call.event is not (spec.fc.type == "event"):
            raise _wrong_kind(spec)
        if not call.event:
            size = sum([len(name) + len(value) for name, value in call.headers])
            if size > REQUEST_HEADER_BYTES:
                raise CallRefused(f"the headers are {size} bytes; a function of type http takes {REQUEST_HEADER_BYTES}")
            if len(call.target) > REQUEST_TARGET_BYTES:
                raise CallRefused(
                    f"path and query are {len(call.target)} bytes; a function of type http takes {REQUEST_TARGET_BYTES}"
                )
        size = len(call.body) if call.stream is None else call.length or 0
        if size > REQUEST_BODY_BYTES:
            raise CallRefused(f"the body is {size} bytes; the contract fc takes {REQUEST_BODY_BYTES}")

    def session(self, link: Link) -> FcSession:
        """See Contract.session."""
        return FcSession(link)

    def start_error(self, spec: FunctionSpec, why: str, log_tail: str) -> StartError:
        """FunctionNotStarted in the vendor's words, with the last line printed; a failed initializer says so."""
        if why.startswith(INITIALIZATION_FAILED):
            return StartError(
                f"function {spec.name}: {why}",
                hint="POST /initialize must answer 200 in time, or switch fc.initializer off; see its output",
                log_tail=log_tail,
            )
        last = log_tail.rstrip().rpartition("\n")[2][:512]
        port = spec.port or self.default_port
        return StartError(
            f"function {spec.name}: FunctionNotStarted: The CA's http server cannot be started: {why}. Logs : {last}",
            hint=f"the code must listen on 0.0.0.0:{port} (the key `port`) within {spec.start_timeout_s:g} s; "
            "see its output",
            log_tail=log_tail,
        )


def error_body(code: str, message: str) -> bytes:
    """An error as the platform's clients read it: older ones ErrorCode and ErrorMessage, FC 3's Code and Message."""
    return json.dumps({"ErrorCode": code, "ErrorMessage": message, "Code": code, "Message": message}).encode()


def _wrong_kind(spec: FunctionSpec) -> CallRefused:
    if spec.fc.type == "event":
        return CallRefused(
            "an event function (fc.type) is invoked with an event, not with an HTTP request",
            hint="invoke it, or deploy it with fc.type: http",
        )
    return CallRefused(
        "an HTTP function (fc.type) takes HTTP requests, not events",
        hint="send a request to its path, or deploy it with fc.type: event",
    )


def _passed_in(headers: Headers) -> Headers:
    named = find_header(headers, b"connection")
    if named is not None and named.lower() not in (b"keep-alive", b"close"):
        headers = end_to_end(headers)
    return [pair for pair in headers if (lower := pair[0].lower()) not in _NOT_IN and not lower.startswith(b"x-fc-")]


def _passed_out(headers: Headers) -> Headers:
    return [pair for pair in headers if pair[0].lower() not in _NOT_OUT]
