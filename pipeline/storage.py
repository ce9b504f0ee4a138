"""One way to name and touch files: a local path, s3://, gs://, hf://, or package://x, which is pipeline/assets/x.

fsspec does the work. Endpoints and credentials come from the environment as each backend reads it (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...). A write is atomic: whoever lists a folder sees a
whole file or none. A missing file raises FileNotFoundError, other trouble ValueError, in one sentence with the URI.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
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

ASSETS = Path(__file__).parent / "assets"
EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hf"}  # protocol -> the extra of this package that brings it
TEMPORARY = ".tmp-"  # files being written; a killed process leaves one behind
JOB_FOLDER = "runtime_resources/working_dir_files"  # where `ray job submit --working-dir` unpacks the code
SILENCE = 86_400  # seconds after which a temporary file of another machine counts as left behind
BLOCK = 4 << 20


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
    home = Path.home() / "distilled-decoding"
    print(
        f"Relative paths are taken from {home}: the job's working directory is deleted when it ends.",
        flush=True,
    )
    return home


def is_remote(uri: str) -> bool:
    return "://" in resolve(uri)


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(the fsspec filesystem, the path inside it) of a URI."""
    protocol = resolve(uri).partition("://")[0]
    try:
        return fsspec.core.url_to_fs(resolve(uri))
    except ImportError as error:
        extra = f"[{EXTRAS[protocol]}]" if protocol in EXTRAS else ""
        raise ValueError(
            f"{uri} needs a package that is not installed ({error}); pip install 'distilled-decoding{extra}'."
        ) from None
    except ValueError as error:
        raise ValueError(f"{uri} cannot be opened ({error}); use a path, s3://, gs://, hf:// or package://.") from None


def exists(uri: str) -> bool:
    with _sentences(uri, "looked up"):
        fs, path = filesystem(uri)
        fs.invalidate_cache()  # others write too
        return bool(fs.exists(path))


def listing(uri: str) -> list[str]:
    """Names directly inside a folder, sorted; none for a folder that does not exist."""
    with _sentences(uri, "listed"):
        fs, path = filesystem(uri)
        fs.invalidate_cache()
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
    inside = path.rstrip("/") + "/"
    return sorted(name.rstrip("/").removeprefix(inside) for name in found if name.rstrip("/") != path.rstrip("/"))


def read_bytes(uri: str) -> bytes:
    with _sentences(uri, "read"):
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, whole or not at all, and durably: the data is on the disk or in the bucket when this returns."""
    if not is_remote(uri):
        with replacing(uri) as file:
            file.write(data)
        return
    with _sentences(uri, "written"):
        fs, path = filesystem(uri)
        fs.pipe_file(path, data)  # one PUT of a finished buffer, or a multipart upload that is published as one


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
        raise ValueError(f"{uri} is not JSON ({error}); it was not written by this package or was edited.") from None


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
            fs.get_file(path, str(temporary))
            os.replace(temporary, target)
        return target


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
    """Write and delete a small file in the folder, and, on a disk, look for ``needed`` bytes of room."""
    probe = join(uri, f"{TEMPORARY}probe-{uuid.uuid4().hex}")
    write_bytes(probe, b"probe")
    remove(probe)
    if not is_remote(uri):
        free = shutil.disk_usage(resolve(uri)).free
        if free < needed:
            raise ValueError(
                f"{uri} has {free / 1e9:.1f} GB left but about {needed / 1e9:.1f} GB are needed; free some."
            )


@contextmanager
def _sentences(uri: str, doing: str) -> Iterator[None]:
    """Turn what a filesystem raises into one sentence that names the URI."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{uri} could not be {doing}: there is no such file; check the path.") from None
    except PermissionError as error:
        raise ValueError(f"{uri} could not be {doing}: permission denied ({error.strerror or error}).") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space or choose another folder" if full else "check the path and the credentials"
        raise ValueError(f"{uri} could not be {doing} ({error.strerror or error}); {advice}.") from None
    except Exception as error:
        # Backends have their own families (botocore's NoCredentialsError, EndpointConnectionError, ...).
        if isinstance(error, ValueError) or not is_remote(uri):
            raise
        raise ValueError(f"{uri} could not be {doing} ({error}); check the address and the credentials.") from None
