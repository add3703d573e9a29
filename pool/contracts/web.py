"""The web contract: any HTTP server on a port. Every path, method, header and body passes through, both ways."""

from __future__ import annotations

import re

import trio

from pool.contracts.base import Call, Link, Reply
from pool.contracts.push import PushSession
from pool.errors import BadAnswer, ExchangeError, StartError
from pool.spec import FunctionSpec
from pool.wire.http1 import CONNECTION, HOST, KINDS, ResponseReader, end_to_end, kind_of

_PATH = re.compile(r"/[!\"$-~]*")


class WebSession(PushSession):
    """A session with one HTTP server."""

    __slots__ = ()

    def render(self, call: Call) -> bytes:
        """The caller's request as it came, less what concerns only the caller's connection."""
        lines = [b"%b %b HTTP/1.1\r\n" % (call.method, call.target)]
        has_host = named = False
        for pair in call.headers:
            kind = KINDS.get(pair[0])
            if kind is None:
                kind = kind_of(pair[0])
            if kind <= HOST:
                lines.append(b"%b: %b\r\n" % pair)
                has_host = has_host or kind == HOST
            elif kind == CONNECTION and pair[1].lower() not in (b"keep-alive", b"close"):
                named = True
        if named:  # it may name headers that concern only the caller's connection
            lines[1:] = [b"%b: %b\r\n" % pair for pair in end_to_end(call.headers) if kind_of(pair[0]) <= HOST]
        if not has_host:
            lines.append(b"host: localhost\r\n")
        if call.stream is not None:
            if call.length is None:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                lines.append(b"content-length: %d\r\n" % call.length)
        elif call.body or call.method in (b"POST", b"PUT", b"PATCH"):
            lines.append(b"content-length: %d\r\n" % len(call.body))
        lines.append(b"x-poold-invocation: %b\r\n\r\n" % call.id.encode())
        return b"".join(lines)

    def interpret(self, call: Call, reader: ResponseReader) -> Reply:
        """The answer as it is. An event's caller learns of a failure by the status."""
        error = f"the function answered {reader.status}" if call.event and reader.status >= 500 else None
        return Reply(reader.status, reader.headers, function_error=error, length=reader.length)

    async def initialise(self) -> None:
        """Ask the ready path, where there is one, until it answers below 500."""
        path = self.link.revision.spec.web.ready_path
        if path is None:
            return
        request = b"GET %b HTTP/1.1\r\nhost: localhost\r\n\r\n" % path.encode("ascii", "replace")
        pause_s = 0.005
        while True:
            if self.link.running.exited is not None:
                raise StartError(f"the code ended before it was ready: {self.link.running.exited}")
            try:
                reader = await self.ask_shortly(request, b"GET")
            except BadAnswer as exc:
                raise StartError(f"the ready path {path} does not answer HTTP: {exc.message}") from exc
            except ExchangeError:
                pass
            else:
                if reader.status < 500:
                    return
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.25)


class WebContract:
    """See the module."""

    name = "web"
    default_port = 8080
    code_target = "/code"

    def check(self, spec: FunctionSpec) -> list[tuple[str, str]]:
        """PORT is taken; and paths go into a request's first line as they are."""
        problems = []
        if "PORT" in spec.env:
            problems.append(("env.PORT", "set by poold from the key `port`; set that instead"))
        for key, path in (("invoke_path", spec.web.invoke_path), ("ready_path", spec.web.ready_path)):
            if path is not None and not _PATH.fullmatch(path):
                problems.append((f"web.{key}", "printable ASCII without blanks or #; write others as %20 and so on"))
        return problems

    def environment(self, spec: FunctionSpec, instance_id: str, port: int) -> dict[str, str]:
        """PORT, as Cloud Run, Heroku and the functions frameworks have it."""
        return {"PORT": str(port), "POOLD_FUNCTION": spec.name, "POOLD_INSTANCE": instance_id}

    def check_call(self, spec: FunctionSpec, call: Call) -> None:
        """Takes everything; the gateway's own limits hold."""

    def session(self, link: Link) -> WebSession:
        """See Contract.session."""
        return WebSession(link)

    def start_error(self, spec: FunctionSpec, why: str, log_tail: str) -> StartError:
        """See Contract.start_error."""
        port = spec.port or self.default_port
        hint = f"the code must listen on 0.0.0.0:{port} (the key `port`, also in the variable PORT)"
        if spec.web.ready_path is not None:
            hint += f" and answer GET {spec.web.ready_path} (web.ready_path) below 500"
        return StartError(
            f"function {spec.name} did not become ready: {why}",
            hint=f"{hint}; see its output",
            log_tail=log_tail,
        )
