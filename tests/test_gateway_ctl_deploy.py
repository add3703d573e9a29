"""poolctl deploy: reading specs, uploading code, following a deployment, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gateway_fake_daemon import Canned, FakeDaemon, canned, failing, ndjson, running

from gateway import ctl
from gateway.apis import views
from gateway.codetar import CodeDirectoryError, write_tar

SPEC = "name: hello\ncode: src\npool:\n  min: 1\n"
DEPLOYED = views.Deployed(name="hello", revision="hello@0123456789ab", digest="sha256:1", outcome="created")

Run = Callable[..., int]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running(tmp_path / "d.sock") as fake:
        fake.on("PUT", "/v1/code", canned(views.CodeStored("c0de")))
        fake.on("PUT", "/v1/functions/hello", ndjson(views.Progress("starting 1 instance"), views.Finished(DEPLOYED)))
        yield fake


@pytest.fixture
def run(daemon: FakeDaemon) -> Run:
    return lambda *arguments: ctl.run(["-H", daemon.host, "deploy", *map(str, arguments)])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a function.yaml and its code."""
    directory = tmp_path / "project"
    (directory / "src" / "lib").mkdir(parents=True)
    (directory / "function.yaml").write_text(SPEC)
    bootstrap = directory / "src" / "bootstrap"
    bootstrap.write_text("#!/bin/sh\n")
    bootstrap.chmod(0o755)
    (directory / "src" / "lib" / "data").write_bytes(b"\0\1")
    return directory


def test_a_directory_is_deployed_with_its_code(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project) == 0
    upload, deploy = daemon.seen
    with tarfile.open(fileobj=io.BytesIO(upload.body)) as tar:
        assert tar.getnames() == ["bootstrap", "lib", "lib/data"]
        assert tar.getmember("bootstrap").mode & 0o100
    assert deploy.query == {"wait": "true", "code": "c0de"}
    assert json.loads(deploy.body) == {"name": "hello", "code": "src", "pool": {"min": 1}}
    out, err = capsys.readouterr()
    assert out.startswith("hello  ready in ")
    assert "hello: starting 1 instance" in err


def test_a_spec_file_by_name_or_by_f_is_the_same(daemon: FakeDaemon, run: Run, project: Path) -> None:
    assert run(project / "function.yaml", "--no-wait") == 0
    assert run("-f", project / "function.yaml", "--json") == 0
    assert [seen.query["wait"] for seen in daemon.seen if seen.path != "/v1/code"] == ["false", "true"]


def test_an_image_needs_no_upload(
    daemon: FakeDaemon, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.json").write_text('{"name": "hello", "image": "demo:1"}')
    assert run(tmp_path / "s.json") == 0
    assert capsys.readouterr().out.startswith("hello  deployed in ")  # no instance is kept, so none is ready
    assert [seen.path for seen in daemon.seen] == ["/v1/functions/hello"]


def test_json_is_the_results(run: Run, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["deployed"][0]["revision"] == "hello@0123456789ab"
    assert err == ""


def test_every_problem_of_a_spec_is_shown_with_its_line(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "function.yaml").write_text("name: hello\ncode: src\ntimeuot_s: 3\npool:\n  min: -1\n")
    assert run(project) == 1
    err = capsys.readouterr().err
    assert "2 problems" in err
    assert "function.yaml:3: timeuot_s" in err
    assert "function.yaml:5: pool.min" in err
    assert daemon.seen == []


def test_a_check_asks_no_daemon(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--check", project) == 0
    assert capsys.readouterr().out == "hello: the spec is valid\n"
    assert daemon.seen == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "function.yaml").unlink(), "there is no function.yaml"),
        (lambda d: (d / "function.yaml").write_bytes(b"\xff"), "not a text in UTF-8"),
        (lambda d: (d / "function.yaml").write_text(SPEC + "---\n" + SPEC), "there twice"),
        (lambda d: (d / "function.yaml").write_text("name: hello\ncode: nowhere\n"), "does not exist"),
        (lambda d: (d / "function.yaml").write_text("name: hello\ncode: function.yaml\n"), "is a file"),
        (lambda d: (d / "src" / "bootstrap").unlink(), "no `bootstrap`"),
        (lambda d: (d / "src" / "bootstrap").chmod(0o644), "chmod +x"),
        (lambda d: os.mkfifo(d / "src" / "pipe"), "cannot be uploaded"),
    ],
)
def test_what_is_wrong_on_disk_is_said(
    daemon: FakeDaemon,
    run: Run,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    spoil(project)
    assert run(project) == 1
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert daemon.seen == []


def test_a_path_that_is_not_there_is_1(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere") == 1
    assert "does not exist" in capsys.readouterr().err


def test_one_name_in_two_files_is_refused(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, "-f", project / "function.yaml") == 1
    assert "hello is described 2 times" in capsys.readouterr().err
    assert daemon.seen == []


def test_a_failed_deploy_shows_reason_hint_and_output(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {
        "code": "start_failed",
        "message": "nothing listens on port 9000",
        "hint": "listen on $PORT",
        "details": [{"message": "what it printed last:", "log_tail": "Traceback\nboom"}],
    }
    daemon.on("PUT", "/v1/functions/hello", ndjson(views.Progress("starting"), {"error": error}))
    assert run(project) == 1
    err = capsys.readouterr().err
    for words in (
        "error: nothing listens on port 9000",
        "what it printed last:",
        "    | boom",
        "hint: listen on $PORT",
    ):
        assert words in err


def test_the_others_are_deployed_when_one_fails(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "function.yaml").write_text("name: bad\nimage: x\n---\n" + SPEC)
    daemon.on("PUT", "/v1/functions/bad", failing(422, "artifact_error", "no image x"))
    assert run(project) == 1
    out, err = capsys.readouterr()
    assert "no image x" in err
    assert out.startswith("hello  ready")


def test_a_course_that_breaks_off_is_a_failure(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("PUT", "/v1/functions/hello", ndjson(views.Progress("starting")))
    assert run(project) == 1
    assert "without a result" in capsys.readouterr().err


def test_a_refused_upload_says_why(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("PUT", "/v1/code", failing(422, "artifact_error", "the disk is full"))
    assert run(project) == 1
    assert "the disk is full" in capsys.readouterr().err


def test_an_unchanged_function_says_so(
    daemon: FakeDaemon, run: Run, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = views.Deployed(name="hello", revision="hello@1", digest="d", outcome="unchanged")
    daemon.on("PUT", "/v1/functions/hello", Canned(200, [b'{"result": %b}\n' % _json(same)]))
    assert run(project) == 0
    assert capsys.readouterr().out == "hello  unchanged (hello@1)\n"


def _json(value: object) -> bytes:
    import msgspec

    return msgspec.json.encode(value)


# --- the tar ----------------------------------------------------------------------------------------------


def _tar(directory: Path) -> bytes:
    out = io.BytesIO()
    write_tar(directory, out)
    return out.getvalue()


def test_the_same_files_give_the_same_bytes(project: Path, tmp_path: Path) -> None:
    code = project / "src"
    first = _tar(code)
    os.utime(code / "bootstrap", (1, 1))
    (code / "bootstrap").chmod(0o700)
    (code / "__pycache__").mkdir()
    (code / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert _tar(code) == first
    (code / "bootstrap").chmod(0o644)
    assert _tar(code) != first


def test_links_stay_links_and_hard_links_become_files(project: Path) -> None:
    code = project / "src"
    (code / "link").symlink_to("lib/data")
    os.link(code / "lib" / "data", code / "hard")
    with tarfile.open(fileobj=io.BytesIO(_tar(code))) as tar:
        assert tar.getmember("link").linkname == "lib/data"
        assert tar.getmember("hard").isreg()
        assert tar.getmember("lib/data").isreg()
        content = tar.extractfile("lib/data")
        assert content is not None
        assert content.read() == b"\0\1"


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CodeDirectoryError, match="does not exist"):
        _tar(tmp_path / "nowhere")
