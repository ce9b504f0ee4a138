"""One way to name and touch files: a local path, s3://, gs://, hf://, or package://x, which is pipeline/assets/x.

fsspec does the work. Endpoints and credentials come from the environment as each backend reads it (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...), never from a URI. A write is atomic: whoever lists a
folder sees a whole file or none. A missing file raises FileNotFoundError, other trouble ValueError, in one sentence
with the URI. What is busy or breaks off is tried again by the backends: on S3, AWS_MAX_ATTEMPTS times (5) by botocore,
and five times that by s3fs where the server says SlowDown or a connection breaks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import fsspec

from pipeline.errors import Missing, Refused

ASSETS = Path(__file__).parent / "assets"
EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hf"}  # protocol -> the extra of this package that brings it
TEMPORARY = ".tmp-"  # files being written; a killed process leaves one behind
ADVICE = {  # by the number of an OSError
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another folder"),
    errno.EBUSY: "the server is overloaded, so run the same command again later",  # after many attempts
}
JOB_FOLDER = "runtime_resources/working_dir_files"  # where `ray job submit --working-dir` unpacks the code
SILENCE = 86_400  # seconds after which a temporary file of another machine counts as left behind
BLOCK = 4 << 20
TYPES = {"html": "text/html; charset=utf-8", "md": "text/markdown; charset=utf-8", "json": "application/json"}
TYPES |= {"png": "image/png"}
# A file from S3 comes as one stream: s3fs (2026.9) goes on where that broke off, but not with parts side by side, and
# need not ask for the size first. Uploads go in parts, each of which is tried again.
DOWNLOADS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}
# The part before the first slash has a colon that begins no port, and an @ follows; a secret may hold slashes, too.
USER_INFO = re.compile(r"://(?!arn:)[^/@:]+:(?!\d+/).*@")


def resolve(uri: str) -> str:
    """A URI that no longer depends on the current folder: a local path made absolute, a remote one as it is."""
    if uri.startswith("package://"):
        return str(ASSETS / uri.removeprefix("package://"))
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")
    path = Path(uri.removeprefix("file://")).expanduser()
    return str(path if path.is_absolute() else _base(os.getcwd()) / path)


@lru_cache
def _base(folder: str) -> Path:
    """What relative paths start from: the current folder, unless it is one that Ray deletes after the job."""
    if JOB_FOLDER not in folder:
        return Path(folder)
    print(
        f"Relative paths are taken from {home()}: the job's working directory is deleted when it ends.",
        flush=True,
    )
    return home()


def home() -> Path:
    """Where files go that need a local folder and were given none that lasts."""
    return Path.home() / "distilled-decoding"


def check_no_credentials(uri: str, name: str) -> None:
    """ValueError, which does not repeat them, if a URI carries user and password; ``name`` says whose URI it is."""
    if USER_INFO.search(uri):
        raise Refused(
            f"{name} carries a user and a password; take them out of the URI and set them in the environment (for S3:"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        )


def is_remote(uri: str) -> bool:
    return "://" in resolve(uri)


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(the fsspec filesystem, the path inside it) of a URI; it knows nothing from before, because others write too."""
    check_no_credentials(uri, f"the URI ...@{uri.rpartition('@')[2]}")
    protocol = resolve(uri).partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(resolve(uri))
    except ImportError as error:
        extra = f"[{EXTRAS[protocol]}]" if protocol in EXTRAS else ""
        raise Refused(
            f"{uri} needs a package that is not installed ({error}); pip install 'distilled-decoding{extra}'."
        ) from None
    except ValueError as error:
        raise Refused(f"{uri} cannot be opened ({error}); use a path, s3://, gs://, hf:// or package://.") from None
    fs.invalidate_cache()
    return fs, path


def exists(uri: str) -> bool:
    with _sentences(uri, "looked up"):
        fs, path = filesystem(uri)
        return bool(fs.exists(path))


def listing(uri: str) -> list[str]:
    """Names directly inside a folder, sorted; none for a folder that does not exist."""
    return sorted(sizes(uri))


def sizes(uri: str) -> dict[str, int]:
    """Name -> bytes of what is directly inside a folder, from one listing; empty for a folder that does not exist."""
    with _sentences(uri, "listed"):
        fs, path = filesystem(uri)
        try:
            found = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    inside = path.rstrip("/")
    names = {entry["name"].rstrip("/"): entry["size"] or 0 for entry in found}
    return {name.removeprefix(f"{inside}/"): size for name, size in names.items() if name != inside}


def is_folder(uri: str) -> bool:
    with _sentences(uri, "looked up"):
        fs, path = filesystem(uri)
        return bool(fs.isdir(path))


def below(uri: str) -> dict[str, str]:
    """Every file in a folder and its folders: {path inside it: a mark that changes with the file}, sorted.

    The mark is size and ETag or time of change, so that a million files need not be read to be told apart.
    """
    with _sentences(uri, "listed"):
        fs, path = filesystem(uri)
        found = fs.find(path, detail=True)
    inside = path.rstrip("/") + "/"
    stamps = ("ETag", "etag", "mtime", "LastModified", "updated")
    return {
        name.removeprefix(inside): f"{info['size']} {next((info[key] for key in stamps if info.get(key)), '')}"
        for name, info in sorted(found.items())
    }


def read_bytes(uri: str) -> bytes:
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path, **_download(uri)))


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


def _content_type(uri: str) -> dict[str, str]:
    """What a browser must be told of a file in a bucket to show it: a report without it is downloaded instead."""
    kind = TYPES.get(uri.rpartition(".")[2])
    argument = {"s3": "ContentType", "s3a": "ContentType", "gs": "content_type", "gcs": "content_type"}
    protocol = uri.partition("://")[0]
    return {argument[protocol]: kind} if kind and protocol in argument else {}


@contextmanager
def replacing(uri: str) -> Iterator[IO[bytes]]:
    """A file open for writing, which becomes the one at ``uri`` as ``write_bytes`` would make it; for large content.

    Nothing of it is held in memory. If the body raises, what was at ``uri`` stays.
    """
    with _sentences(uri, "written"):
        fs, place = filesystem(uri)
        target = Path(tempfile.gettempdir(), Path(place).name) if is_remote(uri) else Path(place)
        target.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}@{os.getpid()}@{uuid.uuid4().hex}"
    temporary = target.with_name(f"{TEMPORARY}{target.name}@{writer}")
    try:
        with _sentences(str(target), "written"), open(temporary, "wb") as file:
            yield file
            file.flush()
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
    """A file open for reading, wherever it is; what is read is not kept."""
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        with fs.open(path, "rb") as file:
            yield file


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except json.JSONDecodeError as error:
        raise Refused(f"{uri} is not JSON ({error}); it was not written by this package or was edited.") from None


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode())


def local(uri: str) -> Path:
    """A local file with the URI's content: the file itself, or a download kept in ~/.cache/distilled-decoding.

    A remote file that changes gets another place in the cache.
    """
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        if not is_remote(uri):
            os.stat(path)
            return Path(path)
        key = hashlib.sha256(f"{resolve(uri)} {fs.ukey(path)}".encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distilled-decoding" / key
        target = cache / Path(path).name
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            temporary = cache / f"{TEMPORARY}{uuid.uuid4().hex}"
            try:
                fs.get_file(path, str(temporary), **_download(uri))
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return target


def _download(uri: str) -> dict[str, Any]:
    return DOWNLOADS.get(uri.partition("://")[0], {})


def sha256(uri: str) -> str:
    """SHA-256 of a file's bytes. Who asks will read it too, so a remote one is fetched as ``local`` does, once."""
    digest = hashlib.sha256()
    with local(uri).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
    writer = uri.rsplit("@", 3)[1:]
    if len(writer) < 3:
        return True  # not even named as one of ours
    host, process, _ = writer
    if host != socket.gethostname():
        fs, path = filesystem(uri)
        with suppress(FileNotFoundError):
            return bool(time.time() - fs.modified(path).timestamp() > SILENCE)
        return False
    try:
        os.kill(int(process), 0)  # asks, and kills nobody
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def check_writable(uri: str, needed: int = 0) -> None:
    """Write and delete a small file in the folder, and, on a disk, look for ``needed`` bytes of room.

    A folder that was not there before is not there afterwards.
    """
    probe = join(uri, f"{TEMPORARY}probe-{uuid.uuid4().hex}")
    above = [] if is_remote(uri) else [Path(resolve(uri)), *Path(resolve(uri)).parents]
    made = [folder for folder in above if not folder.exists()]
    write_bytes(probe, b"probe")
    remove(probe)
    room_in = made[-1].parent if made else None
    for folder in made:
        with suppress(OSError):  # somebody else may use it by now
            folder.rmdir()
    if not is_remote(uri):
        free = shutil.disk_usage(room_in or resolve(uri)).free
        if free < needed:
            raise Refused(f"{uri} has {free / 1e9:.1f} GB left but about {needed / 1e9:.1f} GB are needed; free some.")


@contextmanager
def _sentences(uri: str, doing: str) -> Iterator[None]:
    """Turn what a filesystem raises into one sentence that names the URI."""
    try:
        yield
    except FileNotFoundError:
        what = "bucket" if doing == "written" and is_remote(uri) else "file"
        raise Missing(f"{uri} could not be {doing}: there is no such {what}; check the path.") from None
    except PermissionError as error:
        raise Refused(f"{uri} could not be {doing}: permission denied ({error.strerror or error}).") from None
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "check the path and the credentials")
        raise Refused(f"{uri} could not be {doing} ({error.strerror or error}); {advice}.") from None
    except Exception as error:
        # Backends have their own families (botocore's NoCredentialsError, EndpointConnectionError, ...).
        if isinstance(error, ValueError) or not is_remote(uri):
            raise
        raise Refused(f"{uri} could not be {doing} ({error}); check the address and the credentials.") from None
