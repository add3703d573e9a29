"""The bare reverse proxy that `poolbench overhead` compares poold with.

One process, trio and httptools, one upstream address with a pool of kept-alive connections; each message is parsed,
its head rebuilt without the hop-by-hop fields, and sent on in one write. It does what any correct HTTP/1.1 proxy
must and nothing else: no limits, no timeouts, no log, no routes. So it is the least that a program like poold can
cost in this language, and it is kept as fast as we know how to make it: a slow yardstick would flatter us.
"""

from __future__ import annotations

import contextlib
import socket

import click
import httptools
import trio

from bench.peer import CHUNKED, ClientGone, Crowd, Message, Peer, PeerGone, RequestReader, ResponseReader, refusal

MAX_CLIENTS = 4096
MAX_IDLE = 1024  # kept-alive upstream connections at rest
REPEATABLE = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))


class Proxy:
    """Serves clients from one upstream address."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.idle: list[Peer] = []
        self.crowd = Crowd()

    async def dial(self) -> Peer:
        """A fresh upstream connection. Raises PeerGone."""
        family = socket.AF_INET6 if ":" in self.upstream[0] else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await sock.connect(self.upstream)
        except OSError as exc:
            sock.close()
            raise PeerGone(str(exc)) from exc
        except trio.Cancelled:
            sock.close()
            raise
        return Peer(socket.socket(fileno=sock.detach()), self.crowd, ResponseReader())

    async def serve(self, listener: socket.socket) -> None:
        """Accept until cancelled."""
        listener.setblocking(False)
        places = trio.Semaphore(MAX_CLIENTS)
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await places.acquire()
                    while True:
                        await trio.lowlevel.wait_readable(listener)
                        with contextlib.suppress(OSError):
                            sock, _ = listener.accept()
                            break
                    nursery.start_soon(self.client, Peer(sock, self.crowd, RequestReader()), places)
        finally:
            while self.idle:
                self.idle.pop().close()

    async def client(self, client: Peer, places: trio.Semaphore) -> None:
        """One client's connection, to its end."""
        self.crowd.clients += 1
        try:
            await self.converse(client)
        except (PeerGone, ClientGone):
            pass
        except httptools.HttpParserUpgrade:
            with contextlib.suppress(PeerGone):
                await client.write(refusal(501, "this proxy does not upgrade connections"))
        except httptools.HttpParserError as exc:
            with contextlib.suppress(PeerGone):
                await client.write(refusal(400, f"not HTTP/1.1: {exc}"))
        finally:
            client.close()
            self.crowd.clients -= 1
            places.release()

    async def converse(self, client: Peer) -> None:
        """Requests one after another until either side is done. Raises PeerGone, HttpParserError."""
        messages = client.reader.messages
        while True:
            while not messages or not messages[0].head_done:
                if not await client.read():
                    return
            request = messages[0]
            keep_alive = await self.relay(client, request)
            if not keep_alive or not request.complete:
                return
            messages.popleft()

    async def relay(self, client: Peer, request: Message) -> bool:
        """One request there and its answer back. True when the client's connection can be used again."""
        if client.raw:
            return await self.exchange(client, request, client.raw)
        fields = request.fields()
        framing = CHUNKED if request.chunked else b""
        head = b"%b %b HTTP/1.1\r\n%b%b\r\n" % (request.method, request.url, fields, framing)
        if request.complete:
            if request.body or request.chunked:
                head += request.take_body()
            return await self.exchange(client, request, head)
        if request.expects:
            await client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await self.exchange(client, request, head + request.take_body())

    async def exchange(self, client: Peer, request: Message, data: bytes) -> bool:
        """Send `data` upstream and the answer to the client; see relay()."""
        while True:
            upstream = None
            try:
                upstream = self.idle.pop() if self.idle else await self.dial()
                await upstream.write(data)
                if not request.complete:
                    await self.upload(client, upstream, request)
                response = await self.answer_head(client, upstream)
                reusable = await self.pass_answer(client, upstream, request, response)
            except (PeerGone, httptools.HttpParserError) as exc:
                silent = upstream is None or not upstream.reader.messages
                again = upstream is not None and upstream.used and silent and request.complete
                if upstream is not None:
                    upstream.close()
                if again and request.method in REPEATABLE:
                    continue  # a kept-alive connection that had been closed meanwhile
                if request.answered:
                    raise ClientGone(str(exc)) from exc  # too late for another status: only closing tells
                await client.write(refusal(502, f"the upstream did not answer: {exc}"))
                return False
            except BaseException:
                if upstream is not None:
                    upstream.close()
                raise
            if reusable and len(self.idle) < MAX_IDLE:
                upstream.used = True
                self.idle.append(upstream)
            else:
                upstream.close()
            return request.keep_alive

    async def upload(self, client: Peer, upstream: Peer, request: Message) -> None:
        """The rest of a request's body, as it comes, before the answer is read. Raises PeerGone, ClientGone."""
        while not request.complete:
            try:
                more = await client.read()
            except (PeerGone, httptools.HttpParserError) as exc:
                raise ClientGone(str(exc)) from exc
            if not more:
                raise ClientGone("left in the middle of its request")
            await upstream.write(request.take_body())

    async def answer_head(self, client: Peer, upstream: Peer) -> Message:
        """The head of the final answer; interim ones are passed on. Raises PeerGone, HttpParserError."""
        messages = upstream.reader.messages
        while True:
            while not messages or not messages[0].head_done:
                if not await upstream.read():
                    raise PeerGone("it closed the connection")
            if messages[0].status >= 200:
                return messages[0]
            interim = messages.popleft()
            if interim.status != 100:
                await client.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (interim.status, interim.reason, interim.fields()))

    async def pass_answer(self, client: Peer, upstream: Peer, request: Message, response: Message) -> bool:
        """The answer to the client. True when the upstream connection can be used again. Raises PeerGone."""
        if upstream.raw and client.raw and response.keep_alive and request.method != b"HEAD":
            request.answered = True
            upstream.reader.messages.popleft()
            await client.write(upstream.raw)
            return True
        fields = response.fields()
        bodiless = request.method == b"HEAD" or response.status in (204, 304)
        until_end = not (bodiless or response.sized or response.chunked)
        framing = b""
        if bodiless:
            response.chunked = False
            if not response.complete:  # the parser waits for a body that will not come
                upstream.reader = ResponseReader()
                response.complete = True
        elif response.chunked or until_end:
            response.chunked = request.version != "1.0"
            if response.chunked:
                framing = CHUNKED
            else:
                request.keep_alive = False
        if not request.keep_alive:
            framing += b"connection: close\r\n"
        elif request.version == "1.0":
            framing += b"connection: keep-alive\r\n"
        request.answered = True
        await client.write(
            b"HTTP/1.1 %d %b\r\n%b%b\r\n%b" % (response.status, response.reason, fields, framing, response.take_body())
        )
        while not response.complete:
            if not await upstream.read():
                if not until_end:
                    raise PeerGone("the upstream left in the middle of its answer")
                response.complete = True
            await client.write(response.take_body())
        if upstream.reader.messages:
            upstream.reader.messages.popleft()
        return response.keep_alive and not until_end


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks one. Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT or [HOST]:PORT. Raises click.BadParameter."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise click.BadParameter(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


@click.command()
@click.option("--upstream", required=True, metavar="HOST:PORT", help="Where requests go.")
@click.option("--listen", "address", default="127.0.0.1:0", show_default=True, metavar="HOST:PORT")
def main(upstream: str, address: str) -> None:
    """The bare proxy: prints "listening on HOST:PORT" and serves until it is ended."""
    target, place = parse_address(upstream), parse_address(address)
    try:
        listener = listen(*place)
    except OSError as exc:
        raise click.ClickException(f"cannot listen on {address}: {exc.strerror}") from None
    click.echo("listening on {}:{}".format(*listener.getsockname()[:2]))
    with contextlib.suppress(KeyboardInterrupt), listener:
        trio.run(Proxy(target).serve, listener)


if __name__ == "__main__":
    main()
