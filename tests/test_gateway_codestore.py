"""Uploaded code: what is unpacked and how it is named, and every way an archive can be bad."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway.codestore import CodeStore
from gateway.errors import ClientGone
from gateway.untar import UnpackLimits
from pool.errors import ArtifactError

LIMIT = 10_000_000


class Body:
    """A request's body in pieces; `fail` is raised after them."""

    def __init__(self, data: bytes, *, piece: int = 700, fail: Exception | None = None) -> None:
        self._pieces = [data[i : i + piece] for i in range(0, len(data), piece)]
        self._fail = fail

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._pieces:
            return self._pieces.pop(0)
        if self._fail is not None:
            raise self._fail
        return b""


def entry(name: str, data: bytes | None = None, **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.mode = 0o644
    if data is not None:
        info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data or b""


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hard(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def directory(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.DIRTYPE, mode=mode)


BOOTSTRAP = entry("bootstrap", b"#!/bin/sh\n", mode=0o700)


async def opened(path: Path, limits: UnpackLimits | None = None) -> CodeStore:
    store = CodeStore(path / "code", limits)
    await store.open()
    return store


def left_in(store: CodeStore) -> list[str]:
    """Everything below the store, but for its own empty directory for uploads."""
    return sorted(str(p.relative_to(store.directory)) for p in store.directory.rglob("*") if p.name != ".incoming")


async def refusal(path: Path, data: bytes, limits: UnpackLimits | None = None) -> str:
    store = await opened(path, limits)
    with pytest.raises(ArtifactError) as caught:
        await store.add_tar(Body(data), LIMIT)
    assert left_in(store) == []
    assert os.listdir(path) == ["code"]
    return caught.value.message


@pytest.mark.trio
async def test_a_directory_is_unpacked_readable_for_everyone(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    data = tar_of(
        directory("./", 0o700),
        BOOTSTRAP,
        directory("./lib", 0o700),
        entry("./lib/data", b"x" * 100_000, mode=0o4600),
        entry("deep/er/file", b""),
        link("lib/again", "../bootstrap"),
        link("nowhere", "lib/not-there"),
        hard("twin", "bootstrap"),
    )
    previous = os.umask(0o077)
    try:
        root = store.path(await store.add_tar(Body(data), LIMIT))
    finally:
        os.umask(previous)
    found = {
        str(p.relative_to(root)): oct(stat.S_IMODE(p.lstat().st_mode)) for p in root.rglob("*") if not p.is_symlink()
    }
    assert found == {
        "bootstrap": "0o755",
        "twin": "0o755",
        "lib": "0o755",
        "lib/data": "0o644",
        "deep": "0o755",
        "deep/er": "0o755",
        "deep/er/file": "0o644",
    }
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert (root / "lib/again").read_bytes() == (root / "twin").read_bytes() == b"#!/bin/sh\n"
    assert (root / "lib/data").read_bytes() == b"x" * 100_000
    assert (root / "nowhere").is_symlink()
    assert list((store.directory / ".incoming").iterdir()) == []


@pytest.mark.trio
async def test_the_same_content_has_one_digest_and_one_copy(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    plain = tar_of(BOOTSTRAP, directory("lib"), entry("lib/a", b"a"))
    other = tar_of(
        entry("lib/a", b"replaced"),
        entry("./lib//a", b"a", mtime=99, uid=7, uname="somebody", mode=0o600),
        entry("bootstrap", b"#!/bin/sh\n", mode=0o755, mtime=5),
    )
    first = await store.add_tar(Body(plain), LIMIT)
    made = store.path(first).stat().st_ino
    assert await store.add_tar(Body(other), LIMIT) == first
    assert await store.add_tar(Body(gzip.compress(plain)), LIMIT) == first
    two_members = gzip.compress(plain[:700]) + gzip.compress(plain[700:]) + b"\0" * 100
    assert await store.add_tar(Body(two_members), LIMIT) == first
    assert store.path(first).stat().st_ino == made
    assert len([name for name in left_in(store) if "/" not in name]) == 1


@pytest.mark.trio
@pytest.mark.parametrize(
    "entries",
    [
        (entry("bootstrap", b"#!/bin/sh\n", mode=0o644),),
        (entry("bootstrap", b"#!/bin/sh!", mode=0o700),),
        (BOOTSTRAP, directory("empty")),
        (BOOTSTRAP, link("a", "bootstrap")),
        (BOOTSTRAP, hard("a", "bootstrap")),
        (entry("a", b"#!/bin/sh\n", mode=0o700),),
    ],
)
async def test_other_content_has_another_digest(tmp_path: Path, entries: tuple[tuple[tarfile.TarInfo, bytes]]) -> None:
    store = await opened(tmp_path)
    first = await store.add_tar(Body(tar_of(BOOTSTRAP)), LIMIT)
    assert await store.add_tar(Body(tar_of(*entries)), LIMIT) != first


@pytest.mark.trio
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ((entry("/etc/passwd", b"x"),), "'/etc/passwd' is an absolute path"),
        ((entry("../x", b"x"),), "'../x' leads out"),
        ((entry("a/../../x", b"x"),), "leads out"),
        ((link("a", "/etc"),), "the link a leads to the absolute path '/etc'"),
        ((link("a", ".."),), "the link a to '..' leads out"),
        ((directory("a/b"), link("a/b/up", "../.."), link("z", "a/b/up/..")), "the link z to 'a/b/up/..' leads out"),
        ((link("z", "a/up/.."), directory("a"), link("a/up", "..")), "leads out"),
        ((link("a", "b"), entry("a/x", b"x")), "a is there as a directory and as something else"),
        ((directory("a"), entry("a", b"x")), "a is there as a directory"),
        ((entry("a", b"x"), directory("a")), "a is there as a directory"),
        ((hard("a", "bootstrap"),), "which is no file in the archive"),
        ((directory("d"), hard("a", "d")), "which is no file in the archive"),
        ((hard("a", "../x"),), "leads out"),
        ((entry("dev", type=tarfile.CHRTYPE),), "dev is a device"),
        ((entry("pipe", type=tarfile.FIFOTYPE),), "pipe is a device, a pipe"),
        ((entry(".", b"x"),), "no name for a file"),
        ((entry("n" * 300, b"x"),), "file name too long"),
        ((), "it is empty"),
        ((directory("."),), "it is empty"),
    ],
)
async def test_archives_that_are_refused(
    tmp_path: Path, entries: tuple[tuple[tarfile.TarInfo, bytes], ...], expected: str
) -> None:
    assert expected in await refusal(tmp_path, tar_of(*entries))


@pytest.mark.trio
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "nothing was uploaded"),
        (b"hello", "not a complete tar archive"),
        (b"hello" * 1000, "not a complete tar archive"),
        (tar_of(BOOTSTRAP)[:519], "unexpected end of data"),
        (tar_of(BOOTSTRAP)[:515], "end"),
        (tar_of(BOOTSTRAP)[:1024], "ends in the middle"),
        (tar_of(BOOTSTRAP)[:1024] + b"garbage!" * 64 + b"\0" * 4096, "ends in the middle, or is damaged"),
        (gzip.compress(tar_of(BOOTSTRAP))[:60], "ends in the middle"),
        (gzip.compress(tar_of(BOOTSTRAP))[:-8] + b"\1" * 8, "damaged gzip"),
        (gzip.compress(tar_of(BOOTSTRAP)) + b"more", "damaged gzip"),
        (gzip.compress(b"no tar"), "not a complete tar archive"),
    ],
)
async def test_what_is_no_whole_archive(tmp_path: Path, data: bytes, expected: str) -> None:
    assert expected in await refusal(tmp_path, data)


@pytest.mark.trio
async def test_limits(tmp_path: Path) -> None:
    small = UnpackLimits(entries=5, unpacked_bytes=100_000)
    many = tar_of(*(entry(str(i), b"") for i in range(6)))
    assert "more than 5 entries" in await refusal(tmp_path, many, small)
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert "larger than" in await refusal(tmp_path, bomb, small)
    big = tar_of(entry("a", b"x" * 60_000), entry("b", b"x" * 60_000))
    assert "larger than" in await refusal(tmp_path, big, small)
    store = await opened(tmp_path)
    with pytest.raises(ArtifactError, match="larger than 1000 bytes"):
        await store.add_tar(Body(big), 1000)


def header_with(field: slice, value: bytes, kind: bytes = b"0") -> bytes:
    """One tar header with a field overwritten and its checksum made good."""
    info, _ = entry("a", b"")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[field] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


SIZE = slice(124, 136)
HUGE = b"\x80" + b"\0" * 5 + b"\x7f" + b"\xff" * 5


@pytest.mark.trio
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"5", b"1", b"2", b"Z"])
@pytest.mark.parametrize(
    "size", [HUGE, b"\xff" * 12, b"\xff" * 10 + b"\xfc\x00", b"\xff" * 9 + b"\x80\x00\x00", b"77777777777\0"]
)
async def test_headers_that_name_impossible_sizes_lead_nowhere(tmp_path: Path, kind: bytes, size: bytes) -> None:
    data = header_with(SIZE, size, kind) + tar_of(BOOTSTRAP)
    store = await opened(tmp_path)
    with trio.fail_after(20):
        # Where tarfile reads such a size as nothing, what follows is unpacked as if it were not there.
        with contextlib.suppress(ArtifactError):
            assert (store.path(await store.add_tar(Body(data), LIMIT)) / "bootstrap").exists()
    assert os.listdir(store.directory / ".incoming") == []


@pytest.mark.trio
async def test_a_long_chain_of_extended_headers_is_refused(tmp_path: Path) -> None:
    chain = header_with(SIZE, b"00000000000\0", b"x") * 5000
    assert "not a complete tar archive" in await refusal(tmp_path, chain + tar_of(BOOTSTRAP))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
@example([(0, 255)], True)
def test_a_damaged_archive_is_unpacked_or_refused_and_nothing_else(
    tmp_path: Path, changes: list[tuple[int, int]], mend: bool
) -> None:
    data = bytearray(tar_of(BOOTSTRAP, directory("lib"), entry("lib/é" + "y" * 120, b"z" * 600), link("l", "lib")))
    for at, value in changes:
        data[at % len(data)] = value
    if mend:  # so that tarfile believes the changed header
        for start in range(0, len(data) - 512, 512):
            if any(start <= at % len(data) < start + 512 for at, _ in changes) and data[start]:
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])

    async def scenario() -> None:
        store = await opened(tmp_path)
        before = left_in(store)
        try:
            store.path(await store.add_tar(Body(bytes(data)), LIMIT))
        except ArtifactError:
            assert left_in(store) == before
        assert os.listdir(tmp_path) == ["code"]

    trio.run(scenario)


@pytest.mark.trio
@pytest.mark.parametrize("packed", [False, True])
async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path, packed: bool) -> None:
    data = tar_of(BOOTSTRAP, entry("data", os.urandom(2_000_000)))
    data = gzip.compress(data) if packed else data
    store = await opened(tmp_path)
    with pytest.raises(ClientGone):
        await store.add_tar(Body(data[:-5000], piece=65_536, fail=ClientGone("went away")), LIMIT)
    assert left_in(store) == []


@pytest.mark.trio
async def test_cancelled_while_receiving_and_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await opened(tmp_path)
    send, receive = trio.open_memory_channel[bytes](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.add_tar, receive, LIMIT)
        await send.send(b"some")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert left_in(store) == []

    scope = trio.CancelScope()
    pulses: list[int] = []
    check = trio.from_thread.check_cancelled

    def pulse() -> None:
        pulses.append(1)
        if len(pulses) == 2:
            trio.from_thread.run_sync(scope.cancel)
        check()

    monkeypatch.setattr(trio.from_thread, "check_cancelled", pulse)
    with scope:
        await store.add_tar(Body(tar_of(*(entry(str(i), b"x") for i in range(50)))), LIMIT)
    assert scope.cancelled_caught
    assert len(pulses) == 2
    assert left_in(store) == []


@pytest.mark.trio
async def test_the_same_code_uploaded_many_times_at_once(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    data = tar_of(BOOTSTRAP, entry("data", b"x" * 100_000))
    digests: list[str] = []

    async def upload() -> None:
        digests.append(await store.add_tar(Body(data), LIMIT))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(upload)
    assert len(digests) == 8
    assert [name for name in left_in(store) if "/" not in name] == [digests[0]]


@pytest.mark.trio
async def test_what_a_killed_daemon_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    digest = await store.add_tar(Body(tar_of(BOOTSTRAP)), LIMIT)
    (store.directory / ".incoming" / "abc").mkdir()
    (store.directory / ".incoming" / "abc" / "upload").write_bytes(b"half")
    again = await opened(tmp_path)
    assert list((store.directory / ".incoming").iterdir()) == []
    assert (again.path(digest) / "bootstrap").exists()


@pytest.mark.trio
async def test_unused_code_is_collected_but_not_what_was_just_uploaded(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    kept, old, fresh = [
        await store.add_tar(Body(tar_of(entry("bootstrap", text))), LIMIT) for text in (b"1", b"2", b"3")
    ]
    (store.directory / "notes").mkdir()
    for digest in (kept, old):
        os.utime(store.path(digest), (1, 1))
    assert await store.collect({kept}) == [old]
    assert store.path(kept)
    assert store.path(fresh)
    with pytest.raises(ArtifactError, match="there is no uploaded code"):
        store.path(old)
    assert (store.directory / "notes").is_dir()
    # Uploading it again makes it young again.
    os.utime(store.path(fresh), (1, 1))
    await store.add_tar(Body(tar_of(entry("bootstrap", b"3"))), LIMIT)
    assert await store.collect(set()) == [kept]


@pytest.mark.trio
@pytest.mark.parametrize("digest", ["", "..", ".incoming", "a" * 64, "../code", "A" * 64, "a" * 63 + "\n"])
async def test_only_digests_name_code(tmp_path: Path, digest: str) -> None:
    store = await opened(tmp_path)
    with pytest.raises(ArtifactError, match="there is no uploaded code"):
        store.path(digest)


@pytest.mark.trio
async def test_a_place_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "code").write_text("")
    with pytest.raises(ArtifactError, match="cannot be stored"):
        await CodeStore(tmp_path / "code").open()


@pytest.mark.trio
async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await opened(tmp_path)

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gateway.untar._sync", full)
    with pytest.raises(ArtifactError, match="no space left on device") as caught:
        await store.add_tar(Body(tar_of(BOOTSTRAP)), LIMIT)
    assert caught.value.hint == "make room below state_dir"
    assert left_in(store) == []
