"""A local disk, and fsspec's in-memory filesystem in the place of a bucket."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from pipeline import storage
from pipeline.files import hub, places
from pipeline.files.local import TEMPORARY
from pipeline.host.errors import Missing, Outage, Unfinished


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "disk" else f"memory://bucket-{uuid.uuid4().hex}/set"


def test_write_read_list_remove(folder: str) -> None:
    assert storage.listing(folder) == []
    storage.write_bytes(storage.join(folder, "b.bin"), b"two")
    storage.write_json(storage.join(folder, "a.json"), {"x": [1]})
    storage.write_bytes(storage.join(folder, "inside", "c.bin"), b"three")
    assert storage.listing(folder) == ["a.json", "b.bin", "inside"]
    assert storage.read_bytes(f"{folder}/b.bin") == b"two"
    assert storage.read_json(f"{folder}/a.json") == {"x": [1]}
    assert storage.sha256(f"{folder}/b.bin") == hashlib.sha256(b"two").hexdigest()
    assert storage.exists(f"{folder}/b.bin")
    storage.remove(f"{folder}/b.bin")
    storage.remove(f"{folder}/b.bin")
    assert not storage.exists(f"{folder}/b.bin")
    storage.check_writable(folder)
    storage.check_writable(storage.join(folder, "new", "folder"))
    assert storage.listing(folder) == ["a.json", "inside"], "the probe is gone, and the folders made for it"


def test_a_missing_file_is_one_sentence(folder: str) -> None:
    for use in (storage.read_bytes, storage.local, storage.sha256, storage.read_json):
        with pytest.raises(FileNotFoundError, match=f"{folder}/no.json could not be read") as caught:
            use(f"{folder}/no.json")
        assert "\n" not in str(caught.value)


def test_a_broken_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "file")
    storage.write_bytes(place, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unfinished, match=r"No space left on device\); free some space"):
        storage.write_bytes(place, b"new")
    assert storage.read_bytes(place) == b"old"
    assert storage.listing(str(tmp_path)) == ["file"], "no temporary file stays"


def test_large_files_pass_through_no_memory(folder: str) -> None:
    place = storage.join(folder, "large.bin")
    with storage.replacing(place) as file:
        file.write(b"first ")
        assert not storage.exists(place), "it appears when it is whole"
        file.write(b"second")
    with storage.reading(place) as file:
        assert file.read(5) == b"first"
        file.seek(6)
        assert file.read() == b"second"
    with pytest.raises(RuntimeError, match="halfway"), storage.replacing(place) as file:
        file.write(b"other")
        raise RuntimeError("halfway")
    assert storage.read_bytes(place) == b"first second"
    assert storage.listing(folder) == ["large.bin"]


def test_only_what_nobody_writes_any_more_is_swept(tmp_path: Path) -> None:
    """A second driver on a folder must not take the files that the first is at."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    here, folder = socket.gethostname(), str(tmp_path)
    young, old = f"{TEMPORARY}a@elsewhere@7@x", f"{TEMPORARY}b@elsewhere@7@x"
    dead, foreign = f"{TEMPORARY}c@{here}@{gone.pid}@x", f"{TEMPORARY}d"
    for name in (young, old, dead, foreign):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / old, (0, 0))
    with storage.replacing(f"{folder}/file") as file:
        file.write(b"whole")
        storage.sweep(folder)
    assert storage.listing(folder) == [young, "file"]


def test_nobody_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the data is on its way to the disk there is only a temporary name in the same folder."""
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.listdir(tmp_path)))
    storage.write_bytes(str(tmp_path / "file"), b"data")
    ((name,),) = seen
    assert name.startswith(TEMPORARY)
    assert os.listdir(tmp_path) == ["file"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root ignores permissions, so it becomes nobody for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_folder_without_permission_is_one_sentence(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    with unprivileged(), pytest.raises(ValueError, match=r"locked/.* could not be written: permission denied"):
        storage.check_writable(str(locked))


def test_a_disk_that_is_too_small_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GB left but about 1000000\.0 GB are needed"):
        storage.check_writable(str(tmp_path), needed=10**15)


def test_json_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        storage.read_json(str(tmp_path / "a.json"))


def test_a_download_is_kept_until_the_remote_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = f"memory://bucket-{uuid.uuid4().hex}/weights.bin"
    storage.write_bytes(uri, b"first")
    first = storage.local(uri)
    assert first.is_relative_to(tmp_path / "distilled-decoding")
    assert (first.name, first.read_bytes()) == ("weights.bin", b"first")
    first.write_bytes(b"kept ")
    assert storage.local(uri).read_bytes() == b"kept ", "it was downloaded again"
    storage.write_bytes(uri, b"second")
    assert storage.local(uri).read_bytes() == b"second"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"weights.bin"}


@pytest.mark.faults("cache: two processes at once")
def test_one_of_several_downloads_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads hold the lock of a file of their own, as processes do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = f"memory://bucket-{uuid.uuid4().hex}/weights.bin"
    storage.write_bytes(uri, b"content")
    asking, original, copies = threading.Barrier(4), storage._downloaded, []

    def together(uri: str) -> Path:
        asking.wait(10)
        return original(uri)

    def counted(uri: str, target: Path) -> None:
        copies.append(target)
        (folder,) = (path for path in target.parent.iterdir() if path.is_dir())
        handle = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # nobody else can come this far
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        target.write_bytes(storage.read_bytes(uri))

    monkeypatch.setattr(storage, "_downloaded", together)
    monkeypatch.setattr(storage, "_copy", counted)
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(storage.local, [uri] * 4))
    assert len(places) == len(copies) == 1
    assert places.pop().read_bytes() == b"content"


@pytest.mark.faults("cache: two processes at once")
def test_a_process_waits_for_the_one_that_downloads(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from pipeline.files.local import alone\nwith alone(Path({str(tmp_path)!r})): "
    env = os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[1])}
    command = [sys.executable, "-c", code + "print('in', flush=True); input()"]
    first = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "in\n"
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.kill()  # the lock goes with it
    first.wait()
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


KILLED = """
import os, sys
from pathlib import Path
from pipeline import storage
storage._copy = lambda uri, target: (Path(target).write_bytes(b"half"), os.kill(os.getpid(), 9))
upload = storage.replacing("memory://b/x")
use = {"download": storage.local, "upload": lambda uri: upload.__enter__()}
storage.filesystem("memory://b/x")[0].pipe_file("/b/x", b"whole")
use[sys.argv[1]]("memory://b/x")
os.kill(os.getpid(), 9)
"""


@pytest.mark.faults("cache: killed download")
@pytest.mark.faults("storage: killed upload")
@pytest.mark.parametrize("what", ["download", "upload"])
def test_what_a_killed_transfer_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    changes = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    env = os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", KILLED, what], env=env, timeout=120).returncode == -9
    assert list(tmp_path.rglob(f"{TEMPORARY}*")), "it left something"
    uri = f"memory://bucket-{uuid.uuid4().hex}/x"
    with storage.replacing(uri) as file:
        file.write(b"whole")
    assert storage.local(uri).read_bytes() == b"whole"
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))


def test_a_borrowed_file_is_given_back(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    storage.write_bytes(f"{folder}/file", b"content")
    with storage.borrowed(f"{folder}/file") as path:
        assert path.read_bytes() == b"content"
    assert storage.read_bytes(f"{folder}/file") == b"content"
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
    with pytest.raises(Missing, match=r"no could not be read: there is no such file"), storage.borrowed(f"{folder}/no"):
        pass


def test_package_files_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.local("package://digits/scorer.safetensors") == places.ASSETS / "digits/scorer.safetensors"
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("runs/a") == str(tmp_path / "runs/a")
    assert storage.resolve("/runs/a") == "/runs/a"
    assert storage.resolve("~/a") == str(Path.home() / "a")
    assert storage.resolve("s3://bucket/a/") == "s3://bucket/a"
    assert storage.is_remote("s3://bucket/a")
    assert not storage.is_remote("package://digits/scorer.safetensors")


def test_a_relative_path_outlives_a_submitted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / places.JOB_FOLDER / "_ray_pkg_0123"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.resolve("runs/a") == str(tmp_path / "home/distilled-decoding/runs/a")
    assert storage.resolve("runs/b") == str(tmp_path / "home/distilled-decoding/runs/b")
    assert [uri for uri in ("a", "file://a", "/a", "~/a", "s3://b/a") if places.is_relative(uri)] == ["a", "file://a"]
    assert capsys.readouterr().out == "", "a question is answered without a word"


def test_a_missing_extra_and_an_unknown_scheme_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uri: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    with pytest.raises(ValueError, match=r"ftq://x/y cannot be opened .* use a path, s3://"):
        storage.exists("ftq://x/y")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"gs://b/x needs a package .* pip install 'distilled-decoding\[gcs\]'"):
        storage.exists("gs://b/x")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub's HTTP interface as reading a file of a model takes."""

    content = b"weights" * 1000
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        file = {"type": "file", "oid": "b" * 40, "size": len(self.content), "path": "folder/file.pth"}
        if "/resolve/" in self.path:
            self.reply(self.content)
        elif "/tree/" in self.path:
            self.reply(json.dumps([file]).encode())
        elif self.path.startswith("/api/models/owner/repo"):
            self.reply(json.dumps({"id": "owner/repo", "sha": "a" * 40, "siblings": []}).encode())
        else:
            self.send_error(404)

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_file_of_the_hub_is_fetched_once(tmp_path: Path) -> None:
    """hf:// through huggingface_hub, in a process of its own: the address of the Hub is read on import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from pipeline import storage; uri = 'hf://owner/repo/folder/file.pth';"
        "print(storage.sha256(uri), storage.local(uri), storage.exists(uri))"
    )
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "XDG_CACHE_HOME": str(tmp_path)}
    env |= {"PYTHONPATH": str(Path(storage.__file__).parents[1]), "HF_HUB_DISABLE_TELEMETRY": "1"}
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert out.returncode == 0, out.stderr
        digest, place, found = out.stdout.split()
        assert (digest, found) == (hashlib.sha256(Hub.content).hexdigest(), "True")
        assert Path(place).read_bytes() == Hub.content
        assert tmp_path in Path(place).parents
    fetched = sum("/resolve/" in path for path in Hub.asked)
    # Without the Hub the download serves: where one is told so, and where nobody answers.
    for change in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        out = subprocess.run(
            [sys.executable, "-c", code], env=env | change, capture_output=True, text=True, timeout=120
        )
        assert out.returncode == 0, out.stderr
        said, line = out.stdout.splitlines()
        assert said.startswith("hf://owner/repo/folder/file.pth cannot be asked for now; what was downloaded before")
        assert line.split() == [digest, place, "True"]
    server.shutdown()
    assert fetched == 1


@pytest.mark.faults("the Hub: not there, and the file in its own cache")
@pytest.mark.parametrize("revision", ["", "@v1.0", "@refs/pr/3", "@refs%2Fpr%2F3"])
def test_a_file_in_the_hubs_own_cache_serves_offline(tmp_path: Path, revision: str) -> None:
    name = "refs/pr/3" if "pr" in revision else revision[1:] or "main"
    folder = tmp_path / "hub/models--owner--repo"
    (folder / "snapshots" / ("a" * 40) / "folder").mkdir(parents=True)
    (folder / "snapshots" / ("a" * 40) / "folder/file.pth").write_bytes(b"kept")
    (folder / "refs" / name).parent.mkdir(parents=True)
    (folder / "refs" / name).write_text("a" * 40)
    code = (
        f"from pipeline import storage; uri = 'hf://owner/repo{revision}/folder/';"
        "print(storage.local(uri + 'file.pth').read_bytes()); storage.local(uri + 'other.pth')"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "ours"), "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(Path(storage.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert out.stdout.splitlines()[-1] == "b'kept'", out.stderr
    assert "Refused" in out.stderr
    assert "other.pth was not downloaded before, and HF_HUB_OFFLINE is set" in out.stderr


def test_an_outage_of_a_bucket_is_not_papered_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is made anew by our own jobs: an old copy could be another student's."""
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = f"memory://bucket-{uuid.uuid4().hex}/student.safetensors"
    storage.write_bytes(uri, b"first")
    storage.local(uri)

    def down(*args: object, **more: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(type(storage.filesystem(uri)[0]), "info", down)
    for use in (storage.local, storage.exists, storage.is_folder):
        with pytest.raises(Outage, match=r"nobody there.*run the same command again later"):
            use(uri)
