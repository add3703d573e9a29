"""A deployed revision, and how one instance of it is prepared: started, connected, initialised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from pool.backends.base import Backend, Running, StartRequest
from pool.contracts.base import Contract, Link, Session
from pool.errors import StartError
from pool.instance import Instance
from pool.logbook import LogBook
from pool.logs import InstanceLog
from pool.spec import Revision
from scheduler.model import RevisionSpec

LAST_WORDS_S = 0.05  # what code prints before it dies may arrive this much after its end


@dataclass(slots=True)
class Deployment:
    """What the dispatcher knows of a deployed revision."""

    revision: Revision
    contract: Contract
    prepared: int = 0  # instances prepared so far, ever
    last_error: StartError | None = None
    changed: trio.Event = field(default_factory=trio.Event)

    def wake(self) -> None:
        """Let those who wait for a change look again."""
        self.changed.set()
        self.changed = trio.Event()

    def link(self, running: Running, log: InstanceLog, *, adopted: bool = False) -> Link:
        """What a session with one instance gets to work with."""
        port = self.revision.spec.port or self.contract.default_port
        return Link(self.revision, running, port, log, adopted)

    def new_log(self, instance_id: str, book: LogBook) -> InstanceLog:
        """A log for one instance, which the function's page in the book gets too."""
        name = self.revision.spec.name
        return InstanceLog(instance_id, keep_bytes=16_384, on_line=lambda line: book.add(name, line))


async def prepare(
    backend: Backend, deployment: Deployment, instance_id: str, book: LogBook, leave: Callable[[Running], None]
) -> Instance:
    """Start, connect and initialise one instance, within the spec's start_timeout_s.

    Raises StartError, or what backend.start raises; then, and when cancelled, it leaves nothing behind, or hands
    what cannot be stopped now, as when the engine has gone, to `leave`.
    """
    revision, contract = deployment.revision, deployment.contract
    spec = revision.spec
    port = spec.port or contract.default_port
    log = deployment.new_log(instance_id, book)
    request = StartRequest(
        instance_id=instance_id,
        revision=revision,
        env={**contract.environment(spec, instance_id, port), **spec.env},
        port=port,
        on_output=log.write,
        code_target=contract.code_target,
    )
    began_s = trio.current_time()
    running: Running | None = None
    session: Session | None = None
    instance: Instance | None = None
    try:
        with trio.move_on_after(spec.start_timeout_s):
            running = await backend.start(request)
            link = deployment.link(running, log)
            link.stages["start"] = trio.current_time() - began_s
            session = contract.session(link)
            await session.prepare()
            instance = Instance(instance_id, revision, running, session, log, link.stages)
            return instance
        raise StartError(f"not ready within {spec.start_timeout_s:g} s")
    except StartError as exc:
        if running is None or exc.backend_fault:
            raise
        await trio.sleep(LAST_WORDS_S)
        explained = contract.start_error(spec, exc.message, exc.log_tail or log.tail())
        explained.permanent = exc.permanent
        raise explained from exc
    finally:
        if instance is None:
            with trio.CancelScope(shield=True):
                if session is not None:
                    session.close()
                if running is not None:
                    try:
                        await running.stop(0)
                    except Exception:  # noqa: BLE001 - whatever it is, it is tried again, and told if that fails too
                        leave(running)
                log.close()


def core_spec(revision: Revision, min_instances: int | None = None) -> RevisionSpec:
    """What the core needs to know of a revision."""
    spec = revision.spec
    return RevisionSpec(
        revision=revision.id,
        function=spec.name,
        tenant=spec.tenant,
        slots=spec.concurrency,
        min_instances=spec.pool.min if min_instances is None else min_instances,
        max_instances=max(spec.pool.max, spec.pool.min, min_instances or 0),
        memory_mb=spec.memory_mb,
        reserved=spec.reserved,
        queue_max=spec.queue.max,
        keepalive=spec.pool.keepalive,
        keepalive_s=spec.pool.keepalive_s,
        freeze_after_s=spec.pool.freeze_after_s,
        max_age_s=spec.pool.max_age_s,
        max_uses=spec.pool.max_uses,
        max_memory_mb=spec.pool.max_memory_mb,
    )
