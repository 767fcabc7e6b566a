"""The second tier: committed checkpoints arrive there, whole or not at all, and a new machine resumes from them."""

from __future__ import annotations

import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.checkpoint import DamagedCheckpoint, Remote, newest, upload, verify
from stoker.checkpoint.names import MANIFEST
from stoker.checkpoint.stored import read_manifest
from tests.checkpoint.simulated import (
    Grid,
    blank,
    cut,
    holds,
    resume_all,
    save,
    saved,
    small_model,
    start,
)

OLD, NEW = small_model(1), small_model(2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_LOOK_SECONDS", 0.02)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "somebody"),
        ("AWS_SECRET_ACCESS_KEY", "something"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "1"),
    ):
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    name = f"bucket-{abs(hash(request.node.name))}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/runs/one"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


def quick(url: str) -> Remote:
    return Remote(url, tries=2, pause_seconds=0.01, call_seconds=20.0)


def run_with(url: str, directory: Path, *steps: int, attempt: int = 1, **options) -> list[str | None]:
    """Save OLD as step 1 and NEW as any other with two ranks; how the uploads ended."""
    errors = []
    writers = start(directory, 2, attempt=attempt, remote=quick(url), **options)
    for step in steps:
        save(writers, step, cut(OLD if step == 1 else NEW, Grid(rows=2)))
        assert not writers[0].uploading(20)
        errors += [report.error for report in writers[0].uploads()]
    for writer in writers:
        writer.wait()
        writer.close()
    return errors


def test_a_new_machine_resumes_from_an_object_store_only(tmp_path, bucket):
    assert run_with(bucket, tmp_path / "here", 1, 2, keep=1) == [None, None]
    assert quick(bucket).steps() == [2]
    ranks = blank(cut(NEW, Grid(rows=3)))
    assert resume_all(tmp_path / "new machine", ranks, quick(bucket)) == [{"step": 2}] * 3
    assert holds(ranks, NEW)
    assert verify(tmp_path / "new machine" / "step-00000002") == []
    assert not list((tmp_path / "new machine").glob("*.partial"))


def test_the_first_manifest_of_a_step_stays_on_an_object_store(tmp_path, bucket):
    """Two starts of a run, each on another disk, save the same step."""
    assert run_with(bucket, tmp_path / "first", 2) == [None]
    saved(tmp_path / "second", OLD, 2)
    other, remote = tmp_path / "second" / "step-00000002", quick(bucket)
    manifest = remote.manifest(2)
    assert manifest is not None
    assert not remote.commit(other, manifest[0])
    assert remote.manifest(2) == manifest


@pytest.mark.parametrize(("here", "there", "newer"), [((1,), (2,), NEW), ((2,), (1,), NEW), ((1,), (), OLD)])
def test_the_newest_of_both_tiers_is_taken(tmp_path, folder, here, there, newer):
    run_with(folder, tmp_path / "other", *there)
    for step in here:
        saved(tmp_path / "here", OLD if step == 1 else NEW, step)
    ranks = blank(cut(NEW, Grid()))
    resume_all(tmp_path / "here", ranks, quick(folder))
    assert holds(ranks, newer)


def test_a_damaged_checkpoint_here_is_replaced_by_the_sound_one_of_its_step_there(tmp_path, folder):
    run_with(folder, tmp_path / "here", 1, 2)
    path = tmp_path / "here" / "step-00000002" / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    ranks = blank(cut(NEW, Grid(rows=2)))
    assert resume_all(tmp_path / "here", ranks, quick(folder)) == [{"step": 2}] * 2
    assert holds(ranks, NEW) and (tmp_path / "here" / "damaged" / "step-00000002").exists()


@pytest.mark.parametrize("how", ["cut", "changed", "removed"])
def test_a_damaged_checkpoint_there_is_found_and_the_one_before_is_taken(tmp_path, folder, how):
    run_with(folder, tmp_path / "here", 1, 2)
    path = tmp_path / "remote" / "step-00000002" / "attempt-1" / "rank-00001.safetensors"
    content = path.read_bytes()
    path.unlink()
    if how != "removed":
        path.write_bytes(content[:-9] if how == "cut" else b"?" + content[1:])
    ranks = blank(cut(OLD, Grid(rows=2)))
    assert resume_all(tmp_path / "new", ranks, quick(folder)) == [{"step": 1}] * 2
    assert holds(ranks, OLD)


def test_without_its_manifest_nothing_there_is_a_checkpoint(tmp_path, folder):
    run_with(folder, tmp_path / "here", 1, 2)
    (tmp_path / "remote" / "step-00000002" / MANIFEST).unlink()
    ranks = blank(cut(OLD, Grid()))
    assert resume_all(tmp_path / "new", ranks, quick(folder)) == [{"step": 1}]


def test_an_interrupted_upload_continues_where_it_was(tmp_path, folder, monkeypatch):
    """The next attempt, of another number of ranks, uploads what is missing and nothing twice."""
    saved(tmp_path / "here", NEW, 2)
    checkpoint_path, remote = tmp_path / "here" / "step-00000002", quick(folder)
    there = tmp_path / "remote" / "step-00000002" / "attempt-1"
    there.mkdir(parents=True)
    shutil.copy(checkpoint_path / "rank-00000.safetensors", there)
    (there / "rank-00001.safetensors").write_bytes(b"the begi")
    first = (there / "rank-00000.safetensors").stat().st_mtime_ns
    writers = start(tmp_path / "here", 3, attempt=2, remote=remote)
    writers[0].go_on_uploading()
    assert not writers[0].uploading(20)
    assert [(report.step, report.error) for report in writers[0].uploads()] == [(2, None)]
    assert (there / "rank-00000.safetensors").stat().st_mtime_ns == first
    ranks = blank(cut(NEW, Grid()))
    assert resume_all(tmp_path / "new", ranks, quick(folder)) == [{"step": 2}] and holds(ranks, NEW)


def test_the_remote_keeps_what_the_first_tier_keeps(tmp_path, folder):
    assert run_with(folder, tmp_path / "here", 2, 3, 4, 5, keep=2, keep_every=2) == [None] * 4
    assert quick(folder).steps() == [5, 4, 2]
    assert [path.name[-1] for path in newest(tmp_path / "here")] == ["5", "4", "2"]


def test_a_checkpoint_that_waits_for_its_upload_is_not_removed(tmp_path, folder, monkeypatch):
    go = threading.Event()
    put = Remote.put
    monkeypatch.setattr(Remote, "put", lambda *arguments: go.wait(20) and put(*arguments))
    writers = start(tmp_path / "here", 1, keep=1, remote=quick(folder))
    for step in (2, 3, 4, 5):
        save(writers, step, cut(NEW, Grid()))
    # 2 is under way, 3 has been given up because two newer ones wait
    assert sorted(path.name[-1] for path in newest(tmp_path / "here")) == ["2", "4", "5"]
    go.set()
    assert not writers[0].uploading(20)
    assert [report.step for report in writers[0].uploads()] == [2, 4, 5]


def test_the_manifest_waits_for_the_shares_of_all_ranks(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(upload, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(upload.Uploader, "_follow", lambda self: None)  # rank 1 is gone
    (error,) = run_with(folder, tmp_path / "here", 2)
    assert "rank-00000.safetensors was not uploaded" in (error or "") or "rank-0000" in (error or "")
    assert quick(folder).manifest(2) is None


class Answers500(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def broken_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers500)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield "s3://bucket/run"
    server.shutdown()


@pytest.fixture
def silent_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield "s3://bucket/run"


@pytest.mark.parametrize("store", ["broken_store", "silent_store"])
def test_a_remote_that_fails_is_reported_in_one_line_and_the_local_checkpoint_stays(tmp_path, store, request):
    pytest.importorskip("s3fs")
    url = request.getfixturevalue(store)
    remote = Remote(url, tries=2, pause_seconds=0.01, call_seconds=1.0)
    writers = start(tmp_path / "here", 2, remote=remote)
    save(writers, 1, cut(OLD, Grid(rows=2)))
    assert not writers[0].uploading(30)
    (report,) = writers[0].uploads()
    assert url in (report.error or "") and "tried 2 times" in (report.error or "") and "\n" not in (report.error or "")
    assert verify(tmp_path / "here" / "step-00000001") == []
    ranks = blank(cut(OLD, Grid()))
    assert resume_all(tmp_path / "here", ranks, remote) == [{"step": 1}]  # the local checkpoint is enough to resume
    (error,) = resume_all(tmp_path / "empty", ranks, remote)  # but nothing is no beginning
    assert isinstance(error, OSError) and url in str(error)


class Flaky:
    """A store of which every call fails twice before it works."""

    def __init__(self, files: Any) -> None:
        self._files, self.calls = files, Counter[tuple]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls[name, *map(str, arguments)] += 1
            if self.calls[name, *map(str, arguments)] <= 2:
                raise ConnectionResetError("reset by peer")
            return getattr(self._files, name)(*arguments, **options)

        return call


def test_what_fails_for_a_while_is_tried_again_with_growing_pauses(tmp_path, folder, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("stoker.checkpoint.remote.time", SimpleNamespace(sleep=pauses.append))
    saved(tmp_path / "here", NEW, 2)
    manifest = read_manifest(tmp_path / "here" / "step-00000002")
    remote = Remote(folder, tries=3, pause_seconds=0.5)
    files, root = remote._open()
    remote._opened = Flaky(files), root
    remote.put(tmp_path / "here" / "step-00000002", manifest, "state.json")
    assert pauses == [0.5, 1.0] * 2  # for the look at what is there, and for the upload
    assert remote.size(manifest, "state.json") == (tmp_path / "here" / "step-00000002" / "state.json").stat().st_size


def test_a_library_that_is_missing_is_named(tmp_path):
    with pytest.raises(Exception, match="nosuchstore"):
        Remote("nosuchstore://bucket", tries=1).steps()


def test_a_state_there_is_checked(tmp_path, folder):
    run_with(folder, tmp_path / "here", 1)
    remote = quick(folder)
    found = remote.manifest(1)
    assert found is not None and remote.state(found[0]) == {"step": 1}
    (tmp_path / "remote" / "step-00000001" / "attempt-1" / "state.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: changed"):
        remote.state(found[0])
