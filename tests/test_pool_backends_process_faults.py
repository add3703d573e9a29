"""What the process backend leaves when the host runs short in the middle of a start: nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
from backend_kinds import ProcessKind, make, make_code, request

from pool.backends.process import ProcessBackend
from pool.errors import StartError


@pytest.mark.trio
async def test_a_start_that_runs_out_of_descriptors_leaves_no_process(
    daemon_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ProcessKind(daemon_id, tmp_path)

    def no_more(pid: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with ProcessBackend(kind.daemon_id, kind.state_dir) as backend:
        revision = await make(backend, make_code(tmp_path))
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pidfd_open", no_more)
            with pytest.raises(StartError, match="Too many open files") as caught:
                await backend.start(request(revision, "i1"))
        assert caught.value.backend_fault
        assert await trio.to_thread.run_sync(kind.leftovers) == []
        assert len(os.listdir("/proc/self/fd")) == before
