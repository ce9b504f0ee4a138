"""What a filesystem raises is a sentence of the right kind; the rest passes."""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import zipfile
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
import torch

from pipeline import storage
from pipeline.files.failures import sentence, watched
from pipeline.host.errors import Missing, Outage, Refused, Unfinished

URI = "s3://bucket/file"


def answered(status: int, code: str = "Other") -> OSError:
    """An answer of S3 as s3fs hands it on where it does not know the code: always as an error of input and output."""
    error = OSError(errno.EIO, "said the server")
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = botocore.exceptions.ClientError(response, "PutObject")
    return error


class HubError(Exception):
    """As huggingface_hub's and requests': the response hangs on it."""

    def __init__(self, status: int) -> None:
        super().__init__("said the Hub")
        self.response = type("Response", (), {"status_code": status})


@pytest.mark.faults("storage: each way in which a backend says that it is down")
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.EBUSY, "slow down"), Outage, "overloaded"),
        (OSError(errno.EIO, "Input/output error"), Outage, "run the same command again later"),
        (OSError(errno.ESTALE, "Stale file handle"), Outage, "again later"),
        (OSError(errno.ENOSPC, "No space left"), Unfinished, "free some space"),
        (OSError(errno.EDQUOT, "Quota exceeded"), Unfinished, "free some space"),
        (TimeoutError("no answer"), Outage, "again later"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), Outage, "again later"),
        (socket.gaierror(-2, "Name or service not known"), Outage, "check the address, or run"),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), Outage, "check the address, or run"),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), Outage, "again later"),
        (botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"), Outage, "again later"),
        (answered(500), Outage, "again later"),
        (answered(429), Outage, "overloaded"),
        (answered(400), Refused, "check the address and the credentials"),
        (HubError(502), Outage, "again later"),
        (HubError(401), Refused, "permission denied"),
        (HubError(404), Missing, "no such file"),
        (botocore.exceptions.NoCredentialsError(), Refused, "check the address and the credentials"),
        (botocore.exceptions.SSLError(endpoint_url="x", error="certificate verify failed"), Refused, "credentials"),
        (PermissionError(errno.EACCES, "Access Denied"), Refused, "permission denied"),
        (FileNotFoundError("The specified bucket does not exist"), Missing, "no such file"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), Refused, "File name too long"),
        (ValueError("Bucket name cannot be empty"), Refused, "Bucket name cannot be empty"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_passes_and_what_does_not(error: Exception, kind: type[Exception], words: str) -> None:
    found = sentence(error, URI, "read", remote=True)
    assert type(found) is kind
    assert str(found).startswith(f"{URI} could not be read")
    assert words in str(found)
    assert "\n" not in str(found)


# ---- a caller's own errors


@pytest.mark.parametrize("error", [KeyError("epoch"), OSError(errno.ENOSPC, "of another disk"), ZeroDivisionError()])
@pytest.mark.parametrize("uri", ["disk", "memory://bodies/file"])
def test_errors_of_a_body_pass_untouched(tmp_path: Path, uri: str, error: Exception) -> None:
    place = str(tmp_path / "file") if uri == "disk" else uri
    storage.write_bytes(place, b"old")
    for used in (storage.reading, storage.replacing):
        with pytest.raises(type(error)) as caught, used(place):
            raise error
        assert caught.value is error
    assert storage.read_bytes(place) == b"old"


class Failing(io.RawIOBase):
    """A file on a disk that fails after some bytes."""

    def __init__(self, number: int) -> None:
        self.number, self.left = number, 100

    def write(self, data: Any) -> int:
        if self.left < len(data):
            raise OSError(self.number, os.strerror(self.number))
        self.left -= len(data)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def seek(self, offset: int, whence: int = 0) -> int:
        return 1000 if whence == io.SEEK_END else offset

    def tell(self) -> int:
        return 0


@pytest.mark.faults("disk: full in the middle of a checkpoint")
def test_a_disk_that_fills_up_is_said_whatever_a_library_makes_of_it() -> None:
    """torch answers a write that fails with an error of its own about an unexpected position."""
    full = pytest.raises(
        Unfinished, match=r"the checkpoint could not be written \(No space left on device\); free some"
    )
    with full, watched(Failing(errno.ENOSPC), "the checkpoint", remote=False, writing=True) as file:  # type: ignore[arg-type]
        torch.save({"weight": torch.zeros(10**6)}, file)


@pytest.mark.faults("disk: a server of files that goes away")
@pytest.mark.parametrize(
    "use", [zipfile.ZipFile, torch.load, pickle.load, lambda file: file.read()], ids=["zip", "torch", "pickle", "read"]
)
def test_a_disk_that_fails_while_it_is_read_is_said_too(use: Any) -> None:
    stale = pytest.raises(Outage, match=r"the checkpoint could not be read \(Stale file handle\); the disk or its")
    with stale, watched(Failing(errno.ESTALE), "the checkpoint", remote=False) as file:  # type: ignore[arg-type]
        use(file)


# ---- odd files


def odd(folder: Path) -> dict[str, tuple[Path, str]]:
    """What may stand where a file should."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    (folder / "file").write_bytes(b"x")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(folder / "socket"))
    return {
        "folder": (folder / "folder", "it is a folder, not a file"),
        "pipe": (folder / "pipe", "it is a pipe, not a file"),
        "socket": (folder / "socket", "it is a socket, not a file"),
        "device": (Path("/dev/null"), "it is a device, not a file"),
        "loop": (folder / "loop", "Too many levels of symbolic links"),
        "dangling": (folder / "gone", "there is no such file"),
        "below a file": (folder / "file" / "x", "Not a directory"),
        "long": (folder / ("x" * 300), "File name too long"),
        "null byte": (folder / "a\0b", "embedded null byte"),
    }


@pytest.mark.faults("files: pipes, folders, loops and devices in a file's place")
@pytest.mark.parametrize(
    "case", ["folder", "pipe", "socket", "device", "loop", "dangling", "below a file", "long", "null byte"]
)
def test_what_is_no_file_is_one_sentence(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place, words = odd(tmp_path)[case]
    for use in (storage.read_bytes, storage.local, storage.sha256, storage.read_json, reading):
        with pytest.raises(Refused, match=words) as caught:
            use(str(place))
        assert "\n" not in str(caught.value)


def reading(uri: str) -> bytes:
    with storage.reading(uri) as file:
        return file.read()


@pytest.mark.parametrize("name", ["a b", "ä%20", "[1]*?", "a::b", "local:x", "#;&'\"", "-", "~x", "memory:x", "\udcff"])
def test_any_name_of_a_disk_will_do(tmp_path: Path, name: str) -> None:
    folder = f"{tmp_path}/{name}"
    storage.write_bytes(f"{folder}/{name}", b"content")
    assert storage.listing(str(tmp_path)) == [name]
    assert list(storage.below(folder)) == [name]
    assert storage.exists(f"{folder}/{name}")
    assert storage.is_folder(folder)
    assert storage.read_bytes(f"{folder}/{name}") == storage.local(f"{folder}/{name}").read_bytes() == b"content"
    with storage.reading(f"{folder}/{name}") as file:
        assert file.read() == b"content"
    storage.remove(f"{folder}/{name}")
    assert not storage.exists(f"{folder}/{name}")
