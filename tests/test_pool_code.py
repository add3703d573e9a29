"""What makes a code directory runnable, and what identifies it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pool.code import check_code, code_command, code_facts
from pool.errors import ArtifactError
from pool.spec import FunctionSpec

SPEC = FunctionSpec(name="f", code="/somewhere")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "code"
    path.mkdir(mode=0o755)
    (path / "bootstrap").write_text("#!/bin/sh\n")
    (path / "bootstrap").chmod(0o755)
    return path


def no_bootstrap(code: Path) -> None:
    (code / "bootstrap").unlink()


def not_executable(code: Path) -> None:
    (code / "bootstrap").chmod(0o644)


def only_for_its_owner(code: Path) -> None:
    (code / "bootstrap").chmod(0o700)


def a_directory(code: Path) -> None:
    (code / "bootstrap").unlink()
    (code / "bootstrap").mkdir()


def empty(code: Path) -> None:
    (code / "bootstrap").write_text("")


def closed_directory(code: Path) -> None:
    code.chmod(0o700)


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (no_bootstrap, "there is no file bootstrap in", "executable file named bootstrap"),
        (not_executable, "mode is 0644", "chmod 755 bootstrap"),
        (only_for_its_owner, "mode is 0700", "chmod 755 bootstrap"),
        (a_directory, "not a regular file", "program or a script"),
        (empty, "is empty", "program or a script"),
        (closed_directory, "has mode 0700", "chmod 755"),
    ],
)
def test_what_cannot_run_says_why(code: Path, spoil: Callable[[Path], None], message: str, hint: str) -> None:
    check_code(SPEC, str(code), as_other=True)
    spoil(code)
    with pytest.raises(ArtifactError, match=message) as caught:
        check_code(SPEC, str(code), as_other=True)
    assert hint in caught.value.hint


def test_a_directory_that_is_not_there_or_is_a_file(code: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        check_code(SPEC, str(code / "gone"), as_other=True)
    with pytest.raises(ArtifactError, match="is not a directory"):
        check_code(SPEC, str(code / "bootstrap"), as_other=True)


def test_the_owner_may_run_what_others_may_not(code: Path) -> None:
    only_for_its_owner(code)
    closed_directory(code)
    check_code(SPEC, str(code), as_other=False)


def test_a_command_of_its_own_needs_no_bootstrap(code: Path) -> None:
    no_bootstrap(code)
    spec = FunctionSpec(name="f", code="/x", entrypoint=("/usr/bin/python3",), command=("app.py",))
    check_code(spec, str(code), as_other=True)
    assert code_command(spec, "/code") == ["/usr/bin/python3", "app.py"]
    assert code_command(SPEC, "/code") == ["/code/bootstrap"]


def test_the_digest_sees_names_bytes_modes_and_links(code: Path) -> None:
    seen = [code_facts(str(code)).digest]
    assert code_facts(str(code)).digest == seen[0]

    def changed() -> None:
        seen.append(code_facts(str(code)).digest)

    (code / "lib").mkdir()
    changed()
    (code / "lib" / "a").write_bytes(b"1")
    changed()
    (code / "lib" / "a").write_bytes(b"2")
    changed()
    (code / "lib" / "a").rename(code / "lib" / "b")
    changed()
    (code / "lib" / "b").chmod(0o755)
    changed()
    (code / "link").symlink_to("lib/b")
    changed()
    assert len(set(seen)) == len(seen)


def test_a_pipe_in_the_code_is_refused_and_not_read(code: Path) -> None:
    os.mkfifo(code / "pipe")
    with pytest.raises(ArtifactError, match="neither a file"):
        code_facts(str(code))
