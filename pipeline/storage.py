"""One way to name and touch files: a local path, s3://, gs://, hf://, or package://x, which is pipeline/assets/x.

fsspec does the work, ``files.places`` says where. A write is atomic: whoever lists a folder sees a whole file or none.
Trouble is one sentence with the URI: ``Missing`` for a file that is not there,
``Outage`` for what may pass (nobody answers, overloaded, a disk that fails), Unfinished for a full disk, ``Refused``
for the rest. What is busy or breaks off is first tried again by the backends: on S3, AWS_MAX_ATTEMPTS times (5) by
botocore, and five times that by s3fs where the server says SlowDown or a connection breaks. Errors of a caller that has
a file open here are its own and pass untouched.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from pipeline.files import hub
from pipeline.files import local as local_files
from pipeline.files.failures import sentences, watched
from pipeline.files.local import TEMPORARY
from pipeline.files.places import filesystem, is_remote, join, resolve
from pipeline.host.errors import Missing, Outage, Refused

SILENCE = 86_400  # seconds after which a temporary file of another machine counts as left behind
BLOCK = 4 << 20
ABSENT = "absent"  # in the place of a download: what the Hub did not have when it was last asked
TYPES = {"html": "text/html; charset=utf-8", "md": "text/markdown; charset=utf-8", "json": "application/json"}
TYPES |= {"png": "image/png"}
# A file from S3 comes as one stream: s3fs (2026.9) goes on where that broke off, but not with parts side by side, and
# need not ask for the size first. Uploads go in parts, each of which is tried again.
DOWNLOADS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}


def _sentences(uri: str, doing: str) -> AbstractContextManager[None]:
    return sentences(uri, doing, is_remote(uri))


def exists(uri: str) -> bool:
    return _info(uri) is not None


def _info(uri: str) -> dict[str, Any] | None:
    """What a filesystem knows of a file or folder; None without one. Its ``exists`` takes an outage for that, too."""
    try:
        with _sentences(uri, "looked up"):
            fs, path = filesystem(uri)
            if not is_remote(uri):
                os.stat(path)  # through a link
            return dict(fs.info(path))
    except Missing:
        _note_absent(uri)
        return None
    except Outage as outage:
        if uri.startswith("hf://") and local_files.leads_to(_latest(uri), ABSENT):
            return None
        return {"type": "file", "name": str(_kept(uri, outage))}


def listing(uri: str) -> list[str]:
    """Names directly inside a folder, sorted; none for a folder that does not exist."""
    return sorted(sizes(uri))


def sizes(uri: str) -> dict[str, int]:
    """Name -> bytes of what is directly inside a folder, from one listing; empty for a folder that does not exist."""
    return {name: entry["size"] or 0 for name, entry in _entries(uri).items()}


def _entries(uri: str) -> dict[str, dict[str, Any]]:
    """What the backend says of everything directly inside a folder, by name."""
    with _sentences(uri, "listed"):
        fs, path = filesystem(uri)
        try:
            found = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    inside = path.rstrip("/")
    names = {entry["name"].rstrip("/"): entry for entry in found}
    return {name.removeprefix(f"{inside}/"): entry for name, entry in names.items() if name != inside}


def modified(uri: str) -> dict[str, float]:
    """Name -> when it was last written, in seconds since 1970, of what is directly inside a folder, from one listing.

    Empty for a folder that does not exist; a file of which the backend does not say when is left out.
    """
    found = {name: _written(entry) for name, entry in _entries(uri).items()}
    return {name: when for name, when in found.items() if when}


def _written(entry: dict[str, Any]) -> float | None:
    """When a file of a listing was written: local disks say it in seconds, S3 as a datetime, GCS as text."""
    stamp = next((entry[key] for key in ("mtime", "LastModified", "updated") if entry.get(key)), None)
    if isinstance(stamp, str):
        stamp = datetime.fromisoformat(stamp)
    return stamp.timestamp() if isinstance(stamp, datetime) else stamp


def is_folder(uri: str) -> bool:
    found = _info(uri)
    return found is not None and found["type"] == "directory"


def below(uri: str) -> dict[str, str]:
    """Every file in a folder and its folders: {path inside it: a mark that changes with the file}, sorted.

    The mark is size and ETag or time of change, so that a million files need not be read to be told apart.
    """
    with _sentences(uri, "listed"):
        fs, path = filesystem(uri)
        strict = {} if is_remote(uri) else {"on_error": "raise"}  # a folder without permission is not empty
        found = fs.find(path, detail=True, **strict)
    inside = path.rstrip("/") + "/"
    stamps = ("ETag", "etag", "mtime", "LastModified", "updated")
    return {
        name.removeprefix(inside): f"{info['size']} {next((info[key] for key in stamps if info.get(key)), '')}"
        for name, info in sorted(found.items())
    }


def read_bytes(uri: str) -> bytes:
    """The content of a file, all of it in memory."""
    if uri.startswith("hf://"):  # through the cache, which serves where the Hub cannot be asked
        return local(uri).read_bytes()
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        _check_regular(uri)
        return bytes(fs.cat_file(path, **DOWNLOADS.get(uri.partition("://")[0], {})))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, whole or not at all, and durably: the data is on the disk or in the bucket when this returns."""
    if not is_remote(uri):
        with replacing(uri) as file:
            file.write(data)
        return
    with _sentences(uri, "written"):
        fs, path = filesystem(uri)
        # one PUT of a finished buffer, or a multipart upload that is published as one
        fs.pipe_file(path, data, **_content_type(uri))


def write_files(uri: str, files: Mapping[str, bytes]) -> None:
    """Write files of one folder, {name: content}, each as ``write_bytes`` does, on a disk in half the time."""
    if is_remote(uri):
        for name, data in files.items():
            write_bytes(join(uri, name), data)
        return
    with _sentences(uri, "written"):
        local_files.write(Path(resolve(uri)), files)


def _content_type(uri: str) -> dict[str, str]:
    """What a browser must be told of a file in a bucket to show it: a report without it is downloaded instead."""
    kind = TYPES.get(uri.rpartition(".")[2])
    argument = {"s3": "ContentType", "s3a": "ContentType", "gs": "content_type", "gcs": "content_type"}
    protocol = uri.partition("://")[0]
    return {argument[protocol]: kind} if kind and protocol in argument else {}


@contextmanager
def replacing(uri: str) -> Iterator[IO[bytes]]:
    """A file open for writing, which becomes the one at ``uri`` as ``write_bytes`` would make it; for large content.

    Nothing of it is held in memory. If the body raises, what was at ``uri`` stays, and the error is the body's own.
    """
    with _sentences(uri, "written"):
        fs, place = filesystem(uri)
        target = Path(scratch(), Path(place).name) if is_remote(uri) else Path(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(local_files.temporary(target.name))
    try:
        with _sentences(str(temporary), "written"):
            opened = io.FileIO(temporary, "wb")
        with watched(opened, uri if target == Path(place) else str(temporary), remote=False, writing=True) as file:
            yield file
            file.flush()
            with _sentences(str(target), "written"):
                os.fsync(file.fileno())
        with _sentences(uri, "written"):
            if is_remote(uri):
                fs.put_file(str(temporary), place)  # a multipart upload that is published as one
            else:
                os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def reading(uri: str) -> Iterator[IO[bytes]]:
    """A file open for reading, wherever it is; what is read is not kept. Errors of the body are its own."""
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        _check_regular(uri)
        opened = fs.open(path, "rb") if is_remote(uri) else io.FileIO(path)
    with watched(opened, uri, is_remote(uri)) as file:
        yield file


def _check_regular(uri: str) -> None:
    if not is_remote(uri) and (kind := local_files.no_file(resolve(uri))):
        raise Refused(f"{uri} could not be read: it is {kind}, not a file; check the path.")


@contextmanager
def borrowed(uri: str) -> Iterator[Path]:
    """A local file with the URI's content for the body: the file itself, or a copy that is deleted afterwards."""
    if not is_remote(uri):
        yield local(uri)
        return
    temporary = scratch() / local_files.temporary(Path(uri).name)
    try:
        _copy(uri, temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:  # also of another encoding
        raise Refused(f"{uri} is not JSON ({error}); it was not written by this package or was edited.") from None


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode())


def local(uri: str) -> Path:
    """A local file with the URI's content: the file itself, or a download kept in ``files.local.cache()``.

    A remote file that changes gets another place in the cache. Of the processes of a machine that want one at once, one
    fetches it. Where the Hub cannot be asked, the last download serves, one in the Hub's own cache too, and that is
    said. A file in a bucket does not: what lies there is made anew by our own jobs, and an old one would mislead.
    """
    if not is_remote(uri):
        with _sentences(uri, "read"):
            _check_regular(uri)
            io.FileIO(resolve(uri)).close()  # may it be read?
        return Path(resolve(uri))
    try:
        return _downloaded(uri)
    except Outage as outage:
        return _kept(uri, outage)


def _downloaded(uri: str) -> Path:
    """The download of a remote file as it is now; fetched if it is not there."""
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        version = fs.ukey(path)
    folder = local_files.cache() / _digest(f"{resolve(uri)} {version}")
    target = folder / Path(path).name
    with sentences(str(folder), "written", remote=False):
        folder.mkdir(parents=True, exist_ok=True)
        with local_files.alone(folder):
            if not target.exists():
                _fetch(uri, target)
            if uri.startswith("hf://"):
                local_files.point(_latest(uri), folder.name)
    return target


def _fetch(uri: str, target: Path) -> None:
    """Download a file to ``target``, whole or not at all; what killed downloads left in the cache is swept."""
    sweep(str(local_files.cache()))
    temporary = local_files.cache() / local_files.temporary(target.name)
    try:
        _copy(uri, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(uri: str, target: Path) -> None:
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        fs.get_file(path, str(target), **DOWNLOADS.get(uri.partition("://")[0], {}))


def _latest(uri: str) -> Path:
    """The link to the folder of a URI's last download, or to ``ABSENT``."""
    return local_files.cache() / f"latest-{_digest(resolve(uri))}"


def _note_absent(uri: str) -> None:
    """Remember that the Hub has no such file, for when it cannot be asked: some files of a folder may be missing."""
    if uri.startswith("hf://"):
        with suppress(OSError):  # a cache that cannot be written remembers nothing
            local_files.cache().mkdir(parents=True, exist_ok=True)
            local_files.point(_latest(uri), ABSENT)


def _kept(uri: str, outage: Outage) -> Path:
    """The last download of a file of the Hub's that cannot be asked for now; raises where there is none."""
    if not uri.startswith("hf://"):
        raise outage
    own = _latest(uri) / Path(uri).name
    found = own.resolve() if own.exists() else hub.kept(uri)
    if found is None and hub.is_offline():
        raise Refused(f"{uri} was not downloaded before, and HF_HUB_OFFLINE is set; unset it this once.")
    if found is None:
        raise outage
    _say_kept(uri, str(found))
    return found


@lru_cache
def _say_kept(uri: str, place: str) -> None:
    """Once in a process."""
    print(f"{uri} cannot be asked for now; what was downloaded before serves: {place}", flush=True)


def scratch() -> Path:
    """Where files lie until they are uploaded: a folder of this user's in TMPDIR, swept of what killed ones left."""
    with sentences("the folder for temporary files (TMPDIR)", "written", remote=False):
        folder = Path(tempfile.gettempdir(), f"distilled-decoding-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
    sweep(str(folder))
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(uri: str) -> str:
    """SHA-256 of a file's bytes. Who asks will read it too, so a remote one is fetched as ``local`` does, once."""
    path = local(uri)
    found = path.stat()
    return _sha256(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(256)  # the checks of several jobs ask for the same gigabytes
def _sha256(path: Path, *version: int) -> str:
    """SHA-256 of a file on a disk; ``version`` changes with the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(uri: str) -> None:
    """Delete one file; one that is not there is no error."""
    with _sentences(uri, "deleted"):
        fs, path = filesystem(uri)
        with suppress(FileNotFoundError):
            fs.rm_file(path)


def sweep(uri: str) -> None:
    """Delete what killed writers left behind in a folder, and nothing that a living one is at."""
    for name in listing(uri):
        if name.startswith(TEMPORARY) and _abandoned(join(uri, name)):
            remove(join(uri, name))


def _abandoned(uri: str) -> bool:
    """Whether the writer of a temporary file is gone: a process of this machine that is no more, a day of silence."""
    gone = local_files.writer_is_gone(uri)
    if gone is None:
        fs, path = filesystem(uri)
        with suppress(FileNotFoundError):
            return bool(time.time() - fs.modified(path).timestamp() > SILENCE)
    return bool(gone)


def check_writable(uri: str, needed: int = 0) -> None:
    """Write and delete a small file in the folder, and, on a disk, look for ``needed`` bytes of room.

    A folder that was not there before is not there afterwards.
    """
    probe = join(uri, f"{TEMPORARY}probe-{uuid.uuid4().hex}")
    above = [] if is_remote(uri) else [Path(resolve(uri)), *Path(resolve(uri)).parents]
    made = [folder for folder in above if not folder.exists()]
    write_bytes(probe, b"probe")
    free = needed if is_remote(uri) else shutil.disk_usage(resolve(uri)).free  # the probe keeps the folder in its place
    remove(probe)
    for folder in made:
        with suppress(OSError):  # somebody else may use it by now
            folder.rmdir()
    if free < needed:
        raise Refused(f"{uri} has {free / 1e9:.1f} GB left but about {needed / 1e9:.1f} GB are needed; free some.")
