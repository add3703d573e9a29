"""What an earlier daemon left: adopt the healthy instances of live revisions, remove the rest."""

from __future__ import annotations

from dataclasses import dataclass

import structlog
import trio

from pool.backends.base import Found
from pool.dispatcher import Dispatcher
from pool.errors import PoolError
from pool.instance import Instance

log = structlog.get_logger("poold.recovery")

AT_ONCE = 8
ADOPT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Recovered:
    """How many instances were adopted and removed."""

    adopted: int = 0
    removed: int = 0


async def recover(dispatcher: Dispatcher) -> Recovered:
    """Adopt or remove every instance that an earlier daemon with this identity left.

    Call it with starts held (Dispatcher.hold_starts), so that the floor is not started beside what is adopted.
    One that cannot be removed now is left to the backend. Raises BackendUnavailable when the engine cannot be asked
    what there is. Cancelled: the rest is left as it is, for the next time.
    """
    found = await dispatcher.backend.find()
    result = Recovered()
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(item: Found) -> None:
        async with limiter:
            try:
                if await _adopt(dispatcher, item):
                    result.adopted += 1
                else:
                    await dispatcher.backend.remove(item)
                    result.removed += 1
            except PoolError as exc:  # the backend tries again later; the daemon is to start all the same
                log.warning("not removed now", instance=item.instance_id, error=exc.message)
            except Exception:
                log.exception("neither adopted nor removed", instance=item.instance_id)

    async with trio.open_nursery() as nursery:
        for item in found:
            nursery.start_soon(one, item)
    return result


async def _adopt(dispatcher: Dispatcher, found: Found) -> bool:
    deployment = dispatcher.deployment(found.revision_id)
    if deployment is None or not found.running:
        return False
    instance_log = deployment.new_log(found.instance_id, dispatcher.logs)
    session = None
    with trio.move_on_after(ADOPT_TIMEOUT_S):
        try:
            running = await dispatcher.backend.adopt(found, deployment.revision, instance_log.write)
            link = deployment.link(running, instance_log, adopted=True)
            session = deployment.contract.session(link)
            await session.prepare()
        except PoolError as exc:
            log.info("not adopted", instance=found.instance_id, why=exc.message)
        else:
            instance = Instance(found.instance_id, deployment.revision, running, session, instance_log, {})
            dispatcher.adopt(instance, found.age_s)
            return True
    if session is not None:
        session.close()
    return False
