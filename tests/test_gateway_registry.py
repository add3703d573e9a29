"""Deploying, replacing, scaling, removing and restoring functions, with faults at each step."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec
import pytest
import trio
import trio.testing

from gateway.codestore import CodeStore
from gateway.registry import Registry
from gateway.store import DamagedFunction, Store, StoredFunction, StoreError
from pool.backends.base import Backend
from pool.contracts.registry import CONTRACTS
from pool.errors import ArtifactError, BackendUnavailable, PoolError, StartError
from pool.spec import Artifact, FunctionSpec, PoolSpec, Revision
from scheduler.errors import ConfigurationError
from scheduler.keepalive import REGISTRY


class FakeBackend:
    """Every image and code is there, under the digest of its name, but for what is in `errors`."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}
        self.gate: trio.Event | None = None
        self.digests: dict[str, str] = {}

    async def resolve(self, spec: FunctionSpec, code_path: str | None, on_progress: Callable[[str], None]) -> Artifact:
        name = (spec.image or "") + (f"+{Path(code_path).name}" if code_path else "")
        on_progress(f"looking for {name}")
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if name in self.errors:
            raise self.errors[name]
        name = name.removeprefix("id:")
        return Artifact(digest=self.digests.get(name, name), image=f"id:{spec.image}" if spec.image else None)


class FakePools:
    """The dispatcher's surface. Instances become ready when the test says so, or at once."""

    def __init__(self) -> None:
        self.revisions: dict[str, list[int]] = {}  # floor and ceiling
        self.live: dict[str, int] = {}
        self.ending: set[str] = set()
        self.failing: dict[str, StartError] = {}
        self.at_once = True
        self.calls: list[str] = []
        self._changed = trio.Event()

    def deploy(self, revision: Revision, *, min_instances: int | None = None) -> None:
        assert revision.id not in self.revisions
        assert revision.id not in self.ending
        if revision.spec.pool.keepalive not in REGISTRY:
            raise ConfigurationError(f"there is no keep-alive policy {revision.spec.pool.keepalive}")
        floor = revision.spec.pool.min if min_instances is None else min_instances
        self.revisions[revision.id] = [floor, revision.spec.pool.max]
        self.live[revision.id] = floor if self.at_once else 0
        self.calls.append(f"deploy {revision.id} {floor}")

    def remove(self, revision_id: str, replaced_by: str | None = None) -> None:
        assert replaced_by is None or replaced_by in self.revisions
        del self.revisions[revision_id]
        self.calls.append(f"remove {revision_id}" + (f" for {replaced_by}" if replaced_by else ""))

    def scale(self, revision_id: str, min_instances: int | None, max_instances: int | None) -> None:
        assert min_instances is not None
        assert max_instances is not None
        self.revisions[revision_id] = [min_instances, max_instances]
        self.calls.append(f"scale {revision_id} {min_instances} {max_instances}")

    def recycle(self, revision_id: str) -> None:
        self.calls.append(f"recycle {revision_id}")

    def reset_breaker(self, revision_id: str) -> None:
        self.calls.append(f"reset {revision_id}")

    def deployment(self, revision_id: str) -> object | None:
        return revision_id if revision_id in self.revisions or revision_id in self.ending else None

    def live_instances(self, revision_id: str) -> int:
        return self.live.get(revision_id, 0)

    def become(self, revision_id: str, live: int) -> None:
        self.live[revision_id] = live
        self._changed.set()
        self._changed = trio.Event()

    async def wait_ready(self, revision_id: str, count: int = 1) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            if revision_id in self.failing:
                raise self.failing[revision_id]
            if self.live[revision_id] >= count:
                return
            await self._changed.wait()


class FakeStore:
    """Functions in memory. `gate`: a write waits for it, shielded, as the real one does."""

    def __init__(self) -> None:
        self.rows: dict[str, StoredFunction | DamagedFunction] = {}
        self.error: StoreError | None = None
        self.gate: trio.Event | None = None

    async def _write(self) -> None:
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            if self.gate is not None:
                await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def put_function(self, function: StoredFunction) -> None:
        await self._write()
        self.rows[function.name] = function

    async def delete_function(self, name: str) -> bool:
        await self._write()
        return self.rows.pop(name, None) is not None

    async def functions(self) -> list[StoredFunction | DamagedFunction]:
        await trio.lowlevel.checkpoint()
        return [self.rows[name] for name in sorted(self.rows)]


class FakeCode:
    """Uploaded code that is there under any digest but "gone"; remembers what it was told is used."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()

    def path(self, digest: str) -> Path:
        if digest == "gone":
            raise ArtifactError("there is no uploaded code 'gone' here", hint="upload it")
        return Path("/code") / digest

    async def collect(self, used: set[str]) -> list[str]:
        self.used = set(used)
        await trio.lowlevel.checkpoint()
        return []


class House:
    """A registry with all its fakes."""

    def __init__(self, rows: dict[str, StoredFunction | DamagedFunction] | None = None) -> None:
        self.backend, self.pools, self.store, self.code = FakeBackend(), FakePools(), FakeStore(), FakeCode()
        self.store.rows.update(rows or {})
        self.registry = Registry(
            cast(Store, self.store), cast(CodeStore, self.code), cast(Backend, self.backend), self.pools, CONTRACTS
        )

    def id(self, name: str = "a") -> str:
        function = self.registry.get(name)
        assert function is not None
        return function.revision.id

    def check(self) -> None:
        """What is routed, what is stored and what is deployed to the pools are one."""
        functions = self.registry.list()
        assert {function.name.encode(): function for function in functions} == self.registry.routes
        assert {function.revision.id for function in functions} == set(self.pools.revisions)
        assert {f.name: f.stored() for f in functions if f.problem is None} == {
            name: row
            for name, row in self.store.rows.items()
            if row.name in [f.name for f in functions if not f.problem]
        }
        assert set(self.store.rows) == {function.name for function in functions}


def spec(name: str = "a", image: str | None = "one", **changes: object) -> FunctionSpec:
    return msgspec.structs.replace(FunctionSpec(name=name, image=image), **changes)


def floor(low: int, high: int = 10) -> PoolSpec:
    return PoolSpec(min=low, max=high)


@pytest.mark.trio
async def test_a_first_deployment() -> None:
    house = House()
    lines: list[str] = []
    result = await house.registry.deploy(spec(pool=floor(2)), on_progress=lines.append)
    assert (result.outcome, result.changed, result.ready) == ("created", True, True)
    assert set(result.stages) == {"resolve", "start", "store"}
    assert house.pools.calls == [f"deploy {house.id()} 2"]
    assert house.registry.routes[b"a"].revision is result.revision
    assert house.registry.get("a") is result.function
    assert house.registry.get("b") is None
    assert lines == ["looking for one", "starting 2 instances", f"{house.id()} is deployed"]
    house.check()


@pytest.mark.trio
async def test_a_new_revision_is_ready_before_it_takes_over() -> None:
    house = House()
    await house.registry.deploy(spec(pool=floor(1)))
    old = house.id()
    house.pools.at_once = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.registry.deploy, spec(image="two", pool=floor(2)))
        await trio.testing.wait_all_tasks_blocked()
        assert house.id() == old
        (new,) = set(house.pools.revisions) - {old}
        house.pools.become(new, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert house.id() == old
        house.pools.become(new, 2)
    assert house.id() == new
    assert house.pools.calls[1:] == [f"deploy {new} 2", f"remove {old} for {new}"]
    function = house.registry.get("a")
    assert function is not None
    assert function.generation == 2
    house.check()


@pytest.mark.trio
async def test_without_a_floor_one_is_ready_first_if_the_old_revision_has_any() -> None:
    house = House()
    await house.registry.deploy(spec())
    first = house.id()
    assert house.pools.calls == [f"deploy {first} 0"]
    await house.registry.deploy(spec(image="two"))
    second = house.id()
    assert house.pools.calls[1:] == [f"deploy {second} 0", f"remove {first} for {second}"]
    house.pools.become(second, 3)
    await house.registry.deploy(spec(image="three"))
    third = house.id()
    assert house.pools.calls[3:] == [f"deploy {third} 1", f"scale {third} 0 10", f"remove {second} for {third}"]


@pytest.mark.trio
async def test_the_same_revision_again_only_scales() -> None:
    house = House()
    first = await house.registry.deploy(spec(pool=floor(1)))
    again = await house.registry.deploy(spec(pool=floor(1)))
    assert (again.outcome, again.changed, again.ready) == ("unchanged", False, True)
    scaled = await house.registry.deploy(spec(pool=floor(3, 4), description="new words"))
    assert scaled.revision.id == first.revision.id
    assert scaled.ready is False
    assert scaled.function.spec.description == "new words"
    assert (scaled.function.generation, scaled.function.deployed_at_s) == (1, first.function.deployed_at_s)
    assert house.pools.calls[1:] == [f"reset {house.id()}", f"scale {house.id()} 3 4", f"reset {house.id()}"]
    house.check()


@pytest.mark.trio
async def test_code_functions() -> None:
    house = House()
    one = spec(image=None, code="./here")
    with pytest.raises(ArtifactError, match="none was uploaded"):
        await house.registry.deploy(one)
    with pytest.raises(ArtifactError, match="the spec names none"):
        await house.registry.deploy(spec(), code_digest="d1")
    with pytest.raises(ArtifactError, match="no uploaded code"):
        await house.registry.deploy(one, code_digest="gone")
    await house.registry.deploy(one, code_digest="d1")
    assert house.code.used == {"d1"}
    moved = await house.registry.deploy(spec(image=None, code="./there"), code_digest="d1")
    assert moved.changed is False
    old = house.id()
    house.pools.become(old, 1)
    await house.registry.deploy(one, code_digest="d2")
    assert house.code.used == {"d1", "d2"}  # an instance of the old revision still runs from d1
    house.pools.become(old, 0)
    await house.registry.collect_code()
    assert house.code.used == {"d2"}
    await house.registry.remove("a")
    house.pools.live.clear()
    await house.registry.collect_code()
    assert house.code.used == set()


@pytest.mark.trio
async def test_code_of_a_deployment_under_way_is_not_collected() -> None:
    house = House()
    house.backend.gate = trio.Event()
    async with trio.open_nursery() as nursery:

        async def deploy(name: str) -> None:
            await house.registry.deploy(spec(name, image=None, code="."), code_digest="d1")

        nursery.start_soon(deploy, "a")
        nursery.start_soon(deploy, "b")
        await trio.testing.wait_all_tasks_blocked()
        await house.registry.collect_code()
        assert house.code.used == {"d1"}
        nursery.cancel_scope.cancel()
    await house.registry.collect_code()
    assert house.code.used == set()


@pytest.mark.trio
@pytest.mark.parametrize("deployed_before", [False, True])
@pytest.mark.parametrize("fault", ["resolve", "engine", "start", "store", "contract"])
async def test_a_deployment_that_fails_leaves_everything_as_it_was(deployed_before: bool, fault: str) -> None:
    house = House()
    if deployed_before:
        await house.registry.deploy(spec(pool=floor(1)))
    before = (house.registry.list(), dict(house.pools.revisions), dict(house.store.rows))
    new = spec(image="two", pool=floor(1))
    expected: type[PoolError] = ArtifactError
    match fault:
        case "resolve":
            house.backend.errors["two"] = ArtifactError("there is no image two")
        case "engine":
            house.backend.errors["two"], expected = BackendUnavailable("no engine"), BackendUnavailable
        case "start":
            expected = StartError
            house.pools.at_once = False

            async def fail() -> None:
                await trio.testing.wait_all_tasks_blocked()
                (revision,) = set(house.pools.revisions) - set(before[1])
                house.pools.failing[revision] = StartError("it exited with 3")
                house.pools.become(revision, 0)
        case "store":
            house.store.error, expected = StoreError("the disk is full"), StoreError
        case "contract":
            new = msgspec.structs.replace(new, contract="none-such")
    async with trio.open_nursery() as nursery:
        if fault == "start":
            nursery.start_soon(fail)
        with pytest.raises(expected):
            await house.registry.deploy(new)
    assert (house.registry.list(), house.pools.revisions, house.store.rows) == before
    house.check()
    # And it can be deployed once the fault is gone.
    house.backend.errors.clear()
    house.pools.failing.clear()
    house.pools.at_once, house.store.error = True, None
    result = await house.registry.deploy(spec(image="two", pool=floor(1)))
    assert result.outcome == ("updated" if deployed_before else "created")
    house.check()


@pytest.mark.trio
@pytest.mark.parametrize("step", ["resolve", "start", "store"])
async def test_a_deployment_cancelled_at_each_step(step: str) -> None:
    house = House()
    await house.registry.deploy(spec(pool=floor(1)))
    old = house.registry.get("a")
    gate = trio.Event()
    if step == "resolve":
        house.backend.gate = gate
    house.pools.at_once = step != "start"
    if step == "store":
        house.store.gate = gate
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.registry.deploy, spec(image="two", pool=floor(1)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        gate.set()
    if step == "store":  # what has begun to be written is written, and then in force
        function = house.registry.get("a")
        assert function is not None
        assert function.spec.image == "two"
    else:
        assert house.registry.get("a") is old
    house.check()


@pytest.mark.trio
async def test_without_waiting_a_deployment_takes_over_at_once() -> None:
    house = House()
    house.pools.at_once = False
    result = await house.registry.deploy(spec(pool=floor(2)), wait=False)
    assert (result.outcome, result.ready) == ("created", False)
    first = house.id()
    await house.registry.deploy(spec(image="two", pool=floor(2)), wait=False)
    assert house.pools.calls[1:] == [f"deploy {house.id()} 2", f"remove {first} for {house.id()}"]
    house.check()


@pytest.mark.trio
async def test_two_deployments_of_one_function_take_turns() -> None:
    house = House()
    house.pools.at_once = False
    lines: list[str] = []

    async def second() -> None:
        await house.registry.deploy(spec(image="two", pool=floor(1)), on_progress=lines.append)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.registry.deploy, spec(pool=floor(1)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        (first_id,) = house.pools.revisions
        assert lines == ["waiting: a is being changed by somebody else"]
        house.pools.become(first_id, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert house.id() == first_id
        (second_id,) = set(house.pools.revisions) - {first_id}
        house.pools.become(second_id, 1)
    assert house.id() == second_id
    house.check()
    assert house.registry._turns == {}


@pytest.mark.trio
async def test_deployments_of_two_functions_do_not_wait_for_each_other() -> None:
    house = House()
    house.pools.at_once = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.registry.deploy, spec("slow", pool=floor(1)))
        await trio.testing.wait_all_tasks_blocked()
        await house.registry.deploy(spec("quick"))
        assert [function.name for function in house.registry.list()] == ["quick"]
        nursery.cancel_scope.cancel()
    house.check()


@pytest.mark.trio
async def test_a_revision_that_comes_back_while_its_last_instances_end() -> None:
    house = House()
    await house.registry.deploy(spec())
    first = house.id()
    house.pools.ending.add(first)
    await house.registry.deploy(spec(image="two"))
    await house.registry.deploy(spec())
    assert house.id() == f"{first}.2"
    assert (await house.registry.deploy(spec())).changed is False
    house.check()


@pytest.mark.trio
async def test_a_start_that_never_ends(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    house.pools.at_once = False
    with pytest.raises(StartError, match="became ready in 70 s"):
        await house.registry.deploy(spec(pool=floor(1), start_timeout_s=10.0))
    house.check()


@pytest.mark.trio
async def test_a_floor_that_does_not_fit_beside_the_old_one(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    await house.registry.deploy(spec(pool=floor(3)))
    old = house.id()
    house.pools.at_once = False
    lines: list[str] = []

    async def one_fits() -> None:
        await trio.testing.wait_all_tasks_blocked()
        (new,) = set(house.pools.revisions) - {old}
        house.pools.become(new, 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_fits)
        result = await house.registry.deploy(spec(image="two", pool=floor(3)), on_progress=lines.append)
    assert result.ready is False
    assert "not all of 3 instances are ready" in lines[-2]
    house.check()


@pytest.mark.trio
async def test_scaling_is_stored() -> None:
    house = House()
    await house.registry.deploy(spec(pool=floor(1, 5)))
    await house.registry.scale("a", 2, None)
    await house.registry.scale("a", None, 3)
    function = house.registry.get("a")
    assert function is not None
    assert (function.spec.pool.min, function.spec.pool.max) == (2, 3)
    assert house.pools.calls[1:] == [f"scale {house.id()} 2 5", f"scale {house.id()} 2 3"]
    house.check()
    for low, high in ((4, None), (None, 1), (-1, None), (0, 0)):
        with pytest.raises(PoolError, match="cannot be"):
            await house.registry.scale("a", low, high)
    house.store.error = StoreError("the disk is full")
    with pytest.raises(StoreError):
        await house.registry.scale("a", 1, None)
    assert house.pools.revisions[house.id()] == [2, 3]
    house.check()


@pytest.mark.trio
async def test_removing_and_recycling() -> None:
    house = House()
    await house.registry.deploy(spec())
    house.registry.recycle("a")
    assert house.pools.calls[-1] == f"recycle {house.id()}"
    house.store.error = StoreError("the disk is full")
    with pytest.raises(StoreError):
        await house.registry.remove("a")
    house.check()
    house.store.error = None
    await house.registry.remove("a")
    assert house.registry.list() == []
    house.check()
    for call in (house.registry.remove("a"), house.registry.scale("a", 1, 2)):
        with pytest.raises(KeyError):
            await call
    with pytest.raises(KeyError):
        house.registry.recycle("a")


async def rows_of(*specs: FunctionSpec) -> dict[str, StoredFunction | DamagedFunction]:
    house = House()
    for one in specs:
        await house.registry.deploy(one, code_digest="d1" if one.code else None)
    return house.store.rows


@pytest.mark.trio
async def test_what_was_deployed_is_deployed_again() -> None:
    rows = await rows_of(spec("a", pool=floor(2)), spec("b"), spec("c", image=None, code="."))
    house = House(rows)
    await house.registry.restore()
    assert [function.stored() for function in house.registry.list()] == [rows[name] for name in ("a", "b", "c")]
    assert all(function.problem is None for function in house.registry.list())
    assert house.pools.revisions[house.id("a")] == [2, 10]
    assert house.code.used == {"d1"}
    house.check()
    # And the same spec is the same revision still.
    assert (await house.registry.deploy(spec("b"))).changed is False


@pytest.mark.trio
async def test_what_cannot_be_restored_is_listed_with_its_problem_and_spares_the_others() -> None:
    rows = await rows_of(
        spec("gone", "lost", pool=floor(2)), spec("moved", "other"), spec("fine"), spec("code", image=None, code=".")
    )
    odd = rows["fine"]
    assert isinstance(odd, StoredFunction)
    rows["odd"] = msgspec.structs.replace(odd, name="odd", revision="odd@1", spec=spec("odd", contract="none-such"))
    code = rows["code"]
    assert isinstance(code, StoredFunction)
    rows["code"] = msgspec.structs.replace(code, code_digest="gone")
    rows["torn"] = DamagedFunction(name="torn", problem="its stored spec cannot be read", code_digest="d9")
    house = House(rows)
    house.backend.errors["id:lost"] = ArtifactError("the engine has no image id:lost")
    house.backend.digests["other"] = "another"
    await house.registry.restore()
    problems = {function.name: function.problem for function in house.registry.list()}
    assert problems == {
        "code": "there is no uploaded code 'gone' here; deploy it again",
        "fine": None,
        "gone": "the engine has no image id:lost; deploy it again",
        "moved": "what it runs is not what was deployed; deploy it again",
        "odd": "its contract none-such is unknown to this poold; deploy it again",
        "torn": "its stored spec cannot be read; deploy it again",
    }
    assert house.pools.revisions[house.id("gone")] == [0, 10]
    assert "d9" in house.code.used
    house.check()
    # Each can be deployed again, or removed.
    house.backend.errors.clear()
    result = await house.registry.deploy(spec("gone", "lost", pool=floor(2)))
    assert (result.outcome, result.function.problem) == ("updated", None)
    await house.registry.remove("torn")
    await house.registry.deploy(spec("odd"))
    house.check()


@pytest.mark.trio
async def test_neither_an_unknown_policy_nor_an_unexpected_fault_keeps_the_others_from_coming_back() -> None:
    rows = await rows_of(spec("newer"), spec("faulty", "odd"), spec("fine"))
    newer = rows["newer"]
    assert isinstance(newer, StoredFunction)
    unknown = spec("newer", pool=PoolSpec(min=1, keepalive="of-a-newer-poold"))
    rows["newer"] = msgspec.structs.replace(newer, spec=unknown)
    house = House(rows)
    house.backend.errors["id:odd"] = RuntimeError("nobody expected this")
    await house.registry.restore()
    problems = {function.name: function.problem or "" for function in house.registry.list()}
    assert problems["fine"] == ""
    assert "policy of-a-newer-poold" in problems["newer"]
    assert "nobody expected this" in problems["faulty"]
    house.check()


@pytest.mark.trio
async def test_an_engine_that_is_away_at_the_start_takes_nothing_away() -> None:
    house = House(await rows_of(spec("a", pool=floor(1))))
    house.backend.errors["id:one"] = BackendUnavailable("the engine does not answer")
    await house.registry.restore()
    function = house.registry.get("a")
    assert function is not None
    assert function.problem is None
    assert house.pools.revisions[house.id()] == [1, 10]


@pytest.mark.trio
async def test_waiting_for_the_floors_ends_with_success_and_with_failure() -> None:
    house = House(
        await rows_of(spec("a", pool=floor(2)), spec("b", pool=floor(1)), spec("c"), spec("d", pool=floor(1)))
    )
    house.pools.at_once = False
    await house.registry.restore()
    done = trio.Event()

    async def wait() -> None:
        await house.registry.wait_floors()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        house.pools.become(house.id("a"), 2)
        house.pools.become(house.id("d"), 1)
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        house.pools.failing[house.id("b")] = StartError("it exited")
        house.pools.become(house.id("b"), 0)
        await done.wait()


class Body:
    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data, b""
        return data


@pytest.mark.trio
async def test_with_the_real_store_over_a_restart(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("bootstrap")
        info.mode = 0o755
        tar.addfile(info)
    code = CodeStore(tmp_path / "code")
    backend, pools = FakeBackend(), FakePools()
    store = await Store.open(tmp_path / "poold.db")
    registry = Registry(store, code, cast(Backend, backend), pools, CONTRACTS)
    await registry.restore()
    digest = await code.add_tar(Body(out.getvalue()), 1_000_000)
    result = await registry.deploy(spec(image=None, code=".", pool=floor(1)), code_digest=digest)
    await registry.deploy(spec("b"))
    await registry.remove("b")
    await store.aclose()

    store = await Store.open(tmp_path / "poold.db")
    registry = Registry(store, code, cast(Backend, backend), FakePools(), CONTRACTS)
    await registry.restore()
    (function,) = registry.list()
    assert function == result.function
    assert (code.path(digest) / "bootstrap").is_file()
    with suppress(KeyError):
        await registry.remove("a")
    await store.aclose()
