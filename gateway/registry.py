"""The functions deployed: which revision answers for each name, and how one takes over from another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
import structlog
import trio

from gateway.codestore import CodeStore
from gateway.function import DeployResult, Function, broken, unreadable
from gateway.store import DamagedFunction, Store, StoredFunction, StoreError
from pool.backends.base import Backend, OnProgress
from pool.contracts.base import Contract
from pool.errors import ArtifactError, BackendUnavailable, PoolError, StartError
from pool.spec import FunctionSpec, Revision, make_revision
from scheduler.errors import ConfigurationError

__all__ = ["DeployResult", "Function", "Registry"]

log = structlog.get_logger("poold.registry")

QUEUED_START_S = 60.0  # what a start may wait for others and for memory, beside its own start_timeout_s
RESTORED_AT_ONCE = 4


class Pools(Protocol):
    """The dispatcher, as far as deployments need it."""

    def deploy(self, revision: Revision, *, min_instances: int | None = None) -> None: ...

    def remove(self, revision_id: str, replaced_by: str | None = None) -> None: ...

    def scale(self, revision_id: str, min_instances: int | None, max_instances: int | None) -> None: ...

    def recycle(self, revision_id: str) -> None: ...

    def reset_breaker(self, revision_id: str) -> None: ...

    def deployment(self, revision_id: str) -> object | None: ...

    def live_instances(self, revision_id: str) -> int: ...

    async def wait_ready(self, revision_id: str, count: int = 1) -> None: ...


@dataclass(slots=True)
class _Turn:
    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0


class Registry:
    """One for the daemon; belongs to the trio thread.

    Changes to one function take turns; those to different ones do not wait for each other. Every change is on disk
    before it is in force, and cancelled before that it leaves everything as it was.
    """

    def __init__(
        self,
        store: Store,
        codestore: CodeStore,
        backend: Backend,
        dispatcher: Pools,
        contracts: Mapping[str, Contract],
    ) -> None:
        self.routes: dict[bytes, Function] = {}  # by encoded name, for the invocation path
        self._functions: dict[str, Function] = {}
        self._store = store
        self._codestore = codestore
        self._backend = backend
        self._dispatcher = dispatcher
        self._contracts = contracts
        self._turns: dict[str, _Turn] = {}
        self._code_in_hand: Counter[str] = Counter()  # of deployments under way
        self._retired: dict[str, str] = {}  # code by revision that was replaced, as long as its instances run

    # --- looking ------------------------------------------------------------------------------------------

    def get(self, name: str) -> Function | None:
        """The function of that name."""
        return self._functions.get(name)

    def list(self) -> Sequence[Function]:
        """Every function, by name."""
        return [self._functions[name] for name in sorted(self._functions)]

    # --- changing -----------------------------------------------------------------------------------------

    async def deploy(
        self,
        spec: FunctionSpec,
        *,
        code_digest: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> DeployResult:
        """Deploy a function, or a new revision of it, or (the same revision) only its floor and ceiling.

        With `wait`, the new revision's floor (at least one instance, if the old one has any) is ready before it
        takes over from the old one; a first deployment that does not become ready is undone. Without, it takes over
        at once. Raises ArtifactError, StartError, BackendUnavailable, StoreError: the old revision goes on then.
        """
        tell = on_progress or _unheard
        if spec.contract not in self._contracts:
            raise ArtifactError(
                f"there is no contract {spec.contract}", hint=f"there are: {', '.join(self._contracts)}"
            )
        async with self._turn(spec.name, tell):
            with self._holding_code(code_digest):
                result = await self._deploy(spec, code_digest, wait, tell)
        await self.collect_code()
        return result

    async def remove(self, name: str) -> None:
        """Forget a function; its queue is refused, its instances end as they fall idle. Raises KeyError, StoreError."""
        async with self._turn(name, _unheard):
            function = self._functions[name]
            await self._store.delete_function(name)
            del self._functions[name], self.routes[name.encode()]
            self._retire(function, None)
        await self.collect_code()

    async def scale(self, name: str, min_instances: int | None, max_instances: int | None) -> None:
        """Change floor and ceiling (None: as it is), for good. Raises KeyError, StoreError, PoolError."""
        async with self._turn(name, _unheard):
            function = self._functions[name]
            pool = function.spec.pool
            low = pool.min if min_instances is None else min_instances
            high = pool.max if max_instances is None else max_instances
            if not 0 <= low <= high or high < 1:
                raise PoolError(f"min {low} and max {high} cannot be", hint="0 <= min <= max, and max is at least 1")
            await self._respec(function, _with_pool(function.spec, low, high))

    def recycle(self, name: str) -> None:
        """Replace every instance the function has now. Raises KeyError."""
        self._dispatcher.recycle(self._functions[name].revision.id)

    async def collect_code(self) -> None:
        """Remove uploaded code that nothing uses any more."""
        self._retired = {
            revision: digest for revision, digest in self._retired.items() if self._dispatcher.live_instances(revision)
        }
        used = {function.code_digest for function in self._functions.values()}
        used |= {*self._code_in_hand, *self._retired.values()}
        try:
            await self._codestore.collect({digest for digest in used if digest is not None})
        except ArtifactError as exc:
            log.warning("unused code could not be removed", error=exc.message)

    # --- at the start -------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Deploy again what was deployed when poold ended. Raises StoreError.

        A function that cannot be (its image is gone, its record is of another version) is listed all the same, with
        its problem and no floor, and keeps the others from nothing.
        """
        try:
            await self._codestore.open()
        except ArtifactError as exc:
            raise StoreError(exc.message, hint=exc.hint) from exc
        limiter = trio.CapacityLimiter(RESTORED_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for record in await self._store.functions():
                nursery.start_soon(self._restore, record, limiter)
        await self.collect_code()

    async def wait_floors(self) -> None:
        """Return when every floor is started, or has failed to."""
        async with trio.open_nursery() as nursery:
            for function in self._functions.values():
                if function.spec.pool.min and function.problem is None:
                    nursery.start_soon(self._wait_floor, function)

    # --- pieces -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _turn(self, name: str, tell: OnProgress) -> AsyncIterator[None]:
        turn = self._turns.setdefault(name, _Turn())
        turn.users += 1
        try:
            if turn.lock.locked():
                tell(f"waiting: {name} is being changed by somebody else")
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[name]

    @contextmanager
    def _holding_code(self, digest: str | None) -> Iterator[None]:
        if digest is None:
            yield
            return
        self._code_in_hand[digest] += 1
        try:
            yield
        finally:
            self._code_in_hand[digest] -= 1
            self._code_in_hand += Counter()  # drops zeros

    async def _deploy(self, spec: FunctionSpec, code_digest: str | None, wait: bool, tell: OnProgress) -> DeployResult:
        clock = _Stages()
        artifact = await self._backend.resolve(spec, self._code_path(spec, code_digest), tell)
        clock.end("resolve")
        old = self._functions.get(spec.name)
        revision = make_revision(spec, artifact)
        if old is not None and old.problem is None and _identity(old.revision.id) == revision.id:
            return await self._redeploy(old, spec, clock, tell)
        revision = self._with_free_id(revision)
        floor = spec.pool.min
        if wait and old is not None and self._dispatcher.live_instances(old.revision.id):
            floor = max(1, floor)
        function = Function(
            name=spec.name,
            spec=spec,
            revision=revision,
            code_digest=code_digest,
            deployed_at_s=time.time(),
            generation=old.generation + 1 if old else 1,
        )
        self._dispatcher.deploy(revision, min_instances=floor)
        try:
            ready = floor == 0
            if wait and floor:
                tell(f"starting {floor} instance{'s' if floor > 1 else ''}")
                ready = await self._make_ready(revision, floor, tell)
            clock.end("start")
            await self._store.put_function(function.stored())
        except BaseException:  # whatever it is, Cancelled too: nothing of the new revision stays
            self._dispatcher.remove(revision.id)
            raise
        # It is on disk. From here to the end nothing waits, so nothing can come between.
        clock.end("store")
        self._set(function)
        if floor != spec.pool.min:
            self._dispatcher.scale(revision.id, spec.pool.min, spec.pool.max)
        if old is not None:
            self._retire(old, revision.id)
        tell(f"{revision.id} is deployed" + (f", in place of {old.revision.id}" if old else ""))
        return DeployResult(
            function=function, outcome="updated" if old else "created", ready=ready, stages=clock.stages
        )

    async def _redeploy(self, old: Function, spec: FunctionSpec, clock: _Stages, tell: OnProgress) -> DeployResult:
        """The same revision again: only floor, ceiling and description may differ, and it may try to start again."""
        function = await self._respec(old, spec) if spec != old.spec else old
        self._dispatcher.reset_breaker(function.revision.id)
        clock.end("store")
        tell(f"{function.revision.id} is deployed already")
        ready = self._dispatcher.live_instances(function.revision.id) >= spec.pool.min
        return DeployResult(function=function, outcome="unchanged", ready=ready, stages=clock.stages)

    async def _respec(self, old: Function, spec: FunctionSpec) -> Function:
        function = replace(old, spec=spec, revision=msgspec.structs.replace(old.revision, spec=spec))
        await self._store.put_function(function.stored())
        self._set(function)
        floor = spec.pool.min if function.problem is None else 0
        self._dispatcher.scale(function.revision.id, floor, spec.pool.max)
        return function

    def _code_path(self, spec: FunctionSpec, code_digest: str | None) -> str | None:
        if spec.code is not None and code_digest is None:
            hint = "poolctl deploy uploads it; by hand: PUT /v1/code, then name the digest with ?code="
            raise ArtifactError(f"{spec.name}: the spec names code, but none was uploaded", hint=hint)
        if spec.code is None and code_digest is not None:
            raise ArtifactError(
                f"{spec.name}: code was uploaded, but the spec names none", hint="add code: to the spec"
            )
        return str(self._codestore.path(code_digest)) if code_digest is not None else None

    def _with_free_id(self, revision: Revision) -> Revision:
        """A revision that comes back while its last instances still end needs another id than theirs."""
        number, wanted = 1, revision.id
        while self._dispatcher.deployment(wanted) is not None:
            number += 1
            wanted = f"{revision.id}.{number}"
        return msgspec.structs.replace(revision, id=wanted)

    async def _make_ready(self, revision: Revision, floor: int, tell: OnProgress) -> bool:
        """Wait for the first instance, then for the rest of the floor; False when the rest takes too long, as it
        may where both revisions do not fit in memory. Raises StartError."""
        limit_s = revision.spec.start_timeout_s + QUEUED_START_S
        try:
            with trio.move_on_after(limit_s) as first:
                await self._dispatcher.wait_ready(revision.id, 1)
            if first.cancelled_caught:
                hint = "poolctl status shows whether memory or starts are short"
                raise StartError(f"no instance of {revision.id} became ready in {limit_s:g} s", hint=hint)
            with trio.move_on_after(limit_s) as rest:
                await self._dispatcher.wait_ready(revision.id, floor)
        except KeyError:
            raise StartError(f"{revision.id} was ended while it started") from None
        if rest.cancelled_caught:
            tell(f"not all of {floor} instances are ready; it takes over with those that are")
        return not rest.cancelled_caught

    def _set(self, function: Function) -> None:
        self._functions[function.name] = function
        self.routes[function.name.encode()] = function

    def _retire(self, old: Function, replaced_by: str | None) -> None:
        if old.code_digest is not None:
            self._retired[old.revision.id] = old.code_digest
        self._dispatcher.remove(old.revision.id, replaced_by)

    async def _restore(self, record: StoredFunction | DamagedFunction, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            function = unreadable(record) if isinstance(record, DamagedFunction) else await self._found_again(record)
        if function.problem is not None:
            log.error("a function cannot start", function=function.name, problem=function.problem)
        try:
            self._dispatcher.deploy(function.revision, min_instances=0 if function.problem else function.spec.pool.min)
        except ConfigurationError as exc:  # a newer poold's, with a policy that this one does not know
            log.exception("a function cannot start", function=function.name)
            function = broken(function, f"its spec cannot be carried out: {exc}; deploy it again")
            self._dispatcher.deploy(function.revision, min_instances=0)
        self._set(function)

    async def _found_again(self, record: StoredFunction) -> Function:
        function = Function(
            name=record.name,
            spec=record.spec,
            revision=Revision(id=record.revision, spec=record.spec, artifact=record.artifact),
            code_digest=record.code_digest,
            deployed_at_s=record.deployed_at_s,
            generation=record.generation,
        )
        if record.spec.contract not in self._contracts:
            return broken(function, f"its contract {record.spec.contract} is unknown to this poold")
        # By the image's id, so that a name that stands for another image by now changes nothing.
        pinned = msgspec.structs.replace(record.spec, image=record.artifact.image)
        try:
            found = await self._backend.resolve(pinned, self._code_path(pinned, record.code_digest), _unheard)
        except BackendUnavailable as exc:
            log.warning("a function could not be checked", function=record.name, error=exc.message)
            return function
        except ArtifactError as exc:
            return replace(function, problem=f"{exc.message}; deploy it again")
        except Exception as exc:  # one function's fault must keep neither the others nor the daemon from starting
            log.exception("a function could not be checked", function=record.name)
            return replace(function, problem=f"it could not be checked ({exc}); deploy it again")
        if found.digest != record.artifact.digest:
            return replace(function, problem="what it runs is not what was deployed; deploy it again")
        return function

    async def _wait_floor(self, function: Function) -> None:
        with suppress(StartError, KeyError):  # the dispatcher has logged why; or it is no longer deployed
            await self._dispatcher.wait_ready(function.revision.id, function.spec.pool.min)


class _Stages:
    """Seconds by step."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._at_s = trio.current_time()

    def end(self, stage: str) -> None:
        now_s = trio.current_time()
        self.stages[stage] = now_s - self._at_s
        self._at_s = now_s


def _identity(revision_id: str) -> str:
    """A revision's id without the number that _with_free_id may have added."""
    name, at, digest = revision_id.rpartition("@")
    return name + at + digest.partition(".")[0]


def _with_pool(spec: FunctionSpec, low: int, high: int) -> FunctionSpec:
    return msgspec.structs.replace(spec, pool=msgspec.structs.replace(spec.pool, min=low, max=high))


def _unheard(_line: str) -> None:
    """Nobody follows."""
